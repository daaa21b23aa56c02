"""Tied tensors that files store all the same: their bytes must be those of the tensor to which they are tied."""

from collections.abc import Mapping
from pathlib import Path

from packager.errors import SourceError
from packager.model.safetensors_file import StoredTensor, tensor_chunks


def check_tied(tied: Mapping[str, StoredTensor], others: Mapping[str, StoredTensor], folder: Path) -> None:
    """Compare each tied tensor with the tensors of its shape; a branch leaves it out, so one of them must be equal.

    Raises:
        SourceError: a tied tensor has values of its own, such as a head that is not the embedding.
    """
    for name, tensor in tied.items():
        alike = [x for x in others.values() if (x.info.shape, x.info.dtype) == (tensor.info.shape, tensor.info.dtype)]
        if not any(_equal(tensor, other) for other in alike):
            raise SourceError(
                "the model says that this tensor is tied to another, and stores values of its own for it",
                where=f"{folder}: {name}", why="a quantized branch would lose them",
                hint="if these values are right, set tie_word_embeddings to false in config.json and write the lock "
                "anew; if they are left over, remove the tensor from the weights files",
            )  # fmt: skip


def _equal(a: StoredTensor, b: StoredTensor) -> bool:
    return all(one == other for one, other in zip(tensor_chunks(a), tensor_chunks(b), strict=True))
