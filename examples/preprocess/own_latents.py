"""Write latents and embeddings of your own as a latent dataset for pretrain_dit.py (docs/data_format.md).

    python examples/preprocess/own_latents.py --input mine --output data/latents --autoencoder-name my-vae --fps 24

The input here is a folder of safetensors files, one for each clip, with the tensors `latents` [c, t, h, w], `text`
[l, e] and optionally `image` [n, e], with the caption in CLIP.txt beside CLIP.safetensors; `null.safetensors` has
`text`, the embedding of "". For another form, change `clips` below: it yields one clip at a time.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch

from megatron_fsvideo.config import parse_job, run_script
from megatron_fsvideo.config.rules import Checked, PathText, Positive, PositiveInt
from megatron_fsvideo.data.dataset_json import AutoencoderRecord, ImageRecord, LatentSpace, TextRecord
from megatron_fsvideo.data.latent_writer import LatentShardWriter, OwnClip
from megatron_fsvideo.data.text_files import read_text

NULL_FILE = "null.safetensors"


@dataclass(frozen=True)
class OwnLatentsFlags(Checked):
    """what there is, and what made it"""

    input: PathText
    """Folder of safetensors files."""
    output: PathText
    """Folder of the dataset."""
    autoencoder_name: PathText
    """Name, or folder, of the autoencoder that made the latents. Datasets of two names are never mixed."""
    fps: Positive
    """Frames per second of the clips."""
    spatial_factor: PositiveInt = 8
    """Pixels per latent row and column."""
    temporal_factor: PositiveInt = 4
    """Frames per latent frame after the first."""
    text_encoder_name: PathText = "umt5-xxl"
    """Name of the model that made the text embeddings."""
    text_max_length: PositiveInt = 512
    """Rows that the DiT pads a text to."""
    image_encoder_name: PathText = "clip-vit-h-14"
    """Name of the model that made the image embeddings, if there are any."""


@dataclass(frozen=True)
class OwnLatentsJob:
    """Write latents and embeddings of your own as a latent dataset."""

    own: OwnLatentsFlags


def main() -> None:
    """Read one clip to learn the widths, then write all of them."""
    flags = parse_job(OwnLatentsJob).own
    files = sorted(path for path in Path(flags.input).glob("*.safetensors") if path.name != NULL_FILE)
    if not files:
        raise ValueError(f"{flags.input} holds no safetensors files")
    first = safetensors.torch.load_file(files[0])
    image = first.get("image")
    space = LatentSpace(
        AutoencoderRecord(
            flags.autoencoder_name,
            hashlib.sha256(flags.autoencoder_name.encode()).hexdigest(),
            flags.spatial_factor,
            flags.temporal_factor,
            latent_channels=len(first["latents"]),
        ),
        TextRecord(flags.text_encoder_name, first["text"].shape[1], flags.text_max_length),
        ImageRecord() if image is None else ImageRecord(flags.image_encoder_name, image.shape[1], image.shape[0]),
    )
    writer = LatentShardWriter(flags.output, space)
    written = writer.write(clips(files, flags.fps))
    writer.finish(safetensors.torch.load_file(Path(flags.input) / NULL_FILE)["text"])
    print(f"{flags.output}: {written} clips")


def clips(files: list[Path], fps: float) -> Iterator[OwnClip]:
    """Yield the clips; each is read on demand."""
    for path in files:
        tensors = safetensors.torch.load_file(path)
        caption = path.with_suffix(".txt")
        yield OwnClip(
            tensors["latents"],
            fps,
            read_text(caption).strip() if caption.is_file() else "",
            tensors["text"],
            tensors.get("image"),
            source=path.name,
        )


if __name__ == "__main__":
    run_script(main)
