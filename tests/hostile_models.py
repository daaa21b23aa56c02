"""Hostile base models and branches: every file with every kind of damage, and a process that runs them under limits.

`python -m tests.hostile_models FOLDER STEP FIRST` runs every STEP-th case and prints one line of JSON for each command;
with the word `sample` as well, of `some_cases` only.
"""

import gc
import io
import json
import os
import random
import shutil
import socket
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.limited_calls import Measured, call_limited, overstepped, run_limited

ROOT = Path(__file__).parents[1]
PRIVATE = "payroll: alice 90000"
_LICENSE = "LICENSE.txt"
_INDEX = "model.safetensors.index.json"
_JSON = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", _INDEX,
)  # fmt: skip
_TEXTS = ("merges.txt", "chat_template.jinja", _LICENSE)
_BINARY = ("tokenizer.model", "model.safetensors")
_FILES = (*_JSON, *_TEXTS, *_BINARY)


@dataclass(frozen=True, kw_only=True)
class HostileCase:
    """One damage.

    Attributes:
        name: of the case.
        damage: what makes it in a folder.
        refused: whether a plan of such a base model must be refused.
        crossed: every file, or key, has every damage of its kind.
        slow: takes seconds, as another case that differs little does.
    """

    name: str
    damage: Callable[[Path], object]
    refused: bool = True
    crossed: bool = False
    slow: bool = False


def put(path: Path, data: bytes) -> None:
    """Write a file in the place of another, which may be linked elsewhere and is not changed."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def _sparse(path: Path, data: bytes, size_bytes: int) -> None:
    put(path, data)
    os.truncate(path, size_bytes)


def _link(target: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    return make


def _socket(path: Path) -> None:
    path.unlink(missing_ok=True)
    here = Path.cwd()
    os.chdir(path.parent)  # the path of a socket has at most 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def _fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def _garbage(path: Path) -> None:
    put(path, random.Random(path.name).randbytes(5000))


# What any file may become; "../private.txt" is outside of the model's folder and holds PRIVATE.
PLACES: dict[str, Callable[[Path], None]] = {
    "link-out": _link("../private.txt"),
    "link-absolute": _link("/etc/passwd"),
    "link-device": _link("/dev/zero"),
    "link-proc": _link("/proc/self/environ"),
    "link-nowhere": _link("nowhere"),
    "link-loop": lambda path: _link(path.name)(path),
    "link-folder": _link("."),
    "fifo": _fifo,
    "socket": _socket,
    "folder": _folder,
    "terabyte": lambda path: _sparse(path, b"{", 1 << 40),
    "garbage": _garbage,
}
# What a file of JSON may hold.
DOCUMENTS: dict[str, bytes] = {
    "empty": b"",
    "null": b"null",
    "list": b"[]",
    "cut": b'{"a": ',
    "deep-lists": b'{"a":' + b"[" * 200_000,
    "deep-objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "65-levels": b'{"a":' * 65 + b"1" + b"}" * 65,
    "surrogate": rb'{"a": "\ud800"}',
    "surrogate-key": rb'{"\udfff": 1}',
    "twice": b'{"model_type": "llama", "model_type": "qwen2"}',
    "nan": b'{"a": NaN}',
    "infinity": b'{"a": -Infinity}',
    "1e999": b'{"a": 1e999}',
    "10^400": b'{"a": 1' + b"0" * 400 + b"}",
    "5000-digits": b'{"a": ' + b"9" * 5000 + b"}",
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "bom": b"\xef\xbb\xbf{}",
    "latin-1": b'{"a": "\xe9"}',
    "nul": b'{"a": 1}\0',
    "many-values": b"[" + b"1," * 4_000_000 + b"1]",
    "long-line": b'{"a": "' + b"x" * 70_000_000 + b'"}',
}
TEXTS: dict[str, bytes] = {
    "latin-1": b"caf\xe9",
    "nul": b"a\0b",
    "utf-16": "text".encode("utf-16"),
    "surrogate": b"\xed\xa0\x80",
}
# What a value of config.json may be; a base model needs all of these keys.
KEYS = (
    "model_type", "architectures", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "max_position_embeddings", "torch_dtype",
)  # fmt: skip
ODD: tuple[Any, ...] = (
    True, -1, 0, 10**30, 1e308, "x" * 100_000, "\x1b[2J\n", [], {}, [[]], {"a": {}}, ["llama", 1], "../../etc/passwd",
)  # fmt: skip
NAMES = (
    "../private.txt", "../model/model.safetensors", "/etc/passwd", "a/../../private.txt", "..", ".", "", "a\\b", "a\0b",
    "./model.safetensors", "x" * 5000, "sub/model.safetensors", "model.bin", "../private.safetensors",
    "/dev/zero.safetensors", "\ud7ff.safetensors",
)  # fmt: skip


def _entry(dtype: Any = "F16", shape: Any = (2,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def _many(count: int) -> bytes:
    entries = (b'"t%d":{"dtype":"I8","shape":[0],"data_offsets":[0,0]}' % number for number in range(count))
    return b"{" + b",".join(entries) + b"}"


Header = bytes | dict[str, Any]
# Functions make the large ones when they are needed.
HEADERS: dict[str, tuple[Header | Callable[[], Header], int | None]] = {
    "overlap": ({"a": _entry(), "b": _entry(offsets=(2, 6))}, None),
    "gap": ({"a": _entry(), "b": _entry(offsets=(6, 10))}, None),
    "beyond": ({"a": _entry(shape=(2**40,), offsets=(0, 2**41))}, None),
    "negative": ({"a": _entry(offsets=(-4, 0))}, None),
    "backwards": ({"a": _entry(offsets=(4, 0))}, None),
    "huge-shape": ({"a": _entry(shape=(2**62,) * 32)}, None),
    "dimensions": ({"a": _entry(shape=(1,) * 100_000)}, None),
    "fractions": ({"a": _entry(shape=(2.0,))}, None),
    "booleans": ({"a": _entry(shape=(True, 2))}, None),
    "dtype": ({"a": _entry(dtype=["F16"])}, None),
    "long-dtype": ({"a": _entry(dtype="x" * 1_000_000)}, None),
    "long-name": ({"x" * 1_000_000: _entry()}, None),
    "newlines": ({"a.1" * 90 + "\n" + str(number): _entry() for number in range(2000)}, None),
    "no-offsets": ({"a": {"dtype": "F16", "shape": [2]}}, None),
    "list": (b"[]", None),
    "metadata": ({"__metadata__": {"format": 1}}, None),
    "deep-metadata": (b'{"__metadata__":' + b"[" * 100_000, None),
    "twice": (b'{"a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]},"a":{}}', None),
    "nothing": ({}, None),
    "length-0": (b"", 0),
    "length-2^63": (b"{}", 1 << 63),
    "length-2^64": (b"{}", (1 << 64) - 1),
    "100-MB": (b"{}" + b" " * 99_000_000, None),
    "million": (lambda: _many(1_000_000), None),
    "quarter-million": (lambda: _many(250_000), None),
}  # fmt: skip


def _large(kind: str) -> bytes:
    """Return a document just below the limits of tokenizer.json."""
    if kind == "keys":
        return b"{" + b",".join(b'"k%d":%d' % (number, number + 1000) for number in range(2_490_000)) + b"}"
    if kind == "objects":
        return b'{"a":[' + b",".join(b'{"a":%d.5}' % number for number in range(1_200_000)) + b"]}"
    if kind == "strings":
        return b'{"added_tokens":[' + b",".join(b'"s%d"' % number for number in range(2_490_000)) + b"]}"
    return '{"\U0001f600": "'.encode() + b"x" * 63_000_000 + b'"}'


def _holding_large(kind: str) -> Callable[[Path], object]:
    return lambda folder: put(folder / "tokenizer.json", _large(kind))


def _with_header(header: Header | Callable[[], Header], length: int | None) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        made = header() if callable(header) else header
        raw = made if isinstance(made, bytes) else json.dumps(made).encode()
        put(folder / "model.safetensors", struct.pack("<Q", len(raw) if length is None else length) + raw + bytes(10))

    return make


def _with_value(name: str, key: str, value: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        put(folder / name, json.dumps({**content, key: value}).encode())

    return make


def _with_index(name: str) -> Callable[[Path], object]:
    content = json.dumps({"metadata": {}, "weight_map": {"a": name}}).encode()
    return _at(_INDEX, lambda path: put(path, content))


def _written(data: bytes) -> Callable[[Path], None]:
    return lambda path: put(path, data)


def _at(name: str, damage: Callable[[Path], object]) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        single = folder / "model.safetensors"
        if name == _INDEX and single.exists():  # beside which no index is read
            single.rename(folder / "other.safetensors")
        damage(folder / name)

    return make


def _holding(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: put(folder / name, data)


def hostile_cases() -> Iterator[HostileCase]:
    """Yield every case; names are unique."""
    for name in _FILES:
        for kind, damage in PLACES.items():
            yield HostileCase(name=f"{name}: {kind}", damage=_at(name, damage), crossed=True)
    for name in _JSON:
        for kind, data in DOCUMENTS.items():
            yield HostileCase(name=f"{name}: {kind}", damage=_at(name, _written(data)), crossed=True)
    for name in _TEXTS:
        for kind, data in TEXTS.items():
            yield HostileCase(name=f"{name}: {kind}", damage=_holding(name, data))
        yield HostileCase(name=f"{name}: long line", damage=_holding(name, b"x" * 33_000_000))
    yield from _odd_values()
    for number, name in enumerate(NAMES):
        yield HostileCase(name=f"index: {number}", damage=_with_index(name))
    for kind, (header, length) in HEADERS.items():
        slow = kind == "quarter-million"
        yield HostileCase(name=f"header: {kind}", damage=_with_header(header, length), slow=slow)
    yield from _large_files()


def some_cases() -> list[HostileCase]:
    """Return a third of all cases: each damage for some of the files or keys that have it, each of those with some."""
    cases = list(hostile_cases())
    # 5 divides no number of damages, so that another damage of each file is taken.
    return [
        *(case for case in cases if not case.crossed and not case.slow),
        *[case for case in cases if case.crossed][::5],
    ]


def _odd_values() -> Iterator[HostileCase]:
    for key in KEYS:
        for number, value in enumerate(ODD):
            harmless = (key, number) == ("architectures", -1)
            damage = _with_value("config.json", key, value)
            yield HostileCase(name=f"config.json {key}: {number}", damage=damage, refused=not harmless, crossed=True)
    for number, value in enumerate(ODD):
        for name, key in (("generation_config.json", "eos_token_id"), ("tokenizer_config.json", "chat_template")):
            yield HostileCase(name=f"{name} {key}: {number}", damage=_with_value(name, key, value), refused=False)
        yield HostileCase(
            name=f"tokenizer_config.json tokenizer_file: {number}",
            damage=_with_value("tokenizer_config.json", "tokenizer_file", value),
            refused=False,  # a branch, and the copy that is read, are without the key
        )


def _large_files() -> Iterator[HostileCase]:
    for kind in ("keys", "objects", "strings", "emoji"):
        yield HostileCase(
            name=f"tokenizer.json: large {kind}",
            damage=_holding_large(kind),
            refused=False,
            slow=kind in ("keys", "objects", "strings"),
        )
    yield HostileCase(name="header: large", damage=_with_header(lambda: _many(200_000), None))
    yield HostileCase(
        name="eleven thousand files",
        damage=lambda folder: [(folder / f"{number}").touch() for number in range(11_000)],
    )
    yield HostileCase(name="a line of README", damage=_holding("README.md", b"x" * 100_000_000), refused=False)
    yield HostileCase(name="README of lines", damage=_holding("README.md", b"\n" * 8_000_000), refused=False)
    yield HostileCase(name="README of paths", damage=_holding("README.md", b"/home/a/b \n" * 170_000), refused=False)
    yield HostileCase(name="an unused terabyte", damage=lambda f: _sparse(f / "x.bin", b"", 1 << 40), refused=False)
    yield HostileCase(name="an unused fifo", damage=lambda folder: os.mkfifo(folder / "x.json"), refused=False)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A folder with a sound base model, its recipe and a sound branch, of which every case gets a copy."""

    folder: Path

    def make(self) -> None:
        """Write the sound files."""
        from tests.checkpoints import Checkpoint, edit_json

        shutil.copytree(ROOT / "recipes" / "assets", self.folder / "assets")
        recipe = (ROOT / "recipes" / "demo-llama.yaml").read_text(encoding="utf-8")
        wanted = f"id: apache-2.0\n    base_files: [{_LICENSE}]"
        (self.folder / "recipe.yaml").write_text(recipe.replace("id: apache-2.0", wanted), encoding="utf-8")
        shutil.copy(ROOT / "recipes" / "demo-llama.lock.json", self.folder / "recipe.lock.json")
        model = self.model(self.folder)
        (model / _LICENSE).write_text("Do what you like.\n", encoding="utf-8")
        (model.parent / "private.txt").write_text(PRIVATE, encoding="utf-8")
        branch = Checkpoint().write(self.folder / "branches" / "branch")
        edit_json(branch, "provenance.json", lambda record: record.update(model=Checkpoint().description()))
        (branch.parent / "private.txt").write_text(PRIVATE, encoding="utf-8")

    @staticmethod
    def model(folder: Path) -> Path:
        """The base model's folder in a copy of the scene."""
        return folder / "assets" / "demo-llama" / "model"

    def copy(self, name: str) -> Path:
        """Return a copy; its files are links to the sound ones, which a damage replaces and does not change."""
        folder = self.folder.parent / name
        shutil.copytree(self.folder, folder, copy_function=os.link)
        return folder


def commands(folder: Path) -> Sequence[tuple[str, list[str]]]:
    """Return what is run on a copy of the scene: a plan of the base model, and an audit of the branch."""
    return (
        ("plan", ["plan", str(folder / "recipe.yaml")]),
        ("audit", ["audit", str(folder / "branches" / "branch"), "--format", "json"]),
    )


def warm_up(folder: Path) -> None:
    """Run each command in this process: its copies need not import the modules that the commands use again."""
    from packager.cli.main import app

    for _, arguments in commands(folder):
        with suppress(SystemExit), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            app(arguments)
    gc.collect()
    gc.freeze()  # a fork would copy the pages of all these modules to look for garbage


def main(folder: Path, step: int, first: int, *, sample: bool) -> None:
    """Run every `step`-th case from the `first` on, in `folder`, and print what came of it."""
    scene = Scene(folder=folder / "scene")
    scene.folder.mkdir()
    scene.make()
    warm_up(scene.folder)
    sound = HostileCase(name="sound", damage=lambda _: None, refused=False)
    clean: dict[str, Measured] = {}
    cases = some_cases() if sample else list(hostile_cases())
    for number, case in enumerate((sound, *cases[first::step])):
        copy = scene.copy(str(number))
        for damaged in (Scene.model(copy), copy / "branches" / "branch"):
            # In a process of its own: this one stays small.
            assert call_limited(partial(case.damage, damaged), folder / "damage.txt").status == 0, case.name
        for command, arguments in commands(copy):
            found = run_limited(arguments, folder / f"{number}-{command}.txt")
            harmless = clean.setdefault(command, found)
            result = {
                "case": case.name,
                "command": command,
                "refused": case.refused,
                **asdict(found),
                "secret": PRIVATE in found.output,
                "beyond": found.peak_bytes - harmless.peak_bytes,
                "overstepped": overstepped(found, harmless),
            }
            print(json.dumps(result), flush=True)
        shutil.rmtree(copy)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sample="sample" in sys.argv)
