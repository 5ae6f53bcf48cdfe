"""Sampling and search."""
