"""What ONNX Runtime reads of GPTQ checkpoints: the model builder of onnxruntime-genai, and the kernel on the CPU.

Read on 2026-11-29 in the wheel of onnxruntime-genai 0.18.0 (onnxruntime_genai/models), and run with onnxruntime 1.32.0,
onnx 1.23.2 and transformers 5.23.0 on a CPU; `tests/test_onnxruntime_loader.py` runs it again.
"""

from packager.model.architecture import Architecture
from packager.model.rope import rope_of
from packager.model.rules import (
    TAKE_OTHER_RUNTIME,
    TRY_IT,
    RulesOf,
    all_quantized,
    bits_check,
    patterns_check,
    take_bits,
    whole_groups,
)
from packager.variant import Variant

# Classes of `builder.create_model` whose checkpoints it converted here into what our forward computes.
ONNXRUNTIME_OPENS = frozenset(
    """
    Ernie4_5ForCausalLM GraniteForCausalLM HunYuanDenseV1ForCausalLM LlamaForCausalLM MistralForCausalLM
    Phi3ForCausalLM Qwen2ForCausalLM Qwen2_5_VLForConditionalGeneration Qwen3ForCausalLM
    """.split()  # noqa: SIM905
)

# `add_offset` of builders.gemma and builders.nemotron. Relative errors: 0.0003 to 0.001 where norms are stored in
# float16, 0.002 to 0.009 in bfloat16.
_ROUNDS_NORMS = "adds 1 to the norms' weights in the precision in which they are stored, which rounds them"
_BY_LAYER_TYPE = "fails with transformers 5.23, whose config has parameters for each type of layer"
_NAMES = "does not know the names of its linears"  # loaders.base, `QuantizedModel.__init__`
_DROPS_QUANTIZATION = "deletes quantization_config, and then loads with transformers"
# Classes that it lists and does not convert, or converts into something else.
ONNXRUNTIME_FAILS: dict[str, str] = {
    "Gemma2ForCausalLM": _ROUNDS_NORMS,
    "Gemma3ForCausalLM": _BY_LAYER_TYPE,
    "Gemma3ForConditionalGeneration": _BY_LAYER_TYPE,
    "Gemma4ForConditionalGeneration": _BY_LAYER_TYPE,
    "Gemma4UnifiedForConditionalGeneration": _BY_LAYER_TYPE,
    "GemmaForCausalLM": _ROUNDS_NORMS,
    "GraniteMoeHybridForCausalLM": _NAMES,
    "GptOssForCausalLM": _DROPS_QUANTIZATION,
    "Lfm2ForCausalLM": _NAMES,
    "Lfm2MoeForCausalLM": _NAMES,
    "Lfm2VlForConditionalGeneration": _NAMES,
    "Mistral3ForConditionalGeneration": _DROPS_QUANTIZATION,
    "NemotronForCausalLM": _ROUNDS_NORMS,
    "OlmoForCausalLM": "computes the norms without their mean, without an error",  # builders.olmo, `make_layernorm`
    "PhiForCausalLM": _NAMES,
    "Qwen3VLForConditionalGeneration": "makes a model that does not run: position_ids has three axes",
    "Qwen3_5ForConditionalGeneration": _NAMES,
    "Qwen3_5MoeForConditionalGeneration": _NAMES,
    "SmolLM3ForCausalLM": "fails: its layers without a rotary embedding ask for position_ids",  # builders.smollm
}

# A dynamic embedding with alpha has one base for rows of any length.
_DYNAMIC_WITH_ALPHA = "dynamic with alpha"
# Rotary embeddings by class: builders.hunyuan, `make_rope_init` of builders.llama, builders.phi, and builders.base for
# the others.
_ROPE_TYPES = {
    "HunYuanDenseV1ForCausalLM": ("default", _DYNAMIC_WITH_ALPHA),
    "LlamaForCausalLM": ("default", "llama3", "dynamic"),
    "Phi3ForCausalLM": ("default",),
}
_OTHER_ROPE_TYPES = ("default", "linear")
# Classes whose config has a sliding window and no layer_types, without which builders.base, `is_local`, finds no
# layer that has the window.
_WINDOW_IGNORED = ("MistralForCausalLM", "Phi3ForCausalLM")

# onnxruntime/contrib_ops/cpu/quantization/matmul_nbits.cc. Whole rows are one block.
ONNXRUNTIME_BITS = (2, 4, 8)
_SMALLEST_BLOCK = 16
_LARGEST_BLOCK = 256  # with act order, or with 2 bits
# GroupQueryAttention: "cos_cache dimension 1 must be <= head_size / 2 and a multiple of 8".
_ROTATED_MULTIPLE = 16


def _fails(_: Variant, architecture: Architecture) -> str:
    """Return why the model builder does not convert a class of transformers that it lists."""
    return ONNXRUNTIME_FAILS.get(architecture.model_class, "")


def _classes(_: Variant, architecture: Architecture) -> str:
    """Return that the model builder does not list a class of transformers."""
    name = architecture.model_class
    known = name in ONNXRUNTIME_OPENS or name in ONNXRUNTIME_FAILS
    return "" if known else f"its model builder (0.18) does not list {name}"


def _blocks(variant: Variant, architecture: Architecture) -> str:
    """Return which group the kernel refuses: it takes powers of two from 16 on, in some cases up to 256."""
    for linear in architecture.example_linears:
        whole = variant.group_size == -1
        size = linear.in_features if whole else variant.group_size
        words = f"whole rows, {linear.module} has {size} columns" if whole else f"{size}"
        if size < _SMALLEST_BLOCK or size & (size - 1):
            return f"reads group sizes that are powers of two from {_SMALLEST_BLOCK} on, not {words}"
        if size > _LARGEST_BLOCK and (variant.desc_act or 2 in variant.all_bits):
            case = "with act order" if variant.desc_act else "with 2 bits"
            return f"reads group sizes up to {_LARGEST_BLOCK} {case}, not {words}"
    return ""


def onnxruntime_whole_groups(variant: Variant, architecture: Architecture) -> str:
    """Return a linear whose last group is shorter, where the size itself is one that the kernel takes."""
    return "" if _blocks(variant, architecture) else whole_groups(variant, architecture)


def _act_order(variant: Variant, _: Architecture) -> str:
    """Return what the kernel does not compute with g_idx, which the builder passes on wherever desc_act is true.

    With 8 bits it raises an error. With 2 bits it takes the weights for others, and with 4 bits every zero for 8: no
    error, and relative errors of the logits of 0.5 to 1.2.
    """
    if not variant.desc_act:
        return ""
    if variant.all_bits != (4,):
        return "reads act order with 4 bits only"
    return "" if variant.sym else "takes every zero for 8 with act order, without an error"


def _rope_type(architecture: Architecture) -> str:
    """Return the type of a rotary embedding, in which a dynamic one with alpha is a type of its own."""
    kind = architecture.rope_type
    return _DYNAMIC_WITH_ALPHA if kind == "dynamic" and "alpha" in rope_of(architecture.text_config) else kind


def _rope(_: Variant, architecture: Architecture) -> str:
    """Return what of a rotary embedding the model builder does not know, or silently computes as a plain one."""
    kind, config = _rope_type(architecture), architecture.text_config
    if kind not in _ROPE_TYPES.get(architecture.model_class, _OTHER_ROPE_TYPES):
        return f"computes no rotary embedding of type {kind}"
    # builders.ernie divides the positions by it; transformers 5 does not read it.
    if config.get("compression_ratio", 1) not in (1, None):
        return "reads compression_ratio, which transformers does not"
    heads, head_dim = config.get("num_attention_heads"), config.get("head_dim")
    if not isinstance(head_dim, int) and isinstance(heads, int) and heads > 0:
        head_dim = architecture.hidden_size // heads
    share = config.get("partial_rotary_factor", rope_of(config).get("partial_rotary_factor"))
    if not isinstance(head_dim, int):
        return ""
    rotated = int(head_dim * share) if isinstance(share, int | float) else head_dim
    odd = rotated % _ROTATED_MULTIPLE
    return f"rotates multiples of {_ROTATED_MULTIPLE} columns of a head only, not {rotated}" if odd else ""


def _lengths(_: Variant, architecture: Architecture) -> str:
    """Return the length of a row from which the converted model differs."""
    window, name = architecture.sliding_window, architecture.model_class
    if window is not None and name in _WINDOW_IGNORED:
        return f"past {window} tokens it computes without the sliding window"
    if _rope_type(architecture) == "dynamic":
        return f"past {architecture.max_position_embeddings} tokens its rotary embedding is not the model's"
    return ""


_BUILDER = RulesOf(project="onnxruntime-genai", version="0.18.0", read="2026-11-29")
_RUNTIME = RulesOf(project="ONNX Runtime", version="1.32.0", read="2026-11-29")
_KERNEL = "onnxruntime/contrib_ops/cpu/quantization/matmul_nbits.cc"
_LIST = "onnxruntime_genai.models.builder, create_model"

ONNXRUNTIME_RULES = (
    _RUNTIME.refuses(bits_check(*ONNXRUNTIME_BITS), _KERNEL, take_bits(ONNXRUNTIME_BITS)),
    _BUILDER.unknown(
        patterns_check("names of tensors, not of linears,"),
        "onnxruntime_genai.models.loaders.gptq, get_overrides",
        TRY_IT,
    ),
    _BUILDER.refuses(
        all_quantized, "onnxruntime_genai.models.loaders.base", "skip nothing in the recipe (quantize.skip)"
    ),
    _BUILDER.refuses(_fails, "onnxruntime_genai.models.builders", TAKE_OTHER_RUNTIME),
    _BUILDER.refuses(_classes, _LIST, TAKE_OTHER_RUNTIME),
    _RUNTIME.refuses(_blocks, _KERNEL, "take a branch with group size 32, 64 or 128"),
    _BUILDER.refuses(
        onnxruntime_whole_groups,
        "onnxruntime_genai.models.loaders.base, unpack_qzeros",
        "take a group size that divides all of them",
    ),
    _RUNTIME.refuses(_act_order, _KERNEL, "take a branch with act order static, group or none"),
    _BUILDER.refuses(_rope, "onnxruntime_genai.models.builders, make_rope_init", TAKE_OTHER_RUNTIME),
    _BUILDER.note("after conversion, which gives head and embeddings 4 bits by default", _LIST),
    _BUILDER.limits(_lengths, "onnxruntime_genai.models.builders.base, is_local", "keep rows shorter than that"),
)
