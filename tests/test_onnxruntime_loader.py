"""ONNX Runtime on checkpoints of every decoder that its model builder lists, compared with our verdicts.

Run by `nox -s tests-release`, because the loader's environment must exist. The quantized weights are random, so no
build is needed: what is checked are names, shapes, config.json, and that the loader computes what our forward computes.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from packager.errors import LoaderError
from packager.model.architecture import Architecture
from packager.model.compatibility import Verdict, verdicts
from packager.model.onnxruntime_rules import ONNXRUNTIME_FAILS, ONNXRUNTIME_OPENS
from packager.prove.environments import RuntimeContext, ensure_environment
from packager.prove.loaders import LOADERS
from packager.prove.probes import ProbeJob, run_probe
from packager.prove.verify import Checkpoint, VerifyJob, check_loaders, references_of
from packager.receipt import LoaderRecord
from packager.recipe import Loaders
from packager.system.files import sha256_file
from packager.variant import Variant
from tests.packed_decoders import VARIANT, packed_decoder
from tests.samples import sampled
from tests.tiny_decoders import VOCABULARY, token_ids

pytestmark = pytest.mark.release

SPEC = LOADERS["onnxruntime"]
# After a %, what differs from the model's config; after a #, from 4 bits, groups of 32, act order and symmetric grids.
CHANGES: dict[str, dict[str, Any]] = {
    "plain": {"act_order": "none"}, "asym": {"sym": False}, "row": {"group_size": -1},
    **{f"{bits}bit": {"bits": bits} for bits in (2, 3, 8)},
    **{f"g{size}": {"group_size": size} for size in (8, 16, 64)},
}  # fmt: skip
_THETA = {"rope_theta": 10000.0}
_YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 128}
_BY_BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
_LONGROPE = {"original_max_position_embeddings": 128, "short_factor": [1.5] * 8, "long_factor": [2.5] * 8}
EDITS: dict[str, dict[str, Any]] = {
    "no_window": {"sliding_window": None},
    "window": {"sliding_window": 8},
    "wide_window": {"sliding_window": 64},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, **_THETA}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, **_THETA}},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, **_YARN, **_THETA}},
    "llama3": {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, **_BY_BANDS, **_THETA}},
    "longrope": {
        "rope_parameters": {"rope_type": "longrope", **_LONGROPE, **_THETA}, "original_max_position_embeddings": 128,
    },
    "alpha": {"rope_parameters": {"rope_type": "dynamic", "factor": 1.0, "alpha": 1000.0, **_THETA}},
    "half": {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5, **_THETA}},
    "ratio": {"compression_ratio": 2.0},
    "gelu": {"hidden_act": "gelu_pytorch_tanh"},
}  # fmt: skip

OPENED = "llama qwen2 qwen3 phi3 granite ernie4_5 hunyuan_v1_dense qwen2_5_vl mistral%no_window".split()  # noqa: SIM905
FAILED = """
    gemma gemma2 gemma3_text gemma3 gemma4 gemma4_unified gpt_oss granitemoehybrid granitemoehybrid:dense lfm2 lfm2_moe
    mistral3 nemotron olmo phi phi:normed_queries qwen3_5 qwen3_5_moe qwen3_vl smollm3
    qwen3_moe mixtral olmo2 stablelm starcoder2 cohere gpt2 glm glm4 exaone4 phimoe
"""
SPECIAL = """
    llama:tied llama:biased internlm3 qwen2:windowed mistral%wide_window phi3%wide_window granite%linear qwen2%linear
    ernie4_5%linear mistral%no_window,linear llama%llama3 llama%gelu qwen3%gelu llama@*.q_proj mistral@*.down_proj
    llama%linear llama%yarn qwen2%llama3 qwen2%dynamic mistral%no_window,yarn mistral%no_window,dynamic phi3%longrope
    phi3%half hunyuan_v1_dense%alpha hunyuan_v1_dense%linear ernie4_5%ratio llama#g8,plain
"""
# The rows of 24 tokens are past these windows, and short of the length from which a dynamic embedding differs.
TRAPPED = "mistral phi3%window".split()  # noqa: SIM905
UNTRAPPED = ("llama%dynamic",)
GRID = [
    "#".join(filter(None, (name, ",".join(filter(None, parts)))))
    for name in (*OPENED, "llama:tied", "llama:biased")
    for parts in product(("", "2bit", "3bit", "8bit"), ("", "g16", "g64", "row"), ("", "plain"), ("", "asym"))
]
QUICK = ("llama", "llama#plain,asym", "llama#asym", "llama#8bit", "llama#2bit,plain", "phi3", "olmo", "llama%linear")
OTHERS = [*FAILED.split(), *SPECIAL.split(), *UNTRAPPED]
CASES = list(dict.fromkeys([*QUICK, *GRID, *OTHERS]))


def parts_of(case: str) -> tuple[str, list[str], list[str], list[str]]:
    """Return the decoder, the patterns of what is skipped, the changes of the variant, and those of the config."""
    match = re.fullmatch(r"([^@#%]+)(?:@([^#%]+))?(?:%([^#]+))?(?:#(.+))?", case)
    assert match is not None, case
    name, *others = match.groups(default="")
    skipped, edits, changes = (text.split(",") if text else [] for text in others)
    return name, skipped, changes, edits


def variant_of(case: str) -> Variant:
    changes = [CHANGES[change] for change in parts_of(case)[2]]
    return replace(VARIANT, **{"sym": True, **{key: value for each in changes for key, value in each.items()}})


def write_case(case: str, folder: Path) -> Architecture:
    name, skipped, _, edits = parts_of(case)
    variant = variant_of(case)
    architecture = packed_decoder(name, folder, skip=skipped, variant=variant, spread=0 if variant.sym else 1)
    changed = {key: value for edit in edits for key, value in EDITS[edit].items()}
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    return replace(architecture, config={**architecture.config, **changed})


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the loader made of each checkpoint, and what the rules say."""

    records: Mapping[str, LoaderRecord]
    verdicts: Mapping[str, Verdict]
    classes: frozenset[str]


@pytest.fixture(scope="module")
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, context: RuntimeContext) -> Seen:
    """Let the loader open, in one process, the cases of the tests that are selected."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    selected = {item.callspec.params.get("case") for item in items if hasattr(item, "callspec")}
    checkpoints, found, classes = [], {}, set()
    for number, case in enumerate(case for case in (*CASES, *TRAPPED) if case in selected):
        folder = tmp_path_factory.mktemp(f"case-{number}")
        architecture = write_case(case, folder)
        digests = {file.name: sha256_file(file) for file in folder.glob("*.safetensors")}
        (found[case],) = [each for each in verdicts(variant_of(case), architecture) if each.loader == "onnxruntime"]
        classes.add(architecture.model_class)
        bits = variant_of(case).bits
        checkpoints.append((case, Checkpoint(branch=str(number), folder=folder, bits=bits, weights_sha256=digests)))
    job = VerifyJob(
        checkpoints=[checkpoint for _, checkpoint in checkpoints],
        ids=token_ids(2, 24),
        prompts=[[5, 9, 30, 77]],
        loaders=Loaders(required=("onnxruntime",), prompts=("-",), seq_len=24, num_rows=2, max_new_tokens=8),
        device=torch.device("cpu"),
        context=context,
    )
    made = check_loaders(job, references_of(job), print)
    records = {case: made[checkpoint.branch][0] for case, checkpoint in checkpoints}
    return Seen(records=records, verdicts=found, classes=frozenset(classes))


@pytest.mark.parametrize("case", sampled(CASES, *QUICK))
def test_the_result_is_the_predicted_one(seen: Seen, case: str) -> None:
    """Measured where it passes: relative errors of 0.00001 at most, and of 0.000026 once.

    In that case (granite#2bit,g64,plain,asym) our own forward in float32 differs from float64 by 0.00007.
    """
    record, verdict = seen.records[case], seen.verdicts[case]
    assert (record.status == "passed") is verdict.can_load, (record.reason, verdict.reason)
    if verdict.can_load:
        assert record.relative_error is not None
        assert SPEC.float32_tolerance is not None
        assert record.relative_error <= SPEC.float32_tolerance
        assert record.dtype == "float32"
        assert record.kernel == "com.microsoft.MatMulNBits (CPUExecutionProvider)"
        assert record.tokens_generated == record.tokens_equal > 0


@pytest.mark.parametrize("case", TRAPPED)
def test_past_the_length_that_a_verdict_names_it_computes_something_else(seen: Seen, case: str) -> None:
    record, verdict = seen.records[case], seen.verdicts[case]
    assert verdict.can_load
    assert "past 8 tokens it computes without the sliding window" in verdict.reason
    assert record.status == "failed"
    assert "logits differ by" in record.reason


def test_every_class_of_the_rules_was_tried(seen: Seen, request: pytest.FixtureRequest) -> None:
    if len(seen.records) < len(CASES):
        pytest.skip("some cases are not selected")
    assert {*ONNXRUNTIME_OPENS, *ONNXRUNTIME_FAILS} - seen.classes == {"Lfm2VlForConditionalGeneration"}


OPTIONS = '"nodes_to_exclude": "/lm_head/MatMul,/model/embed_tokens/Gather"'
LEVEL = '"accuracy_level": str(ACCURACY_LEVEL)'


@pytest.mark.parametrize(
    ("decoder", "option", "wrong", "message"),
    [
        ("llama", OPTIONS, '"int4_nodes_to_exclude_": "/lm_head/MatMul"', "/lm_head/MatMul_Q4 is quantized"),
        ("llama:tied", OPTIONS, '"nodes_to_exclude": "/lm_head/MatMul"', "is of type GatherBlockQuantized"),
        ("llama", LEVEL, '"accuracy": "1"', "accuracy_level 4, 1 wanted"),
    ],
    ids=["head", "embeddings", "activations"],
)  # fmt: skip
def test_an_option_that_the_builder_ignores_fails_the_loader(
    decoder: str, option: str, wrong: str, message: str, context: RuntimeContext, tmp_path: Path
) -> None:
    """Each of these makes a model that loads and answers."""
    assert SPEC.script.read_text().count(option) == 1
    script = tmp_path / "onnxruntime_probe.py"
    code = SPEC.script.read_text().replace("str(Path(__file__).parent)", repr(str(SPEC.script.parent)))
    script.write_text(code.replace(option, wrong))
    with pytest.raises(LoaderError, match=message):
        run_probe(
            replace(SPEC, script=script), ensure_environment(SPEC, context), job_of(decoder, tmp_path), 120, context
        )


def job_of(case: str, folder: Path) -> ProbeJob:
    model = folder / "model"
    model.mkdir()
    write_case(case, model)
    return ProbeJob(
        model_dir=model, device="cpu", input_ids=token_ids(2, 24).tolist(), prompts=[[5, 9]], max_new_tokens=4,
        vocab_size=VOCABULARY, output_dir=folder / "output",
    )  # fmt: skip


def test_nothing_of_the_converted_model_is_left(context: RuntimeContext, tmp_path: Path) -> None:
    job = job_of("llama", tmp_path)
    before = {path: path.stat().st_mtime_ns for path in job.model_dir.rglob("*")}
    run_probe(SPEC, ensure_environment(SPEC, context), job, 120, context)
    assert {path.name for path in job.output_dir.iterdir()} == {"job.json", "logits.npy", "result.json"}
    assert {path: path.stat().st_mtime_ns for path in job.model_dir.rglob("*")} == before


def test_code_beside_a_checkpoint_is_not_run(context: RuntimeContext, tmp_path: Path) -> None:
    """config.json names a class of a module in the folder; neither config nor tokenizer imports it."""
    job = job_of("llama", tmp_path)
    config = json.loads((job.model_dir / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoTokenizer": ["own.Tokenizer", None]}}
    (job.model_dir / "config.json").write_text(json.dumps(config))
    (job.model_dir / "own.py").write_text("raise SystemExit('the module was imported')\n")
    with pytest.raises(LoaderError) as raised:
        run_probe(SPEC, ensure_environment(SPEC, context), job, 120, context)
    assert "the module was imported" not in str(raised.value)
    assert "trust_remote_code" in str(raised.value)
