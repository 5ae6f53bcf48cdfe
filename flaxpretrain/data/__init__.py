"""From text to fixed-shape batches: numpy only, never jax."""
