"""Choose the device that computes, and name it in receipts. torch is imported only when a function is called."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from packager.errors import MachineError

if TYPE_CHECKING:
    import torch

# Parameters. A CPU quantizes the demo in seconds and a 13B model in days: larger models need a GPU.
LARGEST_ON_CPU = 1_000_000_000
DeviceChoice = Literal["auto", "cpu", "cuda"]
# Device files of NVIDIA's driver, of WSL and of AMD's driver; torch calls the GPUs of all three "cuda".
_GPU_DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/dxg"), Path("/dev/kfd"))

# An environment variable and its value. Quantizing allocates and frees tensors of many sizes: without this,
# fragmentation loses a fifth of a GPU's memory. torch reads it when it first allocates on a GPU.
GPU_ALLOCATION = ("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def choose_device(choice: DeviceChoice) -> "torch.device":
    """Return the device to compute on; "auto" takes a CUDA GPU where there is one.

    Raises:
        MachineError: "cuda" was chosen and there is none.
    """
    import torch

    if choice == "cuda" and not torch.cuda.is_available():
        raise MachineError("no CUDA GPU", why="torch.cuda.is_available() is False", hint="use --device cpu or auto")
    if choice != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", 0)
    return torch.device("cpu")


def device_type(choice: DeviceChoice) -> str:
    """Return the type of the device to compute on, "cpu" or "cuda"; import torch only where a GPU's driver is loaded.

    Raises:
        MachineError: "cuda" was chosen and there is none.
    """
    if choice == "cpu" or (choice == "auto" and not any(map(Path.exists, _GPU_DRIVERS))):
        return "cpu"
    return choose_device(choice).type


def same_devices(device: "torch.device") -> "tuple[torch.device, ...]":
    """Return a device and, if it is a GPU, every other GPU of the same name: all of them make the same bytes."""
    import torch

    if device.type == "cpu":
        return (device,)
    found = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    name = torch.cuda.get_device_name(device)
    others = [other for other in found if other != device and torch.cuda.get_device_name(other) == name]
    return (device, *others)


def device_name(device: "torch.device") -> str:
    """Return the device's name in a receipt: the GPU's name, or "cpu"."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


@contextmanager
def gpu_memory_errors(hint: str) -> Iterator[None]:
    """Translate torch's OutOfMemoryError.

    Args:
        hint: what the user can do about it.

    Raises:
        MachineError: the body ran out of GPU memory.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MachineError(
            "the GPU's memory is exhausted", why=str(error).partition(".")[0], hint=hint
        ) from error  # fmt: skip


@contextmanager
def limit_gpu_memory(devices: "Sequence[torch.device]", limit: int | None) -> Iterator[None]:
    """Let torch allocate at most `limit` bytes of each GPU in the body, and all of it again afterwards.

    Args:
        devices: CPUs are ignored.
        limit: bytes per GPU; None for no limit.
    """
    import torch

    gpus = [device for device in devices if device.type == "cuda"] if limit is not None else []
    try:
        for device in gpus:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, (limit or 0) / total), device)
        yield
    finally:
        for device in gpus:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
