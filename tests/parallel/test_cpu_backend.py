"""The CPU backend changes what Megatron sees, where it is entered, and nothing else."""

import threading

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from megatron_fsvideo.parallel import cpu_backend
from megatron_fsvideo.parallel.cpu_backend import megatron_on_cpu
from tests.parallel.harness import run_workers

pytestmark = pytest.mark.skipif(not cpu_backend.needed(), reason="this machine has a CUDA device")


def installed(check):
    """Run a check in a process of its own, where the backend is installed for good."""

    def work():
        cpu_backend.install()
        return check()

    return run_workers(work, 1)[0]


def test_inside_the_mode_cuda_means_cpu():
    def check():
        with megatron_on_cpu():
            tensor = torch.zeros(2, device="cuda")
            return [
                str(tensor.device),
                tensor.type(),
                str(tensor.to("cuda").device),
                str(tensor.cuda().device),
                str(torch.cuda.current_device()),
                torch.zeros(1, dtype=torch.bfloat16).type(),
            ]

    assert installed(check) == ["cpu", "torch.cuda.FloatTensor", "cpu", "cpu", "cpu", "torch.cuda.BFloat16Tensor"]


def test_outside_the_mode_tensors_tell_the_truth():
    def check():
        with megatron_on_cpu():
            pass
        with pytest.raises((AssertionError, RuntimeError)):
            torch.zeros(2, device="cuda")
        return torch.zeros(1).type()

    assert installed(check) == "torch.FloatTensor"


def test_another_thread_is_not_in_the_mode():
    def check():
        seen = []
        with megatron_on_cpu():
            thread = threading.Thread(target=lambda: seen.append(torch.zeros(1).type()))
            thread.start()
            thread.join()
        return seen

    assert installed(check) == ["torch.FloatTensor"]


def test_torch_compile_works_after_install():
    def check():
        compiled = torch.compile(lambda x: torch.sin(x) + 1, backend="aot_eager", fullgraph=True)
        x = torch.linspace(0, 1, 5)
        return (compiled(x) - (torch.sin(x) + 1)).abs().max().item()

    assert installed(check) == 0


def test_diffusers_gives_the_same_numbers():
    def sample():
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(5)
        x = torch.linspace(-1, 1, 7)
        for timestep in scheduler.timesteps:
            x = scheduler.step(0.5 * x, timestep, x).prev_sample
        return x

    assert torch.equal(installed(sample), run_workers(sample, 1)[0])


def test_install_refuses_a_cuda_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="CUDA"):
        cpu_backend.install()
    with megatron_on_cpu():
        assert torch.zeros(1).type() == "torch.FloatTensor"


def test_results_are_independent_of_the_mode():
    def check():
        torch.manual_seed(0)
        layer, x = torch.nn.Linear(8, 8), torch.randn(4, 8)
        plain = layer(x).softmax(-1)
        with megatron_on_cpu():
            inside = layer(x).softmax(-1)
        return torch.equal(plain, inside)

    assert installed(check)
