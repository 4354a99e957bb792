"""The step from one training phase to the next: weights that a phase inherits, and weights that start fresh.

| phase | from | fresh in the autoencoder | discriminator |
|---|---|---|---|
| 2, 3, 4 | the phase before | nothing | phase 2 starts it; 3 and 4 go on with it |
| 5 Standard | phase 4 | the attention to the first frame | goes on |
| 6 Lite | phase 5 | the narrower stages at the pixel side and what touches them | goes on |
"""

from pathlib import Path

from megatron_fsvideo.checkpoint.distributed_weights import DistributedWeights
from megatron_fsvideo.checkpoint.release import FSAE_FORMAT, load_release, resolve_release
from megatron_fsvideo.checkpoint.safe_pickle import METADATA_FILE
from megatron_fsvideo.checkpoint.whole_weights import OLD_TRAINING_FILE, OldAutoencoder, StoredWeights
from megatron_fsvideo.config import FSAEConfig, from_dict
from megatron_fsvideo.models.fsae import FSAE
from megatron_fsvideo.models.fsae.phases import inherit
from megatron_fsvideo.tasks.fsae.adversary import Adversary


def inherit_autoencoder(source: Path, fsae: FSAE) -> list[str]:
    """Start an autoencoder from an earlier phase's, in place.

    Args:
        source: a --save folder, whose newest checkpoint is taken (its averaged weights), or a release folder.

    Returns:
        the names of the tensors that keep their initial values: the attention to the first frame after a causal
        decoder, and what touches a stage of the decoder whose width changes.

    Raises:
        ValueError: the folder holds no autoencoder, or one that does not fit.
    """
    folder = resolve_release(source)
    content, weights = load_release(folder)
    if content.get("format") != FSAE_FORMAT:
        raise ValueError(f"--init-from {folder} holds {content.get('format')!r}, not an autoencoder")
    saved, own = from_dict(FSAEConfig, content["model"]), fsae.config
    fresh = inherit(fsae, saved, weights)
    unexpected = [name for name in fresh if not _may_be_fresh(name, saved, own)]
    if unexpected:
        raise ValueError(
            f"--init-from {folder} does not fit in {len(unexpected)} weights of the decoder: "
            f"{', '.join(unexpected[:3])}; give the same decoder_depths, and decoder_widths unless the decoder is lite"
        )
    if left := sorted(set(weights) - set(fsae.state_dict())):
        raise ValueError(f"--init-from {folder} has {len(left)} weights that this model lacks: {', '.join(left[:3])}")
    return fresh


def inherit_discriminator(source: Path, adversary: Adversary) -> bool:
    """Go on with an earlier phase's discriminator; False if there is none beside its weights (phase 1, a release).

    Raises:
        ValueError: the earlier discriminator has another architecture.
    """
    name, checkpoint = adversary.network.name, resolve_release(source).parent
    stored: StoredWeights
    if (checkpoint / OLD_TRAINING_FILE).is_file():
        stored = OldAutoencoder(checkpoint, "adversary")
    elif (checkpoint / METADATA_FILE).is_file():
        stored = DistributedWeights(checkpoint, f"{name}.model.")
    else:
        return False
    if not stored.infos:
        return False
    adversary.load_weights({weight: stored.read(weight) for weight in stored.infos})
    return True


def _may_be_fresh(name: str, saved: FSAEConfig, own: FSAEConfig) -> bool:
    if name.startswith("decoder.first_frame."):
        return saved.decoder == "causal" and own.decoder != "causal"
    return own.decoder == "lite" and saved.decoder_channels != own.decoder_channels
