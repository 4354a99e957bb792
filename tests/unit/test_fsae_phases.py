"""Moves between decoder kinds, and the tool that makes them."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderDC

from megatron_fsvideo.checkpoint.release import load_fsae, save_fsae
from megatron_fsvideo.checkpoint.safetensors_shards import SafetensorsFolder
from megatron_fsvideo.models.fsae import FSAE, begin_video, inherit
from megatron_fsvideo.models.fsae.convolutions import VideoConv3d
from megatron_fsvideo.models.fsae.resampling import SubPixelUp
from tests.unit.fsae_fixtures import build, config, difference, random_latents, random_video

ROOT = Path(__file__).parents[2]


def moved(source: FSAE, kind: str, **changes) -> tuple[FSAE, list[str]]:
    torch.manual_seed(1)
    values = {"noise_weight": 0.0, "decoder_widths": None} | changes
    target = FSAE(config(kind, **values)).double().eval().requires_grad_(False)
    return target, inherit(target, source.config, source.state_dict())


@pytest.mark.parametrize("kind", ["standard", "lite"])
def test_property_10_remap_is_exact_where_features_do_not_move(kind: str) -> None:
    causal = build(config())
    for module in causal.decoder.modules():
        if isinstance(module, SubPixelUp) and module.factor[0] == 2:  # both frames alike, else features move
            module.conv.weight[0::2] = module.conv.weight[1::2]
            module.conv.bias[0::2] = module.conv.bias[1::2]
    latents = random_latents(causal.config, 1).expand(-1, -1, 4, -1, -1)
    target, _ = moved(causal, kind)
    assert difference(target.decode(latents), causal.decode(latents)) < 1e-12
    assert {name for name, tensor in causal.encoder.state_dict().items()} == set(target.encoder.state_dict())
    video = random_video(5)
    assert torch.equal(target.encode(video), causal.encode(video)), "the encoder does not change"


@pytest.mark.parametrize("kind", ["standard", "lite"])
def test_property_10_remap_is_nearer_than_a_copy(kind: str) -> None:
    causal = build(config())
    for module in causal.decoder.modules():
        if isinstance(module, VideoConv3d):  # as trained taps: the present counts most
            module.weight.mul_(torch.tensor([0.1, 0.3, 1.0], dtype=torch.float64).view(1, 1, 3, 1, 1))
    latents = random_latents(causal.config, 5)
    target, _ = moved(causal, kind)
    copied, _ = moved(causal, kind)
    copied.load_state_dict(causal.state_dict(), strict=False)
    wanted = causal.decode(latents)
    remapped_error, copied_error = ((fsae.decode(latents) - wanted).norm() for fsae in (target, copied))
    assert remapped_error < 0.5 * copied_error


def test_property_12_standard_begins_as_the_remapped_causal_decoder() -> None:
    causal = build(config())
    latents, features = random_latents(causal.config, 4), causal.first_frame_features(random_video(1))
    target, fresh = moved(causal, "standard")
    assert fresh == [name for name in target.state_dict() if name.startswith("decoder.first_frame.")]
    for module in causal.decoder.modules():
        if isinstance(module, VideoConv3d):
            oldest, previous, present = (tap.clone() for tap in module.weight.unbind(dim=2))
            module.weight.copy_(torch.stack([torch.zeros_like(oldest), oldest + previous, present], dim=2))
    assert difference(target.decode(latents, features), causal.decode(latents)) < 1e-12


def test_standard_to_lite_keeps_taps_and_lists_what_is_fresh() -> None:
    standard = build(config("standard"))
    lite, fresh = moved(standard, "lite", decoder_widths=(4, 8, 16, 16))
    assert fresh == [
        "decoder.ups.2.conv.weight",
        "decoder.ups.2.conv.bias",
        "decoder.stages.3.0.conv1.weight",
        "decoder.stages.3.0.conv1.bias",
        "decoder.stages.3.0.conv2.weight",
        "decoder.stages.3.0.norm.weight",
        "decoder.stages.3.0.norm.bias",
        "decoder.head_norm.weight",
        "decoder.head_norm.bias",
        "decoder.head.weight",
    ]
    kept = [name for name in lite.state_dict() if name not in fresh]
    assert all(torch.equal(lite.state_dict()[name], standard.state_dict()[name]) for name in kept)
    # At equal widths nothing is fresh, and latent 0 alone, which has no neighbours, decodes alike.
    wide, fresh = moved(standard, "lite")
    latents, features = random_latents(standard.config, 1), standard.first_frame_features(random_video(1))
    silent, _ = moved(standard, "standard")
    assert not fresh and difference(wide.decode(latents, features), silent.decode(latents, features)) < 1e-12


def test_wrong_moves_are_refused() -> None:
    lite = build(config("lite"))
    with pytest.raises(ValueError, match="a lite decoder cannot become causal"):
        inherit(FSAE(config()), lite.config, lite.state_dict())
    with pytest.raises(ValueError, match="encoder weights do not fit .* only the decoder changes"):
        inherit(FSAE(config("lite", widths=(8, 16, 16, 16))), lite.config, lite.state_dict())
    with pytest.raises(ValueError, match="begins with a causal decoder, this one is lite"):
        begin_video(lite)


def run_tool(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "convert_fsae.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_tool_moves_phases(tmp_path: Path) -> None:
    from megatron_fsvideo.config import FSAE_PRESETS, FSAEJob, build_job
    from tools.convert_fsae import ConvertFlags, ConvertJob, convert

    model = {
        name: build_job(FSAEJob, FSAE_PRESETS[f"fsae_{name}_debug"]).model for name in ("causal", "standard", "lite")
    }
    save_fsae(tmp_path / "causal", build(model["causal"]).float())
    result = run_tool(
        "--preset", "fsae_standard_debug", "--load", f"{tmp_path}/causal", "--save", f"{tmp_path}/standard"
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    standard = load_fsae(tmp_path / "standard")
    fresh = [name for name in standard.state_dict() if ".first_frame." in name]
    assert lines[1:] == [f"fresh: {name}" for name in fresh]
    assert f"{len(fresh)} fresh" in lines[0]

    lite, fresh, unused = convert(ConvertJob(ConvertFlags(str(tmp_path / "standard"), "unused"), model["lite"]))
    assert fresh and not unused and lite.config.decoder == "lite"
    with pytest.raises(ValueError, match="neither a file of tensors nor a folder"):
        convert(ConvertJob(ConvertFlags(str(tmp_path / "nowhere"), "unused"), model["lite"]))
    safetensors.torch.save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="neither an FSAE release nor a DC-AE"):
        convert(ConvertJob(ConvertFlags(str(tmp_path / "other.safetensors"), "unused"), model["lite"]))


def test_tool_starts_from_dc_ae(tmp_path: Path) -> None:
    from tools.convert_fsae import ConvertFlags, ConvertJob, convert

    torch.manual_seed(0)
    blocks = ("ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock")
    widths, depths, scales = (8, 8, 32, 32), (1, 1, 1, 1), ((), (), (5,), (5,))
    dcae = AutoencoderDC(
        latent_channels=4,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=depths,
        decoder_layers_per_block=depths,
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
    ).requires_grad_(False)
    dcae.save_pretrained(tmp_path / "dcae")
    assert json.loads((tmp_path / "dcae" / "config.json").read_text())["_class_name"] == "AutoencoderDC"
    flags = ConvertFlags(str(tmp_path / "dcae"), "unused", match_dc_ae=True)
    fsae, fresh, unused = convert(ConvertJob(flags))
    assert not fresh and not unused
    image = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert difference(fsae.encode(image.unsqueeze(2)), dcae.encode(image).latent.unsqueeze(2)) < 1e-5


def test_sizes_that_would_not_count_and_sources_that_hardly_fit_are_refused(tmp_path: Path) -> None:
    from megatron_fsvideo.config import FSAEConfig
    from tools.convert_fsae import ConvertFlags, ConvertJob, convert

    safetensors.torch.save_file({"weight": torch.zeros(2)}, tmp_path / "a.safetensors")
    flags = ConvertFlags(str(tmp_path / "a.safetensors"), "unused", match_dc_ae=True)
    with pytest.raises(ValueError, match="--match-dc-ae takes all sizes from .*; leave out --attention-head-dim"):
        convert(ConvertJob(flags, FSAEConfig(attention_head_dim=16)))
    save_fsae(tmp_path / "standard", build(config("standard")).float())
    target = tmp_path / "videos"
    target.mkdir()
    (target / "film.mp4").write_bytes(b"precious")
    result = run_tool("--load", f"{tmp_path}/standard", "--save", str(target))
    assert result.returncode == 1 and "videos: is there already and is no release folder" in result.stderr
    assert (target / "film.mp4").read_bytes() == b"precious"
    result = run_tool("--load", f"{tmp_path}/standard", "--save", f"{tmp_path}/standard")
    assert result.returncode == 1 and "holds a release; choose another place, or give --overwrite" in result.stderr


def test_a_release_has_the_permissions_that_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        save_fsae(tmp_path / "release", build(config()).float())
    finally:
        os.umask(before)
    for path in [tmp_path / "release", *(tmp_path / "release").iterdir()]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644), path


def test_a_release_that_may_not_be_read_is_told_from_a_missing_one(tmp_path: Path, monkeypatch) -> None:
    save_fsae(tmp_path / "release", build(config()).float())
    honest = Path.open

    def refuse(self, *arguments, **options):
        if self.name == "model.safetensors":
            raise PermissionError(13, "Permission denied", str(self))
        return honest(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ValueError, match="model.safetensors cannot be read: Permission denied"):
        load_fsae(tmp_path / "release")


def test_a_release_beside_hidden_copies_is_read(tmp_path: Path) -> None:
    save_fsae(tmp_path / "release", build(config()).float())
    (tmp_path / "release" / "._model.safetensors").write_bytes(b"Mac OS X")
    assert len(SafetensorsFolder(tmp_path / "release").infos) == len(load_fsae(tmp_path / "release").state_dict())
