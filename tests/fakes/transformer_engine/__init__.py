"""Transformer Engine's interface on a CPU, for tests (see README.md beside this package)."""

from transformer_engine import common, pytorch

__version__ = "2.9.0"
__all__ = ["common", "pytorch"]
