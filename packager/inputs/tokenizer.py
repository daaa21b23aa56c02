"""Open a base model's tokenizer, of copies of the files that a branch gets, so that it is the branch's."""

import json
from collections.abc import Mapping
from typing import Any

from packager.errors import CalibrationError
from packager.inputs.limits import ModelProcess
from packager.receipt import CONFIG, TOKENIZER, TOKENIZER_CONFIG
from packager.system.scratch import ScratchFolder
from packager.system.text import printable

_SAME_REVISION = "take the tokenizer files from the same revision as the weights"


def open_tokenizer(files: Mapping[str, bytes], config: Mapping[str, object], where: str, process: ModelProcess) -> Any:
    """Open a tokenizer of files and nothing else.

    Args:
        files: that a branch gets, by name; they were checked.
        config: content of config.json.
        where: the base model, for messages.
        process: reads the tokenizer before this process does.

    Raises:
        CalibrationError: there is none, it cannot be read, or its class encodes texts in this process.
    """
    from transformers import AutoTokenizer

    lacking = [name for name in (TOKENIZER_CONFIG, TOKENIZER) if name not in files]
    if lacking:
        raise CalibrationError(
            "the base model has no tokenizer",
            where=where,
            why=f"a branch needs {TOKENIZER_CONFIG} and {TOKENIZER}; not there: {', '.join(lacking)}",
            hint=_SAME_REVISION,
        )
    with ScratchFolder("tokenizer") as scratch:
        folder = scratch.path
        for name, data in files.items():
            (folder / name).write_bytes(data)
        (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
        process.check_tokenizer_file(folder / TOKENIZER)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # the tokenizers library raises plain Exception for a damaged tokenizer.json
            raise CalibrationError(
                "the base model's tokenizer cannot be read",
                where=where,
                why=printable(str(error).replace(str(folder), where)),
            ) from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise CalibrationError(
            "the base model's tokenizer is not one of the tokenizers library",
            where=f"{where}: {TOKENIZER_CONFIG}",
            why=f"a {type(tokenizer).__name__} would encode the texts in this process, without limits",
            hint="name the class of the model's family as tokenizer_class, such as LlamaTokenizer, and no backend",
        )
    return tokenizer


def check_vocabulary(tokenizer: Any, vocab_size: int, where: str) -> None:
    """Raise CalibrationError if a token has no row in the embedding, which has `vocab_size` rows."""
    name, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", -1))
    if largest >= vocab_size:
        raise CalibrationError(
            "the tokenizer does not fit the model's vocabulary",
            where=where,
            why=f"its largest token id is {largest}, of {printable(name)[:100]!r}; the embedding has {vocab_size} rows",
            hint=_SAME_REVISION,
        )
