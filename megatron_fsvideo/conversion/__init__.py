"""DiT weights between formats: diffusers, the original Wan2.1, releases, distributed checkpoints."""
