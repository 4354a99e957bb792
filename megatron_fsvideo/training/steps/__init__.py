"""One step object per job: what an iteration of it does."""
