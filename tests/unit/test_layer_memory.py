"""The memory bank: the pulled gradients are autograd's, nothing leaks, nothing outlives its use, nothing is copied."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint

from megatron_fsvideo.config import DIT_PRESETS, DiTJob, DiTParallelConfig, build_job
from megatron_fsvideo.kernels import MixSettings, torch_mixing
from megatron_fsvideo.models.dit import build_dit
from megatron_fsvideo.models.dit.layer_memory import LayerMemory, count_frozen_routers, identity_leaning_bias
from megatron_fsvideo.models.dit.memory_bank import MemoryBank
from megatron_fsvideo.parallel import groups
from tests.parallel.harness import run_workers

NUM_LAYERS, TOKENS, BATCH, HIDDEN = 6, 5, 2, 8
EPSILON = 1e-6


class Layer(nn.Module):
    """What matters of a DiT layer: a residual, a modulated norm, and something that reads the memory."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.memory = LayerMemory(number, HIDDEN) if number > 1 else None
        self.query = nn.Linear(HIDDEN, HIDDEN)
        self.key = nn.Linear(HIDDEN, HIDDEN)
        self.shift = nn.Parameter(torch.empty(BATCH, HIDDEN))
        self.scale = nn.Parameter(torch.empty(BATCH, HIDDEN))

    def modulated(self, normed):
        return normed * (1 + self.scale) + self.shift

    def finish(self, x, query_source, key_source):
        return x + self.query(query_source).tanh() * self.key(key_source)

    def forward(self, x, bank):
        query_source = self.modulated(F.layer_norm(x, (HIDDEN,), eps=EPSILON))
        key_source = query_source
        if self.memory is not None:
            key_source = self.memory(query_source, x, bank, self.shift, self.scale)
        return self.finish(x, query_source, key_source)

    def plain(self, states, norms_states):
        """The same from all states, by autograd."""
        query_source = self.modulated(F.layer_norm(states[-1], (HIDDEN,), eps=EPSILON))
        key_source = query_source
        if self.memory is not None:
            stacked = torch.stack([F.layer_norm(x, (HIDDEN,), eps=EPSILON) if norms_states else x for x in states])
            mixed = torch.einsum("sbl,lsbh->sbh", self.memory.router(query_source).softmax(-1), stacked)
            key_source = self.modulated(mixed if norms_states else F.layer_norm(mixed, (HIDDEN,), eps=EPSILON))
        return self.finish(states[-1], query_source, key_source)


def make_layers():
    layers = nn.ModuleList(Layer(number) for number in range(1, NUM_LAYERS + 1)).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return layers


def make_input(seed=2):
    x = torch.randn(TOKENS, BATCH, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.requires_grad_()


def new_bank(norms_states=False):
    return MemoryBank(torch_mixing, MixSettings(norms_states, EPSILON))


def run(layers, x, bank, recompute=False):
    """The output of a whole model."""
    x = bank.remember(x)
    for layer in layers:
        x = checkpoint(layer, x, bank, use_reentrant=False) if recompute else layer(x, bank)
        if layer is not layers[-1]:
            x = bank.remember(x)
    return x


def run_stage(layers, received, bank):
    """What a stage sends; the output on the last one."""
    x = bank.receive(received, layers[0].number) if layers[0].number > 1 else bank.remember(received)
    for layer in layers:
        x = layer(x, bank)
        if layer is not layers[-1]:
            x = bank.remember(x)
    return x if layers[-1].number == NUM_LAYERS else bank.send(x)


def loss_of(output):
    return (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum()


def gradients(layers, x):
    found = {name: p.grad.clone() for name, p in layers.named_parameters()} | {"x": x.grad.clone()}
    for tensor in (*layers.parameters(), x):
        tensor.grad = None
    return found


def by_autograd(layers, x, norms_states=False):
    states = [x]
    for layer in layers:
        states.append(layer.plain(states, norms_states))
    loss_of(states[-1]).backward()
    return states[-1].detach(), gradients(layers, x)


def assert_same(found, expected, tolerance=1e-11):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 1e-3, f"the gradient of {name} vanishes"
        assert (found[name] - gradient).norm() / gradient.norm() < tolerance, name


@pytest.mark.parametrize("norms_states", [False, True])
def test_the_pull_form_is_autograds_gradient(norms_states):
    layers, x = make_layers(), make_input()
    expected_output, expected = by_autograd(layers, x, norms_states)
    output = run(layers, x, new_bank(norms_states))
    loss_of(output).backward()
    torch.testing.assert_close(output.detach(), expected_output, rtol=1e-12, atol=1e-12)
    assert_same(gradients(layers, x), expected)


@pytest.mark.parametrize("norms_states", [False, True])
@pytest.mark.parametrize("cuts", [[3], [1, 2, 5]])
def test_pipeline_stages_return_the_whole_gradient(cuts, norms_states):
    layers, x = make_layers(), make_input()
    _, expected = by_autograd(layers, x, norms_states)
    bounds = [0, *cuts, NUM_LAYERS]
    tensor, ends = x, []
    for first, last in zip(bounds, bounds[1:], strict=False):
        output = run_stage(list(layers)[first:last], tensor, new_bank(norms_states))
        ends.append((tensor, output))
        tensor = output.detach().requires_grad_()
    gradient = torch.autograd.grad(loss_of(output), output)[0]
    for received, sent in reversed(ends):
        sent.backward(gradient)
        gradient = received.grad
    assert_same(gradients(layers, x), expected)


def test_recomputation_changes_no_bit():
    layers, x = make_layers(), make_input()
    found = []
    for recompute in (False, True):
        loss_of(run(layers, x, new_bank(), recompute)).backward()
        found.append(gradients(layers, x))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("recompute", [False, True])
def test_microbatches_in_flight_do_not_meet(recompute):
    layers, inputs = make_layers(), [make_input(seed) for seed in (3, 4)]
    apart = []
    for x in inputs:
        loss_of(run(layers, x, new_bank(), recompute)).backward()
        apart.append(gradients(layers, x))
    losses = [loss_of(run(layers, x, new_bank(), recompute)) for x in inputs]
    for index in (0, 1):
        losses[index].backward()
        found = gradients(layers, inputs[index])
        assert all(torch.equal(found[name], apart[index][name]) for name in found)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("with_backward", [False, True])
def test_everything_goes_without_the_garbage_collector(recompute, with_backward):
    layers, x, bank = make_layers(), make_input(), new_bank()
    gc.collect()
    gc.disable()
    try:
        output = run(layers, x, bank, recompute)
        watched = [weakref.ref(state) for state in bank.states(NUM_LAYERS)] + [weakref.ref(bank)]
        if with_backward:
            loss_of(output).backward()
        del output, bank
        assert not any(reference() is not None for reference in watched)
    finally:
        gc.enable()


def test_a_state_leaves_as_soon_as_its_last_reader_is_done():
    layers, x, bank = make_layers(), make_input(), new_bank()
    held = []
    for layer in layers:
        # When the bias of a layer's query gets its gradient, the later layers are done.
        layer.query.bias.register_hook(lambda _: held.append((len(bank._states), len(bank._reads))))
    loss_of(run(layers, x, bank)).backward()
    # Of layers 6 .. 1: layer l still needs X_0 .. X_{l-1}, and the layers after it left a g each (this one's may come
    # before or after the hook).
    assert [states for states, _ in held] == list(range(NUM_LAYERS, 0, -1))
    assert all(states + reads <= NUM_LAYERS + 1 for states, reads in held)
    assert not bank._states and not bank._reads


def test_a_second_backward_says_what_happened():
    layers, x = make_layers(), make_input()
    loss = loss_of(run(layers, x, new_bank()))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="freed by a backward pass"):
        loss.backward()


def test_gradients_of_a_few_tensors():
    """Autograd then runs only the nodes on their paths."""
    layers, x = make_layers(), make_input()
    _, expected = by_autograd(layers, x)
    weight = layers[2].key.weight
    (found,) = torch.autograd.grad(loss_of(run(layers, x, new_bank())), [weight])
    assert_same({"w": found}, {"w": expected["2.key.weight"]})
    (found,) = torch.autograd.grad(loss_of(run(layers, x, new_bank(), recompute=True)), [get_gradient_edge(x)])
    assert_same({"x": found}, {"x": expected["x"]})
    for name, parameter in layers.named_parameters():
        parameter.requires_grad_(name.startswith("4."))
    loss_of(run(layers, x.detach(), new_bank())).backward()
    trained = {name: p.grad for name, p in layers.named_parameters() if p.requires_grad}
    assert_same(trained, {name: expected[name] for name in trained})


def test_without_gradients_the_bank_is_only_a_list():
    layers, x, bank = make_layers(), make_input(), new_bank()
    with torch.no_grad():
        output = run(layers, x, bank)
    assert not output.requires_grad
    assert bank.states(1)[0].data_ptr() == x.data_ptr()
    torch.testing.assert_close(output, by_autograd(layers, x)[0])


def test_what_a_stage_sends_is_a_copy():
    """Megatron's schedule frees the data of what was sent."""
    layers, x, bank = make_layers(), make_input(), new_bank()
    sent = run_stage(list(layers)[:2], x, bank)
    assert sent.shape == (3 * TOKENS, BATCH, HIDDEN) and sent._base is None
    assert sent.data_ptr() != x.data_ptr()
    assert torch.equal(sent[:TOKENS], x)


def allocated_during(step):
    """Bytes held at the end of the forward pass and at most, above what was held before, by torch's allocator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss = step()
        with torch.profiler.record_function("end of forward"):
            pass
        loss.backward()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    held, peak, after_forward = 0, 0, None
    for event in events:
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
        elif event.name() == "end of forward":
            after_forward = held
    return after_forward, peak


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str)
def test_under_full_recomputation_memory_costs_nothing(dtype):
    """Bytes of the allocator, not of saved tensors: 16 layers, with and without layer memory.

    What is left of the peak: of one layer the mix and the keys' source, and the fp32 weights of all layers, which are
    small beside states as wide as these.
    """

    def work():
        pgs = groups.initialize(DiTParallelConfig())
        results = []
        for layer_memory in (False, True):
            model_config = replace(
                build_job(DiTJob, DIT_PRESETS["dit_debug"]).model,
                num_layers=16,
                hidden_size=384,
                num_attention_heads=4,
                ffn_hidden_size=1032,
                layer_memory=layer_memory,
            )
            parallel = DiTParallelConfig(recompute_granularity="full")
            model = build_dit(model_config, parallel, pgs, params_dtype=dtype)
            for parameter in model.parameters():  # as Megatron's buffers: they are there before the step
                parameter.grad = torch.zeros_like(parameter)
            latents = torch.randn(1, model_config.in_channels, 8, 12, 8)
            text = torch.randn(1, 8, model_config.text_embed_dim)
            image = torch.randn(1, 4, model_config.image_embed_dim)
            timesteps = torch.tensor([500.0])
            results.append(
                allocated_during(lambda: model(latents, timesteps, text, image).square().mean())  # noqa: B023
            )
        return results

    (held, peak), (held_with, peak_with) = run_workers(work, 1)[0]
    print(f"bytes held after the forward {held} -> {held_with}, peak of the step {peak} -> {peak_with}")
    assert held > 16 * 8 * 96 * 384 * dtype.itemsize, "the layer inputs at least"
    assert abs(held_with / held - 1) < 0.01, (held_with, held)
    assert peak_with / peak < 1.05, (peak_with, peak)


def test_a_frozen_model_in_evaluation_recomputes():
    """A teacher or a reward's path: gradients pass to the inputs, of each layer only the input is kept."""

    def work():
        pgs = groups.initialize(DiTParallelConfig())
        config = replace(build_job(DiTJob, DIT_PRESETS["dit_debug"]).model, num_layers=8)
        latents = torch.randn(1, config.in_channels, 8, 12, 8, requires_grad=True)
        text, image = torch.randn(1, 8, config.text_embed_dim), torch.randn(1, 4, config.image_embed_dim)
        held = []
        for granularity in (None, "full"):
            parallel = DiTParallelConfig(recompute_granularity=granularity)
            model = build_dit(config, parallel, pgs, params_dtype=torch.float32).eval().requires_grad_(False)
            loss = lambda: model(latents, torch.tensor([500.0]), text, image).square().mean()  # noqa: B023, E731
            held.append(allocated_during(loss)[0])
        return held

    kept, recomputed = run_workers(work, 1)[0]
    assert recomputed < kept / 4, (recomputed, kept)


@pytest.mark.parametrize(("initial_weight", "expected"), [(0.9, 0), (0.99, 0), (1.0, 3)])
def test_routers_that_cannot_learn_are_counted(initial_weight, expected):
    layers = nn.ModuleList(LayerMemory(number, 8) for number in (2, 3, 4))
    for layer in layers:
        nn.init.zeros_(layer.router.bias)
        layer.router.bias.data[-1] = identity_leaning_bias(layer.num_states, initial_weight)
    assert count_frozen_routers(layers) == expected
