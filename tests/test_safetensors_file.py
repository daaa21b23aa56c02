"""`safetensors_file` against the reference implementation, in both directions, and against hostile files."""

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from packager.errors import SourceError
from packager.model import safetensors_file
from packager.model.safetensors_file import (
    METADATA,
    StoredTensor,
    TensorInfo,
    copy_tensor,
    file_order,
    header_bytes,
    layout,
    read_header,
    stored_tensors,
)
from packager.model.tensor_tree import predicted_bytes
from tests.hypothesis_profiles import examples
from tests.tensor_trees import tree_of
from tests.test_lock_memory import Live

NUMPY_DTYPES = {
    "F64": np.float64, "I64": np.int64, "U64": np.uint64, "F32": np.float32, "I32": np.int32, "U32": np.uint32,
    "F16": np.float16, "I16": np.int16, "U16": np.uint16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip

tensors_of_any_kind = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda n: n != "__metadata__"),
    st.tuples(st.sampled_from(sorted(NUMPY_DTYPES)), st.lists(st.integers(0, 5), max_size=3)),
    min_size=1,
    max_size=8,
)
few = settings(max_examples=examples(60), suppress_health_check=[HealthCheck.function_scoped_fixture])


def make_file(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(dtype: object = "F16", shape: object = (2,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def put_in_place(path: Path, tensors: Iterable[StoredTensor], *, chunk_bytes: int = 1 << 24) -> None:
    """Make a file by copying stored tensors to the places that `layout` gives them."""
    stored = {tensor.info.name: tensor for tensor in tensors}
    header, places = layout(path, [tensor.info for tensor in stored.values()])
    with path.open("wb") as stream:
        stream.write(header)
        stream.flush()
        for name, place in places.items():
            assert place.path == path
            copy_tensor(stored[name], stream.fileno(), place.offset, chunk_bytes=chunk_bytes)


def random_arrays(kinds: dict[str, tuple[str, list[int]]]) -> dict[str, np.ndarray]:
    random = np.random.default_rng(7)
    return {
        name: np.asarray(random.integers(0, 2, shape)).astype(NUMPY_DTYPES[dtype])
        for name, (dtype, shape) in kinds.items()
    }


@few
@given(kinds=tensors_of_any_kind)
def test_reads_files_of_the_reference_and_predicts_their_sizes(tmp_path: Path, kinds: dict[str, Any]) -> None:
    arrays = random_arrays(kinds)
    path = tmp_path / "reference.safetensors"
    save_file(arrays, path, metadata=METADATA)
    header = read_header(path)
    assert header.metadata == METADATA
    assert {name: (info.dtype, list(info.shape)) for name, info in header.tensors.items()} == dict(kinds)
    assert predicted_bytes(tree_of(header.tensors.values())) == path.stat().st_size
    data = path.read_bytes()
    for name, stored in stored_tensors(path).items():
        raw = data[stored.offset : stored.offset + stored.info.size_bytes]
        assert raw == arrays[name].tobytes()


@few
@given(kinds=tensors_of_any_kind)
def test_gives_every_tensor_the_place_that_the_reference_gives_it(tmp_path: Path, kinds: dict[str, Any]) -> None:
    reference, ours = tmp_path / "reference.safetensors", tmp_path / "ours.safetensors"
    save_file(random_arrays(kinds), reference, metadata=METADATA)
    put_in_place(ours, stored_tensors(reference).values(), chunk_bytes=3)
    assert ours.read_bytes() == reference.read_bytes()


def test_stores_16_bit_floats_and_packed_words_in_the_reference_s_order(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    tensors = {
        "a.scales": torch.ones(3, 4, dtype=torch.float16),
        "a.qweight": torch.ones(2, 4, dtype=torch.int32),
        "b.weight": torch.ones(4, 4, dtype=torch.bfloat16),
        "c.weight": torch.ones(4, dtype=torch.float32),
        "d.weight": torch.ones(4).to(torch.float8_e4m3fn),
        "e.weight": torch.ones(4).to(torch.float8_e5m2),
    }
    reference, ours = tmp_path / "reference.safetensors", tmp_path / "ours.safetensors"
    save_torch(tensors, reference, metadata=METADATA)
    put_in_place(ours, reversed(list(stored_tensors(reference).values())))
    assert ours.read_bytes() == reference.read_bytes()


def test_gathers_tensors_from_several_files_under_new_names(tmp_path: Path) -> None:
    one, two, out = (tmp_path / f"{name}.safetensors" for name in ("one", "two", "out"))
    save_file({"x": np.arange(6, dtype=np.int32).reshape(2, 3)}, one)
    save_file({"y": np.arange(4, dtype=np.float16), "unused": np.zeros(9)}, two)
    x, y = stored_tensors(one)["x"], stored_tensors(two)["y"]
    renamed = StoredTensor(info=TensorInfo(name="z", dtype="I32", shape=(6,)), path=x.path, offset=x.offset)
    put_in_place(out, [y, renamed])
    assert predicted_bytes(tree_of([y.info, renamed.info])) == out.stat().st_size
    loaded = load_file(out)
    np.testing.assert_array_equal(loaded["z"], np.arange(6))
    np.testing.assert_array_equal(loaded["y"], np.arange(4))
    with safe_open(out, "numpy") as reader:
        assert reader.metadata() == {"format": "pt"}


def test_a_header_is_padded_to_8_bytes_and_an_empty_file_is_one() -> None:
    raw = header_bytes(file_order([TensorInfo(name="x", dtype="U8", shape=(3,))]))
    assert len(raw) % 8 == 0
    assert int.from_bytes(raw[:8], "little") == len(raw) - 8
    assert predicted_bytes(tree_of([])) == len(header_bytes([]))


def test_a_source_that_shrank_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    save_file({"x": np.zeros(64)}, path)
    stored = stored_tensors(path)["x"]
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(SourceError, match="ended early"):
        put_in_place(tmp_path / "out.safetensors", [stored])


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    save_file({"x": np.zeros(3, dtype=np.float32), "y": np.zeros(2, dtype=np.int32)}, whole)
    data, path = whole.read_bytes(), tmp_path / "cut.safetensors"
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(SourceError, match=r"cut off|does not fit"):
            read_header(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(SourceError, match="the file holds 21"):
        read_header(path)


def test_a_missing_file_is_a_source_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot be read"):
        read_header(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        pytest.param({"a": entry(), "b": entry(offsets=(6, 10))}, 10, "begins at byte 6, expected 4", id="hole"),
        pytest.param({"a": entry(), "b": entry(offsets=(2, 6))}, 6, "begins at byte 2, expected 4", id="overlap"),
        pytest.param({"a": entry(offsets=(4, 8))}, 8, "begins at byte 4, expected 0", id="hole at the start"),
        pytest.param({"a": entry()}, 6, "describes 4 bytes", id="data left over"),
        pytest.param({"a": entry(dtype="F17")}, 4, "unknown dtype F17", id="unknown dtype"),
        pytest.param({"a": entry(dtype=["F16"])}, 4, "", id="dtype is a list"),
        pytest.param({"a": entry(shape=(3,))}, 4, "4 bytes where its shape needs 6", id="shape too large"),
        pytest.param({"a": entry(shape=(-1, -2))}, 4, "negative", id="negative shape"),
        pytest.param({"a": entry(shape=(2.0,))}, 4, "fractional", id="fractional shape"),
        pytest.param({"a": entry(shape=(True, 2))}, 4, "fractional", id="boolean shape"),
        pytest.param({"a": entry(shape="2")}, 4, "not a list", id="text as shape"),
        pytest.param({"a": entry(shape=(1 << 40, 1 << 40))}, 4, "its shape needs", id="product beyond 64 bits"),
        pytest.param({"a": entry(shape=[1] * 5000)}, 4, "not a list of at most", id="5000 dimensions"),
        pytest.param({"a": entry(offsets=(0,))}, 4, "", id="one offset"),
        pytest.param({"a": entry(offsets=(4, 0))}, 4, "", id="offsets reversed"),
        pytest.param({"a": entry(offsets=(0, 4, 8))}, 4, "", id="three offsets"),
        pytest.param({"a": entry(offsets=(-4, 0))}, 4, "negative", id="negative offset"),
        pytest.param({"a": {"dtype": "F16", "shape": [2]}}, 4, "'data_offsets' is missing", id="no offsets"),
        pytest.param({"a": [1, 2]}, 4, "", id="entry is a list"),
        pytest.param({"a": None}, 4, "", id="entry is null"),
        pytest.param([entry()], 4, "not a JSON object", id="header is a list"),
        pytest.param(b'"text"', 0, "not a JSON object", id="header is text"),
        pytest.param(b"{", 0, "", id="not JSON"),
        pytest.param(b"", 0, "", id="no header"),
        pytest.param(b"\xff\xfe{\0}\0", 0, "", id="UTF-16"),
        pytest.param(b"[" * 200_000, 0, "", id="deep nesting"),
        pytest.param(b'{"a":{"dtype":"F16","shape":[Infinity],"data_offsets":[0,4]}}', 4, "not JSON", id="infinity"),
        pytest.param(
            b'{"a":{"dtype":"F16","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}', 4, "", id="5000 digits"
        ),
        pytest.param({"__metadata__": {"format": 1}}, 0, "not an object of strings", id="metadata of numbers"),
        pytest.param({"__metadata__": ["pt"]}, 0, "not an object of strings", id="metadata is a list"),
    ],
)
def test_hostile_headers_are_refused(tmp_path: Path, header: object, data: int, message: str) -> None:
    path = make_file(tmp_path / "hostile.safetensors", header, bytes(data))
    with pytest.raises(SourceError) as caught:
        read_header(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert caught.value.hint


def test_a_key_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    one = json.dumps(entry())
    path = make_file(tmp_path / "twice.safetensors", f'{{"a":{one},"a":{one}}}'.encode(), bytes(4))
    with pytest.raises(SourceError, match="is given twice"):
        read_header(path)


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 100_000_001, 64, 3])
def test_a_false_header_length_is_refused_without_reading(tmp_path: Path, length: int) -> None:
    path = make_file(tmp_path / "long.safetensors", b"{}  ", length=length)
    with pytest.raises(SourceError, match=r"cut off|does not fit"):
        read_header(path)


def test_zero_sized_tensors_and_scalars_are_read(tmp_path: Path) -> None:
    path = make_file(
        tmp_path / "small.safetensors",
        {"scalar": entry("F32", [], (0, 4)), "none": entry("F16", [0, 7], (4, 4)), "__metadata__": {}},
        bytes(4),
    )
    assert read_header(path).tensors["scalar"].size_bytes == 4
    assert read_header(path).tensors["none"].size_bytes == 0


@few
@given(noise=st.binary(max_size=60), at=st.integers(0, 200))
def test_a_damaged_file_never_reads_as_something_the_reference_refuses(tmp_path: Path, noise: bytes, at: int) -> None:
    path = tmp_path / "damaged.safetensors"
    save_file({"x": np.zeros(3, dtype=np.float32), "y": np.zeros((2, 2), dtype=np.int32)}, path)
    data = path.read_bytes()
    path.write_bytes(data[:at] + noise + data[at + len(noise) :])
    try:
        read_header(path)
    except SourceError:
        return
    try:
        with safe_open(path, "numpy") as reader:
            list(reader.keys())
    except SafetensorError as error:
        pytest.fail(f"the reference refuses it: {error}")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_found_in_every_piece(monkeypatch: pytest.MonkeyPatch, dtype: str, value: float) -> None:
    import torch

    monkeypatch.setattr(safetensors_file, "_PIECE_ELEMENTS", 7)
    for position in range(20):
        tensor = torch.zeros(4, 5, dtype=getattr(torch, dtype))
        assert safetensors_file.all_finite(tensor)
        tensor.view(-1)[position] = value
        assert not safetensors_file.all_finite(tensor)
    assert safetensors_file.all_finite(torch.zeros(0, dtype=getattr(torch, dtype)))


def test_the_check_for_nan_takes_little_memory() -> None:
    import torch

    tensor = torch.zeros(1 << 12, 1 << 13, dtype=torch.bfloat16)
    with Live() as live:
        assert safetensors_file.all_finite(tensor)
    assert live.most < 0.4 * tensor.nbytes
