"""Tied tensors that files store all the same: their bytes may be those of another tensor, or values of their own.

transformers 5 ties what config.json calls tied only if the files do not hold two different tensors
(transformers.modeling_utils, tie_weights). A lock says which of both it is.
"""

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path

from packager.errors import SourceError
from packager.model.safetensors_file import StoredTensor, tensor_chunks

# Returns whether two tensors of one shape and dtype hold the same bytes.
Same = Callable[[StoredTensor, StoredTensor], bool]

_MOST_COMPARED = 16  # tensors of one shape; a model has one that is like its head


def same_bytes(a: StoredTensor, b: StoredTensor) -> bool:
    """Compare two tensors of files on this machine."""
    return all(one == other for one, other in zip(tensor_chunks(a), tensor_chunks(b), strict=True))


def own_values(tied: Iterable[str], stored: Mapping[str, StoredTensor], same: Same = same_bytes) -> tuple[str, ...]:
    """Return which tied tensors are stored with values of their own: those of no other tensor of their shape.

    Args:
        tied: names of tensors that the model takes from others.
        stored: the tensors of the files.
        same: compares two of them.
    """
    tied = set(tied)

    def is_own(tensor: StoredTensor) -> bool:
        kind = tensor.info.shape, tensor.info.dtype
        others = (x for name, x in stored.items() if name not in tied and (x.info.shape, x.info.dtype) == kind)
        return not any(same(tensor, other) for other in islice(others, _MOST_COMPARED))

    return tuple(name for name in sorted(tied & stored.keys()) if is_own(stored[name]))


def check_tied(tied: Iterable[str], stored: Mapping[str, StoredTensor], folder: Path) -> None:
    """Refuse a tied tensor with values of its own; a branch leaves it out.

    Raises:
        SourceError: there is one, and the lock calls it tied.
    """
    for name in own_values(tied, stored):
        raise SourceError(
            "the lock says that this tensor is tied to another, and the weights hold values of its own for it",
            where=f"{folder}: {name}", why="a quantized branch would lose them",
            hint="make the lock anew, which then keeps these values: packager lock",
        )  # fmt: skip
