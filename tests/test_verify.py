"""What is made of a loader's logits: agreement passes; numbers that are none, or somebody else's, never do."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from packager.model.decoder import Decoder
from packager.prove import verify
from packager.prove.environments import RuntimeContext
from packager.prove.probes import ProbeResult
from packager.prove.verify import Checkpoint, Reference, VerifyJob
from packager.receipt import LoaderRecord
from packager.recipe import Loaders

SHA256 = {"model.safetensors": "0" * 64}
OWN, OTHER = (np.random.default_rng(seed).normal(size=(2, 8, 32)).astype(np.float32) for seed in (1, 2))


def record_of(monkeypatch: pytest.MonkeyPatch, logits: np.ndarray, **probe: Any) -> LoaderRecord:
    """Return what is said of a loader that made these logits of the variant `main`, beside one with other weights."""
    result = ProbeResult(
        **{
            "logits": logits, "generated": (), "load_s": 1.0, "forward_s": 1.0, "peak_memory_bytes": 1,
            "device": "cpu", "dtype": "float32", "kernel": "torch", "versions": {},
            "weights_sha256": SHA256,
        } | probe
    )  # fmt: skip
    monkeypatch.setattr(verify, "_probe", lambda *_: {"main": result, "other": result})
    checkpoints = tuple(
        Checkpoint(branch=branch, folder=Path(branch), bits=4, weights_sha256=SHA256) for branch in ("main", "other")
    )
    nobody = cast(Decoder, None)
    references = {"main": Reference(decoder=nobody, logits=OWN), "other": Reference(decoder=nobody, logits=OTHER)}
    job = VerifyJob(
        checkpoints=checkpoints, ids=torch.zeros(2, 8, dtype=torch.int64), prompts=(),
        loaders=Loaders(required=("autogptq",)), device=torch.device("cpu"),
        context=RuntimeContext(cache=Path(), scratch=Path(), environ={}, log=lambda _: None),
    )  # fmt: skip
    (record,) = verify.prove(job, references, lambda _: None)["main"]
    return record


def test_agreement_passes(monkeypatch):
    record = record_of(monkeypatch, OWN * np.float32(1.001))
    assert (record.status, record.reason) == ("passed", "")
    assert record.relative_error == pytest.approx(0.001, rel=1e-3)


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
def test_what_is_not_a_number_or_too_large_fails(monkeypatch, what):
    record = record_of(monkeypatch, SPOILED[what]())
    assert record.status == "failed"
    assert record.reason.startswith("logits differ by ")
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
def test_a_failure_says_what_differs(monkeypatch, logits, probe, reason):
    record = record_of(monkeypatch, logits, **probe)
    assert record.status == "failed"
    assert reason in record.reason
