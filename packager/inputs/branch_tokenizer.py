"""Make a branch's tokenizer of files that every release of transformers reads alike: as tokenizer.json says.

tokenizer.json is the whole tokenizer, as the model's authors wrote it and as most runtimes read it. Some classes of
transformers make something else of it (docs/decisions/0019).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from packager.errors import CalibrationError
from packager.inputs.limits import ModelProcess
from packager.inputs.tokenizer import open_tokenizer
from packager.model.branch_config import BranchFile, json_bytes
from packager.model.config_values import shortened
from packager.model.strict_json import parse_json_object
from packager.model.tokenizer_file import (
    asks_for_a_prefix,
    config_of_file,
    is_read_otherwise,
    model_with_merges_as_lines,
    other_parts,
)
from packager.receipt import TOKENIZER, TOKENIZER_CONFIG
from packager.system.text import printable

_Document = Mapping[str, Any]
_AT_THE_ENDS = ("post_processor",)


@dataclass(frozen=True, kw_only=True)
class BranchTokenizer:
    """A branch's tokenizer.

    Attributes:
        opened: by transformers, of the files that a branch gets.
        files: those that were made, in the place of the base model's.
    """

    opened: Any
    files: Mapping[str, BranchFile]

    @property
    def changes(self) -> tuple[str, ...]:
        """A sentence for each value that differs from the base model's."""
        return tuple(change for file in self.files.values() for change in file.changes)


def branch_tokenizer(
    files: Mapping[str, bytes], config: Mapping[str, object], where: str, process: ModelProcess
) -> BranchTokenizer:
    """Open a base model's tokenizer, and make the files that a branch gets in the place of its own.

    Some classes of transformers 5 build a tokenizer of the vocabulary alone, some of transformers 4 of flags in
    tokenizer_config.json; other programs read tokenizer.json. Where they differ, tokenizer_config.json gets the class
    that takes tokenizer.json as it is, in every release. tokenizer.json itself stays, but for what its authors ask
    for in tokenizer_config.json: the tokens at both ends of a text, and a prefix space. Those are written as
    transformers 5 builds them.

    Args:
        files: that a branch would get, by name; they were checked.
        config: content of config.json.
        where: the base model, for messages.
        process: see `open_tokenizer`.

    Raises:
        CalibrationError: see `open_tokenizer`; or transformers reads the files that were made otherwise.
    """
    tokenizer = open_tokenizer(files, config, where, process)
    own, written = parse_json_object(files[TOKENIZER]), parse_json_object(files[TOKENIZER_CONFIG])
    rebuilt = _rebuilt_parts(tokenizer, own)
    if not rebuilt and not is_read_otherwise(written, own, tokenizer.special_tokens_map):
        return BranchTokenizer(opened=tokenizer, files={})
    asked = {key: part for key, part in rebuilt.items() if key in _AT_THE_ENDS or asks_for_a_prefix(written)}
    # The second is for a class that transformers takes for the model's family, whatever tokenizer_config.json names.
    for parts in (asked, rebuilt):
        document = {**own, **parts}
        made = {TOKENIZER_CONFIG: _config_file(tokenizer, written, document)}
        if parts:
            made[TOKENIZER] = _tokenizer_file(document, sorted(parts), type(tokenizer).__name__)
        made_files = {**files, **{name: file.data for name, file in made.items()}}
        again = open_tokenizer(made_files, config, where, process)
        as_the_file = not other_parts(_as_written(document), json.loads(again.backend_tokenizer.to_str()))
        if as_the_file and _settings(again) == _settings(tokenizer):
            return BranchTokenizer(opened=again, files=made)
    raise CalibrationError(
        "the base model's tokenizer cannot be written so that every runtime reads it alike",
        where=f"{where}: {TOKENIZER_CONFIG}",
        why=f"{type(tokenizer).__name__} makes another tokenizer of the file that it writes",
        hint="open the tokenizer with transformers 5, save it with save_pretrained into a folder of your own with "
        "the weights, and name that folder as base_model.path",
    )


def _rebuilt_parts(tokenizer: Any, own: _Document) -> dict[str, object]:
    """Return the parts of tokenizer.json that a class of transformers builds otherwise than the file says."""
    from transformers import PreTrainedTokenizerFast

    if type(tokenizer) is PreTrainedTokenizerFast:  # it takes the file as it is
        return {}
    return other_parts(_as_written(own), json.loads(tokenizer.backend_tokenizer.to_str()))


def _tokenizer_file(document: _Document, parts: list[str], class_name: str) -> BranchFile:
    model = model_with_merges_as_lines(document)
    content = document if model is None else {**document, "model": model}
    verb = "is" if len(parts) == 1 else "are"
    change = (
        f"{TOKENIZER}: {', '.join(parts)} {verb} written as {class_name} of transformers 5 builds the tokenizer; "
        "other releases and programs read this file"
    )
    return BranchFile(data=json_bytes(content, ascii_only=False), changes=(change,))


def _config_file(tokenizer: Any, written: _Document, document: _Document) -> BranchFile:
    defaults = {
        "model_input_names": list(tokenizer.model_input_names),
        "padding_side": tokenizer.padding_side,
        "clean_up_tokenization_spaces": tokenizer.clean_up_tokenization_spaces,
        **tokenizer.special_tokens_map,
    }
    content = config_of_file(written, document, defaults)
    changes = []
    for key in sorted({*content, *written}):
        before, after = (shortened(part[key]) if key in part else "absent" for part in (written, content))
        if (key in written, written.get(key)) != (key in content, content.get(key)):
            reason = "so that every release takes tokenizer.json as it is"
            changes.append(printable(f"{TOKENIZER_CONFIG}: {key} is {after} and was {before}: {reason}"))
    return BranchFile(data=json_bytes(content), changes=tuple(changes))


def _as_written(document: _Document) -> _Document:
    """Return a tokenizer.json as the tokenizers library writes it."""
    from tokenizers import Tokenizer

    found: _Document = json.loads(Tokenizer.from_str(json.dumps(document)).to_str())
    return found


def _settings(tokenizer: Any) -> object:
    return (
        tokenizer.get_added_vocab(), tokenizer.special_tokens_map, tokenizer.padding_side,
        list(tokenizer.model_input_names), bool(tokenizer.clean_up_tokenization_spaces), tokenizer.split_special_tokens,
    )  # fmt: skip
