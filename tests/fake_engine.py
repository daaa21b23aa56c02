"""A fake AutoGPTQ: a script that follows the engine's protocol, well or badly, and a bench to run it on."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from packager.errors import PackagerError
from packager.inputs.base_model import SourceModel
from packager.prove.environments import RuntimeContext
from packager.quantize.block_store import BlockStore
from packager.quantize.engines import auto_gptq
from packager.quantize.engines.protocol import EngineResult
from packager.quantize.job import Event, QuantizeJob
from packager.variant import Variant
from tests.sources import open_folder
from tests.tiny_models import open_store, save_model, token_rows, variant

SECRET = "hf_this-is-no-real-token"  # noqa: S105 - a test looks for it where it must not be

# Returns zeros of the right shapes; `behaviour` selects what it does besides.
FAKE_SCRIPT = """
import json, os, pathlib, struct, sys, time
import numpy as np
from safetensors.numpy import save_file, safe_open

behaviour = {behaviour!r}
job = json.loads(pathlib.Path(sys.argv[1]).read_text())
output, model = pathlib.Path(job["output_dir"]), pathlib.Path(job["model_dir"])
seen = {{**job, "ids": np.load(job["rows"]).tolist(), "config": json.loads((model / "config.json").read_text()),
        "environ": dict(os.environ), "files": sorted(path.name for path in model.iterdir())}}
pathlib.Path({seen!r}).write_text(json.dumps(seen))

def emit(**event):
    print(json.dumps(event), flush=True)

def end(kind, message, linear=""):
    emit(event="error", kind=kind, message=message, linear=linear, traceback="line 1\\nline 2")
    sys.exit(1)

def packed(name, out, columns, bias):
    bits, size = job["quantize"]["bits"], job["quantize"]["group_size"]
    groups = 1 if size == -1 else columns // size
    tensors = {{
        "qweight": np.zeros((columns * bits // 32, out), np.int32),
        "qzeros": np.full((groups, out * bits // 32), 0x77777777, np.int32),
        "scales": np.full((groups, out), 0.01, np.float16), "g_idx": np.arange(columns, dtype=np.int32) // size,
    }}
    if bias or behaviour == "zero biases":
        tensors["bias"] = np.zeros(out, np.float16)
    if behaviour == "wide scales":
        tensors["scales"] = tensors["scales"].astype(np.float32)
    return {{f"{{name}}.{{kind}}": tensor for kind, tensor in tensors.items()}}

stored = {{}}
for path in model.glob("*.safetensors"):
    with safe_open(path, "numpy") as file:
        stored |= {{name: file.get_slice(name).get_shape() for name in file.keys()}}
linears = [name.removesuffix(".weight") for name in stored if name.endswith("_proj.weight")]
emit(event="start", num_blocks=3)
if behaviour == "unavailable":
    end("unavailable", "torch 9.9 sees no CUDA GPU")
for block in (1, 0, 2) if behaviour == "wrong order" else range(3):
    if behaviour == "stops early" and block == 2:
        break
    tensors = {{}}
    own = [name for name in linears if name.startswith(f"model.layers.{{block}}.")]
    for name in sorted(own, reverse=True):
        tensors |= packed(name, *stored[f"{{name}}.weight"], f"{{name}}.bias" in stored)
        if behaviour in ("factorization", "activations", "scales", "memory", "other") and block == 1:
            end(behaviour, f"{{behaviour}} failed\\nand more", name)
        if behaviour != "no losses":
            emit(event="linear", name=name, loss=0.5 + block + len(name) / 1000, seconds=0.1)
    if behaviour == "stranger":
        emit(event="linear", name="lm_head", loss=1.0, seconds=0.1)
    if behaviour == "talks":
        print("Packing model...", flush=True)
    save_file(tensors, output / f"block-{{block}}.safetensors")
    emit(event="block", block=block, file=f"block-{{block}}.safetensors")
    if behaviour == "crashes":
        print("about to crash with", os.environ, file=sys.stderr, flush=True)
        os._exit(3)
    if behaviour == "is killed":
        os.kill(os.getpid(), 9)
    if behaviour == "hangs":
        time.sleep(60)
emit(event="done", peak_memory_bytes=7)
"""


class Bench:
    """A tiny model, a variant of it that the fake engine quantizes, and what was reported."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *, model: str = "llama") -> None:
        self.folder = folder
        self.source: SourceModel = open_folder(save_model(folder / "model", model))
        self.variant: Variant = variant(engine="auto-gptq")
        self.reports: list[Event] = []
        self.logged: list[str] = []
        monkeypatch.setattr(auto_gptq, "ensure_environment", lambda *_: Path(sys.executable))
        monkeypatch.setattr(auto_gptq, "installed_versions", lambda *_: {"auto-gptq": "0.7.1", "torch": "9.9"})

    @property
    def store(self) -> BlockStore:
        return open_store(self.source, self.folder / "work", self.variant)

    def make(self, behaviour: str = "", *, silence_s: float = 60.0, device_limit: int | None = None) -> EngineResult:
        script = self.folder / "fake.py"
        script.write_text(FAKE_SCRIPT.format(behaviour=behaviour, seen=str(self.folder / "seen.json")))
        environ = {"PATH": "/usr/bin:/bin", "HF_TOKEN": SECRET, "HTTPS_PROXY": f"http://me:{SECRET}@proxy"}
        context = RuntimeContext(
            cache=self.folder / "cache", scratch=self.folder / "work", environ=environ, log=self.logged.append,
            confinement="none",  # it writes seen.json beside its folder
        )  # fmt: skip
        engine = auto_gptq.AutoGptq(context, replace(auto_gptq.SPEC, script=script), silence_s)
        devices = (torch.device("cpu"),)
        job = QuantizeJob(
            source=self.source, rows=token_rows(), stores={self.variant: self.store}, devices=devices,
            device_limit=device_limit,
        )  # fmt: skip
        return engine.quantize(job, self.reports.append)

    @property
    def seen(self) -> dict[str, Any]:
        seen: dict[str, Any] = json.loads((self.folder / "seen.json").read_text())
        return seen

    @property
    def finished(self) -> list[int]:
        return [block for block in range(3) if self.store.records(block) is not None]

    def fails(self, behaviour: str, *, silence_s: float = 60.0) -> PackagerError:
        with pytest.raises(PackagerError) as caught:
            self.make(behaviour, silence_s=silence_s)
        assert not list((self.folder / "work").glob(".tmp-*")), "the scratch folder is left behind"
        return caught.value
