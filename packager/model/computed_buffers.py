"""Compute the buffers that files do not store (rotary tables, masks, scales) of a model on the meta device.

Models of transformers 5 are always built on the meta device and then filled, so every model's own `_init_weights`
computes these buffers. It leaves tensors alone that are marked as initialised.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from packager.errors import SourceError


def compute_buffers(model: nn.Module, names: Iterable[str], device: torch.device) -> None:
    """Compute all buffers on the meta device of the named modules themselves (not of the modules inside them).

    Args:
        model: a model of transformers; tensors that are already loaded are not changed.
        names: of modules; "" is the model.
        device: where the buffers are needed. They are computed on the CPU.

    Raises:
        SourceError: the model's own code does not compute a buffer; names it.
    """
    for name in names:
        module = model.get_submodule(name)
        computed = module._non_persistent_buffers_set  # files store the others
        buffers = {
            key: buffer for key, buffer in module.named_buffers(recurse=False) if buffer.is_meta and key in computed
        }
        if buffers:
            _compute(model, name, buffers)
            for key in buffers:
                module._buffers[key] = module._buffers[key].to(device)  # type: ignore[union-attr]


def _compute(model: nn.Module, name: str, buffers: dict[str, Tensor]) -> None:
    """Compute buffers of a module on the CPU; some models do that only where they initialise themselves."""
    module, owners = model.get_submodule(name), _owners(model, name)
    left: list[str] = []
    for owner, initialised in ((owners[0], module), *((owner, owner) for owner in owners)):
        first, second = (_initialised(module, buffers, owner, initialised, fill) for fill in (0, 1))
        left = [key for key in buffers if not torch.equal(first[key], second[key])]
        if not left:
            return
    raise SourceError(
        "transformers does not compute a buffer that the files do not store", where=f"{name}.{left[0]}",
        why=f"{type(module).__name__} computes it in __init__ only",
        hint="this architecture cannot be quantized with the installed transformers",
    )  # fmt: skip


def _initialised(
    module: nn.Module, buffers: dict[str, Tensor], owner: Any, initialised: nn.Module, fill: int
) -> dict[str, Tensor]:
    """Return the buffers after the owner's code ran over `initialised`; those that it leaves alone keep `fill`."""
    for key, buffer in buffers.items():
        module._buffers[key] = torch.full(buffer.shape, fill, dtype=buffer.dtype)
    computed = {id(module._buffers[key]) for key in buffers}
    tensors: list[Any] = [tensor for part in (owner, module) for tensor in (*part.parameters(), *part.buffers())]
    for tensor in tensors:
        if not tensor.is_meta and id(tensor) not in computed:
            tensor._is_hf_initialized = True  # transformers leaves it alone
    with torch.no_grad():
        owner._init_weights(initialised)
    return {key: module._buffers[key].clone() for key in buffers}  # type: ignore[union-attr]


def _owners(model: nn.Module, name: str) -> list[Any]:
    """Return the models of transformers that a module is part of, innermost first: their `_init_weights` know it."""
    from transformers import PreTrainedModel

    parts = name.split(".") if name else []
    modules = [model.get_submodule(".".join(parts[:end])) for end in range(len(parts), -1, -1)]
    owners = [module for module in modules if isinstance(module, PreTrainedModel)]
    if not owners:
        raise SourceError("this is no model of transformers", where=name)
    return owners
