"""Number of parameters of one rank, and bytes of weights, gradients and optimizer state (docs/planning.md)."""

from typing import NamedTuple

from megatron_fsvideo.planning.case import Case

FP32 = 4
ADAM_MOMENTS = 2


class Parameters(NamedTuple):
    """Numbers of parameters: of the model's type, and those that are in fp32 in any case."""

    typed: int
    fp32: int

    def __add__(self, other: "Parameters") -> "Parameters":  # type: ignore[override]
        return Parameters(self.typed + other.typed, self.fp32 + other.fp32)

    @property
    def total(self) -> int:
        """Number of parameters of both kinds."""
        return self.typed + self.fp32


def layer_parameters(case: Case, layer_number: int) -> Parameters:
    """Parameters of one layer; `layer_number` counts from 1."""
    model, tp = case.model, case.tp
    d, f, share = model.hidden_size, model.ffn_hidden_size // tp, model.hidden_size // tp
    contexts = (model.text_embed_dim > 0) + (model.image_embed_dim > 0)
    column = 3 + 1 + 2 * contexts  # self q k v, cross q, keys and values of each context
    typed = column * (d * share + share) + 2 * (d * share + d)  # and the two output projections
    typed += (2 + 1 + contexts) * share  # query and key norms
    typed += d * f + f + f * d + d + 2 * d  # feed-forward, norm before cross-attention
    fp32 = 6 * d
    if model.layer_memory and layer_number > 1:
        fp32 += layer_number * (d + 1)
    return Parameters(typed, fp32)


def embedder_parameters(case: Case) -> Parameters:
    """Parameters of the condition embedder, which every chunk of every stage has."""
    model, d = case.model, case.model.hidden_size
    text, image = model.text_embed_dim, model.image_embed_dim
    typed = 0
    if text:
        typed += text * d + d + d * d + d
    if image:
        typed += 2 * image + image * image + image + image * d + d + 2 * d
    fp32 = model.freq_dim * d + d + d * d + d + 6 * (d * d + d)
    return Parameters(typed, fp32)


def stage_parameters(case: Case, stage: int) -> Parameters:
    """Parameters of one rank of a pipeline stage."""
    model, d = case.model, case.model.hidden_size
    parameters = Parameters(0, 0)
    for chunk in case.chunks(stage):
        parameters += embedder_parameters(case)
        for number in chunk:
            parameters += layer_parameters(case, number)
    if stage == 0:
        parameters += Parameters(d * model.in_channels * model.patch_volume + d, 0)
    if stage == case.pp - 1:
        outputs = model.latent_channels * model.patch_volume
        parameters += Parameters(0, 2 * d + d * outputs + outputs)
    return parameters


def weight_bytes(case: Case, stage: int) -> dict[str, float]:
    """Bytes, by part, of tensors that live during the whole run."""
    parameters = stage_parameters(case, stage)
    # The distributed optimizer shares over data- and context-parallel ranks alike.
    shards = case.dp_size * case.cp if case.parallel.use_distributed_optimizer else 1
    master = parameters.typed * FP32 if case.bf16 else 0
    return {
        "weights": float(parameters.typed * case.element + parameters.fp32 * FP32),
        "gradients": float(parameters.total * FP32),
        "optimizer state": (master + parameters.total * ADAM_MOMENTS * FP32) / shards,
        "moving average": float(parameters.total * FP32 * case.has_ema) / shards,
    }
