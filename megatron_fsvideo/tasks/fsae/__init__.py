"""The video autoencoder: six phases of training (paper section 2.2)."""
