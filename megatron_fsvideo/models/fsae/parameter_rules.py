"""Which parameters of convolutional networks decay, and which take Muon."""

from torch import nn

from megatron_fsvideo.models.fsae.convolutions import VideoConv3d
from megatron_fsvideo.models.fsae.layers import PixelNorm
from megatron_fsvideo.models.parameter_rules import MATRIX, UNDECAYED, ParameterRule, ParameterRules, classify

_NORMS = (PixelNorm, nn.GroupNorm)
_CONVOLUTIONS = (VideoConv3d, nn.Conv2d, nn.Conv3d)


def fsae_parameter_rules(network: nn.Module) -> ParameterRules:
    """The rule of every parameter of an autoencoder, a discriminator or a latent upsampler.

    Dense kernels decay and take Muon. A grouped kernel is no matrix from inputs to outputs: it does neither.

    Raises:
        ValueError: a parameter of a module that no rule names.
    """
    return classify(network, convolutional_rule)


def convolutional_rule(owner: nn.Module, name: str) -> ParameterRule | None:
    """The rule of a parameter of a convolution or a norm; None of another module's."""
    if isinstance(owner, _NORMS):
        return UNDECAYED
    if isinstance(owner, _CONVOLUTIONS):
        return MATRIX if owner.groups == 1 and name.endswith("weight") else UNDECAYED
    return None
