"""Read a base model's config.json: the file, and its values with their types."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from packager.errors import SourceError
from packager.model.contract_files import CONTENT_RULES, check_content
from packager.model.model_folder import read_inside
from packager.model.rope import rope_type
from packager.model.strict_json import parse_json_object
from packager.receipt import CONFIG

DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
MOST_BLOCKS = 1000  # larger numbers are typing errors, as beyond LARGEST_SIZE, and planning them would never end
LARGEST_SIZE = 1 << 24
_MAX_SHORT = 40
# An absolute path, one below a home folder, a Windows path, an address of a file.
_PATH = re.compile(r"(?:file://\S|(?:~/|/|[A-Za-z]:[\\/])[\w.+@%-])[^\n]*")
_TEXT_KEYS = ("_token", "_tokens", "template")  # tokens and templates are texts, which may look like a path
# Keys of the text part that packager reads, with the names under which config.json may have each.
READ_KEYS = {
    "max_position_embeddings": ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"),
    "rope_parameters": ("rope_scaling", "rope_parameters"),
    **{key: (key,) for key in ("sliding_window", "head_dim", "num_attention_heads", "vocab_size")},
}


def path_keys(document: Mapping[str, object]) -> list[str]:
    """Return the keys whose value is a path of some machine; tokens and templates may only look like one."""
    return [key for key, value in document.items() if not key.endswith(_TEXT_KEYS) and is_path(value)]


def is_path(value: object) -> bool:
    """Return whether a value of a config, or an item of a list there, is a path of some machine."""
    if isinstance(value, list):
        return any(map(is_path, value))
    return isinstance(value, str) and _PATH.fullmatch(value) is not None


def without_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config, and the objects in it, without the keys whose value is a path of some machine.

    Trainers write the folder that a model was read from into its config.json; it says nothing of the model.
    """
    paths = path_keys(config)
    return {
        key: without_paths(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in paths
    }


def unusable_config(config: Mapping[str, object], what: str, folder: Path, error: Exception) -> SourceError:
    """Return the error for a config.json that transformers refuses, with the keys whose values its message quotes."""
    message = f"{type(error).__name__}: {error}"
    keys = [key for key, value in _texts(config) if f"'{value}'" in message]
    named = f" ({', '.join(keys)} in config.json)" if keys else ""
    return SourceError(
        what, where=str(folder), why=f"{message}{named}",
        hint="correct the value in a copy of the model, or name a revision whose config.json transformers opens",
    )  # fmt: skip


def _texts(config: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted key of each text in a config and in the objects inside it."""
    for key, value in config.items():
        if isinstance(value, str) and value:
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping):
            yield from _texts(value, f"{prefix}{key}.")


def text_part(config: Mapping[str, object]) -> Mapping[str, object]:
    """Return the part of a config.json about the language model: `text_config` where there is one, else all of it."""
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config


def read_config(path: Path) -> dict[str, object]:
    """Read a model's config.json.

    Raises:
        SourceError: the file is missing, unreadable, larger than 1 MiB or not a JSON object, or a link leads out of its
            folder.
    """
    try:
        data = read_inside(path.parent, path.name, CONTENT_RULES[CONFIG].most_bytes)
        check_content(CONFIG, data)
        return parse_json_object(data)
    except (OSError, ValueError) as error:
        raise SourceError(
            "the file cannot be read as a JSON object",
            where=str(path),
            why=(error.strerror if isinstance(error, OSError) else None) or str(error),
            hint="base_model.path names the folder that holds the model's config.json",
        ) from error


class ConfigReader:
    """Read typed values of a config.json; problems are collected in `problems`, not raised."""

    def __init__(self, config: Mapping[str, object]) -> None:
        self.values = config
        self.problems: list[str] = []

    def size(self, key: str, default: int | None = None, *, largest: int = LARGEST_SIZE) -> int:
        """Return a positive integer; `default` when it is absent or null, a problem when there is no default."""
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            self.problems.append(f"{key} is missing")
        elif not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
            self.problems.append(f"{key} is {shortened(value)}, expected an integer from 1 to {largest}")
        else:
            return value
        return 1

    def flag(self, key: str) -> bool:
        """Return a boolean; absent or null is False, the default of every family here."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            self.problems.append(f"{key} is {shortened(value)}, expected true or false")
        return value is True

    def dtype(self) -> str:
        """Return the checkpoint's dtype from `torch_dtype` (transformers 4) or `dtype` (transformers 5)."""
        given = [self.values[key] for key in ("torch_dtype", "dtype") if self.values.get(key) is not None]
        if not given:
            self.problems.append("torch_dtype (or dtype) is missing")
        elif given[0] != given[-1]:
            self.problems.append(f"torch_dtype and dtype disagree: {shortened(given[0])} and {shortened(given[-1])}")
        elif not isinstance(given[0], str) or given[0] not in DTYPES:
            self.problems.append(f"torch_dtype is {shortened(given[0])}, expected one of {', '.join(DTYPES)}")
        else:
            return DTYPES[given[0]]
        return "F16"

    def rope_type(self) -> str:
        """Return the rotary embedding's type, "default" for a plain one."""
        for key in ("rope_scaling", "rope_parameters"):
            rope = self.values.get(key)
            if rope is not None and not isinstance(rope, Mapping):
                self.problems.append(f"{key} is {shortened(rope)}, expected an object or null")
        return rope_type(self.values)

    def sliding_window(self) -> int | None:
        """Return the window, or None where max_position_embeddings tokens fit into it."""
        window, longest = self.values.get("sliding_window"), self.values.get("max_position_embeddings")
        return window if isinstance(window, int) and isinstance(longest, int) and window < longest else None


def shortened(value: object) -> str:
    """Return any value in JSON's spelling, cut to 40 characters."""
    text = json.dumps(value, default=str)
    return text if len(text) <= _MAX_SHORT else text[: _MAX_SHORT - 3] + "..."
