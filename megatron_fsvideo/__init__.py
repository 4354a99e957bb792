"""FSVideo on megatron-core: the video autoencoder, the DiT with layer memory, training and generation."""

from megatron_fsvideo.parallel import megatron_import

megatron_import.install()
