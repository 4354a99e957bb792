"""Configuration of generation: the parts of the pipeline besides the DiT."""

from dataclasses import dataclass
from typing import Literal

from megatron_fsvideo.config.rules import Checked, PathText


@dataclass(frozen=True)
class PipelineParts(Checked):
    """where the parts of the pipeline are, and in which format they run"""

    use_ema: bool = True
    """Use the moving average of the weights."""
    fsae: PathText | None = None
    """Folder of the autoencoder, if it has moved since training; or one with another decoder for the same encoder."""
    autoencoder_dtype: Literal["bf16", "fp32"] = "bf16"
    """Number format of the autoencoder. bf16 is several times faster, on CPUs too."""
    text_encoder: PathText | None = None
    """Text encoder, as umt5:PATH_OR_HUB_ID. Required unless it comes as a package: no file is loaded from a place that
    only the checkpoint names."""
    image_encoder: PathText | None = None
    """Image encoder, as clip:PATH_OR_HUB_ID. Required unless it comes as a package."""
    allow_download: bool = False
    """Take encoders from the Hugging Face hub if no folder has their name."""
