"""One step object per job, for `training.loop.train`."""
