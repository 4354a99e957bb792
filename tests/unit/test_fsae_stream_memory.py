"""Memory of a codec does not grow with the video (paper section 2.2.3): measured, and counted at the paper's size."""

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_fsvideo.benchmarking.peak_memory import peak_allocation
from megatron_fsvideo.config import FSAE_PRESETS, FSAEJob, build_job
from megatron_fsvideo.models.codecs import CodecIdentity, FSAECodec
from megatron_fsvideo.models.fsae import FSAE
from megatron_fsvideo.models.fsae.tiling import Tiling
from tools.counted_step import ByteCounter


def streamed_peak(fsae: FSAE, num_frames: int, side: int) -> int:
    """Bytes that torch's allocator had given out at most while that many frames were decoded, ten latents at a time."""
    latent_side = side // fsae.spatial_factor
    num_latents = (num_frames - 1) // fsae.temporal_factor + 1
    generator = torch.Generator().manual_seed(0)

    def latents() -> Iterator[torch.Tensor]:
        for _ in range(num_latents):
            yield torch.randn(1, fsae.latent_channels, 1, latent_side, latent_side, generator=generator)

    with torch.no_grad():
        codec, frame = FSAECodec(fsae, tiling=Tiling(10, 0)), torch.rand(1, 3, 1, side, side) * 2 - 1
        decoded, peak = peak_allocation(
            lambda: sum(part.shape[2] for part in codec.decode_stream(latents(), frame)), torch.device("cpu")
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "preset, limit", [("fsae_phase3", 14.0), ("fsae_lite", 14.0), ("fsae_standard", 24.0)], ids=lambda value: str(value)
)
def test_121_frames_of_704_x_1280_fit_small_devices(preset: str, limit: float) -> None:
    """GiB in bf16, weights included, of encoding (phase 3's preset) or decoding; the video lies elsewhere."""
    with FakeTensorMode(allow_non_fake_inputs=True), ByteCounter() as counter, torch.no_grad():
        torch.set_default_dtype(torch.bfloat16)
        try:
            codec = FSAECodec(FSAE(build_job(FSAEJob, FSAE_PRESETS[preset]).model).eval(), CodecIdentity("", ""))
            if preset == "fsae_phase3":
                frames = (torch.zeros(1, 3, 1, 704, 1280) for _ in range(121))
                made = sum(part.shape[2] for part in codec.encode_stream(frames))
            else:
                latents, frame = torch.zeros(1, 128, 31, 11, 20), torch.zeros(1, 3, 1, 704, 1280)
                made = sum(part.shape[2] for part in codec.decode_stream([latents], frame))
        finally:
            torch.set_default_dtype(torch.float32)
    print(f"{preset}: {counter.peak / 2**30:.2f} GiB")
    assert made == (31 if preset == "fsae_phase3" else 121)
    assert counter.peak / 2**30 < limit
