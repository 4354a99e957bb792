"""Identity of latents. The encoder decides what latents mean; every decoder trained for it reads them.

A dataset's and a checkpoint's record hold the encoder's fingerprint and that of all weights, and in `fingerprint` the
one that its shards carry. Earlier versions wrote only `fingerprint`, of all weights: such a record agrees with whatever
has the same weights throughout.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_FIELDS = ("fingerprint", "encoder_fingerprint", "weights_fingerprint")


@dataclass(frozen=True)
class CodecIdentity:
    """Fingerprints of stored weights, whatever format they are then rounded to.

    Attributes:
        encoder: of the encoder's weights.
        weights: of all weights.
    """

    encoder: str
    weights: str

    def record(self) -> dict[str, str]:
        """The fields of an autoencoder's record."""
        return dict(zip(_FIELDS, (self.encoder, self.encoder, self.weights), strict=True))


def fingerprint(module: nn.Module) -> str:
    """SHA-256 of a module's weights, in hex: names, shapes and values in fp32."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def is_same_encoder(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Whether two autoencoders' records have a fingerprint in common."""
    first, second = ({record.get(field) for field in _FIELDS} - {None} for record in (ours, theirs))
    return bool(first & second)


def spell_autoencoder(record: Mapping[str, Any]) -> str:
    """An autoencoder's path and the start of its fingerprint, for messages."""
    return f"{record['path']} ({record['fingerprint'][:12]})"
