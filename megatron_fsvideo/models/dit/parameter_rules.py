"""Which parameters of the DiT decay, which take Muon, and how fast routers learn."""

from fnmatch import fnmatchcase

from torch import nn

from megatron_fsvideo.models.dit.model import DiTModel
from megatron_fsvideo.models.parameter_rules import (
    DECAYED,
    MATRIX,
    UNDECAYED,
    ParameterRule,
    ParameterRules,
    classify,
)

ROUTER = "*.layer_memory.router.*"

# The first pattern that matches a parameter's name decides.
_RULES = {
    ROUTER: UNDECAYED,
    "*scale_shift_table": UNDECAYED,
    "*.bias": UNDECAYED,
    "block.layers.*.*norm*.weight": UNDECAYED,
    "block.layers.*.linear_*.weight": MATRIX,
    "condition_embedder.image_embedder.norm?.weight": UNDECAYED,
    "condition_embedder.*.linear_?.weight": DECAYED,
    "condition_embedder.time_proj.weight": DECAYED,
    "patch_embedding.weight": DECAYED,
    "head.proj_out.weight": DECAYED,
}


def dit_parameter_rules(chunks: list[DiTModel], router_lr_mult: float) -> ParameterRules:
    """The rule of every parameter of this rank's chunks.

    Muon takes the linear layers inside the transformer layers. As usual for it, what embeds the inputs and what makes
    the outputs keep AdamW, and so do the routers, whose rows compete in a softmax.

    Args:
        router_lr_mult: the routers' learning rate as a multiple of AdamW's.

    Raises:
        ValueError: a parameter that no rule names.
    """

    def rule_of(owner: nn.Module, name: str) -> ParameterRule | None:
        pattern = next((pattern for pattern in _RULES if fnmatchcase(name, pattern)), None)
        if pattern is None:
            return None
        return _RULES[pattern].learning(router_lr_mult) if pattern == ROUTER else _RULES[pattern]

    return {parameter: rule for chunk in chunks for parameter, rule in classify(chunk, rule_of).items()}
