"""What Transformer Engine computes on this machine's GPU, for test_transformer_engine.py, as one line of JSON.

python -m tests.gpu.transformer_engine_cases
"""

import functools
import inspect
import json
from typing import Any

import torch
import transformer_engine.pytorch as te
from torch import Tensor

from megatron_fsvideo.config import DiTConfig, DiTParallelConfig, OptimizerConfig
from megatron_fsvideo.models.backends import check_backend
from megatron_fsvideo.models.dit import DiTModel, build_dit
from megatron_fsvideo.models.dit.parameter_rules import dit_parameter_rules
from megatron_fsvideo.models.dot_product_attention import choose_kernel, dot_product_attention
from megatron_fsvideo.optim.optimizer import build_optimizer, wrap_ddp
from megatron_fsvideo.parallel import groups
from megatron_fsvideo.parallel.schedule import run_schedule
from tests.parallel.test_layouts import FULL, SELECTIVE, forward_step, randomize, relative

MODEL = DiTConfig(
    num_layers=4,
    hidden_size=256,
    num_attention_heads=4,
    ffn_hidden_size=512,
    latent_channels=6,
    text_embed_dim=10,
    image_embed_dim=8,
    freq_dim=16,
)
TE = {"transformer_impl": "transformer_engine"}
RECIPES = ("tensorwise", "delayed", "blockwise", "mxfp8")


def batch(device: torch.device) -> dict[str, Tensor]:
    """36 tokens, 5 rows of text and 3 of the image: nothing that FP8 likes."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "model_input": (2, MODEL.in_channels, 3, 4, 3),
        "text": (2, 5, MODEL.text_embed_dim),
        "image": (2, 3, MODEL.image_embed_dim),
        "target": (2, MODEL.latent_channels, 3, 4, 3),
    }
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors["timesteps"] = torch.tensor([100.0, 800.0])
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def build(pgs: groups.ProcessGroups, **settings: Any) -> DiTModel:
    """A model in bf16 with the same random weights, whatever it is made of."""
    model = build_dit(MODEL, DiTParallelConfig(**settings), pgs, params_dtype=torch.bfloat16)
    randomize([model], pgs)
    return model


def output_and_gradients(pgs: groups.ProcessGroups, **settings: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Of the second pass: delayed scaling has no scales in the first."""
    model, data = build(pgs, **settings), batch(pgs.device)
    for _ in range(2):
        model.zero_grad()
        output = model(data["model_input"], data["timesteps"], data["text"], data["image"])
        output.square().mean().backward()
    return output.detach().cpu(), {name: p.grad.float().cpu() for name, p in model.named_parameters()}


def compare(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> dict[str, Any]:
    """Relative distances, all gradients taken together."""
    flat = [torch.cat([gradients[name].flatten() for name in expected[1]]) for _, gradients in (found, expected)]
    return {
        "same_names": found[1].keys() == expected[1].keys(),
        "finite": bool(flat[0].isfinite().all() and found[0].isfinite().all()),
        "output": relative(found[0].float(), expected[0].float()),
        "gradients": relative(*flat),
    }


def train(pgs: groups.ProcessGroups, **settings: Any) -> list[float]:
    """Losses of ten steps on one batch."""
    model, parallel = build(pgs, **settings), DiTParallelConfig(**settings)
    wrapped = wrap_ddp([model], model.config, parallel, pgs)
    optimizer = build_optimizer(wrapped, OptimizerConfig(lr=1e-3), dit_parameter_rules([model], 10.0), pgs)
    losses = []
    for _ in range(10):
        wrapped[0].zero_grad_buffer()
        optimizer.zero_grad()
        batches = [batch(pgs.device)] * 2
        collected = run_schedule(functools.partial(forward_step, pgs=pgs), wrapped, batches, pgs)
        optimizer.step()
        losses.append(torch.stack([entry["loss"] for entry in collected]).sum().item())
    return losses


def attention(device: torch.device) -> dict[str, Any]:
    """The kernel that the local backend takes here, against the formula in fp64."""
    query = torch.randn(70, 2, 4, 64, device=device, dtype=torch.bfloat16)
    key, value = torch.randn(2, 33, 2, 4, 64, device=device, dtype=torch.bfloat16)
    scores = torch.einsum("sbnd,lbnd->bnsl", query.double(), key.double()) / 64**0.5
    expected = torch.einsum("bnsl,lbnd->sbnd", scores.softmax(-1), value.double())
    distance = relative(dot_product_attention(query, key, value).double(), expected)
    return {"kernel": choose_kernel(device, query.dtype, 64), "distance": distance}


def signatures() -> dict[str, list[str]]:
    """The parameters' names that tests/fakes repeats."""
    functions = {
        "Linear.__init__": te.Linear.__init__,
        "LayerNorm.__init__": te.LayerNorm.__init__,
        "DotProductAttention.__init__": te.DotProductAttention.__init__,
        "DotProductAttention.forward": te.DotProductAttention.forward,
        "fp8_autocast": te.fp8_autocast,
    }
    return {name: list(inspect.signature(function).parameters) for name, function in functions.items()}


def possible_recipes() -> list[str]:
    """Those that this device can do."""
    possible = []
    for recipe in RECIPES:
        try:
            check_backend(DiTParallelConfig(fp8_format="e4m3", fp8_recipe=recipe, **TE))
        except ValueError:
            continue
        possible.append(recipe)
    return possible


def main() -> None:
    """Everything, in one process."""
    pgs = groups.initialize(DiTParallelConfig())
    local, plain = output_and_gradients(pgs), output_and_gradients(pgs, **TE)
    found: dict[str, Any] = {
        "te": compare(plain, local),
        "same_checkpoint": sorted(build(pgs, **TE).sharded_state_dict()) == sorted(build(pgs).sharded_state_dict()),
        "fp8": {},
        "recomputed": {},
        "losses": {"bf16": train(pgs, **TE)},
        "attention": attention(pgs.device),
        "signatures": signatures(),
    }
    for recipe in possible_recipes():
        settings = TE | {"fp8_format": "e4m3" if recipe == "mxfp8" else "hybrid", "fp8_recipe": recipe}
        kept = output_and_gradients(pgs, **settings)
        found["fp8"][recipe] = compare(kept, plain)
        for name, recompute in (("full", FULL), ("selective", SELECTIVE)):
            found["recomputed"][f"{recipe} {name}"] = compare(output_and_gradients(pgs, **settings, **recompute), kept)
        found["losses"][recipe] = train(pgs, **settings)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
