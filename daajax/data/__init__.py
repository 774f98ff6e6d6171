"""From files to the rows of an update, with NumPy alone: nothing here imports jax."""
