"""The latent upsampler with LTX-Video's options equals diffusers' LTXLatentUpsamplerModel."""

import pytest
import torch
from diffusers.pipelines.ltx.modeling_latent_upsampler import LTXLatentUpsamplerModel
from torch import Tensor

from megatron_fsvideo.config import LatentUpsamplerConfig
from megatron_fsvideo.models.latent_upsampler import LatentUpsampler

CHANNELS, MID = 8, 64
# Diffusers' module -> ours, once for weight and once for bias.
NAMES = {"initial_conv": "conv_in", "initial_norm": "norm_in", "upsampler.0": "up", "final_conv": "conv_out"} | {
    f"{theirs}.{k}.{layer}": f"{ours}.{k}.{layer}"
    for theirs, ours in (("res_blocks", "blocks_before"), ("post_upsample_res_blocks", "blocks_after"))
    for k in range(4)
    for layer in ("conv1", "norm1", "conv2", "norm2")
}


def ltx_like(**changes) -> LatentUpsamplerConfig:
    values = {"latent_channels": CHANNELS, "mid_channels": MID, "blocks": (4, 4), "norm": "group"}
    return LatentUpsamplerConfig(**(values | {"time_padding": "zero"} | changes))


def theirs() -> LTXLatentUpsamplerModel:
    """With weights that keep signals near unit size, so that no block is silent."""
    torch.manual_seed(0)
    model = LTXLatentUpsamplerModel(CHANNELS, MID, num_blocks_per_stage=4).eval().requires_grad_(False)
    for name, tensor in model.named_parameters():
        if tensor.ndim > 1:
            tensor.normal_(std=tensor[0].numel() ** -0.5)
        else:
            tensor.uniform_(0.5, 1.5) if "norm" in name and name.endswith("weight") else tensor.uniform_(-0.3, 0.3)
    return model


def ours(config: LatentUpsamplerConfig, state: dict[str, Tensor]) -> LatentUpsampler:
    model = LatentUpsampler(config).eval().requires_grad_(False)
    renamed = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        renamed[f"{NAMES[module]}.{kind}"] = tensor
    model.load_state_dict(renamed)
    return model


@pytest.mark.parametrize("shape", [(2, CHANNELS, 3, 4, 5), (1, CHANNELS, 1, 3, 2)])
def test_property_33_outputs_equal_diffusers(shape: tuple[int, ...]) -> None:
    reference = theirs()
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(latents)
        upsampled = ours(ltx_like(), reference.state_dict())(latents)
        replicated = ours(ltx_like(time_padding="replicate"), reference.state_dict())(latents)
    assert expected.std() > 0.1
    difference = (upsampled - expected).abs().max() / expected.abs().max()
    assert difference < 1e-5, difference
    assert (replicated - expected).abs().max() > 1e-2 * expected.abs().max(), "the padding matters"


def test_property_33_the_full_size_has_the_parameters_of_ltx() -> None:
    with torch.device("meta"):
        reference = LTXLatentUpsamplerModel()
        model = LatentUpsampler(LatentUpsamplerConfig(blocks=(4, 4), norm="group", time_padding="zero"))
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, reference)]
    assert sizes[0] == sizes[1] and round(sizes[0] / 1e6, 1) == 126.3
