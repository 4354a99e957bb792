"""The DiT's parts: tokens, rotary embedding, layer memory, initial weights, size, and refused inputs."""

import dataclasses

import pytest
import torch

from megatron_fsvideo.config import DIT_PRESETS, DiTConfig, DiTJob, DiTParallelConfig, build_job
from megatron_fsvideo.models.dit import build_dit, patchify, unpatchify
from megatron_fsvideo.models.dit.layer_memory import LayerMemory
from megatron_fsvideo.models.dit.rope import apply_rotary, axis_dims, rotary_tables
from megatron_fsvideo.models.dit.weights import initial_value, named_global_parameters
from megatron_fsvideo.parallel import groups
from tests.parallel.harness import run_workers

TINY = build_job(DiTJob, DIT_PRESETS["dit_debug"]).model


def alone(function):
    """Run `function(pgs)` in a process of its own."""

    def work():
        return function(groups.initialize(DiTParallelConfig()))

    return run_workers(work, 1)[0]


def random_model(config, pgs, dtype=torch.float32, router_too=True):
    model = build_dit(config, DiTParallelConfig(), pgs, params_dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if router_too or ".router." not in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def inputs(config, frames=3, height=4, width=4):
    generator = torch.Generator().manual_seed(4)
    return (
        torch.randn(2, config.in_channels, frames, height, width, generator=generator),
        torch.tensor([10.0, 700.0]),
        torch.randn(2, 5, config.text_embed_dim, generator=generator),
        torch.randn(2, 3, config.image_embed_dim, generator=generator),
    )


@pytest.mark.parametrize("patch_size", [(1, 1, 1), (1, 2, 2), (1, 2, 1)])
def test_tokens_run_over_t_h_w_and_come_back(patch_size):
    latents = torch.randn(2, 3, 5, 4, 6)
    tokens = patchify(latents, patch_size)
    grid = tuple(size // patch for size, patch in zip(latents.shape[2:], patch_size, strict=True))
    assert torch.equal(unpatchify(tokens, grid, patch_size), latents)
    delta = torch.zeros(1, 1, 5, 4, 6)
    delta[0, 0, 2, 1, 3] = 1
    where = patchify(delta, patch_size)[0].sum(-1).nonzero().item()
    position = [2 // patch_size[0], 1 // patch_size[1], 3 // patch_size[2]]
    assert where == (position[0] * grid[1] + position[1]) * grid[2] + position[2]


def test_patch_that_does_not_divide_is_named():
    with pytest.raises(ValueError, match="5 latent rows.*2"):
        patchify(torch.zeros(1, 1, 1, 5, 4), (1, 2, 2))


def test_rotary_equals_complex_rotation():
    assert axis_dims(128) == (44, 42, 42)
    grid, head_dim = (3, 2, 5), 16
    heads = torch.randn(30, 2, 4, head_dim, dtype=torch.float64)
    rotary = rotary_tables(grid, head_dim, 10000.0, 1.0, torch.device("cpu"))
    result = apply_rotary(heads, rotary)
    dims = axis_dims(head_dim)
    index = 0
    for t in range(3):
        for h in range(2):
            for w in range(5):
                angles = torch.cat(
                    [
                        position * 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
                        for position, dim in zip((t, h, w), dims, strict=True)
                    ]
                )
                turned = torch.view_as_complex(heads[index].unflatten(-1, (-1, 2))) * torch.polar(
                    torch.ones_like(angles), angles
                )
                torch.testing.assert_close(result[index], torch.view_as_real(turned).flatten(-2), rtol=1e-6, atol=1e-6)
                index += 1


@pytest.mark.parametrize("num_states", [2, 3, 17, 40])
@pytest.mark.parametrize("initial_weight", [0.5, 0.9, 0.99, 1.0])
def test_router_starts_with_its_weight_on_the_latest_state(num_states, initial_weight):
    memory, config = LayerMemory(num_states, 8), dataclasses.replace(TINY, layer_memory_init=initial_weight)
    with torch.no_grad():
        for name, parameter in memory.named_parameters():
            parameter.copy_(initial_value(f"block.layers.1.layer_memory.{name}", parameter.shape, config, 0))
    weights = memory.weights(torch.randn(5, 2, 8))
    assert weights.shape == (5, 2, num_states)
    torch.testing.assert_close(weights[..., -1], torch.full((5, 2), initial_weight))
    torch.testing.assert_close(weights.sum(-1), torch.ones(5, 2))


@pytest.mark.parametrize("norm", ["raw", "normalized"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identity_start_equals_the_model_without_memory_bit_for_bit(norm, dtype):
    """Variant `normalized` norms before the mix, which with weight 1 on the last state is the same number."""

    def check(pgs):
        outputs = []
        for layer_memory in (True, False):
            config = dataclasses.replace(
                TINY, num_layers=4, layer_memory=layer_memory, layer_memory_norm=norm, layer_memory_init=1.0
            )
            model = build_dit(config, DiTParallelConfig(), pgs, params_dtype=dtype)
            with torch.no_grad():
                for name, parameter in named_global_parameters(model):
                    if "router" not in name:
                        generator = torch.Generator().manual_seed(len(name) * 1000 + parameter.numel())
                        parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
            outputs.append(model(*inputs(config)))
        return (outputs[0] == outputs[1]).all().item(), outputs[0].std().item()

    equal, spread = alone(check)
    assert equal and spread > 1e-3


def test_the_14b_preset_has_the_papers_size():
    def check(pgs):
        config = build_job(DiTJob, DIT_PRESETS["dit_14b"]).model
        model = build_dit(config, DiTParallelConfig(), pgs, params_dtype=torch.bfloat16, device=torch.device("meta"))
        routers = {name: tuple(p.shape) for name, p in model.named_parameters() if ".router." in name}
        return sum(p.numel() for p in model.parameters()), routers

    count, routers = alone(check)
    assert count == 16_399_993_728 + 819
    weights = [shape for name, shape in routers.items() if name.endswith("weight")]
    assert weights == [(number, 5120) for number in range(2, 41)]


def test_every_parameter_has_a_gradient_and_padding_text_changes_the_output():
    def check(pgs):
        model = random_model(TINY, pgs)
        data = inputs(TINY)
        output = model(*data)
        output.square().mean().backward()
        missing = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
        padded = torch.cat([data[2], torch.zeros(2, 1, TINY.text_embed_dim)], dim=1)
        return missing, (model(data[0], data[1], padded, data[3]) - output).abs().max().item()

    missing, difference = alone(check)
    assert missing == []
    assert difference > 1e-4  # padded rows are attended to, as in Wan


def test_one_frame_and_no_image_encoder():
    def check(pgs):
        config = dataclasses.replace(TINY, image_embed_dim=0)
        model = random_model(config, pgs)
        model_input, timesteps, text, _ = inputs(config, frames=1)
        return model(model_input, timesteps, text, None)

    assert alone(check).shape == (2, 16, TINY.latent_channels)


def test_missing_conditions_are_named():
    def check(pgs):
        model = random_model(TINY, pgs)
        model_input, timesteps, _, image = inputs(TINY)
        with pytest.raises(ValueError, match="text features"):
            model(model_input, timesteps, None, image)

    alone(check)


@pytest.mark.parametrize(
    ("parallel", "world_size", "words"),
    [
        ({"tensor_model_parallel_size": 3}, 3, "3 does not divide num_attention_heads 4"),
        ({"pipeline_model_parallel_size": 3}, 3, "3 does not divide num_layers 2"),
        ({"context_parallel_size": 2}, 3, "3 processes cannot hold"),
        ({"transformer_impl": "transformer_engine"}, 1, "transformer_engine"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(parallel, world_size, words):
    def work():
        settings = DiTParallelConfig(**parallel)
        with pytest.raises(ValueError, match=words):
            build_dit(TINY, settings, groups.initialize(settings), params_dtype=torch.float32)

    run_workers(work, world_size)


def test_tokens_that_the_ranks_cannot_share_are_refused():
    def work():
        settings = DiTParallelConfig(context_parallel_size=2)
        model = build_dit(TINY, settings, groups.initialize(settings), params_dtype=torch.float32)
        with pytest.raises(ValueError, match="15 tokens cannot be shared evenly by 2 ranks"):
            model(*inputs(TINY, frames=1, height=3, width=5))

    run_workers(work, 2)


def test_initial_weights_do_not_depend_on_the_layout():
    def work(parallel):
        pgs = groups.initialize(parallel)
        model = build_dit(TINY, parallel, pgs, params_dtype=torch.float32)
        return {name: parameter.detach() for name, parameter in named_global_parameters(model)}

    whole = run_workers(work, 1, DiTParallelConfig())[0]
    layers = run_workers(work, 2, DiTParallelConfig(pipeline_model_parallel_size=2))
    assert {**layers[0], **layers[1]}.keys() == whole.keys()
    for stage in layers:
        assert all(torch.equal(value, whole[name]) for name, value in stage.items())
    name = "block.layers.1.mlp.linear_fc1.weight"
    halves = run_workers(work, 2, DiTParallelConfig(tensor_model_parallel_size=2))
    assert torch.equal(torch.cat([half[name] for half in halves]), whole[name])
    assert not torch.equal(whole[name], whole["block.layers.0.mlp.linear_fc1.weight"])


def test_config_names_bad_sizes():
    with pytest.raises(ValueError, match="layer_memory_init"):
        DiTConfig(layer_memory_init=0.0)
