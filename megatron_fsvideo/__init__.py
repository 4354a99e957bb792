"""FSVideo on megatron-core: the video autoencoder, the DiT with layer memory, training and generation."""
