"""The training loop: optimizer, checkpoints, validation, metrics."""
