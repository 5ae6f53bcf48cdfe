"""All tolerances of the tests, with their reasons. Never relax one in place: explain it here."""

LOGITS_FLOAT32 = 2e-5
"""Largest absolute difference of logits from PyTorch Transformers', float32 on the CPU."""
