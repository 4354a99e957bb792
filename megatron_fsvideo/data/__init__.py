"""Videos, buckets, latent shards, the resumable sampler and the batch."""
