"""Video autoencoders behind one small interface: ours, and three VAEs of diffusers from local folders.

Every encoder's output is its mean: nothing is drawn but what a decoder draws, and that is seeded.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from megatron_fsvideo.config import require
from megatron_fsvideo.data.listing import files_in
from megatron_fsvideo.data.text_files import read_object
from megatron_fsvideo.models.codecs import FSAECodec
from megatron_fsvideo.models.frozen.pretrained import check_loading_info
from megatron_fsvideo.models.fsae import FSAE

FOREIGN_CLASSES = {
    "wan": "AutoencoderKLWan",
    "ltx": "AutoencoderKLLTXVideo",
    "hunyuan": "AutoencoderKLHunyuanVideo",
}
"""What `--compare` calls them -> their classes in diffusers."""
FSAE_NAMES = {"causal": "FSAE (causal)", "standard": "FSAE-Standard", "lite": "FSAE-Lite"}


@dataclass(frozen=True)
class Facts:
    """The properties of an autoencoder that a table lists.

    Attributes:
        source: the folder it came from.
        spatial_factor, temporal_factor: pixels and frames per latent position.
        latent_channels: numbers per latent position.
        fingerprint: of the weights of one of ours.
    """

    source: str
    spatial_factor: int
    temporal_factor: int
    latent_channels: int
    fingerprint: str | None = None

    @property
    def downsample(self) -> str:
        """The compression in the form of the paper's Table 2, such as 64x64x4."""
        return f"{self.spatial_factor}x{self.spatial_factor}x{self.temporal_factor}"

    @property
    def compression(self) -> float:
        """Numbers of a video per number of its latents, for long videos."""
        return 3 * self.spatial_factor**2 * self.temporal_factor / self.latent_channels

    def check_clip(self, num_frames: int, side: int) -> None:
        """Refuse clips whose size does not fit the latents.

        Raises:
            ValueError: with the nearest sizes that do.
        """
        factor = self.spatial_factor
        if side % factor:
            sides = [f"{s}" for s in (side // factor * factor, -(-side // factor) * factor) if s]
            raise ValueError(
                f"{self.source} takes sides that are multiples of {factor}, not {side}: give --resolution "
                + " or ".join(sides)
            )
        if num_frames % self.temporal_factor != 1:
            below = max(0, num_frames - 1) // self.temporal_factor * self.temporal_factor + 1
            raise ValueError(
                f"{self.source} takes {self.temporal_factor}k+1 frames, not {num_frames}: give --num-frames {below} "
                f"or {below + self.temporal_factor}"
            )


class Autoencoder(Protocol):
    """An autoencoder that is evaluated. `rows` names its ways to decode; each is one row of the table."""

    facts: Facts
    rows: tuple[str, ...]

    def encode(self, video: Tensor) -> Tensor:
        """[1, 3, f, h, w] in [-1, 1] -> latents [1, c, t, h', w']."""

    def decode(self, latents: Tensor, video: Tensor, row: str) -> Tensor:
        """Latents -> [1, 3, f, h, w]; `video` is the original, of which a decoder may see the first frame."""


class OurAutoencoder:
    """An FSAE, with a Standard or Lite decoder's noise, without it, or both.

    Args:
        source, fingerprint: its folder, and that of its weights.
        noise: which rows a decoder with noise makes.
        first_frame: give a Standard or Lite decoder the first frame's features, as image-to-video generation does.
        noise_seed: which noise.
    """

    def __init__(
        self,
        fsae: FSAE,
        source: str,
        fingerprint: str,
        noise: Literal["both", "on", "off"] = "both",
        first_frame: bool = True,
        noise_seed: int = 0,
    ) -> None:
        self.facts = Facts(source, fsae.spatial_factor, fsae.temporal_factor, fsae.latent_channels, fingerprint)
        self._noise_seed = noise_seed
        name, kind = FSAE_NAMES[fsae.config.decoder], fsae.config.decoder
        self._first_frame = first_frame
        if kind != "causal" and not first_frame:
            name += ", no first frame"
        self._codec = FSAECodec(fsae)
        self._decoders = {name: self._codec} if noise != "off" or not fsae.decoder.noisy_stages else {}
        if noise != "on" and fsae.decoder.noisy_stages:
            self._decoders[f"{name}, no noise"] = FSAECodec(_without_noise(fsae))
        self.rows = tuple(self._decoders)

    def encode(self, video: Tensor) -> Tensor:
        """Encode a clip through the codec, as generation and preprocessing do."""
        return self._codec.encode(video)

    def decode(self, latents: Tensor, video: Tensor, row: str) -> Tensor:
        """Decode through the codec with the video's first frame, or the whole clip without first-frame attention."""
        codec = self._decoders[row]
        if self._first_frame:
            return codec.decode(latents, video[:, :, :1], self._noise_seed)
        return codec.fsae.decode(latents, None, self._noise_seed)


class ForeignAutoencoder:
    """A VAE of diffusers, whole clips at once (no tiles, no slices of frames).

    Args:
        kind: a key of FOREIGN_CLASSES.
        folder: the VAE's folder, or that of a pipeline with it in `vae/`. Never downloads; reads safetensors only.

    Raises:
        ValueError: no such folder, another class, or weights that are not safetensors.
        ImportError: diffusers is missing.
    """

    def __init__(self, kind: str, folder: str, device: torch.device, dtype: torch.dtype) -> None:
        self._vae = _load_foreign(kind, _vae_folder(kind, folder), dtype).to(device).eval().requires_grad_(False)
        temporal = 2 ** sum(self._vae.config.temperal_downsample) if kind == "wan" else None
        if kind == "wan":
            channels = self._vae.config.z_dim
        else:
            channels, temporal = self._vae.config.latent_channels, self._vae.temporal_compression_ratio
        if kind == "hunyuan":
            # On by default: 17 frames would be two blended pieces, one frame more than a piece holds.
            self._vae.use_framewise_encoding = self._vae.use_framewise_decoding = False
        self._takes_timestep = kind == "ltx" and self._vae.config.timestep_conditioning
        self.facts = Facts(f"{kind}:{folder}", self._vae.spatial_compression_ratio, temporal, channels)
        self.rows = (f"{kind} ({Path(folder).resolve().name})",)

    def encode(self, video: Tensor) -> Tensor:
        """The mean of the latents' distribution."""
        return self._vae.encode(video).latent_dist.mode()

    def decode(self, latents: Tensor, video: Tensor, row: str) -> Tensor:
        """Decode with diffusers. LTX-Video's later decoders run at timestep 0 with noise of seed 0."""
        devices = [] if latents.device.type == "cpu" else [latents.device]
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            if self._takes_timestep:
                return self._vae.decode(latents, latents.new_zeros(len(latents))).sample
            return self._vae.decode(latents).sample


def parse_comparison(text: str) -> tuple[str, str]:
    """`wan:/path` -> ("wan", "/path"); the kinds are fsae and those of FOREIGN_CLASSES.

    Raises:
        ValueError: anything else.
    """
    kind, separator, folder = text.partition(":")
    kinds = ("fsae", *FOREIGN_CLASSES)
    if kind not in kinds or not separator or not folder:
        raise ValueError(f"cannot compare with {text!r}: say KIND:FOLDER with a kind of {', '.join(kinds)}")
    return kind, folder


def check_names(autoencoders: list[Autoencoder]) -> list[str]:
    """The rows of all, each name once: a second one of the same name is told apart by its folder."""
    names: list[str] = []
    for autoencoder in autoencoders:
        for row in autoencoder.rows:
            name = row if row not in names else f"{row} [{autoencoder.facts.source}]"
            if name in names:
                raise ValueError(f"{autoencoder.facts.source} is given twice")
            names.append(name)
    return names


def _without_noise(fsae: FSAE) -> FSAE:
    """Return an FSAE that shares these weights and whose decoder adds no noise."""
    with torch.device("meta"):
        quiet = FSAE(replace(fsae.config, noise_weight=0.0))
    quiet.load_state_dict(fsae.state_dict(), assign=True)
    return quiet.eval().requires_grad_(False)


def _vae_folder(kind: str, folder: str) -> Path:
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{kind}:{folder} is not a folder (models are read from local folders, never downloaded)")
    if (root / "model_index.json").is_file():
        root = root / "vae"
    if not (root / "config.json").is_file():
        raise ValueError(f"{kind}:{folder} has no config.json: give the folder of diffusers' VAE, or of its pipeline")
    found = read_object(root / "config.json").get("_class_name")
    if found != FOREIGN_CLASSES[kind]:
        raise ValueError(f"{kind}:{folder} holds a {found}, {kind} means {FOREIGN_CLASSES[kind]}")
    if not files_in(root, ".safetensors"):
        raise ValueError(f"{kind}:{folder} has no .safetensors weights (pickled .bin and .pt files are not read)")
    return root


def _load_foreign(kind: str, folder: Path, dtype: torch.dtype) -> Any:
    model_class = getattr(require("diffusers", "eval"), FOREIGN_CLASSES[kind])
    options = {"use_safetensors": True, "local_files_only": True, "low_cpu_mem_usage": False}
    model, info = model_class.from_pretrained(str(folder), torch_dtype=dtype, output_loading_info=True, **options)
    check_loading_info(f"{kind}:{folder}", info)
    return model
