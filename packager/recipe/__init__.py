"""Stage 1, recipe: the models of a recipe file, frozen and fully validated.

`RecipeFile.load` in `file.py` reads the YAML and reports every problem with its line.
A path in a recipe is relative to the recipe's own folder and may not leave it, but for the base model's folder.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticKnownError

from packager.model.runtimes import LoaderName
from packager.receipt import digest_of
from packager.recipe.field_groups import base_model_problem, repository_problem, rows_by_weight, text_source_problem
from packager.recipe.paths import FolderPath, RelativePath, is_elsewhere
from packager.variant import Bits, EngineName, Layout, Place, Variant, branch_name, branch_problem, place_of


def _whole_number(value: object) -> object:
    # A strict Literal[1] still takes True and 1.0, which equal 1.
    if type(value) is not int:
        raise PydanticKnownError("int_type")
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


def _prompt_template(value: str) -> str:
    if value.count("{prompt}") != 1:
        raise ValueError("must contain {prompt} exactly once")
    return value


def _described(description: str) -> Any:
    return Field(description=description)


# The way of drawing rows from texts, docs/decisions/0021. Builds of another one are made again.
DRAWING_VERSION = 2

_REPO_ID = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}$"
_FILE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
_REVISION = r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,199}$"
_SHORT_HASH = r"(?!(?:[0-9a-f]{40})$)[0-9A-Fa-f]{7,}"  # a commit that the Hub would have to guess
_URL = r"^https://[^\s<>\"'`|)\]]+$"
_GIT_URL = r"^(https://|ssh://|file:///|[A-Za-z0-9._-]+@[A-Za-z0-9.-]+:)[^\s<>\"'`|)\]]+$"
_LINE = r"^[^\r\n\x00-\x1f]+$"
_LANGUAGE = r"^[a-z]{2,3}$"
_TAG = r"^[A-Za-z0-9][A-Za-z0-9._:-]*$"
_MODULE_PATTERN = r"^[A-Za-z0-9_.*]{1,200}$"
_WEIGHTS_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,80}$"
# The requirement of each pattern, to complete "<key> must be ...".
PATTERN_MEANINGS = {
    _REPO_ID: "namespace/name",
    _FILE_NAME: "a file name without a folder",
    _REVISION: "a full commit id, or the name of a branch or tag",
    _URL: "an https:// address without spaces, quotes or brackets",
    _GIT_URL: "an address of a git remote: https://, ssh://, file:/// or user@host:path",
    _LINE: "one line of text",
    _LANGUAGE: "a language code of two or three lower-case letters",
    _TAG: "a Hub tag of letters, digits, '.', '_', ':' and '-'",
    _MODULE_PATTERN: "a module's name of letters, digits, '_' and '.', with * for anything",
    _WEIGHTS_NAME: "a file name of letters, digits, '_' and '-', without .safetensors",
}

RepoId = Annotated[str, Field(pattern=_REPO_ID, description=PATTERN_MEANINGS[_REPO_ID])]
FileName = Annotated[str, Field(pattern=_FILE_NAME, description=PATTERN_MEANINGS[_FILE_NAME])]
Revision = Annotated[str, Field(pattern=_REVISION, description=PATTERN_MEANINGS[_REVISION]), AfterValidator(_revision)]
BranchName = Annotated[
    str, AfterValidator(_branch), _described("main, or left out: then named gptq-{bits}bit-{group_size}g-...")
]
BitsField = Annotated[Bits, BeforeValidator(_whole_number), _described("bits per weight")]
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
DescAct = Annotated[bool, _described("quantize columns in order of decreasing diag(H): act order")]
Sym = Annotated[bool, _described("symmetric grid")]
TrueSequential = Annotated[bool, _described("each linear sees inputs made by the already quantized ones before it")]
StaticGroups = Annotated[bool, _described("fix every grid from the original weights before any column is quantized")]
ScaleSearch = Annotated[
    bool,
    _described(
        "search a smaller scale per group (41 candidates down to 60 % of max|w|); "
        "left out: true, but false for engine auto-gptq, which has none"
    ),
]
EngineField = Annotated[
    EngineName,
    _described("the program that quantizes: our own engine, or AutoGPTQ 0.7.1 in its own environment on CUDA"),
]
SeqLen = Annotated[int, Field(ge=8, le=131072, description="tokens per row")]
Url = Annotated[str, Field(pattern=_URL, description="an https:// address")]
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


class Repository(Strict):
    """The repository that the variants are published to."""

    id: RepoId
    target: Literal["local", "hub", "git"] = Field(
        default="local",
        description="local: a git repository in dist/hub/models/<id>; hub: the Hugging Face Hub; git: any git remote",
    )
    url: GitUrl | None = Field(default=None, description="the remote of target git, without a password in it")
    layout: Layout = Field(
        default="branches",
        description="branches: one repository, a branch per variant; repos: a repository per variant, and a collection",
    )
    visibility: Literal["public", "private"] = Field(
        default="public", description="of a repository that publishing makes on the Hub"
    )
    gated: Literal["auto", "manual"] | None = Field(
        default=None, description="whether readers of a repository that publishing makes on the Hub must ask for access"
    )

    signed: bool = Field(default=False, description="whether a publish must be signed with a key (--sign-key)")

    @model_validator(mode="after")
    def _target_and_settings(self) -> "Repository":
        if problem := repository_problem(self.target, self.layout, url=self.url):
            raise ValueError(problem)
        if self.signed and self.layout == "repos":
            raise ValueError("signed needs layout: branches, where one release statement covers all variants")
        return self

    def place(self, branch: str) -> Place:
        """Return the repository and branch of a variant."""
        return place_of(self.id, self.layout, branch)


class BaseModelRef(Strict):
    """The fp16 model: on the Hub at a revision, or a local folder."""

    id: RepoId
    revision: Revision | None = Field(
        default=None,
        description="a commit on the Hub, or a branch or tag whose commit the lock holds; not for a local folder",
    )
    path: FolderPath | None = Field(
        default=None,
        description="a local folder with safetensors, instead of revision; an absolute one is not published anywhere",
    )

    @property
    def public_path(self) -> str | None:
        """The path as digests that are published may hold it: of a folder elsewhere, only that it is one."""
        return "elsewhere" if self.path is not None and is_elsewhere(self.path) else self.path

    @model_validator(mode="after")
    def _one_source(self) -> "BaseModelRef":
        if problem := base_model_problem(self.given_fields()):
            raise ValueError(problem)
        return self


class TextSource(Strict):
    """Text to tokenize: a local file, or one split of a Hub dataset at a revision."""

    path: RelativePath | None = Field(
        default=None, description="a local file: .txt (one document), .jsonl, .csv, .tsv or .parquet"
    )
    dataset: RepoId | None = Field(default=None, description="a Hub dataset; instead of path")
    config: LineText | None = Field(default=None, description="the dataset's configuration, e.g. wikitext-2-raw-v1")
    revision: Revision | None = Field(
        default=None, description="the dataset's commit, or a branch or tag whose commit the lock holds"
    )
    split: LineText | None = Field(default=None, description="the dataset's split, e.g. train")
    text_field: LineText | None = Field(
        default=None, description="the column or JSON key that holds the text; left out: text"
    )
    messages_field: LineText | None = Field(
        default=None,
        description="instead of text_field: the column that holds conversations, rendered in the model's chat template",
    )

    @model_validator(mode="after")
    def _one_source(self) -> "TextSource":
        if problem := text_source_problem(self.given_fields()):
            raise ValueError(problem)
        return self

    @property
    def column(self) -> str:
        """The name of the column that is read."""
        return self.messages_field or self.text_field or "text"

    @property
    def name(self) -> str:
        """The dataset's id, or the file's name."""
        return self.dataset or PurePosixPath(str(self.path)).name


class WeightedText(TextSource):
    """One of several texts of the calibration."""

    weight: float = Field(default=1.0, gt=0, le=1e6, description="its share of the rows, relative to the other weights")


class Calibration(TextSource):
    """The text that the quantizer is calibrated on, or several texts with weights."""

    sources: tuple[WeightedText, ...] | None = Field(
        default=None,
        min_length=1,
        max_length=16,
        description="several texts, each with its weight; instead of path or dataset",
    )
    num_samples: int = Field(default=128, ge=1, le=65536, description="rows of seq_len tokens")
    seq_len: SeqLen = 2048
    seed: int = Field(default=0, ge=0, description="chooses which rows are drawn from the text")

    @property
    def texts(self) -> tuple[TextSource, ...]:
        """The texts in the recipe's order."""
        return self.sources or (self,)

    @property
    def rows_of_texts(self) -> tuple[int, ...]:
        """How many rows each text gives; their sum is `num_samples`."""
        return rows_by_weight([text.weight for text in self.sources or ()] or [1.0], self.num_samples)


class Evaluation(TextSource):
    """Held-out text for perplexity, KL divergence and top-1 agreement; no variant is calibrated on it."""

    num_tokens: int = Field(default=131072, ge=64, description="rounded down to whole rows of seq_len")
    seq_len: SeqLen = 2048
    seed: int = Field(default=0, ge=0, description="chooses which rows are drawn from the text")
    questions: RelativePath | None = Field(
        default=None, description='JSONL of {"prompt": ..., "answer": ...}, answered greedily'
    )

    @property
    def num_rows(self) -> int:
        """How many rows are drawn."""
        return max(1, self.num_tokens // self.seq_len)


class VariantFields(Strict):
    """Parameters of one variant; those left out come from `defaults`."""

    bits: BitsField | None = None
    group_size: GroupSize | None = None
    desc_act: DescAct | None = None
    sym: Sym | None = None
    damp_percent: DampPercent | None = None
    damp_percent_limit: DampLimit | None = None
    true_sequential: TrueSequential | None = None
    static_groups: StaticGroups | None = None
    scale_search: ScaleSearch | None = None
    engine: EngineField | None = None


class VariantEntry(VariantFields):
    """One variant of the list; without `branch` its name follows `branch_name`."""

    branch: BranchName | None = None
    description: LineText | None = Field(
        default=None, description="the table's last column; written from the measurements if left out"
    )


class Defaults(Strict):
    """Parameters of every variant that does not give its own."""

    bits: BitsField = 4
    group_size: GroupSize = 128
    desc_act: DescAct = False
    sym: Sym = True
    damp_percent: DampPercent = 0.01
    damp_percent_limit: DampLimit = 0.1
    true_sequential: TrueSequential = True
    static_groups: StaticGroups = False
    scale_search: ScaleSearch | None = None
    engine: EngineField = "native"


class CheckpointOptions(Strict):
    """The files of a branch's weights."""

    weights_name: Annotated[str, Field(pattern=_WEIGHTS_NAME)] = Field(
        default="model", description="file name without .safetensors; the same in every branch"
    )
    max_shard_bytes: int = Field(
        default=48_000_000_000, ge=1_000_000, description="a larger checkpoint is split into shards"
    )


class Loaders(Strict):
    """The runtimes that must open every variant, and the rows and prompts that they compute."""

    required: tuple[LoaderName, ...] = Field(default=(), description="publishing needs a pass of each")
    if_available: tuple[LoaderName, ...] = Field(
        default=(), description="run where this machine can run them; the card reports either result"
    )
    num_rows: int = Field(default=4, ge=1, le=64, description="rows of held-out tokens whose logits are compared")
    seq_len: int = Field(default=64, ge=4, le=4096, description="tokens per compared row")
    prompts: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(), description="user messages to answer greedily"
    )
    max_new_tokens: int = Field(default=16, ge=1, le=512, description="tokens generated per prompt")
    timeout_s: int = Field(default=600, ge=10, description="how long one loader may take for one variant")


class License(Strict):
    """The base model's licence, as the Hub names it, and the files that must accompany the weights."""

    id: LineText = Field(
        description="the Hub's licence identifier, e.g. llama2, apache-2.0; or another licence's own name"
    )
    link: Url | None = Field(default=None, description="where the licence can be read")
    files: tuple[RelativePath, ...] = Field(default=(), description="copied into every branch under their own names")
    base_files: tuple[FileName, ...] = Field(
        default=(),
        description="copied at build time from the base model's own repository, e.g. LICENSE.txt: never retyped here",
    )


class PromptTemplate(Strict):
    """The prompt format the model was trained with."""

    name: LineText = Field(description="the usual name of the format, e.g. Llama-2-Chat")
    template: Annotated[str, AfterValidator(_prompt_template)] = Field(
        description="the whole prompt, with {prompt} where the user's message goes"
    )


class Link(Strict):
    """A titled address."""

    title: LineText = Field(description="the text of the link")
    url: Url


class Card(Strict):
    """The parts of the model card that cannot be measured."""

    title: LineText = Field(description="the model's name as people know it, e.g. Meta's Llama 2 13B-chat")
    creator: LineText = Field(description="who made the base model")
    creator_url: Url | None = Field(default=None, description="the creator's page")
    quantized_by: LineText = Field(description="the Hub name of the publisher of this repository")
    license: License
    language: tuple[Annotated[str, Field(pattern=_LANGUAGE)], ...] = Field(default=("en",), description="ISO 639 codes")
    tags: tuple[Annotated[str, Field(pattern=_TAG)], ...] = Field(
        default=(), description="Hub tags besides those every GPTQ repository gets"
    )
    prompt_template: PromptTemplate
    system_prompt: str | None = Field(default=None, description="shown in the Python example as the system message")
    example_prompt: LineText = Field(default="Tell me about AI", description="the user's message in the code examples")
    related_repositories: tuple[Link, ...] = Field(default=(), description="the list under Repositories available")
    header: RelativePath | None = Field(default=None, description="markdown placed above the title")
    footer: RelativePath | None = Field(default=None, description="markdown: community, thanks, credits")
    original_card: RelativePath | None = Field(default=None, description="the base model's card, appended")


class QuantizeOptions(Strict):
    """What is quantized."""

    skip: tuple[ModulePattern, ...] = Field(
        default=(), max_length=100, description="linears of the blocks that stay as they are, such as *.down_proj"
    )


class Recipe(Strict):
    """A whole recipe file."""

    schema_version: Annotated[Literal[1], BeforeValidator(_whole_number)] = Field(
        description="the version of this file format"
    )
    repository: Repository
    base_model: BaseModelRef
    calibration: Calibration
    evaluation: Evaluation
    defaults: Defaults = Defaults()
    variants: tuple[VariantEntry, ...] = Field(
        min_length=1, max_length=64, description="one branch each; main exactly once"
    )
    quantize: QuantizeOptions = QuantizeOptions()
    checkpoint: CheckpointOptions = CheckpointOptions()
    loaders: Loaders = Loaders()
    card: Card

    def expanded_variants(self) -> tuple[Variant, ...]:
        """Return every variant with the defaults filled in and its branch named, in the recipe's order."""
        return tuple(expand(entry, self.defaults) for entry in self.variants)

    def digest(self) -> str:
        """Return the sha256 of the recipe's canonical JSON: comments and layout do not change it."""
        content = self.model_dump(mode="json")
        content["base_model"]["path"] = self.base_model.public_path
        return digest_of(content)


def expand(entry: VariantEntry, defaults: Defaults) -> Variant:
    """Fill `entry` from `defaults` and name its branch."""
    given = {
        key: value for key, value in entry.model_dump(exclude={"branch", "description"}).items() if value is not None
    }
    fields = {**defaults.model_dump(), **given}
    # Scale search lowers the KL divergence of every permutation: docs/explanation/measurements.md.
    if fields["scale_search"] is None:
        fields["scale_search"] = fields["engine"] == "native"
    name = branch_name(bits=fields["bits"], group_size=fields["group_size"], desc_act=fields["desc_act"])
    return Variant(branch=entry.branch or name, **fields)
