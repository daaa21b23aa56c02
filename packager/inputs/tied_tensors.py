"""Tied tensors that files store all the same: their bytes must be those of the tensor to which they are tied."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from packager.errors import SourceError
from packager.model.model_folder import open_model_file
from packager.model.safetensors_file import StoredTensor

_CHUNK_BYTES = 1 << 24


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
    return all(one == other for one, other in zip(_chunks(a), _chunks(b), strict=True))


def _chunks(tensor: StoredTensor) -> Iterator[bytes]:
    with open_model_file(tensor.path) as reader:
        reader.seek(tensor.offset)
        for begin in range(0, tensor.info.size_bytes, _CHUNK_BYTES):
            size = min(_CHUNK_BYTES, tensor.info.size_bytes - begin)
            chunk = reader.read(size)
            if len(chunk) != size:
                raise SourceError(
                    "a tensor's file ended early", where=str(tensor.path), why=f"reading {tensor.info.name}"
                )
            yield chunk
