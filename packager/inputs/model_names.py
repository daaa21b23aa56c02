"""What the names of a base model's files say before any of them is read or downloaded: what kind of model it is."""

from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase

from packager.errors import SourceError
from packager.receipt import CONFIG, SAFETENSORS, TOKENIZER, TOKENIZER_CONFIG, TOKENIZER_MODEL

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_PREFIX = "adapter_"
_MOST_LISTED = 20
# Of trainers: an adapter, the optimizer, the scheduler, random states, arguments.
_LEFTOVERS = (ADAPTER_PREFIX, "optimizer", "scheduler", "rng_state", "training_args", "scaler")
_OWN_FOLDER = (
    "name that folder as base_model.path, with the weights, config.json and what save_pretrained of the tokenizer "
    f"writes there ({TOKENIZER} and {TOKENIZER_CONFIG})"
)


@dataclass(frozen=True, kw_only=True)
class _TokenizerKind:
    """A kind of tokenizer files of which a branch cannot be made.

    Attributes:
        patterns: of names, all of which must be there.
        title: what they are.
        hint: how a tokenizer.json is made of them.
    """

    patterns: tuple[str, ...]
    title: str
    hint: str


_KINDS = (
    _TokenizerKind(
        patterns=("tekken.json",),
        title="Mistral's own format",
        hint="open the model's folder with AutoTokenizer of transformers 5 without mistral-common",
    ),
    *(
        _TokenizerKind(
            patterns=(pattern,),
            title="ranks of tiktoken, which the model's own Python code reads",
            hint="open it with the code that the model's page names, and save it as a fast tokenizer",
        )
        for pattern in ("*.tiktoken", "tiktoken.model")
    ),
    *(
        _TokenizerKind(
            patterns=(pattern,),
            title="a sentencepiece model, which transformers 4 and 5 split into other tokens",
            hint="open it with AutoTokenizer of the transformers release of the model's time, with sentencepiece and "
            "protobuf installed, and compare some ids with those of use_fast=False",
        )
        for pattern in (f"{TOKENIZER_MODEL}*", "spiece.model", "*.bpe.model", "*.spm")
    ),
    _TokenizerKind(
        patterns=("vocab.json", "merges.txt"),
        title="the vocabulary and the merges of a BPE, which only transformers reads",
        hint="open it with AutoTokenizer of transformers",
    ),
    _TokenizerKind(
        patterns=("vocab.txt",),
        title="the vocabulary of a WordPiece model, which only transformers reads",
        hint="open it with AutoTokenizer of transformers",
    ),
)


def check_names(names: Collection[str], where: str) -> None:
    """Refuse a base model of which the names of its files say that no branch can be made.

    A folder without any file of a tokenizer passes: a model may be described before its tokenizer is there.

    Args:
        names: of all its files.
        where: the base model, for messages.

    Raises:
        SourceError: it is an adapter, or its tokenizer has no tokenizer.json.
    """
    names = sorted(name for name in names if "/" not in name)
    if ADAPTER_CONFIG in names and (CONFIG not in names or not any(map(_is_of_model, names))):
        raise SourceError(
            "the base model is an adapter (LoRA), not a model",
            where=f"{where}: {ADAPTER_CONFIG}",
            why="an adapter holds changes of some weights; there are no weights of a whole model beside it",
            hint="merge it into its base model (peft: PeftModel.from_pretrained(model, adapter).merge_and_unload()), "
            "save the result and the tokenizer with save_pretrained, and name that folder as base_model.path",
        )
    if TOKENIZER in names:
        return
    for kind in _KINDS:
        found = [next((name for name in names if fnmatchcase(name, pattern)), "") for pattern in kind.patterns]
        if all(found):
            raise SourceError(
                f"the base model has no {TOKENIZER}",
                where=where,
                why=f"its tokenizer is {' and '.join(found)}: {kind.title}; ExLlamaV2 and the servers read {TOKENIZER}",
                hint=f"{kind.hint}; {_OWN_FOLDER}",
            )


def _is_of_model(name: str) -> bool:
    """Return whether a file may hold the weights of a whole model; pickles are refused later, with their reason."""
    return name.endswith((SAFETENSORS, ".bin", ".pt", ".pth")) and not name.startswith(_LEFTOVERS)


def left_out_line(names: Collection[str]) -> str:
    """Return which files of a base model are left out, for the log; "" if none.

    Args:
        names: of the files.
    """
    if not names:
        return ""
    listed = sorted(names)
    more = f" and {len(listed) - _MOST_LISTED} more" if len(listed) > _MOST_LISTED else ""
    line = f"not used and not copied of the base model: {', '.join(listed[:_MOST_LISTED])}{more}"
    if ADAPTER_CONFIG not in names:
        return line
    return f"{line}; with peft installed, transformers loads {ADAPTER_CONFIG} in the place of the model's own weights"
