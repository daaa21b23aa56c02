"""The rules on GPTQModel's and AutoGPTQ's kernels, compared with what these kernels themselves answer without a GPU."""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from packager.model.autogptq_rules import AUTOGPTQ_BITS, AUTOGPTQ_RULES, autogptq_triton, autogptq_whole_groups
from packager.model.gptqmodel_rules import (
    GPTQMODEL_BITS,
    GPTQMODEL_MARLIN_RULES,
    MARLIN_BITS,
    TRANSFORMERS_RULES,
    gptqmodel_group_sizes,
    marlin_act_order,
    marlin_group_sizes,
    marlin_padding,
    marlin_whole_groups,
)
from packager.model.rules import Check, bits_check, symmetric_only, whole_groups
from packager.model.runtimes import LoaderName
from packager.prove.environments import RuntimeContext, ensure_environment
from packager.prove.loaders import ISOLATED, LOADERS
from tests.packed_decoders import VARIANT
from tests.test_known_models import LLAMA_2_13B
from tests.test_plan import answers

# SmolLM2-135M has linears of 576 x 576, 192 x 576, 1536 x 576 and 576 x 1536.
SHAPES = (
    (64, 64), (64, 128), (128, 64), (96, 128), (128, 192), (256, 96), (320, 128), (576, 576), (576, 192), (576, 1536),
    (1536, 576),
)  # fmt: skip
GROUP_SIZES = (-1, 16, 32, 64, 96, 128, 256)
QUESTIONS: list[tuple[int, int, bool, bool, tuple[int, int]]] = list(
    product((2, 3, 4, 8), GROUP_SIZES, (False, True), (True, False), SHAPES)
)
SMOLLM2 = {
    **LLAMA_2_13B,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}


def ask(program: str, loader: LoaderName, context: RuntimeContext, folder: Path) -> Mapping[str, Sequence[str]]:
    path = folder / "questions.json"
    path.write_text(json.dumps([(*question, *shape) for *question, shape in QUESTIONS]))
    script = Path(__file__).with_name("ask_kernels.py")
    done = subprocess.run(
        [ensure_environment(LOADERS[loader], context), "-I", script, program, ISOLATED.parent, path],
        env={"PATH": os.defpath, "HOME": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return found


def differing(reasons: Sequence[str], checks: Sequence[Check]) -> Sequence[object]:
    """Return the questions that the checks answer otherwise than the kernel, with both answers."""
    found = []
    for question, reason in zip(QUESTIONS, reasons, strict=True):
        bits, group_size, desc_act, sym, (rows, columns) = question
        act_order: Any = "full" if desc_act else "none"
        variant = replace(VARIANT, bits=bits, group_size=group_size, act_order=act_order, sym=sym)  # type: ignore[arg-type]
        linear = SimpleNamespace(module="o_proj", block=0, in_features=rows, out_features=columns)
        architecture: Any = SimpleNamespace(example_linears=[linear])
        ours = next(filter(None, (check(variant, architecture) for check in checks)), "")
        if bool(ours) is not bool(reason):
            found.append((question, ours, reason))
    return found


MARLIN_CHECKS = (bits_check(*MARLIN_BITS), marlin_group_sizes, symmetric_only, marlin_whole_groups, marlin_act_order)


@pytest.mark.release
def test_the_rules_answer_as_gptqmodel_s_kernels_do(context: RuntimeContext, tmp_path: Path) -> None:
    """Over bits, groups, act order, symmetry and shapes; 134 of the 1,232 combinations are for Marlin."""
    found = ask("gptqmodel", "gptqmodel", context, tmp_path)
    assert differing(found["marlin"], MARLIN_CHECKS) == []
    # Not asked for by name, it takes no linear that it pads; it reports that before anything else.
    assert differing(found["marlin-chosen"], (*MARLIN_CHECKS, marlin_padding)) == []
    assert differing(found["torch"], (bits_check(*GPTQMODEL_BITS), gptqmodel_group_sizes)) == []
    assert len([reason for reason in found["marlin"] if not reason]) == 134
    assert len([reason for reason in found["marlin-chosen"] if not reason]) == 84


@pytest.mark.release
def test_the_rules_answer_as_autogptq_s_kernels_do(context: RuntimeContext, tmp_path: Path) -> None:
    """Its kernel for a CPU computes a product; those for CUDA are made, and would compute there only."""
    found = ask("autogptq", "autogptq", context, tmp_path)
    assert differing(found["plain"], (bits_check(*AUTOGPTQ_BITS), autogptq_whole_groups)) == []
    for name in ("exllama", "exllamav2"):
        assert differing(found[name], (bits_check(4), whole_groups)) == []
    assert differing(found["triton"], (autogptq_triton,)) == []
    assert 0 < len([reason for reason in found["exllamav2"] if not reason]) < len(QUESTIONS)


def test_the_compared_checks_are_those_of_the_verdicts() -> None:
    assert {*MARLIN_CHECKS[1:], marlin_padding} <= {rule.check for rule in GPTQMODEL_MARLIN_RULES}
    assert gptqmodel_group_sizes in {rule.check for rule in TRANSFORMERS_RULES}
    assert {autogptq_whole_groups, autogptq_triton} <= {rule.check for rule in AUTOGPTQ_RULES}


@pytest.mark.parametrize(
    ("parameters", "can_load", "says"),
    [
        ({}, True, "pads self_attn.q_proj, 576 x 576, in each forward"),
        ({"act_order": "static"}, True, "only if backend is gptq_marlin"),
        ({"act_order": "full"}, False, "no tile (64 x 128, 128 x 64) divides self_attn.q_proj, 576 x 576"),
        ({"act_order": "full", "group_size": -1}, True, "pads self_attn.q_proj"),
        ({"group_size": 128}, False, "self_attn.q_proj has 576 columns, not a multiple of 128"),
    ],
)
def test_marlin_on_a_model_of_odd_shapes(parameters: dict[str, Any], can_load: bool, says: str) -> None:
    """SmolLM2 in act order is refused, and without act order it is padded."""
    found = answers(SMOLLM2, **{"group_size": 64, **parameters})["gptqmodel-marlin"]
    assert found[0] is can_load
    assert says in found[1]


@pytest.mark.parametrize("runtime", ["vllm", "sglang"])
def test_nine_heads_are_not_spread_over_two_gpus(runtime: str) -> None:
    config = {**SMOLLM2, "hidden_size": 1152, "intermediate_size": 3072}
    assert answers(config, group_size=64)[runtime] in (
        (True, "tensor parallel 2 fails: 9 attention heads"),
        (True, "needs CUDA with compute capability 8.0; tensor parallel 2 fails: 9 attention heads"),
    )
