"""Floating-point operations of the DiT, 2 per multiply-add of its matrix products.

    forward_flops      one forward pass of one sample
    training_flops     what forward and backward must compute: the model FLOPs of which MFU is a share
    hardware_flops     with what recomputation adds: what the device executes

Each returns part -> operations. Norms, softmax, modulation and rotary embedding are not counted. Attention's backward
counts twice its forward: that FlashAttention's kernels compute the logits again is not model work.
"""

from typing import NamedTuple

from megatron_fsvideo.config import DiTConfig, DiTParallelConfig

FlopCount = dict[str, float]

# Dense peak of one device in TFLOP/s by a part of its name (vendors' data sheets, without sparsity). The first that
# fits counts, so a name stands before the names that it contains.
PEAK_TFLOPS: dict[str, dict[str, float]] = {
    "GB300": {"bf16": 2500, "fp8": 5000},
    "GB200": {"bf16": 2500, "fp8": 5000},
    "B300": {"bf16": 2250, "fp8": 4500},
    "B200": {"bf16": 2250, "fp8": 4500},
    "H100 PCIe": {"bf16": 756, "fp8": 1513},
    "H100 NVL": {"bf16": 835, "fp8": 1671},
    "H100": {"bf16": 989, "fp8": 1979},
    "H800": {"bf16": 989, "fp8": 1979},
    "H200 NVL": {"bf16": 835, "fp8": 1671},
    "H200": {"bf16": 989, "fp8": 1979},
    "H20": {"bf16": 148, "fp8": 296},
    "A100": {"bf16": 312},
    "A800": {"bf16": 312},
    "L40S": {"bf16": 362, "fp8": 733},
}

# Parts whose work is one layer's: what recomputation of layers repeats.
LAYER_PARTS = (
    "self_attention_linears",
    "self_attention",
    "cross_attention_linears",
    "context_linears",
    "cross_attention",
    "feed_forward",
    "layer_memory_router",
    "layer_memory_mix",
)


class Rows(NamedTuple):
    """Rows of one sample that go through the model: latent tokens, text tokens, image tokens (Wan's numbers)."""

    tokens: int
    text: int = 512
    image: int = 257

    def context(self, model: DiTConfig) -> int:
        """Rows that cross-attention reads."""
        return self.text * (model.text_embed_dim > 0) + self.image * (model.image_embed_dim > 0)


def forward_flops(model: DiTConfig, rows: Rows) -> FlopCount:
    """Operations of one sample's forward pass, by part."""
    n, m, d, layers = rows.tokens, rows.context(model), model.hidden_size, model.num_layers
    states = layers * (layers + 1) // 2 - 1 if model.layer_memory else 0  # layers 2, 3, ... read 2, 3, ... states
    return {
        "self_attention_linears": 2.0 * n * 4 * d**2 * layers,
        "self_attention": 4.0 * n**2 * d * layers,
        "cross_attention_linears": 2.0 * n * 2 * d**2 * layers,
        "context_linears": 2.0 * m * 2 * d**2 * layers,
        "cross_attention": 4.0 * n * m * d * layers,
        "feed_forward": 2.0 * n * 2 * d * model.ffn_hidden_size * layers,
        "layer_memory_router": 2.0 * n * d * states,
        "layer_memory_mix": 2.0 * n * d * states,
        "condition_embedder": sum(size for size, _ in _embedder_linears(model, rows)),
        "patch_embedding": 2.0 * n * model.in_channels * model.patch_volume * d,
        "head": 2.0 * n * d * model.latent_channels * model.patch_volume,
    }


def training_flops(model: DiTConfig, rows: Rows) -> FlopCount:
    """Operations of one sample's forward and backward pass, by part; recomputation is not counted.

    A linear's backward has two products of the forward's size, except where nothing asks for the gradient of its input.
    """
    parts = {name: 3 * work for name, work in forward_flops(model, rows).items()}
    parts["patch_embedding"] *= 2 / 3
    parts["condition_embedder"] -= sum(size for size, is_first in _embedder_linears(model, rows) if is_first)
    return parts


def hardware_flops(model: DiTConfig, rows: Rows, parallel: DiTParallelConfig) -> FlopCount:
    """Operations of one sample's forward and backward pass, by part, including what recomputation repeats."""
    parts = training_flops(model, rows)
    for name, work in forward_flops(model, rows).items():
        parts[name] += work * recomputed_share(name, model, parallel)
    return parts


def total(parts: FlopCount) -> float:
    """Operations of all parts."""
    return sum(parts.values())


def dit_training_flops(model: DiTConfig, num_tokens: int, text_tokens: int, image_tokens: int = 0) -> float:
    """Model FLOPs of one sample's forward and backward pass."""
    return total(training_flops(model, Rows(num_tokens, text_tokens, image_tokens)))


def peak_tflops(device_name: str, precision: str = "bf16") -> float | None:
    """Dense peak of a device in TFLOP/s, or None if its name or this precision is not in the table."""
    rates = next((rates for part, rates in PEAK_TFLOPS.items() if part in device_name), {})
    return rates.get(precision)


def recomputed_share(part: str, model: DiTConfig, parallel: DiTParallelConfig) -> float:
    """Share of a part's forward that is done twice; `part` is a key of what `forward_flops` returns."""
    if part not in LAYER_PARTS or parallel.recompute_granularity is None:
        return 0.0
    if parallel.recompute_granularity == "selective":
        module = {"self_attention": "core_attn", "cross_attention": "core_attn", "feed_forward": "mlp"}.get(part)
        return float(module in parallel.recompute_modules)
    if parallel.recompute_method == "uniform":
        return 1.0
    # Each chunk's first layers; of layer memory, whose layers differ, this is the mean.
    chunks = parallel.pipeline_model_parallel_size * parallel.num_chunks
    return min(1.0, parallel.recompute_num_layers * chunks / model.num_layers)


def _embedder_linears(model: DiTConfig, rows: Rows) -> list[tuple[float, bool]]:
    """(operations, whether its input needs no gradient) of each linear of the condition embedder."""
    d, text, image = model.hidden_size, model.text_embed_dim, model.image_embed_dim
    linears = [(model.freq_dim * d, 1, True), (d * d, 1, False), (d * 6 * d, 1, False)]
    if text:
        linears += [(text * d, rows.text, True), (d * d, rows.text, False)]
    if image:  # a norm with weights comes first: all need their inputs' gradients
        linears += [(image * image, rows.image, False), (image * d, rows.image, False)]
    return [(2.0 * weights * number, is_first) for weights, number, is_first in linears]
