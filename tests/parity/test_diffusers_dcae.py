"""DC-AE weights inflated to an FSAE equal diffusers' AutoencoderDC on images and static clips (properties 7, 9, 34)."""

import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderDC
from diffusers.loaders.single_file_utils import convert_autoencoder_dc_checkpoint_to_diffusers
from torch import Tensor

from megatron_fsvideo.config import FSAEConfig
from megatron_fsvideo.conversion.dcae_names import dcae_config, start_from_dcae, to_diffusers_names
from megatron_fsvideo.models.fsae import FSAE, resampling
from tools.convert_fsae import ConvertFlags, ConvertJob, convert

SANA = {
    "latent_channels": 32,
    "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "encoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "decoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
    "decoder_layers_per_block": (3, 3, 3, 3, 3, 3),
    "encoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
    "decoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.41407,
}
TINY_WIDTHS = {
    "latent_channels": 8,
    "attention_head_dim": 8,
    "encoder_block_out_channels": (4, 8, 16, 16, 32, 32),
    "decoder_block_out_channels": (4, 8, 16, 16, 32, 32),
    "encoder_layers_per_block": (1, 2, 1, 1, 2, 1),
    "decoder_layers_per_block": (2, 1, 1, 1, 1, 2),
}


def theirs(**configuration) -> AutoencoderDC:
    """With weights that keep signals near unit size, so that no block is silent."""
    with torch.device("meta"):
        model = AutoencoderDC(**configuration)
    model.to_empty(device="cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2.0, generator=generator)
        elif tensor.is_floating_point():
            scale = (3 / tensor[0].numel()) ** 0.5 if tensor.ndim > 1 else 0.2
            tensor.uniform_(-scale, scale, generator=generator)
            if tensor.ndim == 1 and "norm" in name and name.endswith("weight"):
                tensor += 0.5
    return model


def inflated(model: AutoencoderDC, **changes) -> FSAE:
    state = model.state_dict()
    config = dcae_config(state)
    config = FSAEConfig(**(vars(config) | {"attention_head_dim": model.config.attention_head_dim} | changes))
    with torch.device("meta"):
        fsae = FSAE(config)
    fsae.to_empty(device="cpu").eval().requires_grad_(False)
    for tensor in fsae.state_dict().values():
        tensor.fill_(torch.nan)
    assert start_from_dcae(fsae, state) == ([], []), "every tensor of both has its counterpart"
    return fsae


def error(ours: Tensor, reference: Tensor) -> float:
    return float((ours - reference).abs().max() / reference.abs().max())


def errors(model: AutoencoderDC, fsae: FSAE, side: int, with_clip: bool = True) -> dict[str, float]:
    """Relative errors on an image and on a static clip of 5 frames, encode and decode."""
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latent = model.encode(image).latent
    decoded = model.decode(latent).sample
    found = {
        "image encode": error(fsae.encode(image.unsqueeze(2)), latent.unsqueeze(2)),
        "image decode": error(fsae.decode(latent.unsqueeze(2)), decoded.unsqueeze(2)),
    }
    if not with_clip:
        return found
    clip, latents = image.unsqueeze(2).expand(-1, -1, 5, -1, -1), latent.unsqueeze(2).expand(-1, -1, 2, -1, -1)
    found["clip encode"] = error(fsae.encode(clip), latents)
    found["clip decode"] = error(fsae.decode(latents), decoded.unsqueeze(2).expand(-1, -1, 5, -1, -1))
    return found


def test_property_07_inflated_equals_diffusers_tiny() -> None:
    model = theirs(**SANA | TINY_WIDTHS)
    found = errors(model, inflated(model), 64)
    assert max(found.values()) < 1e-5, found
    # Pixel-shuffling Ups fit where ours are all sub-pixel; every Up is folded where theirs interpolate.
    assert max(errors(model, inflated(model, upsampling="sub-pixel"), 64).values()) < 1e-5
    shuffling = theirs(**SANA | TINY_WIDTHS | {"upsample_block_type": "pixel_shuffle"})
    assert max(errors(shuffling, inflated(shuffling, upsampling="sub-pixel"), 64).values()) < 1e-5


def test_property_07_inflated_equals_diffusers_sana() -> None:
    model = theirs(**SANA)
    found = errors(model, inflated(model), 32)
    print(found)
    assert max(found.values()) < 1e-5, found


@pytest.mark.slow
def test_property_07_inflated_equals_diffusers_sana_256() -> None:
    model = theirs(**SANA)
    found = errors(model, inflated(model), 256, with_clip=False)
    print(found)
    assert max(found.values()) < 1e-5, found


def test_property_09_the_natural_channel_order_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = theirs(**SANA | TINY_WIDTHS)
    fsae = inflated(model)

    def natural_order(x: Tensor, factor: tuple[int, int, int]) -> Tensor:
        pt, ph, pw = factor
        b, c, t, h, w = x.shape
        x = x.reshape(b, c, t // pt, pt, h // ph, ph, w // pw, pw).permute(0, 1, 3, 5, 7, 2, 4, 6)
        return x.reshape(b, c * pt * ph * pw, t // pt, h // ph, w // pw)

    monkeypatch.setattr(resampling, "space_to_channels", natural_order)
    found = errors(model, fsae, 64)
    assert found["image encode"] > 0.01 and found["clip encode"] > 0.01, found


def test_property_34_size_of_sana() -> None:
    with torch.device("meta"):
        model = AutoencoderDC(**SANA)
        fsae = FSAE(dcae_config(model.state_dict()))
    assert sum(p.numel() for p in model.parameters()) == 312_250_275
    assert start_from_dcae(fsae, model.state_dict()) == ([], [])


# diffusers' -> MIT's inside a block: the inverse of what is tested, itself tested by diffusers' converter.
TO_MIT = [
    (r"attn\.to_qkv_multiscale\.0\.proj_in\.", "context_module.main.aggreg.0.0."),
    (r"attn\.to_qkv_multiscale\.0\.proj_out\.", "context_module.main.aggreg.0.1."),
    (r"attn\.to_out\.", "context_module.main.proj.conv."),
    (r"attn\.norm_out\.", "context_module.main.proj.norm."),
    (r"conv_out\.conv_inverted\.", "local_module.main.inverted_conv.conv."),
    (r"conv_out\.conv_depth\.", "local_module.main.depth_conv.conv."),
    (r"conv_out\.conv_point\.", "local_module.main.point_conv.conv."),
    (r"conv_out\.norm\.", "local_module.main.point_conv.norm."),
    (r"conv1\.", "main.conv1.conv."),
    (r"conv2\.", "main.conv2.conv."),
    (r"norm\.", "main.conv2.norm."),
    (r"conv\.", "main.conv.conv."),
]


def in_mit_names(model: AutoencoderDC) -> dict[str, Tensor]:
    state, renamed = model.state_dict(), {}
    top = [
        ("encoder.conv_in.", "encoder.project_in.conv."),
        ("encoder.conv_out.", "encoder.project_out.main.op_list.0.conv."),
        ("decoder.conv_in.", "decoder.project_in.main.conv."),
        ("decoder.norm_out.", "decoder.project_out.op_list.0."),
        ("decoder.conv_out.", "decoder.project_out.op_list.2.conv."),
    ]
    for name, tensor in state.items():
        for before, after in top:
            if name.startswith(before):
                renamed[after + name.removeprefix(before)] = tensor
        if match := re.fullmatch(r"(\w+)\.\w+_blocks\.(\d+)\.(\d+)\.(.+)", name):
            prefix = f"{match[1]}.stages.{match[2]}.op_list.{match[3]}."
            if match[4] == "attn.to_q.weight":
                parts = [state[name.replace("to_q", f"to_{letter}")] for letter in "qkv"]
                renamed[prefix + "context_module.main.qkv.conv.weight"] = torch.cat(parts)[..., None, None]
            elif match[4] not in ("attn.to_k.weight", "attn.to_v.weight"):
                for pattern, after in TO_MIT:
                    if re.match(pattern, match[4]):
                        tensor = tensor[..., None, None] if "to_out" in match[4] else tensor
                        renamed[prefix + re.sub(f"^{pattern}", after, match[4])] = tensor
                        break
    return renamed


F64C128 = {
    "latent_channels": 16,
    "attention_head_dim": 8,
    "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 4,
    "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 4,
    "encoder_block_out_channels": (4, 8, 16, 16, 32, 32, 64),
    "decoder_block_out_channels": (4, 8, 16, 16, 32, 32, 64),
    "encoder_layers_per_block": (0, 2, 3, 2, 2, 2, 2),
    "decoder_layers_per_block": (0, 2, 3, 2, 2, 2, 2),
    "encoder_qkv_multiscales": ((),) * 7,
    "decoder_qkv_multiscales": ((),) * 7,
    "decoder_norm_types": ("batch_norm",) * 3 + ("rms_norm",) * 4,
    "decoder_act_fns": ("relu",) * 3 + ("silu",) * 4,
}


@pytest.mark.parametrize("configuration", [SANA | TINY_WIDTHS, F64C128], ids=["sana", "f64c128"])
def test_mit_names(configuration: dict) -> None:
    model = theirs(**configuration)
    expected, mit = model.state_dict(), in_mit_names(model)
    oracle = convert_autoencoder_dc_checkpoint_to_diffusers(dict(mit))
    assert set(oracle) == {name for name in expected if "num_batches" not in name} | (set(oracle) & set(expected))
    ours = to_diffusers_names(mit)
    assert set(ours) == set(expected)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert to_diffusers_names(expected).keys() == expected.keys()
    with pytest.raises(ValueError, match="op_list.0.main.other.weight is no parameter of a DC-AE"):
        to_diffusers_names({"encoder.stages.1.op_list.0.main.other.weight": torch.zeros(1)})


def test_f64c128_starts_what_fits() -> None:
    model = theirs(**F64C128)
    torch.manual_seed(0)
    config = FSAEConfig(
        widths=(4, 8, 16, 16, 32, 32, 64),
        encoder_depths=(1, 2, 2, 3, 2, 2, 2),
        decoder_depths=(1, 2, 3, 2, 2, 2, 2),
        attention_stages=4,
        latent_channels=16,
        attention_head_dim=8,
        upsampling="sub-pixel",
    )
    fsae = FSAE(config).eval().requires_grad_(False)
    fresh, unused = start_from_dcae(fsae, model.state_dict())
    # Their Downs move pixels to channels, their first stage has no blocks, their attention has one scale.
    assert {re.sub(r"\d+", "N", name) for name in fresh if name.startswith("encoder.") and ".3.2." not in name} == {
        "encoder.stem.weight",
        "encoder.stem.bias",
        "encoder.stages.N.N.convN.weight",
        "encoder.stages.N.N.convN.bias",
        "encoder.stages.N.N.norm.weight",
        "encoder.stages.N.N.norm.bias",
        "encoder.stages.N.N.attention.scale_depthwise.weight",
        "encoder.stages.N.N.attention.scale_pointwise.weight",
        "encoder.downs.N.conv.weight",
        "encoder.downs.N.conv.bias",
    }
    assert not [name for name in fresh if name.startswith("encoder.stages.1.")], "residual stages fit"
    assert [name for name in fresh if name.startswith("encoder.stages.0.")] and "encoder.conv_out.weight" not in fresh
    assert [name for name in unused if "running_mean" in name]
    assert "decoder.conv_in.weight" not in fresh and "decoder.ups.0.conv.weight" not in fresh

    x = torch.randn(1, 32, 4, 6)
    block = model.encoder.down_blocks[4][0]
    assert error(fsae.encoder.stages[4][0](x.unsqueeze(2)), block(x).unsqueeze(2)) < 1e-5
    x = torch.randn(1, 64, 3, 2)
    up = model.decoder.up_blocks[5][0]
    assert error(fsae.decoder.ups[0](x.unsqueeze(2)), up(x).unsqueeze(2)) < 1e-5


def test_files_in_both_layouts_of_f64c128_make_the_same_autoencoder(tmp_path: Path) -> None:
    model = theirs(**F64C128)
    layouts = {"mit": in_mit_names(model), "diffusers": model.state_dict()}
    config = FSAEConfig(
        widths=(4, 8, 16, 16, 32, 32, 64),
        attention_stages=4,
        latent_channels=16,
        attention_head_dim=8,
        upsampling="sub-pixel",
    )
    found = {}
    for name, state in layouts.items():
        (tmp_path / name).mkdir()
        safetensors.torch.save_file(
            {key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / name / "model.safetensors"
        )
        found[name] = convert(ConvertJob(ConvertFlags(str(tmp_path / name), "unused"), config))
    (fsae, *lists), (reference, *expected_lists) = found["mit"], found["diffusers"]
    assert lists == expected_lists and lists[0] and len(lists[0]) < len(fsae.state_dict()) / 2
    video = torch.rand(1, 3, 5, 64, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents, expected = (m.eval().encode(video) for m in (fsae, reference))
        decoded = [m.decode(expected) for m in (fsae, reference)]
    assert error(latents, expected) <= 1e-5 and error(*decoded) <= 1e-5
    with pytest.raises(ValueError, match="not a DC-AE with blocks at full resolution"):
        convert(ConvertJob(ConvertFlags(str(tmp_path / "mit"), "unused", match_dc_ae=True)))


SEVEN_STAGES = {
    "latent_channels": 16,
    "attention_head_dim": 32,
    "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 4,
    "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 4,
    "encoder_block_out_channels": (4, 8, 16, 32, 32, 32, 64),
    "decoder_block_out_channels": (4, 8, 16, 32, 32, 32, 64),
    "encoder_layers_per_block": (1, 2, 1, 1, 1, 2, 1),
    "decoder_layers_per_block": (1, 1, 2, 1, 2, 1, 1),
    "encoder_qkv_multiscales": ((),) * 3 + ((5,),) * 4,
    "decoder_qkv_multiscales": ((),) * 3 + ((5,),) * 4,
}


@pytest.mark.parametrize("layout", ["mit.safetensors", "mit.pt", "mit_state_dict.ckpt", "diffusers.safetensors"])
def test_files_of_seven_stages_in_both_layouts_equal_diffusers(layout: str, tmp_path: Path) -> None:
    """f64c128's widths and names on sana's operators, of which every tensor has its place."""
    model = theirs(**SANA | SEVEN_STAGES)
    state = model.state_dict() if layout.startswith("diffusers") else in_mit_names(model)
    file = tmp_path / layout
    if file.suffix == ".safetensors":
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)
    else:
        torch.save({"state_dict": state} if "state_dict" in layout else state, file)
    fsae, fresh, unused = convert(ConvertJob(ConvertFlags(str(file), "unused", match_dc_ae=True)))
    assert not fresh and not unused and fsae.config.spatial_factor == 64
    with torch.no_grad():
        found = errors(model, fsae.eval(), 128)
    assert max(found.values()) <= 1e-5, found


def test_files_with_more_than_tensors_are_refused(tmp_path: Path) -> None:
    model = theirs(**SANA | TINY_WIDTHS)
    torch.save(model, tmp_path / "model.pt")
    torch.save({"state_dict": model.state_dict() | {"epoch": 3}}, tmp_path / "number.pt")
    (tmp_path / "text.ckpt").write_text("no tensors here")
    (tmp_path / "empty.pt").write_bytes(b"")
    cut = tmp_path / "model.pt"
    (tmp_path / "cut.pt").write_bytes(cut.read_bytes()[:2000])
    for name, message in {
        "model.pt": "holds more than tensors",
        "text.ckpt": "damaged or holds more than tensors",
        "empty.pt": "damaged or holds more than tensors",
        "cut.pt": "damaged or holds more than tensors",
        "number.pt": "is no dictionary of tensors: save the state_dict alone",
    }.items():
        with pytest.raises(ValueError, match=f"--load .*{name} .*{message}"):
            convert(ConvertJob(ConvertFlags(str(tmp_path / name), "unused", match_dc_ae=True)))


def test_what_the_published_f64c128_starts() -> None:
    published = {
        "latent_channels": 128,
        "attention_head_dim": 32,
        "encoder_block_out_channels": (128, 256, 512, 512, 1024, 1024, 2048),
        "decoder_block_out_channels": (128, 256, 512, 512, 1024, 1024, 2048),
        "encoder_layers_per_block": (0, 4, 8, 2, 2, 2, 2),
        "decoder_layers_per_block": (0, 5, 10, 2, 2, 2, 2),
    }
    with torch.device("meta"):
        model = AutoencoderDC(**F64C128 | published)
        fsae = FSAE(FSAEConfig(upsampling="sub-pixel"))
    state = fsae.state_dict()
    fresh, _ = start_from_dcae(fsae, to_diffusers_names(in_mit_names(model)))
    share = {
        side: sum(state[name].numel() for name in state if name.startswith(side) and name not in fresh)
        / sum(state[name].numel() for name in state if name.startswith(side))
        for side in ("encoder", "decoder")
    }
    # Downs, batch norms, the third block of stages that have two, and the second scale of attention start fresh.
    assert share == pytest.approx({"encoder": 0.541, "decoder": 0.856}, abs=1e-3)
    assert not [name for name in fresh if "stages.4.0.mlp" in name or name.startswith("encoder.conv_out")]


def test_the_papers_start_adds_a_seventh_stage() -> None:
    with torch.device("meta"):
        state = AutoencoderDC(**SANA).state_dict()
        fsae = FSAE(FSAEConfig())
    fresh, unused = start_from_dcae(fsae, state)
    seventh = ("encoder.stages.6.", "encoder.downs.5.", "encoder.conv_out.")
    seventh += ("decoder.stages.0.", "decoder.ups.0.", "decoder.conv_in.")
    assert fresh == [name for name in fsae.state_dict() if name.startswith(seventh)]
    assert unused == [f"{s}.{kind}" for s in ("decoder.conv_in", "encoder.conv_out") for kind in ("bias", "weight")]
