"""Process groups, sequence sharding, seeds and gradient marks: the one home of parallelism and of the CPU backend."""
