"""The DiT: flow matching on latents (paper section 3)."""
