"""Pretraining objectives, one file each: what joins a batch to a model."""
