"""Hugging Face folders in and out, TensorFlow checkpoints in."""
