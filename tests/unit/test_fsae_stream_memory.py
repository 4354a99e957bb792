"""Memory of a streamed decode does not grow with the video (paper section 2.2.3): measured at the allocator."""

from collections.abc import Iterator

import pytest
import torch

from megatron_fsvideo.config import FSAE_PRESETS, FSAEJob, build_job
from megatron_fsvideo.models.fsae import FSAE
from megatron_fsvideo.models.fsae.tiling import Tiling, decode_frames
from megatron_fsvideo.training.peak_memory import peak_allocation


def streamed_peak(fsae: FSAE, num_frames: int, side: int) -> int:
    """Bytes that torch's allocator had given out at most while that many frames were decoded, ten latents at a time."""
    latent_side = side // fsae.spatial_factor
    num_latents = (num_frames - 1) // fsae.temporal_factor + 1
    generator = torch.Generator().manual_seed(0)

    def latents() -> Iterator[torch.Tensor]:
        for _ in range(num_latents):
            yield torch.randn(1, fsae.latent_channels, 1, latent_side, latent_side, generator=generator)

    with torch.no_grad():
        features = fsae.first_frame_features(torch.rand(1, 3, 1, side, side) * 2 - 1)
        decoded, peak = peak_allocation(
            lambda: sum(part.shape[2] for part in decode_frames(fsae, latents(), features, tiling=Tiling(frames=10))),
            torch.device("cpu"),
        )
    assert decoded == num_frames
    return peak


@pytest.mark.parametrize(
    "preset, side", [("fsae_lite_debug", 32), pytest.param("fsae_lite_small", 64, marks=pytest.mark.slow)]
)
def test_1201_frames_take_the_memory_of_121(preset: str, side: int) -> None:
    torch.manual_seed(0)
    fsae = FSAE(build_job(FSAEJob, FSAE_PRESETS[preset]).model).eval()
    short, long = (streamed_peak(fsae, num_frames, side) for num_frames in (121, 1201))
    print(f"{preset}, {side} x {side}: {short / 1e6:.2f} MB for 121 frames, {long / 1e6:.2f} MB for 1201")
    frame = 4 * 3 * side * side
    assert short > frame * fsae.temporal_factor, "it decodes something"
    assert long == pytest.approx(short, rel=0.05)
