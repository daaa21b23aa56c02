"""What a base model brings and a program must interpret: its chat template and its tokenizer, in a child with limits.

This file runs as a process of its own, which `packager.inputs.limits` starts: a template can loop for hours, and a
pattern in tokenizer.json can take exponential time. Each request is answered by a fork of the process: its limits are
its own, and nothing that it does reaches the next one. This file imports nothing else of the package, so that it starts
in a fraction of a second.
"""

import array
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NoReturn

_MOST_RENDERED = 20_000_000  # characters of all conversations together
_BATCH_CHARACTERS = 4_000_000  # encoded at once; an encoding takes about 30 bytes per character
_MAX_REASON = 500
# The day of every rendered text, so that the same build gives the same tokens on any day. Llama 3.1 and 3.2 write it
# where a runtime has no clock for them, as transformers before 4.45.
_DAY = date(2024, 7, 26)

Json = Mapping[str, Any]


def serve(requests: int, answers: int) -> None:
    """Answer requests until their pipe ends.

    Args:
        requests: a pipe with a line for each: the names of the request's file and of the result's, as a JSON list.
        answers: a pipe that gets a line for each: the exit status, negative if a signal ended the fork.
    """
    import tokenizers  # noqa: F401, once for all forks; it starts no thread before it is used

    with os.fdopen(requests, encoding="utf-8") as lines:
        for line in lines:
            child = os.fork()
            if child == 0:
                os.close(answers)
                answer_request(*json.loads(line))
                os._exit(0)
            os.write(answers, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def answer_request(request_file: str, result_file: str) -> None:
    """Answer a request: {"result": ...}, or {"error": ...} with a sentence."""
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    _set_limits(request["memory_bytes"], request["cpu_s"])
    answer: dict[str, object]
    try:
        answer = {"result": _TASKS[request["task"]](request)}
    except MemoryError:
        answer = {"error": "it needs too much memory"}
    except ValueError as error:
        answer = {"error": str(error)[:_MAX_REASON]}
    except BaseException as error:  # noqa: BLE001, the model decides what is raised; a Rust panic is no Exception
        answer = {"error": f"{type(error).__name__}: {error}"[:_MAX_REASON]}
    Path(result_file).write_text(json.dumps(answer), encoding="utf-8")


def _set_limits(memory_bytes: int, cpu_s: int) -> None:
    """Limit this process: memory fails with MemoryError, processor time with a signal that ends the process."""
    import resource  # POSIX only: importing this module works everywhere

    for kind, limit in (("RLIMIT_AS", memory_bytes), ("RLIMIT_CPU", cpu_s), ("RLIMIT_CORE", 0)):
        number = getattr(resource, kind)
        hard = resource.getrlimit(number)[1]
        soft = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(number, (soft, soft if kind == "RLIMIT_CORE" else hard))


def _render(request: Json) -> list[str]:
    """Render conversations as transformers' apply_chat_template does."""
    from jinja2 import TemplateError

    environment, rendered, left = _environment(), [], _MOST_RENDERED
    template = environment.from_string(request["template"])
    for chat in request["chats"]:
        messages, roles = chat["messages"], ", ".join(message["role"] for message in chat["messages"])
        values = {"add_generation_prompt": chat["add_generation_prompt"], **request["special_tokens"]}
        values["strftime_now"] = _clock(chat["date"])
        try:
            text = template.render(messages=messages, tools=None, documents=None, **values)
        except TemplateError as error:
            raise ValueError(f"for messages of {roles}: {error}") from error
        left -= len(text)
        if left < 0:
            raise ValueError(f"it renders more than {_MOST_RENDERED} characters")
        text.encode("utf-8")  # half of a surrogate pair is no character
        rendered.append(text)
    return rendered


def _clock(fixed: str | None) -> Callable[[str], str]:
    """Return the function that templates ask for the date: it answers with a text, or else with the fixed day."""

    def strftime_now(form: str) -> str:
        return _DAY.strftime(form) if fixed is None else fixed

    return strftime_now


def _environment() -> Any:
    """Return the sandbox of transformers 5 (its module chat_template_utils), which chat templates are written for."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """`{% generation %}` marks the assistant's words for training; the words are rendered as they are."""

        tags = {"generation"}  # noqa: RUF012, jinja2's interface

        def parse(self, parser: Any) -> Any:
            """Return the block's body."""
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    class Dict:
        """Python's dict without its attributes."""

        def __call__(self, *args: Any, **named: Any) -> dict[Any, Any]:
            return dict(*args, **named)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            """Return dict.fromkeys of the arguments."""
            return dict.fromkeys(*args)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None,
               sort_keys: bool = False) -> str:  # fmt: skip
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "dict": Dict()}
    return environment


def _load(request: Json) -> int:
    """Read tokenizer.json and return the size of its vocabulary: what breaks the reader breaks this process only."""
    from tokenizers import Tokenizer

    return int(Tokenizer.from_file(request["tokenizer"]).get_vocab_size())


def _encode(request: Json) -> list[list[int]]:
    """Encode lists of texts; write all token ids into the file `ids` as int32, and return the number of each text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(request["tokenizer"])
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = request["split_special_tokens"]
    counts = []
    with Path(request["ids"]).open("wb") as stream:
        for group in json.loads(Path(request["texts"]).read_text(encoding="utf-8")):
            lengths: list[int] = []
            for batch in _batches(group["texts"]):
                for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=group["add_special_tokens"]):
                    ids = array.array("i", encoding.ids)
                    lengths.append(len(ids))
                    ids.tofile(stream)
            counts.append(lengths)
    return counts


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """Yield the texts in their order, in batches of about as many characters."""
    batch: list[str] = []
    size = 0
    for text in texts:
        if batch and size + len(text) > _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch


_TASKS: Mapping[str, Callable[[Json], object]] = {"render": _render, "load": _load, "encode": _encode}

if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
