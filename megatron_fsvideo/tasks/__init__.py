"""The tasks: networks, data and losses of each job. `training` runs them."""
