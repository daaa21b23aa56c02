"""The device that computes: the chosen one, or an error; several GPUs only if they are of the same kind."""

from types import SimpleNamespace

import pytest
import torch

from packager.errors import MachineError
from packager.model.decoder import compute_dtype
from packager.model.devices import choose_device, device_name, gpu_memory_errors, same_devices

CPU, GPUS = torch.device("cpu"), tuple(torch.device("cuda", number) for number in range(3))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs of one name and one of another."""
    names = ("H100", "L4", "H100")
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(
        is_available=lambda: True, device_count=lambda: 3, get_device_name=lambda device: names[device.index],
    ))  # fmt: skip


def test_a_machine_without_a_gpu_computes_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [choose_device("auto"), choose_device("cpu")] == [CPU, CPU]
    with pytest.raises(MachineError, match="no CUDA GPU"):
        choose_device("cuda")
    assert (same_devices(CPU), device_name(CPU)) == ((CPU,), "cpu")


@pytest.mark.usefixtures("gpus")
def test_a_gpu_is_used_unless_the_cpu_was_chosen():
    assert [choose_device("auto"), choose_device("cuda"), choose_device("cpu")] == [GPUS[0], GPUS[0], CPU]
    assert same_devices(GPUS[0]) == (GPUS[0], GPUS[2])
    assert same_devices(GPUS[1]) == (GPUS[1],)
    assert device_name(GPUS[1]) == "L4"


def test_a_gpu_computes_in_the_base_models_dtype_and_a_cpu_in_float32():
    assert compute_dtype("F16", GPUS[0]) == torch.float16
    assert compute_dtype("BF16, F32", GPUS[0]) == torch.bfloat16
    assert compute_dtype("BF16", CPU) == torch.float32


def test_torchs_memory_error_becomes_one_with_a_hint():
    with pytest.raises(MachineError, match="memory is exhausted") as caught, gpu_memory_errors("use a larger GPU"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
    assert (caught.value.why, caught.value.hint) == ("CUDA out of memory", "use a larger GPU")
