"""Run a stage whose child never ends, under the command line: test_signals.py sends it signals.

Usage: signal_driver.py STAGE CONFINEMENT FOLDER. The child's own child appends to FOLDER/out/beat, and so shows that it
still computes.
"""

import importlib.util
import os
import sys
import venv
from pathlib import Path
from types import ModuleType
from typing import Any

from packager.cli.main import main as packager
from packager.pipeline import flow
from packager.prove.environments import RuntimeContext, ensure_environment
from packager.prove.loaders import LOADERS, LoaderSpec

# A new session, which no signal to the group reaches, where the confinement ends it all the same.
RUNTIME = """
import subprocess, sys, time
code = "import time\\nwhile True:\\n    open({beat!r}, 'a').write('.')\\n    time.sleep(0.02)"
subprocess.Popen([sys.executable, "-c", code], start_new_session={leaves!r})
time.sleep(600)
"""
GIT = """#!/bin/sh
case " $* " in
  *" commit-tree "*) while :; do printf . >> {beat}; sleep 0.02; done ;;
esac
PATH={path} exec git "$@"
"""


def use_this_python(module: ModuleType) -> None:
    """Let a module take this interpreter for that of an environment."""
    vars(module)["ensure_environment"] = lambda *_: Path(sys.executable)


def loader(context: RuntimeContext, spec: LoaderSpec, folder: Path) -> None:
    """Verify a checkpoint; the loaders run in threads."""
    import numpy as np
    import torch

    from packager.prove import verify
    from packager.recipe import Loaders

    LOADERS["transformers"] = spec
    use_this_python(verify)
    job = verify.VerifyJob(
        checkpoints=[verify.Checkpoint(branch="main", folder=folder, bits=4, weights_sha256={})],
        ids=torch.zeros(1, 4, dtype=torch.int64),
        prompts=[],
        loaders=Loaders.model_validate({"required": ("transformers",), "num_rows": 1, "seq_len": 4}),
        device=torch.device("cpu"),
        context=context,
    )
    verify.check_loaders(job, {"main": np.zeros((1, 4, 8), np.float32)}, context.log)


def pip(context: RuntimeContext, spec: LoaderSpec, folder: Path) -> None:
    """Create an environment; its Python is the runtime that never ends."""

    def create(_: venv.EnvBuilder, environment: Path) -> None:
        (environment / "bin").mkdir(parents=True)
        python = environment / "bin" / "python"
        python.write_text(f"#!/bin/sh\nexec {sys.executable} {spec.script}\n")
        python.chmod(0o755)

    venv.EnvBuilder.create = create  # type: ignore[assignment, method-assign]
    importlib.util.find_spec = lambda *_: None
    spec.requirements.write_text(f"absent==1.0 --hash=sha256:{0:064d}\n")
    ensure_environment(spec, context)


def engine(context: RuntimeContext, spec: LoaderSpec, folder: Path) -> None:
    """Quantize with AutoGPTQ."""
    import torch

    from packager.quantize.engines import auto_gptq
    from packager.quantize.job import QuantizeJob
    from tests.sources import open_folder
    from tests.tiny_models import open_store, save_model, token_rows, variant

    use_this_python(auto_gptq)
    source, chosen = (
        open_folder(save_model(folder / "model", "llama")),
        variant(engine="auto-gptq"),
    )
    job = QuantizeJob(
        source=source, rows=token_rows(), stores={chosen: open_store(source, folder / "work", chosen)},
        devices=(torch.device("cpu"),), device_limit=None,
    )  # fmt: skip
    auto_gptq.AutoGptq(context, spec).quantize(job, lambda _: None)


def main() -> None:
    """Run the stage that the command line names."""
    stage, confinement, name = sys.argv[1:]
    folder = Path(name)
    (folder / "out").mkdir()
    beat = {
        "loader": folder / "scratch" / "toy" / "main" / "beat",
        "engine": folder / "scratch" / ".tmp-auto-gptq" / "beat",
    }.get(stage, folder / "out" / "beat")
    (folder / "beat").symlink_to(beat)
    if stage == "git":
        tools = folder / "tools"
        tools.mkdir()
        (tools / "git").write_text(GIT.format(beat=beat, path=os.environ["PATH"]))
        (tools / "git").chmod(0o755)
        os.environ["PATH"] = f"{tools}:{os.environ['PATH']}"
        sys.argv = ["packager", "publish", str(folder / "recipe.yaml"), "--dist", str(folder / "dist"), "--yes"]
        packager()
    script, lock = folder / "runtime.py", folder / "lock.txt"
    script.write_text(RUNTIME.format(beat=str(beat), leaves=confinement != "none" and stage != "pip"))
    lock.touch()
    spec = LoaderSpec(
        name="toy", script=script, requirements=lock, devices=frozenset({"cpu"}), requires_python=">=3", description=""
    )
    context = RuntimeContext(
        cache=folder / "cache", scratch=folder / "scratch", environ=dict(os.environ), log=lambda _: None,
        confinement=confinement,  # type: ignore[arg-type]
    )  # fmt: skip
    run: dict[str, Any] = {"loader": loader, "pip": pip, "engine": engine}
    flow.render = lambda *_, **__: run[stage](context, spec, folder)
    sys.argv = ["packager", "card", str(folder / "recipe.yaml")]
    packager()


if __name__ == "__main__":
    main()
