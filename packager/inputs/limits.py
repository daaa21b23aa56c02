"""Ask a process of its own what a base model's template and tokenizer make of texts, with limits of time and memory.

Of our environment it gets the path of Python's packages only. Decision 12 has the reasons for a process of its own.
"""

import json
import os
import select
import signal
import sys
from array import array
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

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
_DAMAGED = "the file is damaged or hostile; ask the model's author"
_NOT_RENDERED = (
    "if the template refuses a role, such as system, leave out card.system_prompt or the texts that have it; "
    "else the template is damaged or hostile: ask the model's author"
)


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A conversation to render.

    Attributes:
        messages: each has a role and a content.
        add_generation_prompt: the beginning of the answer comes after them.
        date: what a template gets that asks for the date, in any form; None for a fixed day, 26 July 2024.
    """

    messages: tuple[Mapping[str, str], ...]
    add_generation_prompt: bool = False
    date: str | None = None


@dataclass(frozen=True, kw_only=True)
class TextGroup:
    """Texts to encode, with the tokens that the tokenizer adds to a document or without."""

    texts: Sequence[str]
    add_special_tokens: bool


@dataclass(frozen=True, kw_only=True)
class _Limits:
    cpu_s: int
    memory_bytes: int


class ModelProcess:
    """A process that answers questions about a base model's files, each within limits of its own; use it in a block.

    Raises:
        CalibrationError: by each question, if there is no answer within its limits.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._folder = stack.enter_context(ScratchFolder("model")).path
            self._log = self._folder / "log"
            asked, self._asked = os.pipe()
            self._answers, answered = os.pipe()
            for descriptor in (self._asked, self._answers):
                stack.callback(os.close, descriptor)
            command = [sys.executable, "-P", "-m", model_code.__name__, str(asked), str(answered)]
            log = stack.enter_context(self._log.open("wb"))
            running = Processes().running(
                command, folder=self._folder, environ=_environ(), out=log, err=log, inherited=(asked, answered)
            )  # fmt: skip
            try:
                stack.enter_context(running)
            finally:
                os.close(asked)
                os.close(answered)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def render_chats(self, template: str, special_tokens: Mapping[str, str], chats: Sequence[Chat]) -> list[str]:
        """Render conversations in a chat template.

        Raises:
            CalibrationError: the template cannot be rendered, or takes more than 10 s or 1 GiB.
        """
        request = {
            "task": "render",
            "template": template,
            "special_tokens": dict(special_tokens),
            "chats": [
                {
                    "messages": list(chat.messages),
                    "add_generation_prompt": chat.add_generation_prompt,
                    "date": chat.date,
                }
                for chat in chats
            ],
        }
        limits = _Limits(cpu_s=RENDER_CPU_S, memory_bytes=_RENDER_MEMORY_BYTES)
        rendered: list[str] = self._ask(request, limits, "the model's chat template cannot be rendered", _NOT_RENDERED)
        return rendered

    def check_tokenizer_file(self, path: Path) -> None:
        """Read a tokenizer.json, and forget it.

        Raises:
            CalibrationError: the library cannot read it, or needs too much time or memory for it.
        """
        limits = _Limits(cpu_s=_LOAD_CPU_S, memory_bytes=_LOAD_MEMORY_BYTES)
        self._ask({"task": "load", "tokenizer": str(path)}, limits, "the base model's tokenizer cannot be read")

    def encode(
        self, tokenizer_json: str, groups: Sequence[TextGroup], *, split_special_tokens: bool = False
    ) -> list[list[list[int]]]:
        """Encode texts.

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
        tokenizer, texts, ids = (self._folder / name for name in ("tokenizer.json", "texts.json", "ids"))
        tokenizer.write_text(tokenizer_json, encoding="utf-8")
        listed = [{"texts": list(group.texts), "add_special_tokens": group.add_special_tokens} for group in groups]
        texts.write_text(json.dumps(listed), encoding="utf-8")
        request = {
            "task": "encode",
            "tokenizer": str(tokenizer),
            "texts": str(texts),
            "ids": str(ids),
            "split_special_tokens": split_special_tokens,
        }
        counts: list[list[int]] = self._ask(request, limits, "the model's tokenizer cannot encode the texts")
        with ids.open("rb") as stream:
            return [[_read_ids(stream, count) for count in lengths] for lengths in counts]

    def _ask(self, request: Mapping[str, object], limits: _Limits, failure: str, hint: str = _DAMAGED) -> Any:
        """Return the answer to a request.

        Raises:
            CalibrationError: with `failure`, the reason and `hint`.
        """
        asked, result = self._folder / "request.json", self._folder / "result.json"
        asked.write_text(
            json.dumps({**request, "cpu_s": limits.cpu_s, "memory_bytes": limits.memory_bytes}), encoding="utf-8"
        )
        status = self._status(json.dumps([str(asked), str(result)]), _WALL_FACTOR * limits.cpu_s + _WALL_S)
        if status == "0":
            answer = json.loads(result.read_text(encoding="utf-8"))
            reason = answer.get("error", "")
        else:
            answer, reason = {}, _death(status, limits, self._log)
        if reason:
            raise CalibrationError(failure, why=reason, hint=hint)
        return answer["result"]

    def _status(self, line: str, wall_s: float) -> str:
        """Send a request; return the exit status of its fork, "" if the process is gone, "late" if the time is over."""
        with suppress(BrokenPipeError):
            os.write(self._asked, f"{line}\n".encode())
        if not select.select([self._answers], [], [], wall_s)[0]:
            self._stack.close()  # the fork still runs
            return "late"
        return os.read(self._answers, 64).decode().strip()


def _read_ids(stream: Any, count: int) -> list[int]:
    ids = array("i")
    ids.fromfile(stream, count)
    return ids.tolist()


def _death(status: str, limits: _Limits, log: Path) -> str:
    if status in ("late", str(-signal.SIGXCPU)):
        return f"it took more than {limits.cpu_s} s of processor time"
    if status == str(-signal.SIGABRT):
        return f"its process was ended: it needs more than {limits.memory_bytes >> 30} GiB of memory, or is damaged"
    return f"its process ended with status {status or 'unknown'}: {tail(log, 1)}"


def _environ() -> dict[str, str]:
    """Return the child's whole environment: where Python finds its packages, and how many threads it may use."""
    return {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "RAYON_NUM_THREADS": str(_THREADS),
        "MALLOC_ARENA_MAX": "2",  # each arena of a thread would take 64 MiB of the address space
        "LC_ALL": "C.UTF-8",
    }
