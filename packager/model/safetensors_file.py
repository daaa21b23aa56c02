"""Read and write safetensors files without torch: headers, exact sizes, and tensors at their offsets.

Format: 8 bytes little-endian header length, a JSON header padded with spaces to a multiple of 8, then the tensors'
bytes without gaps. Reference: https://github.com/huggingface/safetensors#format. Tensors are ordered as the reference
implementation orders them (by dtype, the widest first, then by name), so that files agree byte by byte.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from json.encoder import encode_basestring
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from packager.errors import SourceError
from packager.model.model_folder import open_model_file
from packager.model.strict_json import parse_json_object

if TYPE_CHECKING:
    import torch

# In the order in which the reference implementation (0.8.0) stores tensors: F32 before I32, BF16 before F16.
DTYPE_BYTES = {
    "U64": 8, "I64": 8, "F64": 8, "F32": 4, "U32": 4, "I32": 4, "BF16": 2, "F16": 2, "U16": 2, "I16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
_FILE_ORDER = {dtype: position for position, dtype in enumerate(DTYPE_BYTES)}
# A 405B model's 4,000 tensors need half a megabyte. A parsed header takes many times its size in memory.
_MAX_HEADER_BYTES = 32_000_000
_MOST_HEADER_VALUES = 2_000_000  # a tensor of two dimensions has seven commas and brackets
_MAX_NAME = 1000
_MAX_SHOWN = 40
_MAX_DIMENSIONS = 32
_PIECE_ELEMENTS = 1 << 22
METADATA = {"format": "pt"}


class TensorInfo(NamedTuple):  # a plan makes 100,000 of them for each variant: a dataclass takes three times as long
    """One tensor's name, dtype (safetensors spelling) and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return _size_bytes(self.dtype, self.shape)


@lru_cache(maxsize=4096)  # models have few different shapes
def _size_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * DTYPE_BYTES[dtype]


@dataclass(frozen=True, kw_only=True)
class Header:
    """A safetensors file's header: its tensors, their offsets [begin, end) in the file, and its metadata."""

    tensors: Mapping[str, TensorInfo]
    offsets: Mapping[str, tuple[int, int]]
    metadata: Mapping[str, str]


def file_order(tensors: Iterable[TensorInfo]) -> list[TensorInfo]:
    """Return the tensors in the order in which they are stored."""
    return sorted(tensors, key=lambda tensor: (_FILE_ORDER[tensor.dtype], tensor.name))


def header_bytes(tensors: Sequence[TensorInfo], metadata: Mapping[str, str] = METADATA) -> bytes:
    """Return the length prefix and the padded header for `tensors`, which must be in file order; see `file_bytes`."""
    entries = [_metadata_entry(metadata)]
    begin = 0
    for tensor in tensors:
        # Not by json.dumps: a plan needs the headers of 100,000 tensors, and dicts of them take three times as long.
        end, shape = begin + tensor.size_bytes, ",".join(map(str, tensor.shape))
        described = f'"dtype":"{tensor.dtype}","shape":[{shape}],"data_offsets":[{begin},{end}]'
        entries.append(f"{encode_basestring(tensor.name)}:{{{described}}}")
        begin = end
    text = f"{{{','.join(entries)}}}".encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _metadata_entry(metadata: Mapping[str, str]) -> str:
    return f'"__metadata__":{json.dumps(dict(metadata), separators=(",", ":"), ensure_ascii=False)}'


def file_bytes(entries_bytes: int, data_bytes: int) -> int:
    """Return the size of a file.

    Args:
        entries_bytes: of its header's entries, each with the comma before it: see `entry_bytes`.
        data_bytes: of its tensors.
    """
    length = 2 + len(_metadata_entry(METADATA).encode()) + entries_bytes
    return 8 + length + -length % 8 + data_bytes


@lru_cache(maxsize=4096)
def entry_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the length of a header's entry, with the comma before it, without the name and the two offsets."""
    return len(f',"":{{"dtype":"{dtype}","shape":[{",".join(map(str, shape))}],"data_offsets":[,]}}')


def read_header(path: Path) -> Header:
    """Read and check a file's header: well-formed JSON, known dtypes, no gap, no overlap, the right file size.

    Raises:
        SourceError: the file is truncated or not a safetensors file; names the expected and the found size.
    """
    try:
        with open_model_file(path) as stream:
            return header_from(stream.read, os.fstat(stream.fileno()).st_size, str(path))
    except OSError as error:
        raise SourceError("the file cannot be read", where=str(path), why=error.strerror or str(error)) from error


def header_from(read: Callable[[int], bytes], file_bytes: int, where: str) -> Header:
    """Read and check the header of a file that may lie elsewhere; see `read_header`.

    Args:
        read: returns the next bytes of the file, as many as it is given.
        file_bytes: size of the file.
        where: the file, for messages.

    Raises:
        SourceError: see `read_header`.
    """
    # Nothing is asked of an empty file: a server answers a range of no bytes with an error.
    length = int.from_bytes(read(8), "little") if file_bytes else 0
    if file_bytes < 8 or length > min(_MAX_HEADER_BYTES, file_bytes - 8):
        raise SourceError(
            "not a safetensors file, or cut off inside its header",
            where=where,
            why=f"the header claims {length} bytes, the file has {file_bytes}; a header may have {_MAX_HEADER_BYTES}",
            hint="copy or download the file again",
        )
    try:
        return _parse_header(read(length), file_bytes=file_bytes)
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(
            "the safetensors header does not fit the file",
            where=where,
            why=f"{error} is missing" if isinstance(error, KeyError) else str(error),
            hint="the file is damaged or cut off: copy or download it again",
        ) from error


def _parse_header(raw: bytes, *, file_bytes: int) -> Header:
    # A key given twice is refused: parsers disagree on which one counts, so two readers could see two files.
    entries = parse_json_object(raw, most_values=_MOST_HEADER_VALUES)
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise TypeError("__metadata__ is not an object of strings")
    tensors, offsets, data_begin = {}, {}, 8 + len(raw)
    for name, entry in entries.items():
        if len(name) > _MAX_NAME:
            raise ValueError(f"a tensor's name has {len(name)} characters")
        if not isinstance(entry, dict):
            raise TypeError(f"{name} is not described by an object")
        dtype = entry["dtype"]
        if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
            raise ValueError(f"{name} has the unknown dtype {str(dtype)[:_MAX_SHOWN]}")
        tensor = TensorInfo(name=name, dtype=dtype, shape=_naturals(name, entry["shape"], _MAX_DIMENSIONS))
        begin, end = _naturals(name, entry["data_offsets"], 2)
        if end - begin != tensor.size_bytes:
            raise ValueError(f"{name} has {end - begin} bytes where its shape needs {_shown_size(tensor.size_bytes)}")
        tensors[name], offsets[name] = tensor, (data_begin + begin, data_begin + end)
    position = data_begin
    for name, (begin, end) in sorted(offsets.items(), key=lambda item: item[1]):
        if begin != position:
            raise ValueError(f"{name} begins at byte {begin - data_begin}, expected {position - data_begin}")
        position = end
    if position != file_bytes:
        described, held = position - data_begin, file_bytes - data_begin
        raise ValueError(f"the header describes {described} bytes of tensors, the file holds {held}")
    return Header(tensors=tensors, offsets=offsets, metadata=metadata)


def _shown_size(size_bytes: int) -> str:
    """Return a number of bytes; 32 dimensions can mean one of 600 digits."""
    return str(size_bytes) if size_bytes < 1 << 64 else "more than 2^64"


def _naturals(name: str, values: object, at_most: int) -> tuple[int, ...]:
    """Return a list of at most `at_most` integers from 0 to 2^63 - 1 as a tuple; True and 2.0 are refused."""
    if not isinstance(values, list) or len(values) > at_most:
        raise ValueError(f"{name} has a shape or data_offsets that is not a list of at most {at_most} numbers")
    for value in values:  # a loop: `any` takes twice as long, and an index of 70,000 tensors has 140,000 lists
        if type(value) is not int or not 0 <= value < 1 << 63:
            what = "a number that is negative, fractional or too large"
            raise ValueError(f"{name} has a shape or data_offsets with {what}")
    return tuple(values)


class StoredTensor(NamedTuple):  # see `TensorInfo`
    """A tensor, and the file and offset of its bytes, which may still have to be written."""

    info: TensorInfo
    path: Path
    offset: int


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return every tensor of a safetensors file with the offset of its bytes.

    Raises:
        SourceError: see `read_header`.
    """
    return tensors_at(path, read_header(path))


def tensors_at(path: Path, header: Header) -> dict[str, StoredTensor]:
    """Return every tensor of a safetensors file whose header was read, with the offset of its bytes."""
    return {
        name: StoredTensor(info=info, path=path, offset=header.offsets[name][0])
        for name, info in header.tensors.items()
    }


def layout(
    path: Path, tensors: Iterable[TensorInfo], metadata: Mapping[str, str] = METADATA
) -> tuple[bytes, dict[str, StoredTensor]]:
    """Return the header of a file for `tensors`, and the offset of each tensor in it."""
    ordered = file_order(tensors)
    header = header_bytes(ordered, metadata)
    stored, offset = {}, len(header)
    for info in ordered:
        stored[info.name] = StoredTensor(info=info, path=path, offset=offset)
        offset += info.size_bytes
    return header, stored


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of `data` (bytes) at an offset of an open file."""
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def copy_tensor(source: StoredTensor, descriptor: int, offset: int, *, chunk_bytes: int = 1 << 24) -> None:
    """Copy a stored tensor's bytes to an offset of an open file; memory stays at one chunk.

    Raises:
        SourceError: the tensor's file ended early.
    """
    for chunk in tensor_chunks(source, chunk_bytes=chunk_bytes):
        write_at(descriptor, memoryview(chunk), offset)
        offset += len(chunk)


def tensor_chunks(stored: StoredTensor, *, chunk_bytes: int = 1 << 24) -> Iterator[bytes]:
    """Yield a stored tensor's bytes, `chunk_bytes` at a time.

    Raises:
        SourceError: the tensor's file ended early.
    """
    with open_model_file(stored.path) as reader:
        reader.seek(stored.offset)
        for begin in range(0, stored.info.size_bytes, chunk_bytes):
            size = min(chunk_bytes, stored.info.size_bytes - begin)
            chunk = reader.read(size)
            if len(chunk) != size:
                where, why = str(stored.path), f"reading {stored.info.name}"
                raise SourceError("a tensor's file ended early", where=where, why=why)
            yield chunk


def read_tensor(stored: StoredTensor) -> "torch.Tensor":
    """Read a stored tensor's bytes into a new CPU tensor.

    Raises:
        SourceError: the file ends early.
    """
    import torch

    dtypes = {
        "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
        "I32": torch.int32, "I64": torch.int64, "U8": torch.uint8,
    }  # fmt: skip
    # Not a bytearray: zeroing one holds the interpreter lock, which stops the thread that launches GPU work.
    data = torch.empty(stored.info.size_bytes, dtype=torch.uint8)
    with stored.path.open("rb", buffering=0) as stream:
        stream.seek(stored.offset)
        view, done = data.numpy().data, 0
        while done < len(view):  # an unbuffered read may return fewer bytes than requested
            count = stream.readinto(view[done:])
            if not count:
                where = str(stored.path)
                raise SourceError("a tensor's file ended early", where=where, why=f"reading {stored.info.name}")
            done += count
    return data.view(dtypes[stored.info.dtype]).reshape(stored.info.shape)


def all_finite(tensor: "torch.Tensor") -> bool:
    """Return whether a contiguous CPU tensor holds neither NaN nor Inf; piece by piece.

    torch's `isfinite` takes 2.5 times the bytes of a bfloat16 tensor while it runs: 840 MB for an embedding of
    [262144, 640].
    """
    import torch

    return all(bool(piece.isfinite().all()) for piece in torch.split(tensor.reshape(-1), _PIECE_ELEMENTS))
