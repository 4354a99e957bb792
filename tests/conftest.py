"""What every test starts with."""

import pytest
import torch


@pytest.fixture(autouse=True)
def fixed_random_numbers():
    """A test that draws without a generator of its own draws the same numbers every time."""
    torch.manual_seed(0)
