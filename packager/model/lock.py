"""The lock: what a base model says of itself, written down once so that `plan` needs neither network nor torch.

`packager lock` makes it from the files' headers and from transformers (`describe.py`); a build compares it with the
files before the first block. docs/reference/lock.md describes the file. No torch here.
"""

from itertools import islice
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, JsonValue, StringConstraints, model_validator

from packager.model.config_values import LARGEST_SIZE, MOST_BLOCKS, without_paths
from packager.model.name_patterns import MOST_NAMES, read_numbers
from packager.receipt import FileRecord
from packager.records import Record

Name = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
Commit = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40}$")]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=1, le=LARGEST_SIZE, strict=True)]
MOST_PROMPT_CHARACTERS = 100_000
Bytes = Annotated[int, Field(ge=0, lt=1 << 60, strict=True)]


class LockedTensors(Record):
    """Tensors of one dtype and shape, by a pattern of `name_patterns`."""

    names: Name
    dtype: str
    shape: Annotated[tuple[Annotated[int, Field(ge=0, lt=1 << 48, strict=True)], ...], Field(max_length=32)]


class LockedLinear(Record):
    """A linear in every block of a kind.

    Attributes:
        module: its name inside the block, as transformers builds the model.
        stored: the stored name of its weight without ".weight", in which {block} is the block's number.
        in_features, out_features: of its weight [out_features, in_features].
        bias: it has one.
    """

    module: Name
    stored: Name
    in_features: Size
    out_features: Size
    bias: bool


class LockedExperts(Record):
    """The experts of a layer: each linear of their group stands for one of every expert.

    Attributes:
        parameter: its name inside the block, as transformers builds the model: it holds the linears of all experts.
        stored: the stored name of the one tensor that holds them too, in which {block} is the block's number; None
            where each linear is stored as a tensor of its own.
        count: experts of the layer.
        top_k: experts that a token goes to.
        per_token: the linears see the tokens themselves; else a token gives `top_k` inputs.
    """

    parameter: Name
    stored: Name | None = None
    count: Annotated[int, Field(ge=1, le=MOST_NAMES, strict=True)]
    top_k: Annotated[int, Field(ge=1, le=MOST_NAMES, strict=True)]
    per_token: bool


class LockedGroup(Record):
    """Linears of a block that see the same input, and so have one Hessian; or those of every expert of a layer.

    Attributes:
        experts: they are linears of experts, and {expert} in their names stands for an expert's number.
        linears: in the order in which the block reaches them.
        held_bytes: activations of one token that are alive then, in a dtype of two bytes, without the block's input.
        held_bytes_per_pair: likewise, for each pair of tokens of a row: attention scores that are stored.
    """

    experts: LockedExperts | None = None
    linears: Annotated[tuple[LockedLinear, ...], Field(min_length=1)]
    held_bytes: Bytes
    held_bytes_per_pair: Bytes = 0

    @property
    def in_features(self) -> int:
        """Columns of each weight."""
        return self.linears[0].in_features

    @property
    def out_features(self) -> int:
        """Rows of all weights together; of experts, of one expert's."""
        return sum(linear.out_features for linear in self.linears)

    @property
    def modules(self) -> tuple[str, ...]:
        """The names of all linears inside the block: those of the first expert, then of the next."""
        return tuple(linear.module.replace("{expert}", each) for each in self.numbers for linear in self.linears)

    @property
    def numbers(self) -> tuple[str, ...]:
        """What {expert} stands for; "" alone for linears whose names do not hold it."""
        return ("",) if self.experts is None else tuple(map(str, range(self.experts.count)))

    @property
    def unit(self) -> str:
        """What a recipe skips as a whole: the module of the experts; "" for linears, which are skipped one by one."""
        return self.experts.parameter.rpartition(".")[0] if self.experts is not None else ""

    @model_validator(mode="after")
    def _names_are_of_experts_or_not(self) -> Self:
        for name in (name for linear in self.linears for name in (linear.module, linear.stored)):
            if name.count("{expert}") != (self.experts is not None):
                raise ValueError(f"{name!r} must hold {{expert}} once in a group of experts, and nowhere else")
        return self

    @model_validator(mode="after")
    def _linears_can_see_one_input(self) -> Self:
        if len({linear.in_features for linear in self.linears}) > 1:
            raise ValueError(f"{self.linears[0].module} is in a group with linears that take inputs of another width")
        return self


class LockedKind(Record):
    """Blocks that are alike.

    Attributes:
        blocks: their numbers: "0..2,5".
        groups: the linears that can be quantized.
        left: other weights of two dimensions or more, by module, with the reason why they are not quantized.
        weight_elements: of one block.
        peak_bytes: activations of one token that are alive at most inside the block, in a dtype of two bytes.
        peak_bytes_per_pair: likewise, for each pair of tokens of a row.
    """

    blocks: Name
    groups: tuple[LockedGroup, ...]
    left: dict[str, str]
    weight_elements: Bytes
    peak_bytes: Bytes
    peak_bytes_per_pair: Bytes = 0

    @model_validator(mode="after")
    def _modules_are_in_one_place(self) -> Self:
        modules = [linear.module for group in self.groups for linear in group.linears]
        if len({*modules, *self.left}) != len(modules) + len(self.left):
            raise ValueError(f"a module of blocks {self.blocks} is there twice")
        return self


class LockedWindow(Record):
    """Layers that cache the last tokens only.

    Attributes:
        tokens: that they keep.
        bytes_per_token: of all of them together, in a dtype of two bytes.
    """

    tokens: Size
    bytes_per_token: Bytes


class LockedCache(Record):
    """How the cache of one row grows with its tokens, see `LockedModel.kv_bytes_per_token`.

    Attributes:
        windows: layers that do not keep every token; their bytes are part of `kv_bytes_per_token`.
        state_bytes: what is cached however long the row is: states of linear attention and of convolutions.
    """

    windows: Annotated[tuple[LockedWindow, ...], Field(max_length=MOST_BLOCKS)] = ()
    state_bytes: Bytes = 0


class LockedModel(Record):
    """The architecture of a base model.

    Attributes:
        model_class: of transformers.
        blocks_path: the module that holds the blocks, as transformers builds the model.
        kinds: of blocks.
        hidden_size: width of the blocks' inputs and outputs.
        vocab_size: logits per token.
        kv_bytes_per_token: what the model caches of one token, in a dtype of two bytes.
        kv_cache: which tokens it keeps; None in locks of older releases, which count every token in every layer.
        tied: stored names of tensors that are another tensor and need not be stored.
        own: stored names of tensors that config.json calls tied, although the files hold values of their own for them.
        tensors: of the base model's files.
        config: its config.json, without the paths that trainers leave in it: branches hold the lock.
        resolved: what transformers takes for keys that `config` leaves out in its part about the language model, of
            those that packager reads; None in locks of older releases.
    """

    model_class: Name
    blocks_path: Name
    kinds: Annotated[tuple[LockedKind, ...], Field(min_length=1)]
    hidden_size: Size
    vocab_size: Size
    kv_bytes_per_token: Bytes
    kv_cache: LockedCache | None = None
    tied: tuple[Name, ...]
    own: tuple[Name, ...] = ()
    tensors: Annotated[tuple[LockedTensors, ...], Field(min_length=1, max_length=MOST_NAMES)]
    config: Annotated[dict[str, JsonValue], AfterValidator(without_paths)]
    resolved: dict[str, JsonValue] | None = None

    @model_validator(mode="after")
    def _blocks_are_complete(self) -> Self:
        found = (number for kind in self.kinds for number in read_numbers(kind.blocks))
        numbers = sorted(islice(found, MOST_BLOCKS + 1))
        if numbers != list(range(len(numbers))) or len(numbers) > MOST_BLOCKS:
            raise ValueError("the kinds of blocks do not hold each block once")
        return self


class LockedBase(Record):
    """The base model's identity.

    Attributes:
        id: as in the recipe.
        requested: the recipe's branch or tag that `revision` was resolved from; None where the recipe gives a commit.
        revision: the commit on the Hub; None for a local folder.
        files: that a build uses at that commit; empty for a local folder.
    """

    id: Name
    requested: Name | None = None
    revision: Commit | None
    files: dict[str, FileRecord]


class LockedPrompt(Record):
    """A user's message in the base model's chat template, which the card's prompt template is compared with.

    Attributes:
        system_prompt: the recipe's, which is rendered before it; None where the recipe has none.
        text: what the template renders for the message {prompt}, up to where the answer begins. {date} stands where it
            asks for today's date.
        added: the token's text that the tokenizer itself puts before every text, if `text` begins with it; else "".
    """

    system_prompt: Annotated[str, Field(max_length=MOST_PROMPT_CHARACTERS)] | None = None
    text: Annotated[str, Field(max_length=MOST_PROMPT_CHARACTERS)]
    added: Annotated[str, Field(max_length=1000)] = ""


class Lock(Record):
    """The whole file.

    Attributes:
        made_with: versions of what described the model: transformers.
        base_model: whose files.
        datasets: commits of the datasets whose branch or tag the recipe names, by `dataset_key`.
        chat_template_sha256: of the chat template, None where there is none.
        prompt: the card's prompt as that template renders it; None where there is no template.
        model: its architecture.
    """

    lock_version: Literal[1]
    made_with: dict[str, str]
    base_model: LockedBase
    datasets: dict[str, Commit] = Field(default_factory=dict)
    chat_template_sha256: Digest | None
    prompt: LockedPrompt | None = None
    model: LockedModel


def dataset_key(dataset: str, revision: str) -> str:
    """Return the key of a dataset's branch or tag in `Lock.datasets`."""
    return f"{dataset}@{revision}"
