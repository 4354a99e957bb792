"""The training loop, networks in training, their checkpoints, and the logs of a run."""
