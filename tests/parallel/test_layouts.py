"""Layouts do not change the result: loss, every gradient, the gradient norm and the weights after clipped steps.

One process is the reference. All weights are random, also those that start at zero or at the identity, so that no
gradient vanishes; the test asserts that none does. fp32 on gloo. Recomputation changes no bit at all.
"""

import functools
from dataclasses import dataclass, replace

import pytest
import torch

from megatron_fsvideo.config import DiTConfig, DiTParallelConfig, OptimizerConfig
from megatron_fsvideo.diffusion.losses import loss_of_mse, squared_errors
from megatron_fsvideo.models.dit import build_dit_chunks, patchify
from megatron_fsvideo.models.dit.parameter_rules import dit_parameter_rules
from megatron_fsvideo.models.dit.weights import named_global_parameters, slice_of_whole
from megatron_fsvideo.optim.optimizer import build_optimizer, wrap_ddp
from megatron_fsvideo.parallel import groups
from megatron_fsvideo.parallel.cpu_backend import megatron_on_cpu
from megatron_fsvideo.parallel.schedule import run_schedule
from megatron_fsvideo.parallel.seeds import weight_generator
from megatron_fsvideo.parallel.sequence import all_gather_slices, local_slice, sum_for_same_loss
from tests.parallel.harness import run_workers

NUM_MICROBATCHES = 4
NUM_STEPS = 2

MODEL = DiTConfig(
    num_layers=4,
    hidden_size=48,
    num_attention_heads=4,
    ffn_hidden_size=96,
    latent_channels=6,
    text_embed_dim=10,
    image_embed_dim=8,
    freq_dim=16,
)


@dataclass(frozen=True)
class Layout:
    """One case: how many processes, how they are used, and which model."""

    name: str
    world_size: int
    parallel: DiTParallelConfig
    model: DiTConfig = MODEL
    optimizer: str = "adam"
    batches: str = "video"
    token_multiple: int | None = None

    @property
    def reference(self) -> "Layout":
        """The same in one process, with everything kept."""
        return replace(self, name="one process", world_size=1, parallel=DiTParallelConfig(), token_multiple=None)


def layout(
    name: str,
    world_size: int,
    model: DiTConfig = MODEL,
    optimizer: str = "adam",
    batches: str = "video",
    token_multiple: int | None = None,
    **parallel: int | bool | str | tuple[str, ...],
) -> Layout:
    names = {"tp": "tensor_model_parallel_size", "cp": "context_parallel_size", "pp": "pipeline_model_parallel_size"}
    settings = DiTParallelConfig(**{names.get(k, k): v for k, v in parallel.items()})
    return Layout(name, world_size, settings, model, optimizer, batches, token_multiple)


NORMALIZED = DiTConfig(**{**MODEL.__dict__, "layer_memory_norm": "normalized", "patch_size": (1, 2, 2)})
WITHOUT_MEMORY = DiTConfig(**{**MODEL.__dict__, "layer_memory": False})
# The embedders, which every stage has, are larger than the layers: the shards of the distributed optimizer then cut
# them at other places on each stage.
LARGE_EMBEDDERS = DiTConfig(**{**MODEL.__dict__, "num_layers": 3, "freq_dim": 1536})
SIX_LAYERS = replace(MODEL, num_layers=6)
EIGHT_LAYERS = replace(MODEL, num_layers=8)
UNEVEN = {"num_layers_in_first_pipeline_stage": 3, "num_layers_in_last_pipeline_stage": 1}
FULL = {"recompute_granularity": "full"}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ("core_attn", "mlp")}

LAYOUTS = [
    layout("tp2", 2, tp=2),
    layout("tp2_sp", 2, tp=2, sequence_parallel=True),
    layout("cp2", 2, cp=2),
    layout("pp2", 2, pp=2),
    layout("tp2_pp2", 4, tp=2, pp=2),
    layout("dp2", 2),
    layout("pp2_dp2_distributed_optimizer", 4, pp=2, use_distributed_optimizer=True),
    layout(
        "pp2_dp2_overlap_distributed_optimizer_mixed_batches",
        4,
        batches="mixed",
        pp=2,
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,
    ),
    layout(
        "large_embedders_pp2_dp2_distributed_optimizer",
        4,
        LARGE_EMBEDDERS,
        pp=2,
        num_layers_in_first_pipeline_stage=2,
        num_layers_in_last_pipeline_stage=1,
        use_distributed_optimizer=True,
    ),
    layout("tp2_cp2", 4, tp=2, cp=2),
    layout("tp2_sp_cp2", 4, tp=2, cp=2, sequence_parallel=True),
    layout("tp2_sp_cp2_images", 4, batches="image", tp=2, cp=2, sequence_parallel=True),
    layout("tp2_sp_pp2", 4, tp=2, pp=2, sequence_parallel=True),
    layout("pp4", 4, pp=4),
    layout("pp2_uneven", 2, pp=2, **UNEVEN),
    layout("tp2_sp_recompute", 2, tp=2, sequence_parallel=True, **FULL),
    layout("tp2_recompute_block", 2, tp=2, recompute_method="block", recompute_num_layers=2, **FULL),
    layout("pp2_recompute", 2, pp=2, **FULL),
    layout("cp2_recompute_selective", 2, cp=2, **SELECTIVE),
    layout("tp2_sp_pp2_recompute_selective", 4, tp=2, pp=2, sequence_parallel=True, **SELECTIVE),
    layout("without_memory_pp2_recompute_two_layers", 2, WITHOUT_MEMORY, pp=2, recompute_num_layers=2, **FULL),
    layout("pp2_virtual2", 2, pp=2, num_virtual_stages_per_pipeline_rank=2),
    layout("pp2_virtual2_recompute", 2, pp=2, num_virtual_stages_per_pipeline_rank=2, **FULL),
    layout(
        "pp2_virtual2_uneven_mixed_batches",
        2,
        SIX_LAYERS,
        batches="mixed",
        pp=2,
        num_virtual_stages_per_pipeline_rank=2,
        num_layers_in_first_pipeline_stage=4,
    ),
    layout(
        "pp2_virtual2_dp2_overlap_distributed_optimizer",
        4,
        pp=2,
        num_virtual_stages_per_pipeline_rank=2,
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,
    ),
    pytest.param(
        layout("pp4_virtual2", 4, EIGHT_LAYERS, pp=4, num_virtual_stages_per_pipeline_rank=2), marks=pytest.mark.slow
    ),
    layout("pp2_images", 2, batches="image", pp=2),
    layout("pp2_uneven_mixed_batches", 2, batches="mixed", pp=2, **UNEVEN),
    layout("tp2_sp_mixed_batches", 2, batches="mixed", tp=2, sequence_parallel=True),
    layout("tp4", 4, tp=4),
    layout("tp4_sp", 4, tp=4, sequence_parallel=True),
    layout("normalized_pp2", 2, NORMALIZED, pp=2),
    layout(
        "pp2_tp2_sp_dp2_overlap_distributed_optimizer",
        8,
        pp=2,
        tp=2,
        sequence_parallel=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,
    ),
    layout("dp2_overlap_distributed_optimizer", 2, use_distributed_optimizer=True, overlap_grad_reduce=True),
    layout("normalized_patch2_tp2_sp", 2, NORMALIZED, tp=2, sequence_parallel=True),
    layout("without_memory_pp2", 2, WITHOUT_MEMORY, pp=2),
    layout("muon_tp2_sp", 2, MODEL, "muon", tp=2, sequence_parallel=True),
    layout("muon_pp2", 2, MODEL, "muon", pp=2),
    layout("muon_dp2_distributed_optimizer", 2, MODEL, "muon", use_distributed_optimizer=True),
    layout(
        "muon_tp2_sp_dp2_overlap_distributed_optimizer_mixed_batches",
        4,
        MODEL,
        "muon",
        "mixed",
        tp=2,
        sequence_parallel=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,
    ),
    layout(
        "muon_pp2_virtual2_dp2_distributed_optimizer",
        4,
        MODEL,
        "muon",
        pp=2,
        num_virtual_stages_per_pipeline_rank=2,
        use_distributed_optimizer=True,
    ),
    # 48 tokens, 5 of text and 3 of the image become 56 (a rank 28 or 35), 7 and 7.
    layout("padded", 1, token_multiple=7),
    layout("padded_tp2_sp", 2, token_multiple=7, tp=2, sequence_parallel=True),
    layout("padded_tp2_sp_cp2", 4, token_multiple=7, tp=2, cp=2, sequence_parallel=True),
    layout("padded_mixed_batches_pp2_recompute", 2, token_multiple=7, batches="mixed", pp=2, **FULL),
    layout("padded_normalized_patch2_cp2", 2, NORMALIZED, token_multiple=7, cp=2),
]


def random_weights(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Random values of every weight, drawn whole by name; gains around 1."""
    centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
    return centre + 0.2 * torch.randn(shape, generator=weight_generator(7, name))


def batch_shape(kind: str, index: int) -> tuple[int, int]:
    """(samples, frames) of a micro-batch; mixed ones differ from each other in both."""
    return {"video": (2, 3), "image": (2, 1), "mixed": (1 + index % 2, (3, 1, 1, 2)[index % 4])}[kind]


def microbatches(num: int, first: int, kind: str) -> list[dict[str, torch.Tensor]]:
    """Micro-batches with errors that differ much between samples."""
    batches = []
    for index in range(first, first + num):
        generator = torch.Generator().manual_seed(index)
        samples, frames = batch_shape(kind, index)
        shape = (samples, MODEL.latent_channels, frames, 4, 4)
        batches.append(
            {
                "model_input": torch.randn(samples, MODEL.in_channels, frames, 4, 4, generator=generator),
                "timesteps": 1000 * torch.rand(samples, generator=generator),
                "text": torch.randn(samples, 5, MODEL.text_embed_dim, generator=generator),
                "image": torch.randn(samples, 3, MODEL.image_embed_dim, generator=generator),
                "target": (1 + index) * torch.randn(shape, generator=generator),
            }
        )
    return batches


def forward_step(iterator, wrapped, *, pgs):
    """Megatron's forward step: the prediction, and a function of it that is the loss."""
    batch = next(iterator)
    prediction = wrapped(batch["model_input"], batch["timesteps"], batch["text"], batch["image"])

    def loss_function(prediction):
        patch_size = wrapped.module.model_config.patch_size
        target = local_slice(patchify(batch["target"], patch_size), 1, pgs.cp)
        errors = sum_for_same_loss(squared_errors(prediction, target), pgs.cp)
        number = batch["target"][0].numel()
        loss = loss_of_mse(errors / number, number, "pseudo_huber", 0.5).mean()
        return loss, {"loss": loss.detach().clone()}

    return prediction, loss_function


def whole_tensor(local: torch.Tensor, parameter: torch.nn.Parameter, pgs) -> torch.Tensor:
    """A parameter's tensor of all tensor-parallel ranks."""
    if pgs.tp_size == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return local.clone()
    return all_gather_slices(local, parameter.partition_dim, pgs.tp)


def gather_gradient_shards(wrapped, pgs) -> None:
    """With the distributed optimizer each data-parallel rank has reduced only its shard of a bucket: join them."""
    for buffer in wrapped.buffers:
        for bucket in buffer.buckets:
            shard = bucket.grad_data.chunk(pgs.dp_cp.size())[pgs.dp_cp.rank()].clone()
            bucket.grad_data.copy_(all_gather_slices(shard, 0, pgs.dp_cp))


def named_parameters(chunks):
    """The parameters of all chunks under their names in the whole model; each chunk has its copy of the embedders."""
    return [pair for chunk in chunks for pair in named_global_parameters(chunk)]


def randomize(chunks, pgs) -> None:
    with torch.no_grad():
        for name, parameter in named_parameters(chunks):
            shape = list(parameter.shape)
            if getattr(parameter, "tensor_model_parallel", False):
                shape[parameter.partition_dim] *= pgs.tp_size
            parameter.copy_(slice_of_whole(random_weights(name, tuple(shape)), parameter, pgs.tp_rank, pgs.tp_size))


def train(case: Layout) -> dict:
    """Two clipped steps; what this rank's stage knows of losses, gradients, norms and weights."""
    pgs = groups.initialize(case.parallel)
    chunks = build_dit_chunks(
        case.model, case.parallel, pgs, params_dtype=torch.float32, token_multiple=case.token_multiple
    )
    randomize(chunks, pgs)
    wrapped = wrap_ddp(chunks, chunks[0].config, case.parallel, pgs)
    settings = OptimizerConfig(
        optimizer=case.optimizer, muon_precision="fp32", lr=1e-2, weight_decay=0.1, clip_grad=0.05, router_lr_mult=3.0
    )
    optimizer = build_optimizer(wrapped, settings, dit_parameter_rules(chunks, settings.router_lr_mult), pgs)

    result: dict = {"losses": [], "norms": [], "gradients": {}, "weights": {}}
    for step in range(NUM_STEPS):
        batches = microbatches(NUM_MICROBATCHES, step * NUM_MICROBATCHES, case.batches)
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        mine = batches[pgs.dp_rank :: pgs.dp_size]
        losses = [entry["loss"] for entry in run_schedule(functools.partial(forward_step, pgs=pgs), wrapped, mine, pgs)]
        if step == 0:
            if case.parallel.use_distributed_optimizer:
                for chunk in wrapped:
                    gather_gradient_shards(chunk, pgs)
            for name, parameter in named_parameters(chunks):
                result["gradients"][name] = whole_tensor(parameter.main_grad, parameter, pgs)
        with megatron_on_cpu():
            _, norm, _ = optimizer.step()
        if pgs.is_last_stage:
            total = groups.all_reduce_sum(torch.stack(losses).sum(), pgs.dp)
            result["losses"].append((total / NUM_MICROBATCHES).item())
        result["norms"].append(float(norm))
    for name, parameter in named_parameters(chunks):
        result["weights"][name] = whole_tensor(parameter.detach(), parameter, pgs)
    groups.shutdown()
    return result


@functools.cache
def reference(case: Layout) -> dict:
    return run_workers(train, 1, case)[0]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.name)
def test_layout_equals_one_process(case):
    expected = reference(case.reference)
    for name, gradient in expected["gradients"].items():
        assert gradient.abs().max() > 1e-7, f"the gradient of {name} vanishes: the test would prove nothing"
    assert max(expected["norms"]) > 0.1, "the steps are not clipped"

    ranks = run_workers(train, case.world_size, case)
    assert any(rank["losses"] for rank in ranks)
    assert len({name for rank in ranks for name in rank["weights"]}) == len(expected["weights"])
    for rank in ranks:
        assert rank["gradients"].keys() == rank["weights"].keys()
        for norm, expected_norm in zip(rank["norms"], expected["norms"], strict=True):
            assert norm == pytest.approx(expected_norm, rel=1e-5)
        for loss, expected_loss in zip(rank["losses"], expected["losses"], strict=False):
            assert loss == pytest.approx(expected_loss, rel=1e-5)
        for name, gradient in rank["gradients"].items():
            error = relative(gradient, expected["gradients"][name])
            assert error < 1e-5, f"gradient of {name}: {error:.2e}"
        for name, weight in rank["weights"].items():
            error = relative(weight, expected["weights"][name])
            assert error < 1e-4, f"{name} after {NUM_STEPS} steps: {error:.2e}"


def assert_no_bit_differs(found, kept):
    assert found["losses"] == kept["losses"] and found["norms"] == kept["norms"]
    for what in ("gradients", "weights"):
        assert found[what].keys() == kept[what].keys()
        for name, tensor in kept[what].items():
            assert torch.equal(found[what][name], tensor), f"{what} of {name}"


@pytest.mark.parametrize(
    "recompute",
    [FULL, FULL | {"recompute_method": "block", "recompute_num_layers": 3}, SELECTIVE],
    ids=["full", "block", "selective"],
)
@pytest.mark.parametrize("model", [MODEL, NORMALIZED], ids=["raw", "normalized"])
def test_recomputation_changes_no_bit(model, recompute):
    kept = reference(Layout("one process", 1, DiTParallelConfig(), model))
    found = run_workers(train, 1, Layout("recomputed", 1, DiTParallelConfig(**recompute), model))[0]
    assert_no_bit_differs(found, kept)


@pytest.mark.parametrize(
    "sizes", [{"tp": 2, "sequence_parallel": True}, {"pp": 2}], ids=lambda sizes: "tp2_sp" if "tp" in sizes else "pp2"
)
def test_recomputation_changes_no_bit_on_two_processes(sizes):
    kept = run_workers(train, 2, layout("kept", 2, **sizes))
    found = run_workers(train, 2, layout("recomputed", 2, **sizes, **FULL))
    for rank, expected in zip(found, kept, strict=True):
        assert_no_bit_differs(rank, expected)
