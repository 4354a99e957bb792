"""Every local script of examples/ runs, at debug size, on a machine without GPU tools and without variables set."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_fsvideo.checkpoint.release import save_fsae
from megatron_fsvideo.config import DIT_PRESETS, FSAE_PRESETS, DiTJob, FSAEJob, build_job
from megatron_fsvideo.data.video import write_video
from megatron_fsvideo.models.frozen.perceptual import VGG_WIDTHS, VGG16Trunk
from megatron_fsvideo.models.fsae import FSAE
from tests.parity.test_foreign_autoencoders import TINY, tiny
from tests.unit.judge_fixtures import random_i3d
from tests.wan_fixtures import wan_config, wan_shapes

ROOT = Path(__file__).parents[2]
LINKED = ("pretrain_fsae.py", "pretrain_dit.py", "tools", "examples", "megatron_fsvideo")
# A phase's mechanisms stay on; shapes, networks and batches are those of seconds.
FSAE_DEBUG = (
    "--widths 4 8 8 --encoder-depths 0 1 1 --decoder-depths 0 1 1 --attention-stages 1 --latent-channels 8 "
    "--attention-head-dim 4 --first-frame-head-dim 4 --train-iters 2 --buckets 9x32x32 1x32x32 --num-frames 9 "
    "--resolution 32 --short-side 32 --holdout-every 3 --global-batch-size 2 --image-batch-size 2 "
    "--micro-batch-size 1 --perceptual-trunk none --perceptual-weight 0 --context-parallel-size 1 --encoder-tile 0 "
    "--patch-rows 0 --patch-columns 0 --image-warmup-iters 0 --discriminator-warmup-iters 0 --discriminator-width 4 "
    "--discriminator-scales 1 --discriminator-layers 1 --lr-warmup-iters 0 --no-bf16"
).split()

pytestmark = pytest.mark.slow


def film(path: Path, num_frames: int, side: int = 96) -> Path:
    """Two shots of moving stripes, with noise that makes each clip another one."""
    generator = torch.Generator().manual_seed(len(path.name) + num_frames + ord(path.stem[-1]))
    ramp = torch.arange(side)
    frames = []
    for k in range(num_frames):
        stripes = (ramp[None, :] * (1 + k // (num_frames // 2)) + 3 * k) % 200
        frames.append(stripes + torch.randint(0, 40, (side, side), generator=generator))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, torch.stack(frames).to(torch.uint8)[..., None].expand(-1, -1, -1, 3).contiguous(), fps=8)
    return path


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory like a clone's, with videos and the quickstart's results in small."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    for k in range(3):
        film(folder / "videos" / f"film{k}.mp4", 96).with_suffix(".txt").write_text("stripes that move")
    quickstart = folder / "runs" / "quickstart"
    torch.manual_seed(0)
    save_fsae(quickstart / "fsae", FSAE(build_job(FSAEJob, FSAE_PRESETS["fsae_quickstart"]).model))
    film(quickstart / "pans" / "pans.mp4", 9 * 48)
    lines = [
        {
            "path": "pans.mp4",
            "start": 9 * k,
            "num_frames": 9,
            "caption": f"pan {('left', 'right', 'up', 'down')[k % 4]}",
            "split": "train" if k < 32 else "heldout",
        }
        for k in range(48)
    ]
    (quickstart / "pans" / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def run(checkout: Path, script: str, *words: str | Path, **variables: str) -> str:
    """Run a script as a user of this clone does; returns what it printed."""
    environment = {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "HOME": str(checkout),
        "PYTHONPATH": str(ROOT),
    }
    arguments = ["bash", f"examples/{script}", *map(str, words)]
    done = subprocess.run(
        arguments, cwd=checkout, env=environment | variables, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f"{script}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


def test_no_gpu_tool_is_on_the_path() -> None:
    assert not any((Path(folder) / "nvidia-smi").exists() for folder in ("/usr/bin", "/bin")), (
        "the other tests prove less"
    )


def test_the_autoencoder_goes_through_its_phases_and_is_judged(checkout: Path, dino_folder: Path) -> None:
    for phase in range(1, 7):
        flags = list(FSAE_DEBUG)
        if phase == 4:
            flags += ["--vf-encoder-path", str(dino_folder), "--vf-grid", "4"]
        if phase == 6:
            flags += ["--decoder-widths", "4", "8", "8"]
        run(checkout, "fsae/train_local.sh", str(phase), *flags)
        assert (checkout / f"runs/fsae_phase{phase}/latest_checkpointed_iteration.txt").read_text().strip() == "2"
    for kind, name in (("wan", "wan2.1"), ("ltx", "ltx-video"), ("hunyuan", "hunyuanvideo")):
        assert kind in TINY
        tiny(kind).save_pretrained(checkout / name)
    torch.save(random_i3d().state_dict(), checkout / "rgb_imagenet.pt")
    linear = {f"lin{k}.model.1.weight": torch.rand(1, width, 1, 1) for k, width in enumerate(VGG_WIDTHS)}
    save_file(VGG16Trunk().state_dict() | linear, checkout / "vgg16_lpips.safetensors")
    sizes = ["--num-clips", "2", "--num-frames", "9", "--resolution", "32", "--short-side", "32"]
    run(checkout, "fsae/evaluate_local.sh", *sizes, VIDEO_DIR="videos", NUM_POINTS="80")
    assert json.loads((checkout / "runs/fsae_evaluation/table2.json").read_text())["table"]


def test_videos_are_encoded_and_a_dit_trains_on_them(checkout: Path) -> None:
    torch.manual_seed(0)
    save_fsae(checkout / "runs" / "fsae", FSAE(build_job(FSAEJob, FSAE_PRESETS["fsae_debug"]).model))
    small = ["--text-encoder", "minilm", "--text-max-length", "8", "--image-encoder", "none"]
    small += ["--buckets", "9x32x32", "--fps", "8"]
    run(checkout, "preprocess/preprocess_local.sh", *small)
    run(checkout, "preprocess/preprocess_local.sh", *small, OUTPUT="data/latents-valid")
    debug = ["--preset", "dit_debug", "--text-embed-dim", "384", "--image-embed-dim", "0", "--train-iters", "2"]
    debug += [
        "--latent-channels",
        str(build_job(FSAEJob, FSAE_PRESETS["fsae_debug"]).model.latent_channels),
        "--global-batch-size",
        "2",
        "--eval-iters",
        "1",
    ]
    run(checkout, "dit/train_local.sh", *debug)
    assert (checkout / "runs/dit/iter_0000002").is_dir()


def test_stages_of_the_dit_follow_each_other_into_a_video(checkout: Path) -> None:
    for number, stage in enumerate(("stage1", "stage2", "stage3"), start=1):
        run(checkout, f"dit/{stage}_local.sh", "--train-iters", str(2 * number))
    run(checkout, "dit/sft_local.sh", "--train-iters", "2")
    assert (checkout / "runs/stages/sft/iter_0000002").is_dir()
    image = checkout / "photo.png"
    from PIL import Image

    Image.new("RGB", (90, 80), (20, 200, 90)).save(image)
    run(checkout, "generate/generate_local.sh", "runs/stages/sft", image, "pan left", "runs/generated/out.mp4")
    assert (checkout / "runs/generated/out.mp4").stat().st_size > 1000
    run(checkout, "convert/release_local.sh", "runs/stages/sft", "releases/dit")
    assert list((checkout / "releases/dit").glob("*.safetensors"))


def test_wan_becomes_a_start(checkout: Path) -> None:
    config = build_job(DiTJob, DIT_PRESETS["dit_debug"]).model
    folder = checkout / "Wan2.1-I2V-14B-720P"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(wan_config(config)))
    save_file({name: torch.randn(shape) for name, shape in wan_shapes(config).items()}, folder / "model.safetensors")
    run(checkout, "convert/wan_start_local.sh", "Wan2.1-I2V-14B-720P", "checkpoints/wan", "--to-preset", "dit_debug")
    assert os.listdir(checkout / "checkpoints/wan")
