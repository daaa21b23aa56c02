"""The types of a recipe's values, and the base of its models."""

import re
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticKnownError

from packager.model.runtimes import OTHER_LOADER, LoaderName
from packager.recipe.field_groups import mix_problem
from packager.variant import ActOrder, Bits, BitsMix, Effort, EngineName, ScaleSearch, branch_problem


def whole_number(value: object) -> object:
    """Refuse what is not an int: a boolean, or a float of a whole value."""
    # A strict Literal[1] still takes True and 1.0, which equal 1.
    if type(value) is not int:
        raise PydanticKnownError("int_type")
    return value


def _scale_search(value: object) -> object:
    """Refuse what is neither a boolean nor "signed", in one error and not one for each of the two types."""
    if not isinstance(value, bool) and value != "signed":
        raise PydanticKnownError("literal_error", {"expected": "true, false or 'signed'"})
    return value


def _loader(value: str) -> str:
    """Refuse what is neither one of our loaders nor `plugin:NAME`, in one error and not one for each of the two."""
    if value not in get_args(LoaderName) and not re.fullmatch(_OTHER_LOADER, value):
        names = ", ".join(map(repr, get_args(LoaderName)))
        raise PydanticKnownError("literal_error", {"expected": f"{names} or '{OTHER_LOADER}NAME'"})
    return value


def _branch(value: str) -> str:
    if problem := branch_problem(value):
        raise ValueError(f"cannot be a branch: {problem}")
    return value


def _group_size(value: int) -> int:
    if value != -1 and (value < 8 or value % 8):
        raise ValueError("must be -1 (the whole row) or a positive multiple of 8")
    return value


def _revision(value: str) -> str:
    if re.fullmatch(_SHORT_HASH, value):
        raise ValueError("must be a whole commit id of 40 lower-case hex digits, or the name of a branch or tag")
    if ".." in value or "//" in value or value.endswith(("/", ".", ".lock")):
        raise ValueError(f"must be {PATTERN_MEANINGS[_REVISION]}")
    return value


def one_prompt(value: str) -> str:
    """Refuse a template without {prompt}, or with two."""
    if value.count("{prompt}") != 1:
        raise ValueError("must contain {prompt} exactly once")
    return value


def _described(description: str) -> Any:
    return Field(description=description)


# The way of drawing rows from texts, docs/decisions/0021. Builds of another one are made again.
DRAWING_VERSION = 2

REPO_ID = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}$"
FILE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
_REVISION = r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,199}$"
_SHORT_HASH = r"(?!(?:[0-9a-f]{40})$)[0-9A-Fa-f]{7,}"  # a commit that the Hub would have to guess
# A quote is \x22: the dialect of JSON schemas (ECMA-262) knows no other way to escape it.
URL = r"^https://[^\s<>\x22'`|)\]]+$"
_GIT_URL = r"^(https://|ssh://|file:///|[A-Za-z0-9._-]+@[A-Za-z0-9.-]+:)[^\s<>\x22'`|)\]]+$"
_OTHER_LOADER = rf"^{OTHER_LOADER}[A-Za-z0-9][A-Za-z0-9_-]{{0,63}}$"
_LINE = r"^[^\r\n\x00-\x1f]+$"
LANGUAGE = r"^[a-z]{2,3}$"
TASK_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}$"
TAG = r"^[A-Za-z0-9][A-Za-z0-9._:-]*$"
_MODULE_PATTERN = r"^[A-Za-z0-9_.*]{1,200}$"
WEIGHTS_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,80}$"
# The requirement of each pattern, to complete "<key> must be ...".
PATTERN_MEANINGS = {
    REPO_ID: "namespace/name",
    FILE_NAME: "a file name without a folder",
    _REVISION: "a full commit id, or the name of a branch or tag",
    URL: "an https:// address without spaces, quotes or brackets",
    _GIT_URL: "an address of a git remote: https://, ssh://, file:/// or user@host:path",
    _LINE: "one line of text",
    _OTHER_LOADER: "plugin: with the name of an entry point, of letters, digits, '_' and '-'",
    TASK_NAME: "a name of letters, digits, '_', '.', '+' and '-'",
    LANGUAGE: "a language code of two or three lower-case letters",
    TAG: "a Hub tag of letters, digits, '.', '_', ':' and '-'",
    _MODULE_PATTERN: "a module's name of letters, digits, '_' and '.', with * for anything",
    WEIGHTS_NAME: "a file name of letters, digits, '_' and '-', without .safetensors",
}

RepoId = Annotated[str, Field(pattern=REPO_ID, description=PATTERN_MEANINGS[REPO_ID])]
FileName = Annotated[str, Field(pattern=FILE_NAME, description=PATTERN_MEANINGS[FILE_NAME])]
Revision = Annotated[str, Field(pattern=_REVISION, description=PATTERN_MEANINGS[_REVISION]), AfterValidator(_revision)]
BranchName = Annotated[
    str, AfterValidator(_branch), _described("main, or left out: then named gptq-{bits}bit-{group_size}g-...")
]
BitsField = Annotated[Bits, BeforeValidator(whole_number), _described("bits per weight")]
GroupSize = Annotated[
    int,
    AfterValidator(_group_size),
    Field(
        description="columns per scale, a multiple of 8; -1 = the whole row",
        json_schema_extra={"anyOf": [{"const": -1}, {"minimum": 8, "multipleOf": 8}]},
    ),
]
DampPercent = Annotated[float, Field(gt=0, lt=1, description="fraction of mean(diag H) added to the diagonal")]
DampLimit = Annotated[float, Field(gt=0, lt=1, description="how far damping may be raised when a factorisation fails")]
ActOrderField = Annotated[
    ActOrder,
    _described(
        "the order in which columns are quantized, by diag(H): none; group: inside groups, then groups; static: all "
        "columns, grids fixed before; full: all columns, groups scattered, which vLLM refuses since 0.30; left out: "
        "static, and for engine auto-gptq none"
    ),
]
DescAct = Annotated[bool, _described("another spelling: true is act_order full, false is act_order none")]
Sym = Annotated[bool, _described("symmetric grid")]
TrueSequential = Annotated[bool, _described("each linear sees inputs made by the already quantized ones before it")]
ScaleSearchField = Annotated[
    ScaleSearch,
    BeforeValidator(_scale_search),
    _described(
        "search a smaller scale per group (41 candidates down to 60 % of max|w|); signed: negative ones too, for "
        "sym: true; left out: signed, for sym: false true, and for engine auto-gptq, which has none, false"
    ),
]
Refine = Annotated[
    bool,
    _described(
        "after GPTQ's last column, refit each group's scale and choose each integer again, from the last column to the "
        "first, in linears that see enough calibration tokens"
    ),
]
TargetCorrection = Annotated[
    float,
    Field(
        ge=0,
        le=1,
        description="how much of what the quantized linears before a linear did to its inputs its weights make up for "
        "before they are quantized (QEP, quantization error propagation); 0: nothing; needs true_sequential",
    ),
]
EffortField = Annotated[
    Effort,
    _described(
        "high: when a block is quantized, also tune the integers and scales of its linears together, for outputs "
        "nearer to the original block's; takes many times as long; not for models with experts"
    ),
]
EngineField = Annotated[
    EngineName,
    _described("the program that quantizes: our own engine, or AutoGPTQ 0.7.1 in its own environment on CUDA"),
]
LoaderField = Annotated[
    str,
    AfterValidator(_loader),
    WithJsonSchema({"anyOf": [{"enum": list(get_args(LoaderName))}, {"type": "string", "pattern": _OTHER_LOADER}]}),
    _described("a loader of packager, or plugin:NAME, one of another installed package"),
]
SeqLen = Annotated[int, Field(ge=8, le=131072, description="tokens per row")]
Url = Annotated[str, Field(pattern=URL, description="an https:// address")]
GitUrl = Annotated[str, Field(pattern=_GIT_URL, description=PATTERN_MEANINGS[_GIT_URL])]
LineText = Annotated[str, Field(min_length=1, max_length=400, pattern=_LINE, description=PATTERN_MEANINGS[_LINE])]


ModulePattern = Annotated[
    str, Field(pattern=_MODULE_PATTERN, description="a module's name inside its block, in which * stands for anything")
]


class Strict(BaseModel):
    """Refuse unknown keys and implicit conversions; values are frozen."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    def given_fields(self) -> frozenset[str]:
        """Return the names of the fields that hold a value."""
        return frozenset(name for name in type(self).model_fields if getattr(self, name) is not None)


class Mix(Strict):
    """Bits that are chosen by measured loss for each group of linears that see the same input."""

    bits: tuple[BitsField, ...] = Field(max_length=4, description="the numbers of bits to choose from")
    mean: float = Field(
        description="the size: at most that of linears which all have so many bits; between two of `bits`, too"
    )

    @model_validator(mode="after")
    def _has_a_choice(self) -> "Mix":
        if problem := mix_problem(self.bits, self.mean):
            raise ValueError(problem)
        return self

    def bits_mix(self) -> BitsMix:
        """Return it as variants have it."""
        return BitsMix(bits=tuple(sorted(self.bits)), mean=self.mean)
