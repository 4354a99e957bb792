"""Optimizers, their state in checkpoints, the learning-rate schedule and the moving average, for any network."""
