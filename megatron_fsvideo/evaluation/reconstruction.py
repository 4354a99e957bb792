"""Measures how well autoencoders reconstruct clips, on any number of processes (paper section 2.2.3, Table 2).

Each process reconstructs its share of the clips and measures them one by one; the measures of a clip do not depend on
which process made them, and means are taken over all clips in their order: any number of processes, one result.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_fsvideo.config import VideoDataConfig
from megatron_fsvideo.data.latent_shards import LatentStatistics
from megatron_fsvideo.data.shot_index import ShotIndex
from megatron_fsvideo.data.shots import Shot
from megatron_fsvideo.data.video import VideoError, from_unit
from megatron_fsvideo.evaluation.autoencoders import Autoencoder
from megatron_fsvideo.evaluation.clips import read_clip
from megatron_fsvideo.evaluation.frechet import frechet_distance
from megatron_fsvideo.evaluation.psnr import psnr_per_frame
from megatron_fsvideo.evaluation.ssim import ssim
from megatron_fsvideo.models.frozen.i3d import I3D
from megatron_fsvideo.models.frozen.perceptual import PerceptualLoss
from megatron_fsvideo.parallel.team import Team

_PERCEPTUAL_FRAMES = 4
"""Frames whose VGG features are held at once."""


@dataclass(frozen=True)
class Judges:
    """Networks that measure, beside the formulas; None leaves their column out."""

    perceptual: PerceptualLoss | None = None
    i3d: I3D | None = None

    @property
    def perceptual_key(self) -> str:
        """Name of the perceptual distance in reports: `lpips` only if it is LPIPS."""
        assert self.perceptual is not None
        return "lpips" if self.perceptual.label == "LPIPS-VGG16" else "perceptual"


@dataclass
class Reconstructed:
    """The results of one clip.

    Attributes:
        metrics: row -> name -> value: psnr, ssim, first_frame_psnr, last_frame_psnr and lpips or perceptual.
        features: row -> I3D's logits [400]; the original's under "original".
        statistics: sums of the latents.
        frames: row -> uint8 [f, h, w, 3], and the original's, of clips that are shown.
    """

    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)
    statistics: LatentStatistics = field(default_factory=LatentStatistics)
    frames: dict[str, Tensor] = field(default_factory=dict)


ORIGINAL = "original"


@torch.no_grad()
def reconstruct_clips(
    autoencoder: Autoencoder,
    clips: Sequence[Shot],
    data: VideoDataConfig,
    judges: Judges,
    team: Team,
    place: tuple[torch.device, torch.dtype],
    shown: Sequence[int] = (),
    index: ShotIndex | None = None,
) -> dict[int, Reconstructed | str]:
    """Clip index -> results of its reconstructions, or the reason why it could not be read. Equal on every process.

    Args:
        place: the autoencoder's device, where also the judges are, and number format.
        shown: indices of clips whose frames are kept.
        index: what is known of the clips' files.
    """
    device, dtype = place
    found: dict[int, Reconstructed | str] = {}
    mine = list(team.share(clips))
    quiet = not team.leads or not sys.stderr.isatty()
    for number, clip in tqdm(mine, desc=autoencoder.rows[0], unit="clip", disable=quiet):
        try:
            video = read_clip(clip, data, index).to(device)
        except VideoError as error:
            found[number] = str(error)
            continue
        found[number] = _reconstruct(autoencoder, video, judges, dtype, number in shown)
    return team.gather(found)


def measure(video: Tensor, reconstruction: Tensor, judges: Judges) -> dict[str, float]:
    """Measures of one clip, two [1, 3, f, h, w] in [-1, 1]; PSNR in dB."""
    frames = psnr_per_frame(reconstruction, video)[0]
    values = {
        "psnr": float(frames.mean()),
        "ssim": float(ssim(reconstruction, video)),
        "first_frame_psnr": float(frames[0]),
        "last_frame_psnr": float(frames[-1]),
    }
    if judges.perceptual is not None:
        pieces = zip(*(v.split(_PERCEPTUAL_FRAMES, dim=2) for v in (reconstruction, video)), strict=True)
        distances = torch.cat([judges.perceptual.per_frame(a, b) for a, b in pieces], dim=1)
        values[judges.perceptual_key] = float(distances.mean())
    return values


def summarize(results: Sequence[Reconstructed], row: str) -> dict[str, float]:
    """Means of a row's measures over the clips, and `fvd` if there are features of at least two clips."""
    names = results[0].metrics[row]
    values = {name: sum(r.metrics[row][name] for r in results) / len(results) for name in names}
    if results[0].features and len(results) > 1:
        ours, theirs = (torch.stack([r.features[name] for r in results]) for name in (row, ORIGINAL))
        values["fvd"] = frechet_distance(ours, theirs)
    return values


def latent_statistics(results: Sequence[Reconstructed]) -> LatentStatistics:
    """Sums over all clips."""
    return sum((result.statistics for result in results), LatentStatistics())


def _reconstruct(
    autoencoder: Autoencoder, video: Tensor, judges: Judges, dtype: torch.dtype, show: bool
) -> Reconstructed:
    latents = autoencoder.encode(video.to(dtype))
    kept = Reconstructed(statistics=LatentStatistics.of(latents[0].cpu()))
    decoded = {row: autoencoder.decode(latents, video.to(dtype), row).float().clamp(-1, 1) for row in autoencoder.rows}
    for row, clip in decoded.items():
        kept.metrics[row] = measure(video, clip, judges)
    for row, clip in {ORIGINAL: video, **decoded}.items():
        if judges.i3d is not None:
            kept.features[row] = judges.i3d(clip)[0].cpu()
        if show:
            kept.frames[row] = from_unit(clip[0]).cpu()
    return kept
