"""Checkpoints of every kind of decoder in the real loaders, compared with our verdicts; and the loaders' own lists.

Run by `nox -s tests-release`, because the loaders' environments must exist. The quantized weights are random, so no
build is needed: what is checked are names, shapes, config.json, and that the loader computes what our forward computes.
"""

import json
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from packager.model.architecture import Architecture
from packager.model.autogptq_rules import AUTOGPTQ_OPENS
from packager.model.checkpoint import block_keys
from packager.model.compatibility import Verdict, verdicts
from packager.model.gptqmodel_rules import GPTQMODEL_GROUP_SIZES
from packager.model.runtime_architectures import GPTQMODEL_FAILS, GPTQMODEL_OPENS, GPTQMODEL_TYPES
from packager.model.runtimes import LoaderName
from packager.prove.environments import RuntimeContext, ensure_environment
from packager.prove.loaders import LOADERS
from packager.prove.tolerances import TOLERANCE
from packager.prove.verify import Checkpoint, VerifyJob, check_loaders, references_of
from packager.receipt import LoaderRecord
from packager.recipe import Loaders
from packager.system.files import sha256_file
from packager.variant import Variant
from tests.packed_decoders import VARIANT, packed_decoder
from tests.test_left_linears import all_linears
from tests.tiny_decoders import token_ids

pytestmark = pytest.mark.release

# The decoders by what is special about each; after the @, what the recipe skips.
TRANSFORMERS = """
    gemma2 gemma3_text gemma3 phi3 granite olmo2 glm4 gpt_neox cohere2 stablelm starcoder2 smollm3 opt falcon falcon:new
    gpt_bigcode gpt2 gpt2@*.c_proj qwen3_5_text mixtral gptj bloom mistral@*.down_proj llama@*.q_proj nanochat mamba
    mamba2 recurrent_gemma ctrl qwen3_moe deepseek_v3 nemotron_h qwen3_next jamba
"""
# After the #, what differs in the variant: a key of CHANGES.
GPTQMODEL = """
    mixtral gemma3 nemotron_h granitemoe gemma4_text:experts mistral@*.down_proj llama@*.q_proj qwen3_moe@mlp.experts
    qwen3_moe:dense_first falcon:new llama#asym llama#3bit llama#8bit llama#g8 llama#row
"""
AUTOGPTQ = "gpt_neox gptj codegen gpt2 opt bloom falcon gemma gpt_bigcode mixtral stablelm phi"
CASES: dict[LoaderName, list[str]] = {
    "transformers": TRANSFORMERS.split(),
    "autogptq": AUTOGPTQ.split(),
    "gptqmodel": [*sorted(GPTQMODEL_OPENS), *sorted(GPTQMODEL_FAILS), *GPTQMODEL.split()],
}
CHANGES: dict[str, dict[str, Any]] = {
    "": {}, "asym": {"sym": False}, "3bit": {"bits": 3}, "8bit": {"bits": 8}, "g8": {"group_size": 8},
    "row": {"group_size": -1},
}  # fmt: skip
# GPTQModel opens no asymmetric checkpoint of another program.
VARIANTS = {"transformers": VARIANT, "autogptq": VARIANT, "gptqmodel": replace(VARIANT, sym=True)}


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What each loader made of each checkpoint, and the checkpoints' architectures."""

    records: Mapping[tuple[str, str], LoaderRecord]
    architectures: Mapping[str, Architecture]

    def verdict(self, case: str, loader: LoaderName) -> Verdict:
        made = verdicts(variant_of(loader, case), self.architectures[case])
        (found,) = [each for each in made if each.loader == loader]
        return found


OpenedBy = Callable[[LoaderName], Opened]


def variant_of(loader: LoaderName, case: str) -> Variant:
    return replace(VARIANTS[loader], **CHANGES[case.partition("#")[2]])


def opened_by(loader: LoaderName, folder: Path, context: RuntimeContext) -> Opened:
    """Let a loader open all of its cases in one process."""
    architectures, checkpoints = {}, []
    for number, case in enumerate(CASES[loader]):
        variant = variant_of(loader, case)
        name, _, skip = case.partition("#")[0].partition("@")
        path = folder / str(number)
        path.mkdir()
        architectures[case] = packed_decoder(name, path, skip=skip.split(",") if skip else (), variant=variant)
        digests = {file.name: sha256_file(file) for file in path.glob("*.safetensors")}
        checkpoints.append(Checkpoint(branch=case, folder=path, bits=variant.bits, weights_sha256=digests))
    job = VerifyJob(
        checkpoints=checkpoints,
        ids=token_ids(2, 24),
        prompts=[[5, 9, 30, 77]],
        loaders=Loaders(required=(loader,), prompts=("-",), seq_len=24, num_rows=2, max_new_tokens=8),
        device=torch.device("cpu"),
        context=context,
    )
    records = check_loaders(job, references_of(job), print)
    return Opened(
        records={(case, record.loader): record for case, found in records.items() for record in found},
        architectures=architectures,
    )


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory, context: RuntimeContext) -> OpenedBy:
    return cache(lambda loader: opened_by(loader, tmp_path_factory.mktemp(loader), context))


@pytest.mark.parametrize(("loader", "case"), [(loader, case) for loader, cases in CASES.items() for case in cases])
def test_a_loader_opens_what_the_verdict_says(opened: OpenedBy, loader: LoaderName, case: str) -> None:
    """Measured where it passes: relative errors of at most 0.0006 in float32, and of 0.002 in float16 (GPTQModel)."""
    record, verdict = opened(loader).records[case, loader], opened(loader).verdict(case, loader)
    assert (record.status == "passed") is verdict.can_load, (record.reason, verdict.reason)
    if verdict.can_load:
        assert record.relative_error is not None
        assert record.relative_error <= TOLERANCE[record.dtype]
        assert record.tokens_generated == record.tokens_equal > 0


def test_every_family_that_autogptq_opens_is_tried_here() -> None:
    tried = {case.partition(":")[0] for case in CASES["autogptq"]}
    assert set(AUTOGPTQ_OPENS) <= tried | {"llama", "mistral", "qwen2"}  # in test_loaders_of_architectures.py


def in_environment(loader: LoaderName, context: RuntimeContext, code: str, *arguments: str) -> str:
    """Return what code prints in a loader's environment, which may read its packages only."""
    python = ensure_environment(LOADERS[loader], context)
    probes = Path(__file__).parent.parent / "packager" / "prove" / "loaders"
    start = (
        "import sys, importlib; sys.path.append(sys.argv.pop(1));"
        "isolated = importlib.import_module('packager_isolated'); isolated.prepare_gptqmodel('cpu');"
        "import torch; isolated.provide_pcre();"
    )
    run = subprocess.run(
        [python, "-c", start + code, probes, *arguments], capture_output=True, text=True, check=True, timeout=300
    )
    return run.stdout.splitlines()[-1]


def test_gptqmodel_s_own_code_leaves_exactly_what_is_left(opened: OpenedBy, context: RuntimeContext) -> None:
    cases = {}
    for case in ("mistral@*.down_proj", "llama@*.q_proj", "qwen3_5_text", "mixtral"):
        architecture = opened("transformers").architectures[case]
        names = dict(all_linears(architecture))
        cases[case] = {"dynamic": block_keys(architecture)["dynamic"], "names": names}
    code = (
        "import json; from gptqmodel.quantization.config import dynamic_get;"
        "cases = json.loads(sys.argv[1]);"
        "print(json.dumps({c: {n: dynamic_get(v['dynamic'], n) is not False for n in v['names']}"
        " for c, v in cases.items()}))"
    )
    answer = json.loads(in_environment("transformers", context, code, json.dumps(cases)))
    assert answer == {case: value["names"] for case, value in cases.items()}


def test_the_list_of_gptqmodel_s_types_is_gptqmodel_s(context: RuntimeContext) -> None:
    """Its file is read, not imported: models/auto.py imports every model."""
    code = "import gptqmodel, pathlib; print(pathlib.Path(gptqmodel.__file__).parent / 'models' / 'auto.py')"
    source = Path(in_environment("transformers", context, code)).read_text()
    start = source.index("MODEL_MAP")
    table = source[start : source.index("\n}", start)]
    assert set(re.findall(r'^\s*"([^"]+)":', table, re.MULTILINE)) == GPTQMODEL_TYPES


def test_the_group_sizes_are_those_of_gptqmodel_s_kernels(context: RuntimeContext) -> None:
    code = (
        "from gptqmodel.nn_modules.qlinear.torch import TorchLinear;"
        "from gptqmodel.nn_modules.qlinear.tritonv2 import TritonV2Linear;"
        "print([TorchLinear.SUPPORTS_GROUP_SIZE, TritonV2Linear.SUPPORTS_GROUP_SIZE])"
    )
    assert json.loads(in_environment("gptqmodel", context, code)) == [list(GPTQMODEL_GROUP_SIZES)] * 2
