"""Pretrain transformer language models in JAX and hand them to the Hugging Face hub."""

__version__ = "0.1.0"
