"""What every test starts with."""

from pathlib import Path

import pytest
import torch


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests of a GPU are skipped where there is none, so that tools/gpu_session.sh runs anywhere."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")


@pytest.fixture(autouse=True)
def fixed_random_numbers():
    """A test that draws without a generator of its own draws the same numbers every time."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_process_groups_in_the_test_process():
    """A forked worker would inherit groups whose threads stayed behind, and wait for them for ever."""
    yield
    assert not torch.distributed.is_initialized(), "make process groups in workers: tests/parallel/harness.py"


@pytest.fixture(scope="session")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DINOv2 of random weights that costs nothing, as transformers saves one."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14, mlp_ratio=2
    )
    folder = tmp_path_factory.mktemp("dino")
    transformers.Dinov2Model(config).save_pretrained(folder)
    return folder
