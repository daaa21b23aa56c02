"""AutoGPTQ's probe, without AutoGPTQ installed: a job can name a kernel, and gets that one or an error."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from packager.prove.loaders import LOADERS

SCRIPT = LOADERS["autogptq"].script


@pytest.fixture(scope="module")
def probe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("autogptq_probe", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def opened(probe: ModuleType, folder: Path, patch: pytest.MonkeyPatch, *, kernel: str, backend: str | None) -> Any:
    """Run a job in an AutoGPTQ that computes with `kernel`; return its result and what from_quantized was given."""
    given: dict[str, Any] = {}
    quantized = type("QuantLinear", (), {"__module__": f"auto_gptq.nn_modules.qlinear.{kernel}"})()
    model = SimpleNamespace(modules=lambda: [quantized])
    model.eval = lambda: model

    def from_quantized(path: str, **options: Any) -> Any:
        given.update(options)
        return SimpleNamespace(model=model)

    patch.setitem(
        sys.modules, "auto_gptq", SimpleNamespace(AutoGPTQForCausalLM=SimpleNamespace(from_quantized=from_quantized))
    )
    patch.setattr(probe.isolated, "answers", lambda *_: {})
    patch.setattr(probe.isolated, "versions", lambda _: {})
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "config.json").write_text(json.dumps({}))
    return probe.probe({"model_dir": str(folder), "device": "cpu", "backend": backend}, folder), given


@pytest.mark.parametrize(
    ("backend", "kernel", "chosen"),
    [
        (None, "qlinear_exllamav2", {}),
        ("triton", "qlinear_triton", {"use_triton": True, "disable_exllama": True, "disable_exllamav2": True}),
        ("exllama", "qlinear_exllama", {"use_triton": False, "disable_exllama": False, "disable_exllamav2": True}),
        ("exllamav2", "qlinear_exllamav2", {"use_triton": False, "disable_exllama": True, "disable_exllamav2": False}),
        ("cuda", "qlinear_cuda_old", {"use_triton": False, "disable_exllama": True, "disable_exllamav2": True}),
        ("cuda", "qlinear_cuda", {"use_triton": False, "disable_exllama": True, "disable_exllamav2": True}),
    ],
)
def test_a_job_names_its_kernel(
    probe: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    backend: str | None,
    kernel: str,
    chosen: dict[str, bool],
) -> None:
    result, given = opened(probe, tmp_path, monkeypatch, kernel=kernel, backend=backend)
    assert result["kernel"] == f"auto_gptq.nn_modules.qlinear.{kernel}.QuantLinear"
    choosing = ("use_triton", "disable_exllama", "disable_exllamav2")
    assert {name: given[name] for name in choosing if name in given} == chosen


@pytest.mark.parametrize(
    ("backend", "kernel", "error", "message"),
    [
        ("exllama", "qlinear_cuda", RuntimeError, "AutoGPTQ computes with qlinear_cuda: qlinear_exllama needs what is"),
        ("exllama", "qlinear_exllamav2", RuntimeError, "computes with qlinear_exllamav2"),
        ("marlin", "qlinear_cuda", ValueError, "no kernel 'marlin'; there are cuda, exllama, exllamav2, triton"),
    ],
)
def test_another_kernel_than_the_named_one_is_an_error(
    probe: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    kernel: str,
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        opened(probe, tmp_path, monkeypatch, kernel=kernel, backend=backend)
