"""The commands of the tutorial and of the debugging page run, in order, on films and latents made here."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from megatron_fsvideo.data.dataset_json import AutoencoderRecord, ImageRecord, LatentSpace, TextRecord
from megatron_fsvideo.data.latent_writer import LatentShardWriter, OwnClip
from megatron_fsvideo.data.video import write_video
from tests.functional.runs import losses

ROOT = Path(__file__).parents[2]
# Training of minutes becomes training of seconds; nothing else of a command is changed.
SHORTENED = {
    "pretrain_fsae.py": "pretrain_fsae.py --train-iters 2 --image-warmup-iters 0",
    "pretrain_dit.py": "pretrain_dit.py --train-iters 3",
}
ENVIRONMENT = os.environ | {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
}


def drifting(num_frames: int, seed: int) -> torch.Tensor:
    """uint8 [f, 144, 256, 3]: smooth random colours that move to the left."""
    coarse = torch.rand(1, 3, 6, 16, generator=torch.Generator().manual_seed(seed))
    still = torch.nn.functional.interpolate(coarse, (144, 256 + 2 * num_frames), mode="bicubic").clamp(0, 1)[0]
    frames = torch.stack([still[:, :, 2 * k : 2 * k + 256] for k in range(num_frames)])
    return (frames * 255).to(torch.uint8).movedim(1, -1).contiguous()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder that looks like the repository, with films and a photo of the user's."""
    folder = tmp_path_factory.mktemp("user")
    for name in ("pretrain_dit.py", "pretrain_fsae.py", "tools", "examples"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "films").mkdir()
    for k in range(2):
        film = torch.cat([drifting(30, seed=10 * k + shot) for shot in range(6)])
        write_video(folder / f"films/film{k}.mp4", film, 12)
        (folder / f"films/film{k}.txt").write_text(f"film {k}")
    (folder / "films.csv").write_text("video,text\nfilms/film0.mp4,one\nfilms/film1.mp4,two\n")
    Image.fromarray(drifting(1, 99)[0].numpy()).save(folder / "photo.png")
    return folder


def run_page(place: Path, page: str, leave_out: str = "no such command") -> None:
    """Run every bash block of a page but those that hold `leave_out`."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    blocks = [block for block in re.findall(r"```bash\n(.*?)```", text, re.S) if leave_out not in block]
    assert len(blocks) >= 2
    script = "set -e\n" + "\n".join(blocks)
    for name, replacement in SHORTENED.items():
        script = script.replace(name, replacement)
    done = subprocess.run(
        ["bash", "-c", script], cwd=place, env=ENVIRONMENT, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


def write_quickstart_latents(folder: Path) -> None:
    """Random latents of the quickstart's widths."""
    autoencoder = AutoencoderRecord("random", "random", 8, 4, 32)
    writer = LatentShardWriter(folder, LatentSpace(autoencoder, TextRecord("random", 384, 8), ImageRecord()))
    writer.write(OwnClip(torch.randn(32, 3, 10, 10), 8.0, text=torch.randn(1 + k % 8, 384)) for k in range(16))
    writer.finish(torch.randn(1, 384))


@pytest.mark.slow
def test_the_debugging_page(place):
    write_quickstart_latents(place / "runs/quickstart/latents/train")
    run_page(place, "debugging.md")
    one, two = (losses(place / "runs" / name) for name in ("one", "two"))
    assert len(one) == 10 and one == pytest.approx(two, rel=1e-4)
    assert list((place / "runs/profile/profile").iterdir())


@pytest.mark.slow
def test_the_gpu_session_without_a_gpu(place):
    environment = ENVIRONMENT | {"SIZES": "debug", "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        ["bash", "tools/gpu_session.sh", place / "figures"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert {path.suffix for path in (place / "figures").iterdir()} == {".json", ".log"}


@pytest.mark.slow
def test_the_tutorial_from_footage_to_a_clip(place):
    run_page(place, "own_data.md", leave_out="Wan2.1")
    assert (place / "boat.mp4").stat().st_size > 0
