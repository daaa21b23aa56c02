"""Derive the tensors of a decoder model from config.json alone.

Shapes were read from transformers 5.23 (`modeling_{llama,mistral,qwen2,qwen3}.py`) and are compared with it by
`tests/test_architecture.py`. A new family is one more entry of `FAMILIES`. No torch here: `plan` must stay fast.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby

from packager.errors import PlanError
from packager.model.config_values import MOST_BLOCKS, ConfigReader, shortened
from packager.model.safetensors_file import TensorInfo

# Buffers that old checkpoints store and every runtime computes itself; a quantized branch leaves them out.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)
BLOCK_PREFIX = "model.layers"
# Linears of a block in order; those of one row share their input, and so one Hessian.
INPUT_GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
BLOCK_LINEARS = tuple(name for group in INPUT_GROUPS for name in group)


@dataclass(frozen=True, kw_only=True)
class Family:
    """The meaning that a model_type gives to config keys that families read differently.

    Attributes:
        causal_lm: the only class of config.json's `architectures` with known tensor names.
        qkv_bias: q_proj, k_proj and v_proj always have a bias.
        attention_bias: `attention_bias` gives all four attention linears a bias (ignored by other families).
        mlp_bias: `mlp_bias` gives the three linears of the MLP a bias (ignored by other families).
        qk_norm: queries and keys have an RMSNorm of head_dim each.
        kv_heads_optional: without `num_key_value_heads` there are as many as attention heads.
        head_dim_required: config.json must give head_dim; there is no default.
    """

    causal_lm: str
    qkv_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    kv_heads_optional: bool = False
    head_dim_required: bool = False


FAMILIES: Mapping[str, Family] = {
    "llama": Family(causal_lm="LlamaForCausalLM", attention_bias=True, mlp_bias=True, kv_heads_optional=True),
    "mistral": Family(causal_lm="MistralForCausalLM"),
    "qwen2": Family(causal_lm="Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Family(causal_lm="Qwen3ForCausalLM", attention_bias=True, qk_norm=True, head_dim_required=True),
}


@dataclass(frozen=True, kw_only=True)
class LinearSpec:
    """One weight matrix [out_features, in_features] of a block; `name` like `model.layers.3.self_attn.q_proj`."""

    name: str
    block: int
    in_features: int
    out_features: int
    bias: bool

    @property
    def local_name(self) -> str:
        """The name inside its block, one of `BLOCK_LINEARS`."""
        return self.name.removeprefix(f"{BLOCK_PREFIX}.{self.block}.")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder model's shapes.

    Attributes:
        dtype: of every tensor of the base checkpoint, safetensors spelling: F16, BF16 or F32.
        rope_type: of the rotary embedding: "default", "llama3", "yarn", ...
        sliding_window: as in config.json, whether the family uses it or not; None where it can never matter.
        tensors: every tensor of the base checkpoint: embedding, blocks, norm, head (absent when tied).
        linears: every linear that is quantized, block by block, in the order of `INPUT_GROUPS`.
    """

    model_type: str
    dtype: str
    num_blocks: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope_type: str
    sliding_window: int | None
    tensors: tuple[TensorInfo, ...]
    linears: tuple[LinearSpec, ...]

    @property
    def scaled_rope(self) -> bool:
        """Whether the rotary embedding is of another type than the plain one."""
        return self.rope_type != "default"

    @property
    def head_dim_is_derived(self) -> bool:
        """Whether head_dim is hidden_size / num_attention_heads, as runtimes of 2023 assume."""
        return self.head_dim * self.num_attention_heads == self.hidden_size

    @property
    def num_parameters(self) -> int:
        """Parameters, a tied embedding counted once."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def base_bytes(self) -> int:
        """Bytes of all tensors of the base checkpoint."""
        return sum(tensor.size_bytes for tensor in self.tensors)

    @property
    def block_linears(self) -> tuple[LinearSpec, ...]:
        """The first block's linears; all blocks are alike."""
        return self.linears[: len(BLOCK_LINEARS)]

    @property
    def group_shapes(self) -> tuple[tuple[int, int], ...]:
        """For each of `INPUT_GROUPS` the shared in_features and the sum of the out_features of its linears."""
        block = {linear.local_name: linear for linear in self.block_linears}
        return tuple(
            (block[group[0]].in_features, sum(block[name].out_features for name in group)) for group in INPUT_GROUPS
        )

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of the fp16 keys and values of one token."""
        return 2 * 2 * self.num_blocks * self.num_key_value_heads * self.head_dim


def read_architecture(config: Mapping[str, object], where: str) -> Architecture:
    """Derive every tensor of a model from its config.json.

    Args:
        config: the parsed config.json.
        where: the file's name, for messages.

    Raises:
        PlanError: an unsupported model_type, or keys that are missing or impossible; all are named at once.
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None or not isinstance(model_type, str):
        raise PlanError(
            f"model_type {shortened(model_type)} is not supported",
            where=where,
            why=f"the tensors of these are known: {', '.join(FAMILIES)}",
            hint="a new family is one entry of FAMILIES in packager/model/architecture.py",
        )
    reader = ConfigReader(config)
    architecture = _derive(reader, family, model_type)
    problems = reader.problems or _contradictions(config, family, architecture)
    if problems:
        raise PlanError("config.json does not describe a model we can plan", where=where, why="; ".join(problems))
    return architecture


def _derive(reader: ConfigReader, family: Family, model_type: str) -> Architecture:
    """Build the architecture; a missing size counts as 1 and is reported in `reader.problems`."""
    heads, hidden = reader.size("num_attention_heads"), reader.size("hidden_size")
    kv_heads_known = family.kv_heads_optional or "num_key_value_heads" in reader.values
    kv_heads = reader.size("num_key_value_heads", heads if kv_heads_known else None)
    head_dim = reader.size("head_dim", None if family.head_dim_required else max(hidden // heads, 1))
    intermediate, num_blocks = reader.size("intermediate_size"), reader.size("num_hidden_layers", largest=MOST_BLOCKS)
    shapes = _linear_shapes(hidden, intermediate, heads * head_dim, kv_heads * head_dim, _biases(family, reader))
    linears = tuple(
        LinearSpec(name=f"{BLOCK_PREFIX}.{block}.{name}", block=block, in_features=rows, out_features=cols, bias=bias)
        for block in range(num_blocks)
        for name, (rows, cols, bias) in shapes.items()
    )
    architecture = Architecture(
        model_type=model_type,
        dtype=reader.dtype(),
        num_blocks=num_blocks,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=reader.size("vocab_size"),
        max_position_embeddings=reader.size("max_position_embeddings"),
        tie_word_embeddings=reader.flag("tie_word_embeddings"),
        rope_type=reader.rope_type(),
        sliding_window=reader.sliding_window(),
        tensors=(),
        linears=linears,
    )
    return replace(architecture, tensors=tuple(_base_tensors(architecture, qk_norm=family.qk_norm)))


def _contradictions(config: Mapping[str, object], family: Family, architecture: Architecture) -> list[str]:
    """Return which values contradict each other, each being well formed."""
    problems = []
    classes = config.get("architectures")
    if classes is not None and classes != [family.causal_lm]:
        problems.append(f'architectures is {shortened(classes)}, expected ["{family.causal_lm}"]')
    if config.get("quantization_config") is not None:
        problems.append("quantization_config is there: the base model is already quantized")
    heads, kv_heads = architecture.num_attention_heads, architecture.num_key_value_heads
    if heads % kv_heads:
        problems.append(f"num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}")
    if config.get("head_dim") is None and architecture.hidden_size % heads:
        problems.append(f"num_attention_heads {heads} does not divide hidden_size {architecture.hidden_size}")
    elif architecture.head_dim % 2:
        problems.append(f"head_dim {architecture.head_dim} is odd: a rotary embedding rotates pairs")
    return problems


def _biases(family: Family, reader: ConfigReader) -> tuple[bool, bool, bool]:
    """Return whether q, k, v, then o, then the MLP have biases."""
    attention = family.attention_bias and reader.flag("attention_bias")
    return family.qkv_bias or attention, attention, family.mlp_bias and reader.flag("mlp_bias")


def _linear_shapes(
    hidden: int, intermediate: int, queries: int, keys: int, biases: tuple[bool, bool, bool]
) -> dict[str, tuple[int, int, bool]]:
    """Return (in_features, out_features, bias) of every linear of a block, in the order of `BLOCK_LINEARS`."""
    qkv_bias, o_bias, mlp_bias = biases
    shapes = (
        (hidden, queries, qkv_bias),
        (hidden, keys, qkv_bias),
        (hidden, keys, qkv_bias),
        (queries, hidden, o_bias),
        (hidden, intermediate, mlp_bias),
        (hidden, intermediate, mlp_bias),
        (intermediate, hidden, mlp_bias),
    )
    return dict(zip(BLOCK_LINEARS, shapes, strict=True))


def _base_tensors(architecture: Architecture, *, qk_norm: bool) -> Iterator[TensorInfo]:
    """Yield every tensor of the base checkpoint in the order of `Architecture.tensors`."""
    hidden, vocab_size = architecture.hidden_size, architecture.vocab_size

    def tensor(name: str, *shape: int) -> TensorInfo:
        return TensorInfo(name=name, dtype=architecture.dtype, shape=shape)

    yield tensor("model.embed_tokens.weight", vocab_size, hidden)
    for block, members in groupby(architecture.linears, key=lambda linear: linear.block):
        prefix = f"{BLOCK_PREFIX}.{block}"
        for linear in members:
            yield tensor(f"{linear.name}.weight", linear.out_features, linear.in_features)
            if linear.bias:
                yield tensor(f"{linear.name}.bias", linear.out_features)
        if qk_norm:
            yield tensor(f"{prefix}.self_attn.q_norm.weight", architecture.head_dim)
            yield tensor(f"{prefix}.self_attn.k_norm.weight", architecture.head_dim)
        yield tensor(f"{prefix}.input_layernorm.weight", hidden)
        yield tensor(f"{prefix}.post_attention_layernorm.weight", hidden)
    yield tensor("model.norm.weight", hidden)
    if not architecture.tie_word_embeddings:
        yield tensor("lm_head.weight", vocab_size, hidden)
