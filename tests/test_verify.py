"""The judgement of a loader's logits and tokens: agreement passes; NaN, or the logits of another variant, never do."""

import gc
import json
import weakref
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from packager.errors import LoaderError, LoaderUnavailableError, MachineError
from packager.model.decoder import Decoder, forward
from packager.prove import verify
from packager.prove.environments import RuntimeContext
from packager.prove.loaders import LoaderSpec
from packager.prove.probes import ProbeJob, ProbeResult
from packager.prove.tolerances import TOLERANCE, tolerance_of_model
from packager.prove.verify import Checkpoint, VerifyJob
from packager.receipt import LoaderRecord, LoaderRunRecord
from packager.recipe import Loaders
from packager.system.processor import processor_name
from tests.tiny_models import save_model, token_rows

SHA256 = {"model.safetensors": "0" * 64}
CPU = torch.device("cpu")
OWN, OTHER = (np.random.default_rng(seed).normal(size=(2, 8, 32)).astype(np.float32) for seed in (1, 2))


def result_of(logits: np.ndarray, **probe: Any) -> ProbeResult:
    fields: dict[str, Any] = {
        "logits": logits, "generated": (), "load_s": 1.0, "forward_s": 1.0, "peak_memory_bytes": 1,
        "device": "cpu", "dtype": "float32", "kernel": "torch", "versions": {}, "weights_sha256": SHA256,
    }  # fmt: skip
    return ProbeResult(**fields | probe)


def job_of(folders: Mapping[str, Path], ids: torch.Tensor, **fields: Any) -> VerifyJob:
    checkpoints = [
        Checkpoint(branch=branch, folder=folder, bits=4, weights_sha256=SHA256) for branch, folder in folders.items()
    ]
    defaults: dict[str, Any] = {
        "checkpoints": checkpoints, "ids": ids, "prompts": (), "loaders": Loaders(required=("autogptq",)),
        "device": CPU, "context": RuntimeContext(cache=Path(), scratch=Path(), environ={}, log=lambda _: None),
    }  # fmt: skip
    return VerifyJob(**defaults | fields)


def replace_loaders(monkeypatch: pytest.MonkeyPatch, probe: Callable[[ProbeJob], ProbeResult | LoaderError]) -> None:
    """Replace environments and processes by a function that computes a checkpoint's result."""

    def run_probes(_: object, __: Path, jobs: Sequence[ProbeJob], *___: object) -> list[ProbeResult | LoaderError]:
        return [probe(job) for job in jobs]

    monkeypatch.setattr(verify, "ensure_environment", lambda *_: Path("python"))
    monkeypatch.setattr(verify, "run_probes", run_probes)


def record_of(monkeypatch: pytest.MonkeyPatch, logits: np.ndarray, **probe: Any) -> LoaderRecord:
    """Return the record of a loader that made these logits of the variant `main`, beside one with other weights."""
    replace_loaders(monkeypatch, lambda _: result_of(logits, **probe))
    job = job_of({"main": Path("main"), "other": Path("other")}, torch.zeros(2, 8, dtype=torch.int64))
    (record,) = verify.check_loaders(job, {"main": OWN, "other": OTHER}, lambda _: None)["main"]
    return record


def test_agreement_passes(monkeypatch):
    record = record_of(monkeypatch, OWN * np.float32(1.001))
    assert (record.status, record.reason) == ("passed", "")
    assert record.relative_error == pytest.approx(0.001, rel=1e-3)


def test_the_time_and_memory_of_what_ran_is_told_and_what_did_not_run_has_none(monkeypatch):
    results = {"autogptq": result_of(OWN, load_s=2.0, forward_s=0.5, peak_memory_bytes=7), "onnxruntime": None}

    def run_probes(spec, _, jobs, *__):
        return [results[spec.name] or LoaderError("it did not finish") for _ in jobs]

    replace_loaders(monkeypatch, lambda _: result_of(OWN))
    monkeypatch.setattr(verify, "run_probes", run_probes)
    told = []
    loaders = Loaders(required=("autogptq",), if_available=("onnxruntime",), num_rows=2, seq_len=8)
    ids = torch.zeros(4, 16, dtype=torch.int64)
    job = job_of({"main": Path("main")}, ids, loaders=loaders, timed=lambda *each: told.append(each))
    verify.check_loaders(job, {"main": OWN}, lambda _: None)
    wanted = LoaderRunRecord(
        loader="autogptq",
        device="cpu",
        load_s=2.0,
        forward_s=0.5,
        num_tokens=16,
        seq_len=8,
        peak_memory_bytes=7,
        beside=2,
        machine=processor_name(),
    )
    assert told == [("main", wanted)]


def test_each_loader_is_told_when_it_has_opened_all(monkeypatch):
    replace_loaders(monkeypatch, lambda _: LoaderError("it did not finish"))
    told: list[str] = []
    loaders = Loaders(required=("autogptq",), if_available=("exllamav2",))
    ids = torch.zeros(2, 8, dtype=torch.int64)
    job = job_of({"main": Path("main")}, ids, loaders=loaders, finished=told.append)
    verify.check_loaders(job, {"main": OWN}, lambda _: None)
    assert sorted(told) == ["autogptq", "exllamav2"]


@pytest.mark.parametrize("outcome", [None, LoaderError("it did not finish"), LoaderUnavailableError("no GPU")])
def test_a_record_says_how_the_process_was_confined_if_there_was_one(monkeypatch, outcome):
    replace_loaders(monkeypatch, lambda _: outcome or result_of(OWN))
    context = RuntimeContext(cache=Path(), scratch=Path(), environ={}, log=lambda _: None, confinement="namespaces")
    job = job_of({"main": Path("main")}, torch.zeros(2, 8, dtype=torch.int64), context=context)
    (record,) = verify.check_loaders(job, {"main": OWN}, lambda _: None)["main"]
    assert record.confinement == ("" if record.status == "not run" else "namespaces")


def test_a_loader_that_a_rule_refuses_is_recorded_as_refused_and_not_run(monkeypatch):
    seen = []

    def probe(job: ProbeJob) -> ProbeResult:
        seen.append(job.model_dir.name)
        return result_of(OWN)

    replace_loaders(monkeypatch, probe)
    folders = {"main": Path("main"), "other": Path("other")}
    job = job_of(folders, torch.zeros(2, 8, dtype=torch.int64), refused={"main": {"autogptq": "knows no yarn"}})
    records = verify.check_loaders(job, {"main": OWN, "other": OTHER}, lambda _: None)
    assert seen == ["other"]
    (refused,), (ran,) = records["main"], records["other"]
    assert (refused.status, refused.reason, refused.ran) == ("refused", "knows no yarn", False)
    assert ran.ran


@pytest.mark.parametrize(
    ("loaders", "asked", "status"),
    [
        ({"if_available": ("vllm-cpu",)}, False, "not run"),
        ({"if_available": ("vllm-cpu",)}, True, "passed"),
        ({"required": ("vllm-cpu",)}, False, "passed"),
        ({"if_available": ("onnxruntime",)}, False, "passed"),
    ],
)
def test_a_large_environment_is_made_on_request(monkeypatch, tmp_path, loaders, asked, status):
    replace_loaders(monkeypatch, lambda _: result_of(OWN))
    context = RuntimeContext(cache=tmp_path, scratch=tmp_path, environ={}, log=lambda _: None)
    ids = torch.zeros(2, 8, dtype=torch.int64)
    job = job_of({"main": Path("main")}, ids, loaders=Loaders(**loaders), context=context, on_request=asked)
    (record,) = verify.check_loaders(job, {"main": OWN}, lambda _: None)["main"]
    assert record.status == status
    assert ("made on request only: by packager verify" in record.reason) == (status == "not run")


def test_a_loader_without_cuda_runs_on_the_cpu_in_a_run_on_cuda(monkeypatch):
    devices = {}

    def probe(job: ProbeJob) -> LoaderError:
        devices[job.output_dir.parent.name] = job.device
        return LoaderError("it did not finish")

    replace_loaders(monkeypatch, probe)
    loaders = Loaders(required=("transformers", "onnxruntime"))
    ids = torch.zeros(2, 8, dtype=torch.int64)
    job = job_of({"main": Path("main")}, ids, loaders=loaders, device=torch.device("cuda"))
    verify.check_loaders(job, {"main": OWN}, lambda _: None)
    assert devices == {"transformers": "cuda", "onnxruntime": "cpu"}


def test_the_tolerance_may_be_the_loader_s_own(monkeypatch):
    replace_loaders(monkeypatch, lambda _: result_of(OWN * np.float32(1.0003)))
    loaders = Loaders(required=("transformers", "onnxruntime"))
    job = job_of({"main": Path("main")}, torch.zeros(2, 8, dtype=torch.int64), loaders=loaders)
    records = verify.check_loaders(job, {"main": OWN}, lambda _: None)["main"]
    assert [record.status for record in records] == ["passed", "failed"]
    assert records[1].reason == "logits differ by 0.0003 relative, allowed 0.0001 in float32"


def test_a_probe_must_write_as_many_logits_as_ours_have(monkeypatch):
    seen = []

    def probe(job: ProbeJob) -> LoaderError:
        seen.append(job.vocab_size)
        return LoaderError("it did not finish")

    replace_loaders(monkeypatch, probe)
    job = job_of({"main": Path("main")}, torch.zeros(2, 8, dtype=torch.int64))
    verify.check_loaders(job, {"main": OWN}, lambda _: None)
    assert seen == [OWN.shape[-1]]


def spoiled(where: Any, value: float) -> np.ndarray:
    logits = OWN.copy()
    logits[where] = value
    return logits


SPOILED: Mapping[str, Callable[[], np.ndarray]] = {
    "one NaN": lambda: spoiled((1, 7, 31), np.nan),
    "all NaN": lambda: spoiled(..., np.nan),
    "one infinity": lambda: spoiled((0, 0, 0), np.inf),
    "beyond what can be squared": lambda: spoiled((0, 0, 0), 3e38),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("what", SPOILED)
def test_logits_that_are_nan_or_too_large_fail(monkeypatch, what):
    record = record_of(monkeypatch, SPOILED[what]())
    assert record.status == "failed"
    assert record.reason.startswith("its logits are not finite, or too large to compare")
    assert record.relative_error is None
    json.loads(record.model_dump_json(), parse_constant=pytest.fail)  # a receipt is JSON, which has no NaN
    assert LoaderRecord.model_validate_json(record.model_dump_json()).status == "failed"


@pytest.mark.parametrize(
    ("logits", "probe", "reason"),
    [
        (OWN, {"weights_sha256": {"model.safetensors": "1" * 64}}, "it read other weights than were packed (sha256)"),
        (OTHER, {}, "its logits are closer to those of other"),
        (OWN * np.float32(1.02), {}, "logits differ by 0.0200 relative, allowed 0.005 in float32"),
        (OWN * np.float32(1.02), {"dtype": "float8"}, "allowed 0.005 in float8"),
        (-OWN, {}, "top-1 agreement 0.000, at least 0.95 wanted"),
    ],
)
def test_a_failure_names_the_difference(monkeypatch, logits, probe, reason):
    record = record_of(monkeypatch, logits, **probe)
    assert record.status == "failed"
    assert reason in record.reason


def test_the_figures_are_those_of_a_plain_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(3).normal(size=OWN.shape).astype(np.float32)
    logits = OWN + np.float32(0.4) * noise
    record = record_of(monkeypatch, logits)
    difference, own = (logits - OWN).astype(np.float64), OWN.astype(np.float64)
    assert record.relative_error == pytest.approx((difference**2).sum() ** 0.5 / (own**2).sum() ** 0.5, abs=1e-6)
    same = [
        max(range(32), key=logits[row, position].__getitem__) == max(range(32), key=OWN[row, position].__getitem__)
        for row in range(2)
        for position in range(8)
    ]
    assert 0 < sum(same) < len(same)
    assert record.top1_agreement == pytest.approx(sum(same) / len(same), abs=1e-6)
    assert (record.tokens_generated, record.tokens_equal) == (0, 0)


PROMPTS = ((5, 9, 11), (17,), (40, 41, 42, 43, 44, 45))
NUM_TOKENS = 6


class Checked:
    """A tiny model in place of a checkpoint (its linears are not packed), and transformers' whole model of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = save_model(folder, "llama")
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.ids = token_rows(2, 8).ids
        self.logits = self.run(self.ids)
        self.generated = tuple(self.generate(prompt) for prompt in PROMPTS)

    @torch.no_grad()
    def run(self, ids: torch.Tensor) -> np.ndarray:
        logits: torch.Tensor = self.model(ids).logits
        return logits.numpy()

    def after(self, tokens: Sequence[int]) -> np.ndarray:
        """Return the logits of the next token."""
        found: np.ndarray = self.run(torch.tensor([list(tokens)]))[0, -1]
        return found

    def generate(self, prompt: Sequence[int], count: int = NUM_TOKENS) -> tuple[int, ...]:
        ids = list(prompt)
        for _ in range(count):
            ids.append(int(self.after(ids).argmax()))
        return tuple(ids[len(prompt) :])

    def equal(self, generated: Sequence[Sequence[int]], *, allowed: float = 0.02) -> int:
        """Count the tokens that tie with the most likely one after the prompt and the tokens before them.

        Two logits tie if they differ by `allowed` times the rms of all logits at most.
        """
        count = 0
        for prompt, tokens in zip(PROMPTS, generated, strict=True):
            for number, token in enumerate(tokens):
                logits = self.after([*prompt, *tokens[:number]]).astype(np.float64)
                count += bool(logits.max() - logits[token] <= allowed * (logits**2).mean() ** 0.5)
        return count

    def job(self, **fields: Any) -> VerifyJob:
        return job_of({"main": self.folder}, self.ids, prompts=PROMPTS, **fields)

    def record(self, monkeypatch: pytest.MonkeyPatch, **probe: Any) -> LoaderRecord:
        fields: dict[str, Any] = {"logits": self.logits, "generated": self.generated} | probe
        replace_loaders(monkeypatch, lambda _: result_of(**fields))
        (record,) = verify.verify(self.job(), lambda _: None)["main"]
        return record


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Checked:
    return Checked(tmp_path_factory.mktemp("checked"))


def test_our_logits_are_those_of_the_whole_model(checked: Checked, monkeypatch: pytest.MonkeyPatch) -> None:
    for tokens in (1024, 3):  # pieces that end inside a row
        monkeypatch.setattr(verify, "tokens_per_piece", lambda _, tokens=tokens: tokens)
        found = verify.references_of(checked.job())["main"]
        assert found.shape == checked.logits.shape
        assert np.allclose(found, checked.logits, atol=1e-5)


def test_greedy_tokens_of_the_whole_model_are_equal(checked: Checked, monkeypatch: pytest.MonkeyPatch) -> None:
    record = checked.record(monkeypatch)
    assert (record.status, record.reason) == ("passed", "")
    assert (record.tokens_generated, record.tokens_equal) == (18, 18)


@pytest.mark.parametrize(
    ("dtype", "times", "status"),
    [
        pytest.param(torch.float16, 6.5, "passed", marks=pytest.mark.slow),
        (torch.float16, 9.5, "failed"),
        pytest.param(torch.bfloat16, 2.4, "passed", marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, 3.6, "failed", marks=pytest.mark.slow),
    ],
)
def test_a_model_in_whose_dtype_rounding_costs_more_may_differ_more(
    checked: Checked, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, times: float, status: str
) -> None:
    name = str(dtype).removeprefix("torch.")
    monkeypatch.setitem(TOLERANCE, name, 1e-5)
    with torch.no_grad():
        rounded = deepcopy(checked.model).to(dtype)(checked.ids).logits.float().numpy()
    rounding = float(np.linalg.norm(rounded - checked.logits) / np.linalg.norm(checked.logits))
    logits = checked.logits + times * (rounded - checked.logits)
    record = checked.record(monkeypatch, logits=logits, dtype=name)
    assert record.rounding_error == pytest.approx(rounding, rel=0.15)
    assert record.relative_error == pytest.approx(times * rounding, rel=0.02)
    assert (record.status, "relative, allowed" in record.reason) == (status, status == "failed")


def test_a_token_within_what_rounding_costs_the_model_is_equal(
    checked: Checked, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = (checked.generated[0][-1] + 1) % 128
    generated = ((*checked.generated[0][:-1], last), *checked.generated[1:])
    logits = checked.after([*PROMPTS[0], *checked.generated[0][:-1]]).astype(np.float64)
    gap = float((logits.max() - logits[last]) / np.sqrt((logits**2).mean()))
    for rounding, equal in ((gap / 4 + 0.01, True), (gap / 4 - 0.01, False)):
        monkeypatch.setattr(verify, "rounding_errors", lambda *_: lambda _: 1.0)
        monkeypatch.setattr(verify, "tolerance_of_model", lambda *_, rounding=rounding: rounding)
        record = checked.record(monkeypatch, generated=generated, dtype="float16")
        assert (record.tokens_equal == record.tokens_generated) == equal


@pytest.mark.parametrize(
    ("probe", "measured"),
    [
        ({"dtype": "float16"}, True),
        ({"dtype": "float32"}, False),
        ({"dtype": "float16", "times": 1.2}, False),
        ({"dtype": "float16", "times": np.nan}, False),
        ({"dtype": "float16", "times": 1.001}, False),
    ],
)
def test_rounding_is_measured_where_it_can_decide(
    monkeypatch: pytest.MonkeyPatch, probe: dict[str, Any], measured: bool
) -> None:
    monkeypatch.setattr(verify, "rounding_errors", lambda *_: lambda _: 0.003)
    times = np.float32(probe.get("times", 1.02))
    record = record_of(monkeypatch, OWN * times, dtype=probe["dtype"])
    assert record.rounding_error == (0.003 if measured else None)
    assert record.status == ("passed" if measured or times == np.float32(1.001) else "failed")


def test_rounding_is_measured_once_for_all_loaders_of_a_dtype(
    checked: Checked, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtypes = {"autogptq": "float16", "transformers": "float16", "vllm": "bfloat16", "onnxruntime": "float32"}
    results = {name: result_of(checked.logits * np.float32(1.04), dtype=dtype) for name, dtype in dtypes.items()}
    replace_loaders(monkeypatch, lambda _: result_of(checked.logits))
    monkeypatch.setattr(verify, "run_probes", lambda spec, _, jobs, *__: [results[spec.name] for _ in jobs])
    monkeypatch.setattr(LoaderSpec, "machine_problem", lambda *_: "")
    asked, lines = list[tuple[str, torch.dtype]](), list[str]()
    costs = {"float16": 0.006, "bfloat16": 0.02}  # of the branch "main"; of the other, twice as much

    def counted(checkpoint: Checkpoint, _: VerifyJob, dtype: torch.dtype = torch.float32) -> np.ndarray:
        asked.append((checkpoint.branch, dtype))
        cost = costs[str(dtype).removeprefix("torch.")] * (1 if checkpoint.branch == "main" else 2)
        return checked.logits * np.float32(1 + cost)

    monkeypatch.setattr(verify, "reference", counted)
    folders = dict.fromkeys(("main", "other"), checked.folder)
    job = job_of(folders, checked.ids, loaders=Loaders(required=tuple(dtypes)))
    found = verify.check_loaders(job, dict.fromkeys(folders, checked.logits), lines.append)
    assert asked == [(branch, dtype) for branch in folders for dtype in (torch.float16, torch.bfloat16)]
    assert [line for line in lines if "rounding" in line] == [
        f"  {branch}: our own forward in {dtype} runs, to measure what rounding costs this model"
        for branch in folders
        for dtype in ("float16", "bfloat16")
    ]
    for branch, times in zip(folders, (1, 2), strict=True):
        errors = {record.loader: record.rounding_error for record in found[branch]}
        for name, dtype in dtypes.items():
            cost = costs.get(dtype)
            assert errors[name] == (None if cost is None else pytest.approx(times * cost, abs=2e-6))


def test_the_tolerance_of_a_model_is_bounded_both_ways() -> None:
    assert [tolerance_of_model(0.01, "float16", error) for error in (0.001, 0.0028, 0.05, np.inf, np.nan)] == [
        0.01, pytest.approx(0.0224), 0.1, 0.01, 0.01,
    ]  # fmt: skip


def shifted(tokens: Sequence[int]) -> tuple[int, ...]:
    return (*tokens[1:], tokens[0])


CHANGES: Mapping[str, Callable[[tuple[tuple[int, ...], ...]], tuple[tuple[int, ...], ...]]] = {
    "the last token differs": lambda made: (made[0], (*made[1][:-1], (made[1][-1] + 1) % 128), made[2]),
    "the first token differs": lambda made: (((made[0][0] + 64) % 128, *made[0][1:]), made[1], made[2]),
    "one position later": lambda made: tuple(shifted(tokens) for tokens in made),
    "answers of other prompts": lambda made: (made[1], made[2], made[0]),
    "fewer tokens": lambda made: (made[0][:2], (), (made[2][0], 3)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_token_that_differs_is_counted(checked: Checked, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    generated = CHANGES[name](checked.generated)
    record = checked.record(monkeypatch, generated=generated)
    count, equal = sum(map(len, generated)), checked.equal(generated)
    assert equal < count
    assert (record.tokens_generated, record.tokens_equal) == (count, equal)
    assert record.status == "failed"
    assert record.reason == f"{count - equal} of {count} generated tokens are not what our forward finds most likely"


def test_garbage_logits_make_no_garbage_token_equal(checked: Checked, monkeypatch: pytest.MonkeyPatch) -> None:
    dice = np.random.default_rng(0)
    logits = dice.normal(size=checked.logits.shape).astype(np.float32)
    generated = tuple(tuple(dice.integers(3, 128, NUM_TOKENS).tolist()) for _ in PROMPTS)
    for garbage in (logits, logits * np.float32(1e30), np.full_like(logits, np.nan)):
        record = checked.record(monkeypatch, logits=garbage, generated=generated, dtype="float16")
        assert record.tokens_equal == checked.equal(generated, allowed=0.04) < 3
        assert (record.status, record.tokens_generated) == ("failed", 18)


def test_a_token_outside_the_vocabulary_is_not_equal(checked: Checked, monkeypatch: pytest.MonkeyPatch) -> None:
    generated = ((*checked.generated[0][:2], 128, *checked.generated[0][3:]), (-1,) * 6, checked.generated[2])
    record = checked.record(monkeypatch, generated=generated)
    assert (record.tokens_generated, record.tokens_equal) == (18, 2 + 6)


def test_nan_in_our_own_forward_makes_no_token_equal(checked: Checked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Decoder, "logits", lambda _, states: torch.full((*states.shape[:-1], 128), torch.nan))
    assert checked.record(monkeypatch, logits=checked.logits).tokens_equal == 0


@pytest.mark.parametrize(("dtype", "allowed"), [("float32", 0.02), ("float16", 0.04), ("bfloat16", 0.12)])
@pytest.mark.parametrize("factor", [0.98, 1.02])
def test_tokens_tie_within_the_rounding_of_the_dtype(
    checked: Checked, monkeypatch: pytest.MonkeyPatch, dtype: str, allowed: float, factor: float
) -> None:
    logits = checked.after([*PROMPTS[0], *checked.generated[0][:-1]]).astype(np.float64)
    best, rms = checked.generated[0][-1], np.sqrt((logits**2).mean())
    second = int(np.argsort(logits)[-2])
    original = Decoder.logits

    def changed(self: Decoder, hidden: torch.Tensor) -> torch.Tensor:
        """Bring the second most likely token of the first prompt's last position close to the most likely one."""
        found = original(self, hidden)
        target = torch.from_numpy(logits).float()
        near = (found - target).abs().amax(-1) < 1e-4
        found[..., second] = torch.where(near, float(logits[best] - factor * allowed * rms), found[..., second])
        return found

    monkeypatch.setattr(Decoder, "logits", changed)
    generated = ((*checked.generated[0][:-1], second), *checked.generated[1:])
    record = checked.record(monkeypatch, generated=generated, dtype=dtype)
    assert record.tokens_equal == (18 if factor < 1 else 17)


def test_rounding_to_float16_changes_no_verdict(checked: Checked, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader in float16: its own greedy tokens, and the other token wherever two tie in float16."""
    half: Any = AutoModelForCausalLM.from_pretrained(checked.folder, dtype=torch.float16).eval()

    @torch.no_grad()
    def generate(prompt: Sequence[int]) -> tuple[int, ...]:
        ids = list(prompt)
        for _ in range(NUM_TOKENS):
            logits = half(torch.tensor([ids])).logits[0, -1]
            ids.append(int((logits == logits.max()).nonzero()[-1]))
        return tuple(ids[len(prompt) :])

    with torch.no_grad():
        logits = half(checked.ids).logits.float().numpy()
    generated = tuple(generate(prompt) for prompt in PROMPTS)
    record = checked.record(monkeypatch, logits=logits, generated=generated, dtype="float16")
    assert (record.status, record.tokens_equal) == ("passed", 18)


def test_no_decoder_is_alive_while_loaders_run(checked: Checked, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Decoder]] = []
    alive: list[int] = []
    emptied: list[int] = []
    create = Decoder.__init__

    def init(self: Decoder, *arguments: Any, **named: Any) -> None:
        create(self, *arguments, **named)
        made.append(weakref.ref(self))

    def probe(_: ProbeJob) -> ProbeResult:
        alive.append(sum(each() is not None for each in made))
        return result_of(checked.logits, generated=checked.generated)

    monkeypatch.setattr(Decoder, "__init__", init)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(len(alive)))
    replace_loaders(monkeypatch, probe)
    loaders = Loaders(required=("autogptq", "transformers"))
    job = job_of({"main": checked.folder, "other": checked.folder}, checked.ids, prompts=PROMPTS, loaders=loaders)
    records = verify.verify(job, lambda _: None)
    assert [record.tokens_equal for found in records.values() for record in found] == [18] * 4
    assert len(made) == 2 + 2  # our logits, then the tokens of all loaders at once
    assert alive == [0] * 4
    assert emptied == [0]


def test_a_model_is_freed_without_the_garbage_collector(checked: Checked) -> None:
    gc.collect()
    gc.disable()
    try:
        decoder = verify._decoder(checked.job().checkpoints[0], checked.job())
        (state,) = forward(decoder, checked.ids, rows=2)
        decoder.logits(state)
        weights = weakref.ref(decoder.blocks[0])
        del decoder, state
        assert weights() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("step", ["references_of", "token_gaps"])
def test_a_gpu_without_memory_is_an_error_with_a_hint(
    checked: Checked, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    calls = []

    def fail(decoder: Decoder, ids: torch.Tensor, *, rows: int) -> list[torch.Tensor]:
        calls.append(1)
        if len(calls) > (step == "token_gaps"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(decoder, ids, rows=rows)

    monkeypatch.setattr(verify, "forward", fail)
    with pytest.raises(MachineError, match="the GPU's memory is exhausted") as caught:
        checked.record(monkeypatch)
    assert (caught.value.why, len(calls)) == ("CUDA out of memory", 1 + (step == "token_gaps"))
    assert "--device cpu" in caught.value.hint
