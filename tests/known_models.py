"""Describe models of four families from config.json alone, so that tests need neither transformers nor weights.

The product describes models by `model/describe.py`, whatever their architecture. Shapes were read from transformers
5.23 (`modeling_{llama,mistral,qwen2,qwen3}.py`); `tests/test_known_models.py` compares them with it.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from packager.errors import PlanError, SourceError
from packager.model.architecture import Architecture, architecture_of
from packager.model.config_values import MOST_BLOCKS, ConfigReader, shortened
from packager.model.lock import (
    LockedCache,
    LockedGroup,
    LockedKind,
    LockedLinear,
    LockedModel,
    LockedTensors,
    LockedWindow,
)  # fmt: skip
from packager.model.name_patterns import write_numbers

_BLOCKS = "model.layers"
# Linears of a block in order; those of one row share their input.
_GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


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
class _Sizes:
    """The sizes of a model of one of the families."""

    hidden: int
    intermediate: int
    queries: int
    keys: int
    head_dim: int
    vocab: int
    num_blocks: int
    tied: bool
    dtype: str
    biases: tuple[bool, bool, bool]
    qk_norm: bool


def known_architecture(config: Mapping[str, object], where: str) -> Architecture:
    """Return the architecture of a model of a known family; see `known_model`."""
    return architecture_of(known_model(config, where), where)


def describe_known(config: Mapping[str, object], where: str) -> LockedModel:
    """Describe a model for an audit: one of another family is unknown to it."""
    if config.get("model_type") not in list(FAMILIES):
        raise SourceError(f"model_type {shortened(config.get('model_type'))} is not known here", where=where)
    return known_model(config, where)


def known_model(config: Mapping[str, object], where: str) -> LockedModel:
    """Describe a model of a known family from its config.json.

    Args:
        config: the parsed config.json.
        where: the file's name, for messages.

    Raises:
        PlanError: an unknown model_type, or keys that are missing or impossible; all are named at once.
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise PlanError(
            f"model_type {shortened(model_type)} is not known here", where=where,
            why=f"the tensors of these are known from config.json alone: {', '.join(FAMILIES)}",
        )  # fmt: skip
    reader = ConfigReader(config)
    sizes, problems = _sizes(reader, family)
    problems = reader.problems or problems
    if problems:
        raise PlanError("config.json does not describe a model of its family", where=where, why="; ".join(problems))
    return _model(config, family, sizes)


def _sizes(reader: ConfigReader, family: Family) -> tuple[_Sizes, list[str]]:
    """Read the sizes; a missing one counts as 1 and is reported in `reader.problems`. Return contradictions too."""
    config = reader.values
    heads, hidden = reader.size("num_attention_heads"), reader.size("hidden_size")
    kv_heads_known = family.kv_heads_optional or "num_key_value_heads" in config
    kv_heads = reader.size("num_key_value_heads", heads if kv_heads_known else None)
    head_dim = reader.size("head_dim", None if family.head_dim_required else max(hidden // heads, 1))
    reader.size("max_position_embeddings")
    reader.rope_type()
    attention = family.attention_bias and reader.flag("attention_bias")
    sizes = _Sizes(
        hidden=hidden, intermediate=reader.size("intermediate_size"), queries=heads * head_dim,
        keys=kv_heads * head_dim,
        head_dim=head_dim, vocab=reader.size("vocab_size"),
        num_blocks=reader.size("num_hidden_layers", largest=MOST_BLOCKS), tied=reader.flag("tie_word_embeddings"),
        dtype=reader.dtype(), qk_norm=family.qk_norm,
        biases=(family.qkv_bias or attention, attention, family.mlp_bias and reader.flag("mlp_bias")),
    )  # fmt: skip
    problems = []
    classes = config.get("architectures")
    if classes is not None and classes != [family.causal_lm]:
        problems.append(f'architectures is {shortened(classes)}, expected ["{family.causal_lm}"]')
    if config.get("quantization_config") is not None:
        problems.append("quantization_config is there: the base model is already quantized")
    if heads % kv_heads:
        problems.append(f"num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}")
    if config.get("head_dim") is None and hidden % heads:
        problems.append(f"num_attention_heads {heads} does not divide hidden_size {hidden}")
    elif head_dim % 2:
        problems.append(f"head_dim {head_dim} is odd: a rotary embedding rotates pairs")
    return sizes, problems


def _model(config: Mapping[str, object], family: Family, sizes: _Sizes) -> LockedModel:
    linears = _linears(sizes)
    groups = tuple(
        LockedGroup(linears=tuple(linears[name] for name in group), held_bytes=held)
        for group, held in zip(_GROUPS, _held(sizes), strict=True)
    )
    kind = LockedKind(
        blocks=write_numbers(range(sizes.num_blocks)), groups=groups, left={},
        weight_elements=sum(  # a pattern of names stands for one tensor in each block
            math.prod(entry.shape) for entry in _tensors(sizes, linears) if entry.names.startswith(_BLOCKS)
        ),
        peak_bytes=2 * max(4 * sizes.intermediate, 8 * sizes.queries, 8 * sizes.hidden),
    )  # fmt: skip
    return LockedModel(
        model_class=family.causal_lm, blocks_path=_BLOCKS, kinds=(kind,), hidden_size=sizes.hidden,
        vocab_size=sizes.vocab, kv_bytes_per_token=2 * 2 * sizes.num_blocks * sizes.keys,
        kv_cache=LockedCache(windows=_windows(config, sizes)),
        tied=("lm_head.weight",) if sizes.tied else (), tensors=tuple(_tensors(sizes, linears)),
        config=dict(config), resolved={},  # type: ignore[arg-type]
    )  # fmt: skip


def _windows(config: Mapping[str, object], sizes: _Sizes) -> tuple[LockedWindow, ...]:
    """Return the window of a Mistral, 4096 tokens unless config.json says otherwise; the other families have none."""
    window = config.get("sliding_window", 4096) if config.get("model_type") == "mistral" else None
    if not isinstance(window, int):
        return ()
    return (LockedWindow(tokens=window - 1, bytes_per_token=2 * 2 * sizes.num_blocks * sizes.keys),)


def _held(sizes: _Sizes) -> tuple[int, int, int, int]:
    """Return the bytes of a token's activations at each group of linears, two bytes each, without the block's input."""
    hidden = sizes.hidden
    return (
        2 * hidden,
        2 * (hidden + 2 * sizes.queries + 2 * sizes.keys),
        2 * 2 * hidden,
        2 * (2 * hidden + sizes.intermediate),
    )


def _linears(sizes: _Sizes) -> dict[str, LockedLinear]:
    qkv_bias, o_bias, mlp_bias = sizes.biases
    hidden, intermediate = sizes.hidden, sizes.intermediate
    shapes = {
        "self_attn.q_proj": (hidden, sizes.queries, qkv_bias),
        "self_attn.k_proj": (hidden, sizes.keys, qkv_bias),
        "self_attn.v_proj": (hidden, sizes.keys, qkv_bias),
        "self_attn.o_proj": (sizes.queries, hidden, o_bias),
        "mlp.gate_proj": (hidden, intermediate, mlp_bias),
        "mlp.up_proj": (hidden, intermediate, mlp_bias),
        "mlp.down_proj": (intermediate, hidden, mlp_bias),
    }
    return {
        name: LockedLinear(
            module=name, stored=f"{_BLOCKS}.{{block}}.{name}", in_features=columns, out_features=rows, bias=bias
        )
        for name, (columns, rows, bias) in shapes.items()
    }


def _tensors(sizes: _Sizes, linears: Mapping[str, LockedLinear]) -> Iterator[LockedTensors]:
    blocks = "0" if sizes.num_blocks == 1 else f"{{{write_numbers(range(sizes.num_blocks))}}}"

    def tensor(names: str, *shape: int) -> LockedTensors:
        return LockedTensors(names=names, dtype=sizes.dtype, shape=shape)

    yield tensor("model.embed_tokens.weight", sizes.vocab, sizes.hidden)
    for name, linear in linears.items():
        yield tensor(f"{_BLOCKS}.{blocks}.{name}.weight", linear.out_features, linear.in_features)
        if linear.bias:
            yield tensor(f"{_BLOCKS}.{blocks}.{name}.bias", linear.out_features)
    if sizes.qk_norm:
        for name in ("q_norm", "k_norm"):
            yield tensor(f"{_BLOCKS}.{blocks}.self_attn.{name}.weight", sizes.head_dim)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield tensor(f"{_BLOCKS}.{blocks}.{name}.weight", sizes.hidden)
    yield tensor("model.norm.weight", sizes.hidden)
    if not sizes.tied:
        yield tensor("lm_head.weight", sizes.vocab, sizes.hidden)
