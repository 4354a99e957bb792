"""What the autoencoder's training adds to pixels: LPIPS in slices, an adversary, semantic alignment, regularisers."""
