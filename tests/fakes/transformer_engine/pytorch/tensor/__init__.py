"""Tensors that are stored in FP8; none is here."""


class QuantizedTensor:
    """What megatron-core asks whether a parameter is."""
