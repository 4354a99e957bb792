"""Models: the DiT, the video autoencoder, frozen encoders."""
