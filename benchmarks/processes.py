"""Run an engine's script in a process of its own, so that its memory peaks and imports are its own."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from packager.prove.environments import READY, environment_name
from packager.prove.loaders import LOADERS
from packager.prove.probes import RUNTIME_VARIABLES
from packager.system.processes import Processes, tail

SCRIPTS = Path(__file__).parent / "peers"
ROOT = Path(__file__).parent.parent
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
_KEPT = {"PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "TMPDIR", *RUNTIME_VARIABLES}
_OTHERS = {"TOKENIZERS_PARALLELISM": "false", "PYTHONNOUSERSITE": "1", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A program that quantizes.

    Attributes:
        name: on the command line.
        title: in the table.
        script: in peers/.
        loader: our loader whose environment contains the engine, if there is one.
        best: whether it runs with the options that, by its documentation, give the best weights, not with its defaults.
    """

    name: str
    title: str
    script: str
    loader: str | None = None
    best: bool = False


OURS = Engine(name="ours", title="ours", script="ours.py")
OUR_EVALUATION = replace(OURS, script="our_evaluation.py")
PEERS = {
    engine.name: engine
    for engine in (
        Engine(name="autogptq", title="AutoGPTQ", script="autogptq.py", loader="autogptq"),
        Engine(name="gptqmodel", title="GPTQModel", script="gptqmodel_.py", loader="transformers"),
        Engine(
            name="gptqmodel-best", title="GPTQModel, best", script="gptqmodel_.py", loader="transformers", best=True
        ),
        Engine(name="autoround", title="AutoRound", script="autoround_.py"),
        Engine(name="autoround-best", title="AutoRound, best", script="autoround_.py", best=True),
        Engine(name="llmcompressor", title="llm-compressor", script="llmcompressor_.py"),
    )
}


@dataclass(frozen=True, kw_only=True)
class EnginePaths:
    """The paths of the engines.

    Attributes:
        pythons: by engine, the interpreter the user named.
        paths: by engine, folders put before everything else on its path.
        cache: where the loaders' environments are.
    """

    pythons: Mapping[str, Path]
    paths: Mapping[str, Sequence[Path]]
    cache: Path

    def python(self, engine: Engine) -> Path:
        """Return the engine's interpreter: the one the user named, the loader's environment, or the running one.

        The running interpreter is used where the user named a path for the engine.
        """
        if engine.name in self.pythons:
            return self.pythons[engine.name]
        if engine.loader is not None and engine.name not in self.paths:
            folder = self.cache / "loaders" / environment_name(LOADERS[engine.loader])
            if (folder / READY).exists():
                return folder / "bin" / "python"
        return Path(sys.executable)

    def environ(self, engine: Engine, environ: Mapping[str, str]) -> dict[str, str]:
        """Return the environment of an engine's process: offline, without secrets, with its own paths first."""
        own = [str(path.absolute()) for path in self.paths.get(engine.name, ())]
        # Another interpreter must not import the packages of this one.
        inherited = environ.get("PYTHONPATH", "") if self.python(engine) == Path(sys.executable) else ""
        root = [str(ROOT)] if engine.name == OURS.name else []
        path = os.pathsep.join(filter(None, [*own, *root, inherited]))
        kept = {name: text for name, text in environ.items() if name in _KEPT}
        return {**kept, **_OFFLINE, **_OTHERS, **({"PYTHONPATH": path} if path else {})}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of one job.

    Attributes:
        status: "ok", "not installed", "unavailable" or "failed".
        reason: why the status is not "ok".
        result: the script's result file (see peers/peer.py).
    """

    status: str
    reason: str = ""
    result: Mapping[str, Any] = field(default_factory=dict)


def run_jobs(
    engine: Engine,
    jobs: Sequence[Mapping[str, Any]],
    paths: EnginePaths,
    folder: Path,
    *,
    timeout_s: float,
    environ: Mapping[str, str] | None = None,
) -> list[Outcome]:
    """Run an engine's jobs one after the other in one process; its output goes to a log in `folder`.

    Args:
        engine: whose script runs.
        jobs: see peers/peer.py.
        paths: where the engine is.
        folder: of the jobs, their results and the log.
        timeout_s: the longest time from one job's end to the next one's.
        environ: variables of its process, beside those that every engine gets.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files, results = [], []
    for number, job in enumerate(jobs):
        files.append(folder / f"{engine.name}-{number}.json")
        results.append(folder / f"{engine.name}-{number}-result.json")
        results[-1].unlink(missing_ok=True)
        content = {**job, "result": str(results[-1].absolute())}
        files[-1].write_text(json.dumps(content, indent=2), encoding="utf-8")
    command = [str(paths.python(engine)), str(SCRIPTS / engine.script), *(str(file.absolute()) for file in files)]
    log = folder / f"{engine.name}.log"
    with log.open("wb") as out:
        status = Processes().run(
            command,
            folder=folder,
            environ={**paths.environ(engine, os.environ), **(environ or {})},
            out=out,
            err=out,
            timeout_s=timeout_s,
            progress=lambda: sum(result.exists() for result in results),
        )
    ended = f"it took over {timeout_s:g} s" if status is None else f"exit status {status}"
    last = tail(log, 1)[:200]
    return [_outcome(path, f"{ended}: {last}") for path in results]


def _outcome(path: Path, ended: str) -> Outcome:
    if not path.exists():
        return Outcome(status="failed", reason=ended)
    result = json.loads(path.read_text(encoding="utf-8"))
    return Outcome(status=result["status"], reason=result.get("reason", ""), result=result)


def add_path_arguments(parser: argparse.ArgumentParser, *, peers: str) -> None:
    """Add the options for which peers run and where they are."""
    parser.add_argument("--peers", default=peers, help=f'comma-separated, "" for none (default {peers})')
    parser.add_argument(
        "--peer-python", action="append", default=[], metavar="NAME=PATH",
        help="the interpreter that has a peer (default: the loader's environment that has it, else this one)",
    )  # fmt: skip
    parser.add_argument(
        "--peer-path", action="append", default=[], metavar="NAME=DIR", help="a folder to put first on a peer's path"
    )
    parser.add_argument(
        "--cache", type=Path, help="where the loaders' environments are (default ~/.cache/gptq-packager)"
    )


def peers_of(parser: argparse.ArgumentParser, names: str) -> tuple[Engine, ...]:
    """Return the peers of a comma-separated list, in its order."""
    wanted = [name for name in names.split(",") if name]
    if unknown := [name for name in wanted if name not in PEERS]:
        parser.error(f"no such peer: {', '.join(unknown)}; there are {', '.join(PEERS)}")
    return tuple(PEERS[name] for name in wanted)


def engine_paths(parser: argparse.ArgumentParser, given: argparse.Namespace) -> EnginePaths:
    """Return the paths of the peers that the command line names."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    # Not resolved: an environment's interpreter is a link to the one that it was made with.
    pythons = {name: Path(path).absolute() for name, path in _pairs(parser, given.peer_python)}
    paths: dict[str, list[Path]] = {}
    for name, path in _pairs(parser, given.peer_path):
        paths.setdefault(name, []).append(Path(path))
    cache = given.cache or Path(caches).expanduser() / "gptq-packager"
    return EnginePaths(pythons=pythons, paths=paths, cache=cache)


def _pairs(parser: argparse.ArgumentParser, given: Sequence[str]) -> list[tuple[str, str]]:
    pairs = []
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or name not in (*PEERS, OURS.name) or not Path(path).exists():
            parser.error(f"{text!r}: expected a peer's name, '=' and a path that exists")
        pairs.append((name, path))
    return pairs


def device_of(choice: str) -> str:
    """Return "cpu" or "cuda"."""
    import torch

    if choice == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return choice
