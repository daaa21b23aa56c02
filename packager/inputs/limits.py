"""Start the process that interprets a base model's template and tokenizer, and limit its time and memory.

Of our environment it gets the path of Python's packages only. Decision 12 has the reasons for a process of its own.
"""

import json
import os
import signal
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packager.errors import CalibrationError
from packager.inputs import model_code
from packager.system.processes import Processes, tail
from packager.system.scratch import ScratchFolder

RENDER_CPU_S = 10
_RENDER_MEMORY_BYTES = 1 << 30
_LOAD_CPU_S = 60
_LOAD_MEMORY_BYTES = 4 << 30
# Tokenizers encode a megabyte in a second or two of a core.
_ENCODE_CPU_S, _ENCODE_CPU_S_PER_MB = 20, 20
_BYTES_PER_CHARACTER = 64
_WALL_FACTOR, _WALL_S = 4, 20  # a busy machine gives a process a part of a core
_THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A conversation to render: messages of a role and a content, and whether the answer's beginning comes after."""

    messages: tuple[Mapping[str, str], ...]
    add_generation_prompt: bool = False


@dataclass(frozen=True, kw_only=True)
class TextGroup:
    """Texts to encode, with the tokens that the tokenizer adds to a document or without."""

    texts: Sequence[str]
    add_special_tokens: bool


@dataclass(frozen=True, kw_only=True)
class _Limits:
    cpu_s: int
    memory_bytes: int


def render_chats(template: str, special_tokens: Mapping[str, str], chats: Sequence[Chat]) -> list[str]:
    """Render conversations in a chat template, all in one child process.

    Raises:
        CalibrationError: the template cannot be rendered, or takes more than 10 s or 1 GiB.
    """
    request = {
        "task": "render",
        "template": template,
        "special_tokens": dict(special_tokens),
        "chats": [
            {"messages": list(chat.messages), "add_generation_prompt": chat.add_generation_prompt} for chat in chats
        ],
    }
    limits = _Limits(cpu_s=RENDER_CPU_S, memory_bytes=_RENDER_MEMORY_BYTES)
    rendered: list[str] = _run(request, limits, "the model's chat template cannot be rendered")
    return rendered


def check_tokenizer_file(path: Path) -> None:
    """Read a tokenizer.json in a child process.

    Raises:
        CalibrationError: the library cannot read it, or needs too much time or memory for it.
    """
    limits = _Limits(cpu_s=_LOAD_CPU_S, memory_bytes=_LOAD_MEMORY_BYTES)
    _run({"task": "load", "tokenizer": str(path)}, limits, "the base model's tokenizer cannot be read")


def encode_in_child(
    tokenizer_json: str, groups: Sequence[TextGroup], *, split_special_tokens: bool = False
) -> list[list[list[int]]]:
    """Encode texts in a child process.

    Args:
        tokenizer_json: the tokenizer, as its library writes it.
        groups: the texts.
        split_special_tokens: the names of special tokens in a text are ordinary text.

    Returns:
        For each group the token ids of each text.

    Raises:
        CalibrationError: the tokenizer fails, or needs too much time or memory.
    """
    size = sum(len(text) for group in groups for text in group.texts)
    longest = max((len(text) for group in groups for text in group.texts), default=0)
    limits = _Limits(
        cpu_s=_ENCODE_CPU_S + size * _ENCODE_CPU_S_PER_MB // 10**6,
        memory_bytes=_LOAD_MEMORY_BYTES + (longest + size) * _BYTES_PER_CHARACTER,
    )
    with ScratchFolder("encode") as scratch:
        folder = scratch.path
        (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
        listed = [{"texts": list(group.texts), "add_special_tokens": group.add_special_tokens} for group in groups]
        (folder / "texts.json").write_text(json.dumps(listed), encoding="utf-8")
        request = {
            "task": "encode",
            "tokenizer": str(folder / "tokenizer.json"),
            "texts": str(folder / "texts.json"),
            "ids": str(folder / "ids"),
            "split_special_tokens": split_special_tokens,
        }
        counts: list[list[int]] = _run(request, limits, "the model's tokenizer cannot encode the texts")
        with (folder / "ids").open("rb") as stream:
            return [[_read_ids(stream, count) for count in lengths] for lengths in counts]


def _read_ids(stream: Any, count: int) -> list[int]:
    ids = array("i")
    ids.fromfile(stream, count)
    return ids.tolist()


def _run(request: Mapping[str, object], limits: _Limits, failure: str) -> Any:
    """Return the answer to a request.

    Raises:
        CalibrationError: with `failure` and the reason.
    """
    with ScratchFolder("model") as scratch:
        folder = scratch.path
        asked, answered, log = folder / "request.json", folder / "result.json", folder / "log"
        asked.write_text(
            json.dumps({**request, "cpu_s": limits.cpu_s, "memory_bytes": limits.memory_bytes}), encoding="utf-8"
        )
        command = [sys.executable, "-P", "-m", model_code.__name__, str(asked), str(answered)]
        wall_s = _WALL_FACTOR * limits.cpu_s + _WALL_S
        with log.open("wb") as stream:
            status = Processes().run(
                command, folder=folder, environ=_environ(), out=stream, err=stream, timeout_s=wall_s
            )  # fmt: skip
        if status == 0:
            answer = json.loads(answered.read_text(encoding="utf-8"))
            reason = answer.get("error", "")
        else:
            answer, reason = {}, _death(status, limits, log)
    if reason:
        raise CalibrationError(failure, why=reason, hint="the file is damaged or hostile; ask the model's author")
    return answer["result"]


def _death(status: int | None, limits: _Limits, log: Path) -> str:
    if status in (None, -signal.SIGXCPU):
        return f"it took more than {limits.cpu_s} s of processor time"
    if status == -signal.SIGABRT:
        return f"its process was ended: it needs more than {limits.memory_bytes >> 30} GiB of memory, or is damaged"
    return f"its process ended with status {status}: {tail(log, 1)}"


def _environ() -> dict[str, str]:
    """Return the child's whole environment: where Python finds its packages, and how many threads it may use."""
    return {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "RAYON_NUM_THREADS": str(_THREADS),
        "MALLOC_ARENA_MAX": "2",  # each arena of a thread would take 64 MiB of the address space
        "LC_ALL": "C.UTF-8",
    }
