"""Describe a base model for its lock in a process of its own, with limits of time and memory.

config.json decides what transformers builds: a billion layers, or a list of any length. Of our environment the process
gets the path of Python's packages only. The process runs this file, too, with a folder that holds a request, the file
of the answer, and the limits as its arguments. Decision 17 has the reasons.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packager.errors import SourceError
from packager.model.config_values import MOST_BLOCKS, shortened, unusable_config
from packager.model.lock import LockedModel
from packager.model.safetensors_file import TensorInfo
from packager.receipt import CONFIG
from packager.system.processes import Processes, ending, tail
from packager.system.scratch import ScratchFolder
from packager.system.text import printable, quoted, shown

# DeepSeek-V3, with 61 blocks and 91,991 tensors, takes about 20 s of a core, and 0.5 GiB.
_CPU_S, _WALL_S = 300, 1200
_MEMORY_BYTES = 6 << 30
_MOST_RESULT_BYTES = 64_000_000
_KEYS = ("what", "where", "why", "hint")


def describe_in_child(
    config: Mapping[str, object], tensors: Mapping[str, TensorInfo] | None, where: str, own: Sequence[str] = ()
) -> LockedModel:
    """Describe the model of a config.json and its stored tensors.

    Args:
        config: content of config.json.
        tensors: of the weights files, by name; None for those that transformers would store.
        where: the model, for messages.
        own: see `packager.model.describe.describe`.

    Raises:
        SourceError: see `packager.model.describe.describe`; or transformers has no such decoder, or needs too much time
            or memory for it.
    """
    _check_block_counts(config, where)
    stored = None if tensors is None else {name: [info.dtype, *info.shape] for name, info in tensors.items()}
    with ScratchFolder("describe") as scratch:
        folder = scratch.path
        (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
        (folder / "request.json").write_text(json.dumps({"tensors": stored, "own": own}), encoding="utf-8")
        answer = _run(folder, where)
    if "error" in answer:
        error = {key: str(answer["error"].get(key, "")).replace(str(folder), where) for key in _KEYS}
        inside = error["where"] if error["where"] not in ("", where) else ""
        raise SourceError(
            error["what"], where=": ".join(filter(None, (where, inside))), why=printable(error["why"]),
            hint=error["hint"],
        )  # fmt: skip
    return LockedModel.model_validate_json(json.dumps(answer["model"]))


def description_by_transformers() -> Callable[[Mapping[str, object], str], LockedModel] | None:
    """Return the function that describes the model of a config.json alone; None without the build extra."""
    if not all(map(find_spec, ("torch", "transformers"))):
        return None
    return lambda config, where: describe_in_child(config, None, where)


def _check_block_counts(config: Mapping[str, object], where: str) -> None:
    """Refuse numbers of blocks that no model has, before transformers begins to build them."""
    for part in _parts(config):
        for key, count in part.items():
            if key.endswith(("layer", "layers")) and isinstance(count, int) and count > MOST_BLOCKS:
                raise SourceError(
                    "the model has too many blocks", where=where,
                    why=f"{key} is {shown(count)}, and {MOST_BLOCKS} is the most that a model may have",
                )  # fmt: skip


def _parts(config: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    """Yield a config and the configs inside it."""
    yield config
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _parts(value)


def _run(folder: Path, where: str) -> Any:
    result, log = folder / "result.json", folder / "log"
    command = [sys.executable, "-P", "-m", __name__, str(folder), str(result), str(_CPU_S), str(_MEMORY_BYTES)]
    with log.open("wb") as stream:
        status = Processes().run(
            command, folder=folder, environ=_environ(folder), out=stream, err=stream, timeout_s=_WALL_S,
            max_file_bytes=_MOST_RESULT_BYTES,
        )  # fmt: skip
    if status == 0:
        return json.loads(result.read_text(encoding="utf-8"))
    if status in (None, -signal.SIGXCPU):
        reason = f"transformers took more than {_CPU_S} s of processor time"
    else:
        reason = f"its process ended: {ending(status)}: {printable(tail(log, 1))}"
    raise _too_large(where, reason)


def _too_large(where: str, reason: str) -> SourceError:
    return SourceError(
        "the model cannot be described", where=where, why=reason,
        hint="compare the sizes in config.json with the model's page",
    )  # fmt: skip


def _environ(folder: Path) -> dict[str, str]:
    """Return the child's whole environment: without a token, and without a network for the Hub's client."""
    return {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "HF_HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "OMP_NUM_THREADS": "1",
        "LC_ALL": "C.UTF-8",
    }


def _answer(folder: Path, result: Path, memory_bytes: int = _MEMORY_BYTES) -> None:
    """Write {"model": ...} or {"error": ...} of the request in a folder."""
    answer: dict[str, object]
    try:
        answer = {"model": _described(folder).model_dump(mode="json")}
    except (SourceError, MemoryError) as error:
        if MemoryError in (type(error), type(error.__cause__)):
            error = _too_large(str(folder), f"transformers needs more than {memory_bytes >> 30} GiB of memory for it")
        answer = {"error": {key: getattr(error, key) for key in _KEYS}}
    except Exception as error:  # noqa: BLE001 - the code of any model raises anything
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        unusable = unusable_config(config, "transformers cannot describe this model", folder, error)
        answer = {"error": {key: getattr(unusable, key) for key in _KEYS}}
    result.write_text(json.dumps(answer), encoding="utf-8")


def _described(folder: Path) -> LockedModel:
    from packager.model.describe import describe

    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    stored = request["tensors"]
    tensors = None
    if stored is not None:
        tensors = {
            name: TensorInfo(name=name, dtype=dtype, shape=tuple(shape)) for name, (dtype, *shape) in stored.items()
        }
    _check_is_decoder(json.loads((folder / CONFIG).read_text(encoding="utf-8")), folder)
    return describe(folder, tensors, request["own"])


def _check_is_decoder(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse what transformers does not build as a decoder, with a reason of one line.

    Raises:
        SourceError: it does not know the architecture, or the model has an encoder or no output head.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    from packager.model.skeleton import open_config

    model_type, version = config.get("model_type"), metadata.version("transformers")
    name, where = quoted(str(model_type)), f"{folder}: {CONFIG}"
    if not isinstance(model_type, str):
        raise SourceError(
            "config.json names no model", where=where, why=f"model_type is {shortened(model_type)}, not a name",
            hint="take config.json from the model's page again: this one is of another program, or a part of it",
        )  # fmt: skip
    if model_type not in CONFIG_MAPPING:
        own_code = "auto_map" in config
        raise SourceError(
            "the model brings its own code, which is not run" if own_code else "transformers does not know this model",
            where=where, why=f"transformers {version} has no model_type {name}"
            + (", and config.json names Python files of the model (auto_map)" if own_code else ""),
            hint="a later release of transformers may have it; code that a model brings is never run",
        )  # fmt: skip
    opened = open_config(folder)
    if getattr(opened, "is_encoder_decoder", False):
        raise SourceError(
            "the model has an encoder and a decoder", where=where, why=f"model_type is {name}",
            hint="only models that are a decoder alone are quantized",
        )  # fmt: skip
    if type(opened) not in MODEL_FOR_CAUSAL_LM_MAPPING and type(opened) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise SourceError(
            "the model is not one that generates text", where=where,
            why=f"transformers {version} has no language model for model_type {name}",
        )  # fmt: skip


def _set_limits(cpu_s: int, memory_bytes: int) -> None:
    """Limit this process: memory fails with MemoryError, processor time with a signal that ends the process.

    RLIMIT_DATA and not RLIMIT_AS: torch with CUDA maps libraries and reserves addresses of many GiB.
    """
    import resource  # POSIX only: importing this module works everywhere

    for kind, limit in (("RLIMIT_DATA", memory_bytes), ("RLIMIT_CPU", cpu_s), ("RLIMIT_CORE", 0)):
        number = getattr(resource, kind)
        hard = resource.getrlimit(number)[1]
        soft = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(number, (soft, soft if kind == "RLIMIT_CORE" else hard))


if __name__ == "__main__":
    _set_limits(int(sys.argv[3]), int(sys.argv[4]))
    _answer(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[4]))
