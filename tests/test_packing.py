"""The checkpoint's tensors against a bit string and an unpacking of their own, with Python's integers."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from packager.errors import SourceError
from packager.model import batches
from packager.model.packing import (
    CheckpointReader,
    dequantize_linear,
    pack,
    pack_zeros,
    unpack,
    unpack_zeros,
    values_per_pack,
)
from tests.hypothesis_profiles import examples


@settings(max_examples=examples(80))
@given(data=st.data(), bits=st.sampled_from([2, 3, 4, 8]))
def test_pack_is_one_little_endian_bit_stream(data, bits):
    per = values_per_pack(bits)
    n = per * data.draw(st.integers(1, 4))
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=n, max_size=n))
    words = pack(torch.tensor(values, dtype=torch.uint8)[:, None], bits)
    stream = sum(value << (bits * i) for i, value in enumerate(values))
    expected = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(n * bits // 32)]
    assert [word & 0xFFFFFFFF for word in words[:, 0].tolist()] == expected
    assert unpack(words, bits)[:, 0].tolist() == values


@pytest.mark.parametrize(("bits", "word"), [(4, 0x77777777), (8, 0x7F7F7F7F), (2, 0x55555555)])
def test_symmetric_zeros_are_stored_minus_one(bits, word):
    zeros = torch.full((3, 32), 2 ** (bits - 1), dtype=torch.uint8)
    packed = pack_zeros(zeros, bits)
    assert packed.shape == (3, 32 * bits // 32)
    assert set(packed.flatten().tolist()) == {word}
    assert torch.equal(unpack_zeros(packed, bits), zeros)


def test_values_that_do_not_fill_words_are_refused():
    with pytest.raises(ValueError, match="whole 32-bit words"):
        pack(torch.zeros(31, 2, dtype=torch.uint8), 3)


def values_of(words: list[int], bits: int) -> list[int]:
    """Return the values of one packed column or row, read from one long integer."""
    stream = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return [(stream >> (bits * i)) & (2**bits - 1) for i in range(32 * len(words) // bits)]


def oracle_weight(tensors: dict[str, torch.Tensor], bits: int) -> list[list[float]]:
    """Return the weight [out_features][in_features] by the v1 format's definition, one number at a time."""
    q = [values_of(column, bits) for column in tensors["qweight"].T.tolist()]
    stored_zeros = [values_of(row, bits) for row in tensors["qzeros"].tolist()]
    groups, scales = tensors["g_idx"].tolist(), tensors["scales"].tolist()
    return [
        [scales[group][out] * (q[out][i] - (stored_zeros[group][out] + 1)) for i, group in enumerate(groups)]
        for out in range(len(q))
    ]


def packed_linear(bits: int) -> dict[str, torch.Tensor]:
    """Return the packed tensors of a linear with 64 columns in 3 scattered groups, made without the package's code."""
    generator = torch.Generator().manual_seed(bits)

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64).to(torch.int32)

    return {
        "qweight": words(64 * bits // 32, 32),
        "qzeros": words(3, bits),
        "scales": torch.rand(3, 32, generator=generator).half(),
        "g_idx": torch.randint(0, 3, (64,), generator=generator, dtype=torch.int32),
    }


@pytest.mark.parametrize("at_once", [2**20, 32 * 32, 1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_linear_is_dequantized_as_the_format_defines(bits, at_once, monkeypatch):
    """At once, in two halves, and 32 of 64 columns (8 for 4 bits) at a time."""
    monkeypatch.setitem(batches.DEQUANTIZED_AT_ONCE, "cpu", at_once)
    tensors = packed_linear(bits)
    if bits == 8:  # a stored 255 stands for 256, which no grid has and uint8 does not hold
        tensors["qzeros"] &= 0x7F7F7F7F
    found = dequantize_linear(tensors.__getitem__, bits)
    assert found.dtype == torch.float32
    assert found.shape == (32, 64)
    assert found.is_contiguous()
    assert found.tolist() == torch.tensor(oracle_weight(tensors, bits), dtype=torch.float32).tolist()
    assert torch.equal(dequantize_linear(tensors.__getitem__, bits, torch.bfloat16), found.bfloat16())


@pytest.mark.parametrize("bits", [3, 4])
def test_a_checkpoint_is_read_over_all_its_files(tmp_path: Path, bits: int):
    linear, norm = packed_linear(bits), torch.rand(8).half()
    parts = {f"model.layers.0.mlp.up_proj.{name}": tensor for name, tensor in linear.items()}
    first = {name: parts.pop(name) for name in list(parts)[:2]}
    save_file(first, tmp_path / "model-00001-of-00002.safetensors")
    save_file(parts | {"model.norm.weight": norm}, tmp_path / "model-00002-of-00002.safetensors")
    read = CheckpointReader(tmp_path, bits)
    assert torch.equal(read("model.norm.weight"), norm)
    expected = torch.tensor(oracle_weight(linear, bits), dtype=torch.float32)
    assert torch.equal(read("model.layers.0.mlp.up_proj.weight"), expected)


@pytest.mark.parametrize("lost", ["g_idx", "scales"])
def test_a_missing_tensor_is_named(tmp_path: Path, lost: str):
    tensors = {f"linear.{name}": tensor for name, tensor in packed_linear(4).items() if name != lost}
    save_file(tensors, tmp_path / "model.safetensors")
    read = CheckpointReader(tmp_path, 4)
    for name, missing in (("linear.weight", f"linear.{lost}"), ("model.norm.weight", "model.norm.weight")):
        with pytest.raises(SourceError, match="lacks a tensor") as caught:
            read(name)
        assert missing in str(caught.value)
