"""With layer memory off and equal weights, the DiT equals diffusers' WanTransformer3DModel: outputs and gradients."""

import pytest
import torch
from diffusers import WanTransformer3DModel

from megatron_fsvideo.config import DiTConfig, DiTParallelConfig
from megatron_fsvideo.conversion.wan_names import from_diffusers, to_diffusers_name
from megatron_fsvideo.models.dit import build_dit, unpatchify
from megatron_fsvideo.models.dit.weights import named_global_parameters, slice_of_whole
from megatron_fsvideo.parallel import groups
from megatron_fsvideo.parallel.sequence import all_gather_slices
from tests.parallel.harness import run_workers


def configuration(patch_size: tuple[int, int, int]) -> DiTConfig:
    return DiTConfig(
        num_layers=3,
        hidden_size=48,
        num_attention_heads=4,
        ffn_hidden_size=80,
        latent_channels=8,
        patch_size=patch_size,
        text_embed_dim=20,
        image_embed_dim=24,
        freq_dim=32,
        layer_memory=False,
    )


def theirs(config: DiTConfig) -> WanTransformer3DModel:
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=config.patch_size,
        num_attention_heads=config.num_attention_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_channels,
        out_channels=config.latent_channels,
        text_dim=config.text_embed_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_hidden_size,
        num_layers=config.num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=config.layernorm_epsilon,
        image_dim=config.image_embed_dim,
        added_kv_proj_dim=config.hidden_size,
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            centre = 1.0 if parameter.dim() == 1 and parameter.mean() == 1 else 0.0
            parameter.copy_(centre + 0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def inputs(config: DiTConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        "hidden_states": torch.randn(2, config.in_channels, 3, 4, 6, generator=generator),
        "timestep": torch.tensor([3.0, 801.0]),
        # diffusers finds the image tokens by assuming 512 text tokens after them.
        "text": torch.randn(2, 512, config.text_embed_dim, generator=generator),
        "image": torch.randn(2, 5, config.image_embed_dim, generator=generator),
        "output_gradient": torch.randn(2, config.latent_channels, 3, 4, 6, generator=generator),
    }


def run_ours(config: DiTConfig, state: dict[str, torch.Tensor], tp_size: int) -> tuple[torch.Tensor, dict]:
    parallel = DiTParallelConfig(tensor_model_parallel_size=tp_size, sequence_parallel=tp_size > 1)
    pgs = groups.initialize(parallel)
    model = build_dit(config, parallel, pgs, params_dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in named_global_parameters(model):
            parameter.copy_(
                slice_of_whole(from_diffusers(name, state, config.patch_volume), parameter, pgs.tp_rank, pgs.tp_size)
            )
    data = inputs(config)
    tokens = model(data["hidden_states"], data["timestep"], data["text"], data["image"])
    grid = (3, 4 // config.patch_size[1], 6 // config.patch_size[2])
    output = unpatchify(tokens, grid, config.patch_size)
    output.backward(data["output_gradient"])
    gradients = {}
    for name, parameter in named_global_parameters(model):
        gradient = parameter.grad
        if getattr(parameter, "tensor_model_parallel", False):
            gradient = all_gather_slices(gradient, parameter.partition_dim, pgs.tp)
        elif getattr(parameter, "sequence_parallel", False):
            gradient = groups.all_reduce_sum(gradient, pgs.tp)
        gradients[name] = gradient.clone()
    groups.shutdown()
    return output.detach(), gradients


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("patch_size", [(1, 1, 1), (1, 2, 2)])
def test_outputs_and_gradients_equal_diffusers(patch_size, tp_size):
    config = configuration(patch_size)
    model, data = theirs(config), inputs(config)
    output, gradients = run_workers(run_ours, tp_size, config, model.state_dict(), tp_size)[0]

    expected = model(
        hidden_states=data["hidden_states"],
        timestep=data["timestep"],
        encoder_hidden_states=data["text"],
        encoder_hidden_states_image=data["image"],
        return_dict=False,
    )[0]
    expected.backward(data["output_gradient"])
    assert (output - expected).abs().max() < 1e-5 * expected.abs().max()

    parameters = dict(model.named_parameters())
    unmatched = set(parameters)
    for name, gradient in gradients.items():
        reference = from_diffusers(name, {k: p.grad for k, p in parameters.items()}, config.patch_volume)
        error = (gradient.flatten() - reference.flatten()).norm() / reference.norm()
        assert error < 1e-5, f"{name}: {error:.2e}"
        unmatched.discard(to_diffusers_name(name))
    # diffusers makes this gain and never uses it.
    assert all(name.endswith("norm_added_q.weight") for name in unmatched), unmatched
