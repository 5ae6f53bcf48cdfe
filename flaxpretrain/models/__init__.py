"""Architectures, one file per Hugging Face model_type: jax and flax only."""
