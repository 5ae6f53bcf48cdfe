"""All tolerances of the tests, with their reasons. Never relax one in place: explain it here."""

LOGITS_FLOAT32 = 2e-5
"""Largest absolute difference of logits from PyTorch Transformers', float32 on the CPU."""

FLOAT32_REORDERED = 2e-6
"""Parameters near 1 after two steps, when float32 sums were taken in another order."""
