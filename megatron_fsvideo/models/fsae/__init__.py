"""The video autoencoder of paper section 2.2."""

from megatron_fsvideo.models.fsae.model import FSAE, fingerprint
from megatron_fsvideo.models.fsae.streaming import StreamCache

__all__ = ["FSAE", "StreamCache", "fingerprint"]
