"""The training loop and what it stands on. `loop.train` is the whole of it."""
