"""Prove one of tests/tiny_decoders.py from end to end: described, run block by block, quantized, packed, read again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from packager.errors import SourceError
from packager.inputs.base_model import SourceModel, read_source
from packager.inputs.rows import TokenRows
from packager.model.architecture import Architecture, LinearSpec, architecture_of
from packager.model.checkpoint import checkpoint_tensors
from packager.model.decoder import Decoder, forward
from packager.model.describe import describe
from packager.model.lock import LockedModel
from packager.model.packing import CheckpointReader, dequantize_linear
from packager.model.safetensors_file import StoredTensor, read_tensor, stored_tensors
from packager.quantize.block import QuantizedBlock, _BlockSolver
from packager.quantize.job import QuantizeJob
from packager.quantize.sweep import quantize
from tests.tiny_decoders import open_decoder, tiny_decoder, token_ids
from tests.tiny_models import open_store, token_rows, variant

CPU = torch.device("cpu")
VARIANT = variant(act_order="full", damp_percent=0.1, damp_percent_limit=0.5)
# Both forwards make the same operations, most of them with the same bits. Experts add their outputs in an order that
# depends on the batch: 100 times the rounding of float32 (1.2e-7).
TOLERANCE = 1.2e-5

Facts = dict[str, Any]


def facts_of(name: str, folder: Path, *, quantized: bool = True) -> Facts:
    """Return what the reference page says of an architecture; an AssertionError tells which proof fails.

    Args:
        name: one of tiny_decoders.NAMES.
        folder: empty.
        quantized: make a variant too.
    """
    base = tiny_decoder(name, folder / "model")
    stored = stored_in(base)
    try:
        locked = describe(base, {key: tensor.info for key, tensor in stored.items()})
    except SourceError as error:
        where = f"{error.where}: " if error.where and str(folder) not in error.where else ""
        return {"refused": f"{where}{error.what}{f' ({error.why})' if error.why else ''}"}
    architecture = architecture_of(locked, name)
    check_forward(name, base, stored)
    if quantized and architecture.linears:
        check_packed(name, read_source(base, architecture, base_id="test/model"), folder / "work")
    return _facts(locked, architecture)


def stored_in(folder: Path) -> dict[str, StoredTensor]:
    stored: dict[str, StoredTensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        stored |= stored_tensors(path)
    return stored


def _facts(locked: LockedModel, architecture: Architecture) -> Facts:
    return {
        "model_class": locked.model_class,
        "blocks_path": locked.blocks_path,
        "kinds": [
            {
                "blocks": kind.blocks,
                "linears": sum(len(group.linears) for group in kind.groups),
                "left": dict(sorted(kind.left.items())),
            }
            for kind in locked.kinds
        ],
        "built": bool(architecture.linears),
    }


def check_forward(name: str, base: Path, stored: dict[str, StoredTensor]) -> None:
    """Compare logits block by block with those of transformers, for batches of 2 and 1 rows and two lengths."""
    decoder = Decoder(base, lambda key: read_tensor(stored[key]), names=stored, device=CPU, dtype=torch.float32)
    model, _ = open_decoder(base, name)
    for rows, length in ((3, 24), (2, 17)):
        ids = token_ids(rows, length, seed=length)
        found = torch.cat([decoder.logits(states) for states in forward(decoder, ids, rows=2)])
        with torch.no_grad():
            expected = torch.cat([model(input_ids=part, use_cache=False).logits.float() for part in ids.split(2)])
        assert found.shape == expected.shape
        for row, expected_row in zip(found, expected, strict=True):
            difference = float((row - expected_row).norm() / expected_row.norm())
            assert difference <= TOLERANCE, f"the forward differs by {difference:.1e}"


@contextmanager
def _meant() -> Iterator[dict[str, Tensor]]:
    """Collect by name the weights with which a block goes on; of experts, the rows of gate lie above those of up."""
    meant: dict[str, Tensor] = {}
    run = _BlockSolver.run

    def note(solver: _BlockSolver, load: Callable[[], nn.Module]) -> QuantizedBlock:
        result = run(solver, load)
        block, job = solver._block, solver._job
        meant.update((name, block.get_parameter(f"{module}.weight").clone()) for module, name in job.names.items())
        for parameter, experts in job.experts.items():
            for weight, linears in zip(block.get_parameter(parameter), experts, strict=True):
                rows = weight.split([linear.out_features for linear in linears])
                meant.update((linear.name, row.clone()) for linear, row in zip(linears, rows, strict=True))
        return result

    with patch.object(_BlockSolver, "run", note):
        yield meant


def _read_part(packed: dict[str, StoredTensor], linear: str, part: str) -> Tensor:
    return read_tensor(packed[f"{linear}.{part}"])


def _original(name: str, source: SourceModel, linear: LinearSpec) -> Tensor:
    """Return a weight of the base model; of experts that it stores as one tensor, from transformers' parameter."""
    if f"{linear.name}.weight" in source.tensors:
        return source.read(f"{linear.name}.weight").float()
    model, _ = open_decoder(source.folder, name)
    parameter = model.get_parameter(f"{source.architecture.blocks_path}.{linear.block}.{linear.parameter}")
    expert = int(linear.module.split(".")[-2])
    below = linear.parameter.endswith("gate_up_proj") and linear.module.endswith("up_proj")
    begin = linear.out_features if below else 0
    return parameter[expert, begin : begin + linear.out_features].detach().float()


def check_packed(name: str, source: SourceModel, work: Path) -> None:
    """Quantize a variant; compare its files with the plan, with what the solver meant, and with the base model."""
    rows = TokenRows(ids=token_ids(8, 32), record=token_rows().record)
    store = open_store(source, work, VARIANT)
    with _meant() as meant:
        quantize(QuantizeJob(source=source, rows=rows, stores={VARIANT: store}, devices=(CPU,)), lambda _: None)
    store.complete(source.tensors)
    packed = stored_in(store.checkpoint)
    planned = {tensor.name: tensor for tensor in checkpoint_tensors(source.architecture, VARIANT)}
    assert {name: tensor.info for name, tensor in packed.items()} == planned, "the files are not as planned"
    assert meant.keys() == {linear.name for linear in source.architecture.linears}
    made = {f"{linear.name}." for linear in source.architecture.linears}
    linears = {linear.name: linear for linear in source.architecture.linears}
    for key, weight in meant.items():
        found = dequantize_linear(partial(_read_part, packed, key), VARIANT.bits)
        assert torch.equal(found, weight), f"{key} is not what the solver meant"
        original = _original(name, source, linears[key])
        stored_as = [part for part in (original, original.T) if part.shape == weight.shape]  # a Conv1D lies transposed
        distance = min(float((weight - part).norm()) for part in stored_as)
        assert distance < 0.3 * original.norm(), f"{key} is far from its original"
    parts = {f"{linear}{part}" for linear in made for part in ("qweight", "qzeros", "scales", "g_idx")}
    for key in packed.keys() - parts:
        original, copied = source.read(key), read_tensor(packed[key])
        assert torch.equal(original.to(copied.dtype), copied), f"{key} has changed"
    merged = set(_merged_experts(source.architecture))
    kept = {key for key in source.tensors if key not in merged and not any(key == f"{linear}weight" for linear in made)}
    assert kept <= packed.keys(), "tensors are lost"
    assert not merged & packed.keys(), "experts are there as one tensor too"
    if any(linear.parameter for linear in linears.values()):
        _check_read_again(source, store.checkpoint, meant)


def _merged_experts(architecture: Architecture) -> Iterator[str]:
    """Yield the base model's tensors of which each holds the linears of all experts."""
    for kind in architecture.kinds:
        for group in kind.groups:
            if group.experts is not None and group.experts.stored is not None:
                yield from (group.experts.stored.replace("{block}", str(block)) for block in kind.blocks)


def _check_read_again(source: SourceModel, checkpoint: Path, meant: dict[str, Tensor]) -> None:
    """Read a branch as evaluation does: each expert's linear is in its place of the parameter of all experts."""
    reader = CheckpointReader(checkpoint, VARIANT.bits)
    decoder = Decoder(
        source.folder, reader, names=reader.names, dequantized=reader.dequantized, device=CPU, dtype=torch.float32
    )
    for block, weights in enumerate(decoder.stream()):
        of_experts = [each for each in source.architecture.linears if each.block == block and each.parameter]
        for parameter in dict.fromkeys(linear.parameter for linear in of_experts):
            rows = [meant[linear.name] for linear in of_experts if linear.parameter == parameter]
            assert torch.equal(weights[parameter].flatten(0, 1), torch.cat(rows)), f"{parameter} is read in another way"
