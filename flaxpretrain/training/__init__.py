"""State, step, loop, optimizers, sharding, checkpoints: names no objective or architecture."""
