"""Every loader of the CPU on checkpoints whose linears have several bits: what is predicted is what is seen.

Run by `nox -s tests-release`. GPTQModel writes such checkpoints; here the weights are random. `dynamic` has a pattern
for each group of linears, which names what vLLM computes as one (qkv_proj) too.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from packager.inputs.describe_in_child import description_by_transformers
from packager.model.compatibility import verdicts
from packager.model.packing import CheckpointReader
from packager.model.runtimes import LoaderName
from packager.prove.declared import declared_checkpoint
from packager.prove.environments import RuntimeContext
from packager.prove.verify import TOLERANCE, Checkpoint, VerifyJob, check_loaders, references_of
from packager.receipt import LoaderRecord
from packager.recipe import Loaders
from packager.system.files import sha256_file
from packager.variant import Bits
from tests import tiny_decoders
from tests.packed_decoders import VARIANT, packed_decoder, random_linear
from tests.test_loader_grid import ON_CPU, SIZES
from tests.tiny_decoders import token_ids

FOUR = replace(VARIANT, group_size=32, act_order="none", sym=True)
# The bits of some linears of a 4-bit checkpoint, by the pattern that names them.
CASES: Mapping[str, Mapping[str, Bits]] = {
    "4and8": {
        r"+:^model\.layers\.0\.mlp\.down_proj$": 8,
        r"+:^model\.layers\.1\.self_attn\.(?:q|k|v|qkv)_proj$": 8,
    },
    "4and3": {r"+:^model\.layers\.0\.mlp\.(?:gate|up|gate_up)_proj$": 3},
    "2and3and4": {r"+:^model\.layers\.0\.mlp\.down_proj$": 3, r"+:^model\.layers\.1\.mlp\.down_proj$": 2},
}


def mixed_decoder(folder: Path, given: Mapping[str, Bits]) -> dict[str, int]:
    """Write a checkpoint in which the linears of some patterns have other bits; return the bits of all linears."""
    architecture = packed_decoder("llama", folder, variant=FOUR, spread=0)
    tensors: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    found: dict[str, int] = {}
    dice = torch.Generator().manual_seed(1)
    for linear in architecture.linears:
        bits = next((bits for key, bits in given.items() if re.match(key[2:], linear.name)), FOUR.bits)
        found[linear.name] = bits
        if bits != FOUR.bits:
            tensors |= random_linear(linear, replace(FOUR, bits=bits), dice, spread=0)
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    dynamic = {key: {"bits": bits} for key, bits in given.items()}
    for name, key in (("config.json", "quantization_config"), ("quantize_config.json", None)):
        content: dict[str, Any] = json.loads((folder / name).read_text())
        (content[key] if key else content)["dynamic"] = dynamic
        (folder / name).write_text(json.dumps(content))
    return found


@pytest.fixture
def _sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in SIZES.items():
        monkeypatch.setitem(tiny_decoders._SIZES, name, size)


@pytest.mark.slow
@pytest.mark.usefixtures("_sizes")
@pytest.mark.parametrize("case", CASES)
def test_each_linear_is_read_with_its_own_bits(case: str, tmp_path: Path) -> None:
    """The oracle reads each linear by the bits with which it was packed."""
    packed = mixed_decoder(tmp_path, CASES[case])
    assert len(set(packed.values())) > 1
    read = CheckpointReader(tmp_path, None)
    for name, bits in packed.items():
        assert torch.equal(read(f"{name}.weight"), CheckpointReader(tmp_path, bits)(f"{name}.weight")), name
    declared = declared_checkpoint(tmp_path, "main", description_by_transformers())
    assert set(declared.variant.all_bits) == set(packed.values())


@pytest.mark.release
@pytest.mark.slow
@pytest.mark.usefixtures("_sizes")
@pytest.mark.parametrize("loader", ON_CPU)
def test_what_is_predicted_is_what_is_seen(loader: LoaderName, tmp_path: Path, context: RuntimeContext) -> None:
    """GPTQModel's own loader opens them all, with relative errors of 0.0015 in float16 (2026-11-30); no other does."""
    checkpoints, predicted = [], {}
    for case, given in CASES.items():
        folder = tmp_path / case
        folder.mkdir()
        mixed_decoder(folder, given)
        digests = {file.name: sha256_file(file) for file in folder.glob("*.safetensors")}
        checkpoints.append(Checkpoint(branch=case, folder=folder, bits=None, weights_sha256=digests))
        declared = declared_checkpoint(folder, case, description_by_transformers())
        (predicted[case],) = (
            verdict.status for verdict in verdicts(declared.variant, declared.architecture) if verdict.loader == loader
        )
    job = VerifyJob(
        checkpoints=tuple(checkpoints),
        ids=token_ids(2, 24),
        prompts=[[5, 9, 30, 77]],
        loaders=Loaders(required=(loader,), prompts=("-",), seq_len=24, num_rows=2, max_new_tokens=4),
        device=torch.device("cpu"),
        context=context,
    )
    seen: dict[str, LoaderRecord] = {
        branch: records[0] for branch, records in check_loaders(job, references_of(job), print).items()
    }
    for case, record in seen.items():
        assert predicted[case] in ("unknown", {"passed": "loads", "failed": "refused"}[record.status]), record.reason
        assert record.relative_error is None or record.relative_error <= TOLERANCE[record.dtype]
    assert (loader == "gptqmodel") == ({record.status for record in seen.values()} == {"passed"})
