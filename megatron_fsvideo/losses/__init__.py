"""The autoencoder's losses beyond pixels: LPIPS in slices, adversary, semantic alignment, regularisers."""
