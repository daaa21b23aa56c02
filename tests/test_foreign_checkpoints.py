"""Checkpoints that AutoGPTQ and GPTQModel themselves write are audited without a false error, and repaired.

Run by `nox -s tests-release`, because the loaders' environments must exist. docs/how-to/audit-a-folder.md has what
AutoRound and llm-compressor write, tried by hand.
"""

import json
import os
import random
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from packager.inputs.describe_in_child import description_by_transformers
from packager.prove.audit import AuditReport, audit
from packager.prove.environments import RuntimeContext, ensure_environment
from packager.prove.loaders import LOADERS
from packager.prove.probes import probe_environ
from packager.prove.repair import repair
from tests.test_house_rules import ROOT
from tests.test_repair import logits

pytestmark = pytest.mark.release
BASE = ROOT / "recipes" / "assets" / "demo-llama" / "model"
WRITER = Path(__file__).parent / "write_foreign_checkpoint.py"
TIMEOUT_S = 900
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A program with its parameters, and the codes of what it does that is no false alarm."""

    program: str
    loader: str
    parameters: dict[str, Any]
    errors: frozenset[str] = frozenset()
    warnings: frozenset[str] = frozenset()


# Both write a path of the machine, of the base model or of GPTQModel's swap folder: no false error.
LEAK = frozenset({"local-path"})
# AutoGPTQ names weights after their parameters, writes biases of 0 and its own keys, and no generation_config.json.
AUTO_GPTQ = frozenset({
    "weights-name", "bias-needless", "quantize-config-key", "quantization-key-undeclared", "generation-config-missing",
})  # fmt: skip
GPTQMODEL = frozenset({"quantize-config-key", "quantization-key-undeclared"})
CASES = [
    Case(program="auto-gptq", loader="autogptq", errors=LEAK, warnings=AUTO_GPTQ,
         parameters={"bits": 4, "group_size": 64, "desc_act": True}),
    Case(program="auto-gptq", loader="autogptq", errors=LEAK, warnings=AUTO_GPTQ,
         parameters={"bits": 8, "group_size": -1, "desc_act": False}),
    Case(program="gptqmodel", loader="transformers", errors=LEAK, warnings=GPTQMODEL,
         parameters={"bits": 4, "group_size": 64, "desc_act": True}),
    Case(program="gptqmodel", loader="transformers", errors=LEAK, warnings=GPTQMODEL,
         parameters={"bits": 4, "group_size": 32, "desc_act": False}),
]  # fmt: skip


def codes(report: AuditReport, severity: str) -> set[str]:
    return {finding.code for finding in report.findings if finding.severity == severity}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.program}-{case.parameters['group_size']}")
def test_a_checkpoint_of_another_program_has_no_false_error(
    tmp_path: Path, pytestconfig: pytest.Config, case: Case
) -> None:
    cache = Path(pytestconfig.getoption("--cache-folder")).expanduser()
    context = RuntimeContext(cache=cache, scratch=cache, environ=os.environ, log=print)
    python = ensure_environment(LOADERS[case.loader], context)
    draw = random.Random(0)
    rows = [[1, *(draw.randrange(3, 500) for _ in range(63))] for _ in range(4)]
    (tmp_path / "job.json").write_text(json.dumps({"parameters": case.parameters, "rows": rows}))
    folder = tmp_path / "written"
    environ = {"PATH": os.defpath, "OMP_NUM_THREADS": "2"}
    command = [python, "-s", WRITER, case.program, BASE, folder, tmp_path / "job.json"]
    done = subprocess.run(
        [str(part) for part in command], env=probe_environ(python, environ, "cpu", tmp_path),
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for name in TOKENIZER:  # saved by its users, not by AutoGPTQ
        if not (folder / name).exists():
            shutil.copy(BASE / name, folder / name)
    describe = description_by_transformers()
    report = audit(folder, complete=False, describe=describe)
    assert codes(report, "error") == case.errors, report.errors
    assert codes(report, "warning") <= case.warnings, report.warnings
    facts = report.facts
    assert {key: getattr(facts, key) for key in case.parameters} == case.parameters
    assert (facts.num_linears, facts.linears_read) == (42, 42)
    repaired = repair(folder, tmp_path / "fixed", print, describe=describe)
    assert codes(audit(tmp_path / "fixed", complete=False, describe=describe), "error") == set()
    assert case.errors <= {change.code for change in repaired.changes}
    if case.program == "gptqmodel":
        bits = case.parameters["bits"]
        assert logits(tmp_path / "fixed", bits).equal(logits(folder, bits))
