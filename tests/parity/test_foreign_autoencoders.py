"""Comparing with diffusers' Wan, LTX and HunyuanVideo VAEs: tiny random ones, from folders, against direct calls."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from megatron_fsvideo.evaluation.autoencoders import ForeignAutoencoder, parse_comparison
from tests.unit.test_evaluate_fsae import checkpoint, films, run  # noqa: F401  fixtures

diffusers = pytest.importorskip("diffusers")

CPU, FP32 = torch.device("cpu"), torch.float32
LTX = {
    "latent_channels": 8,
    "block_out_channels": (8, 8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8, 8),
    "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1, 1),
    "patch_size": 2,
}
TINY = {
    "wan": ("AutoencoderKLWan", {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}),
    "ltx": ("AutoencoderKLLTXVideo", LTX),
    "hunyuan": (
        "AutoencoderKLHunyuanVideo",
        {"latent_channels": 4, "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4},
    ),
}
# Spatial factor, temporal factor, compression: LTX has half of the published patch.
FACTS = {"wan": (8, 4, 192), "ltx": (16, 8, 768), "hunyuan": (8, 4, 192)}


def tiny(kind: str, **changes: object) -> nn.Module:
    name, values = TINY[kind]
    torch.manual_seed(0)
    return getattr(diffusers, name)(**(values | changes)).eval().requires_grad_(False)


def random_clip(num_frames: int = 17, side: int = 32) -> Tensor:
    return torch.rand(1, 3, num_frames, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("kind", TINY)
def test_equals_direct_calls(kind, tmp_path):
    model = tiny(kind)
    model.save_pretrained(tmp_path / "vae")
    loaded = ForeignAutoencoder(kind, str(tmp_path / "vae"), CPU, FP32)
    facts = loaded.facts
    assert (facts.spatial_factor, facts.temporal_factor, facts.compression) == FACTS[kind]
    assert loaded.rows == (f"{kind} (vae)",)
    video = random_clip()
    expected = model.encode(video).latent_dist.mode()
    latents = loaded.encode(video)
    assert torch.equal(latents, expected)
    assert latents.shape[1:3] == (facts.latent_channels, 16 // facts.temporal_factor + 1)
    assert latents.shape[3] * facts.spatial_factor == 32
    if kind == "hunyuan":
        model.use_framewise_decoding = False
    decoded = loaded.decode(latents, video, loaded.rows[0])
    assert decoded.shape == video.shape and decoded.std() > 0.01
    assert torch.equal(decoded, model.decode(expected).sample)


def test_hunyuan_decodes_the_clip_as_one(tmp_path):
    model = tiny("hunyuan")
    model.save_pretrained(tmp_path)
    loaded, video = ForeignAutoencoder("hunyuan", str(tmp_path), CPU, FP32), random_clip()
    latents = loaded.encode(video)
    pieces = model.decode(latents).sample
    assert not torch.allclose(loaded.decode(latents, video, ""), pieces, atol=1e-4)


def test_ltx_with_timesteps_and_noise_is_seeded(tmp_path):
    model = tiny("ltx", timestep_conditioning=True, decoder_inject_noise=(True,) * 5)
    for name, parameter in model.named_parameters():
        if name.endswith("per_channel_scale1"):
            parameter.fill_(0.5)
    model.save_pretrained(tmp_path)
    loaded, video = ForeignAutoencoder("ltx", str(tmp_path), CPU, FP32), random_clip()
    latents = loaded.encode(video)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second = (loaded.decode(latents, video, "") for _ in range(2))
    assert torch.equal(first, second) and torch.equal(torch.get_rng_state(), state)
    assert not torch.allclose(first, model.decode(latents, torch.zeros(1)).sample, atol=1e-3)
    torch.manual_seed(0)
    assert torch.allclose(first, model.decode(latents, torch.zeros(1)).sample, atol=1e-5)


def test_finds_the_vae_of_a_pipeline_and_reads_nothing_that_could_be_code(tmp_path):
    model = tiny("wan")
    model.save_pretrained(tmp_path / "pipeline" / "vae")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    loaded = ForeignAutoencoder("wan", str(tmp_path / "pipeline"), CPU, FP32)
    assert loaded.rows == ("wan (pipeline)",)
    with pytest.raises(ValueError, match="holds a AutoencoderKLWan, ltx means AutoencoderKLLTXVideo"):
        ForeignAutoencoder("ltx", str(tmp_path / "pipeline"), CPU, FP32)
    model.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    with pytest.raises(ValueError, match="no .safetensors weights"):
        ForeignAutoencoder("wan", str(tmp_path / "pickled"), CPU, FP32)
    with pytest.raises(ValueError, match="never downloaded"):
        ForeignAutoencoder("wan", "Wan-AI/Wan2.1-T2V-14B-Diffusers", CPU, FP32)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no config.json"):
        ForeignAutoencoder("wan", str(tmp_path / "empty"), CPU, FP32)


def test_sizes_that_a_vae_cannot_take(tmp_path):
    tiny("ltx").save_pretrained(tmp_path)
    facts = ForeignAutoencoder("ltx", str(tmp_path), CPU, FP32).facts
    facts.check_clip(17, 32)
    with pytest.raises(ValueError, match="multiples of 16, not 40: give --resolution 32 or 48"):
        facts.check_clip(17, 40)
    with pytest.raises(ValueError, match="takes 8k.1 frames, not 13: give --num-frames 9 or 17"):
        facts.check_clip(13, 32)


def test_comparisons_are_kind_and_folder():
    assert parse_comparison("wan:/models/a:b") == ("wan", "/models/a:b")
    for text in ("wan", "wan:", "cosmos:/x", "/models/wan"):
        with pytest.raises(ValueError, match="KIND:FOLDER with a kind of fsae, wan, ltx, hunyuan"):
            parse_comparison(text)


def test_all_are_judged_on_the_same_clips(checkpoint, films, tmp_path, monkeypatch, capsys):  # noqa: F811
    for kind in TINY:
        tiny(kind).save_pretrained(tmp_path / kind)
    out = tmp_path / "table.json"
    argv = ["--load", checkpoint, "--video-dir", films, "--out", out, "--sampling", "videos", "--num-clips", "2"]
    argv += ["--num-frames", "9", "--resolution", "32", "--device", "cpu"]
    compared = [
        "--compare",
        *(f"{kind}:{tmp_path / kind}" for kind in TINY),
        f"fsae:{checkpoint / 'iter_0000010/model'}",
    ]
    run(monkeypatch, *argv, *compared[:-1])
    report = json.loads(out.read_text())
    assert [row["name"] for row in report["table"]] == ["FSAE (causal)", "wan (wan)", "ltx (ltx)", "hunyuan (hunyuan)"]
    assert [row["downsample"] for row in report["table"]] == ["4x4x4", "8x8x4", "16x16x8", "8x8x4"]
    printed = capsys.readouterr().out
    for row in report["table"]:
        assert f"{row['name']} " in printed and 0 < row["values"]["psnr"] < 40 and len(row["per_clip"]) == 2
    statistics = json.loads(out.with_suffix(".latents.json").read_text())
    assert [len(entry["latent_mean"]) for entry in statistics] == [4, 4, 8, 4]
    assert [Path(entry["autoencoder"]).name for entry in statistics][1:] == [f"{k}" for k in TINY]
    with pytest.raises(ValueError, match="is given twice"):
        run(monkeypatch, *argv, "--overwrite", *compared, compared[-1])
    with pytest.raises(ValueError, match="multiples of 16, not 40"):
        run(monkeypatch, *argv, "--overwrite", "--resolution", "40", *compared)
