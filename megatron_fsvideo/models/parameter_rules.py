"""Rules by which the optimizer treats each parameter. Every network gives a rule for every parameter it has."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn


@dataclass(frozen=True)
class ParameterRule:
    """Rule by which one parameter is trained.

    Attributes:
        decays: weight decay reaches it.
        takes_muon: with optimizer muon, Muon updates it: a kernel that maps all inputs to each output.
        lr_mult: its learning rate as a multiple of AdamW's.
    """

    decays: bool
    takes_muon: bool = False
    lr_mult: float = 1.0

    def learning(self, lr_mult: float) -> "ParameterRule":
        """Return this rule with another multiple of the learning rate."""
        return replace(self, lr_mult=lr_mult)


UNDECAYED = ParameterRule(decays=False)
DECAYED = ParameterRule(decays=True)
MATRIX = ParameterRule(decays=True, takes_muon=True)

ParameterRules = dict[nn.Parameter, ParameterRule]
RuleOf = Callable[[nn.Module, str], ParameterRule | None]


def classify(network: nn.Module, rule_of: RuleOf) -> ParameterRules:
    """The rule of every parameter of a network.

    Args:
        rule_of: gets the module that owns a parameter and the parameter's name in the network, and returns its rule or,
            for a parameter that it does not know, None.

    Raises:
        ValueError: a parameter has no rule.
    """
    rules = {}
    for prefix, owner in network.named_modules():
        for name, parameter in owner.named_parameters(prefix, recurse=False):
            rule = rule_of(owner, name)
            if rule is None:
                raise ValueError(
                    f"parameter {name} of {type(network).__name__} has no rule: say in the network's parameter rules "
                    "whether it decays and whether Muon updates it"
                )
            rules[parameter] = rule
    return rules
