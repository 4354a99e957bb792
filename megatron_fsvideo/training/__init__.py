"""The training loop, what it keeps and writes down, and one step object per job."""
