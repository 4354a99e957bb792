"""What every test starts with."""

import pytest
import torch


@pytest.fixture(autouse=True)
def fixed_random_numbers():
    """A test that draws without a generator of its own draws the same numbers every time."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_process_groups_in_the_test_process():
    """A forked worker would inherit groups whose threads stayed behind, and wait for them for ever."""
    yield
    assert not torch.distributed.is_initialized(), "make process groups in workers: tests/parallel/harness.py"
