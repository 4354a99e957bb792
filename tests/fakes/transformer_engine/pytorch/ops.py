"""megatron-core names these types in annotations."""


class Sequential:
    """A chain of operations."""


class FusibleOperation:
    """One of them."""
