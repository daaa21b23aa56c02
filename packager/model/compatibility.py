"""Predict from parameters and shapes alone which runtimes load a variant.

`RUNTIME_RULES` has an entry for each of `RUNTIMES`; docs/reference/format.md lists their sources. A verdict is a
prediction: `verify` opens the files, and only what it opened is called proven.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from packager.model.architecture import Architecture
from packager.model.onnxruntime_rules import ONNXRUNTIME_CHECKS, onnxruntime_lengths
from packager.model.rope import gpt_neox_keys_lacking, is_old_scaling
from packager.model.runtime_architectures import (
    EXPERTS_BY_NAME,
    FUSED_LINEARS,
    GPTQMODEL_DROPS,
    GPTQMODEL_FAILS,
    GPTQMODEL_OPENS,
    GPTQMODEL_TYPES,
    TRANSFORMERS_FAILS,
)
from packager.model.runtimes import RUNTIMES
from packager.model.vllm_rules import (
    vllm_act_order,
    vllm_bits,
    vllm_classes,
    vllm_cpu_bits,
    vllm_cpu_classes,
    vllm_cpu_heads,
    vllm_cpu_shapes,
    vllm_group_sizes,
    vllm_symmetric,
    vllm_tensor_parallel,
    vllm_whole_groups,
)
from packager.variant import Variant

# Returns in a few words what it found, or "".
Check = Callable[[Variant, Architecture], str]

MARLIN_BITS = (4, 8)
MARLIN_GROUP_SIZES = (-1, 32, 64, 128)
# Of the kernels that transformers and GPTQModel choose on any machine: gptqmodel.nn_modules.qlinear, TorchLinear and
# TritonV2Linear, SUPPORTS_GROUP_SIZE.
GPTQMODEL_GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)
# The families that AutoGPTQ 0.7.1 and transformers 4.40.2 both know, with the types of rotary embedding known there.
LEGACY_ROPE_TYPES: Mapping[str, tuple[str, ...]] = {
    "llama": ("default", "linear", "dynamic"),
    "mistral": ("default",),
    "qwen2": ("default",),
}
AUTOGPTQ_FAMILIES = tuple(LEGACY_ROPE_TYPES)
# Families that AutoGPTQ opens, but that our script for quantizing with it does not know.
AUTOGPTQ_OPENS = (*AUTOGPTQ_FAMILIES, "gpt_neox", "gptj", "codegen")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a loader can open a variant.

    Attributes:
        loader: the runtime's name.
        can_load: the prediction.
        reason: why not; when it can, what a reader must know, or "".
    """

    loader: str
    can_load: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class RuntimeRules:
    """The rules of a runtime.

    Attributes:
        refuses: its own checks: a checkpoint that one of them finds does not load.
        traps: what a reader must know although the checkpoint loads.
    """

    refuses: tuple[Check, ...] = ()
    traps: tuple[Check, ...] = ()

    def verdict(self, name: str, variant: Variant, architecture: Architecture) -> Verdict:
        """Apply every check and report all that found something; `name` is the runtime's."""
        refusals = _found(self.refuses, variant, architecture)
        return Verdict(
            loader=name,
            can_load=not refusals,
            reason=refusals or _found(self.traps, variant, architecture),
        )


def _found(checks: tuple[Check, ...], variant: Variant, architecture: Architecture) -> str:
    return "; ".join(filter(None, (check(variant, architecture) for check in checks)))


def _bits(*known: int) -> Check:
    words = ", ".join(map(str, known))
    return lambda variant, _: "" if variant.bits in known else f"reads {words} bits only"


def _group_sizes(*known: int) -> Check:
    words = ", ".join(map(str, known))
    return lambda variant, _: "" if variant.group_size in known else f"reads group sizes {words} only"


def _families(*known: str) -> Check:
    words = ", ".join(known)
    return lambda _, architecture: "" if architecture.model_type in known else f"knows {words} only"


def _proven_families(*proven: str) -> Check:
    """Refuse families that the runtime may know, but whose checkpoints were never opened with it by this project."""
    words = ", ".join(proven)
    return lambda _, architecture: "" if architecture.model_type in proven else f"is proven with {words} only"


def _rules_read_for(*read: str) -> Check:
    """Refuse families for which this project has not read the runtime's code: it may know them, or not."""
    words = ", ".join(read)
    return lambda _, architecture: "" if architecture.model_type in read else f"its code was read for {words} only"


def _gptqmodel_types(_: Variant, architecture: Architecture) -> str:
    known = architecture.model_type in GPTQMODEL_TYPES
    return "" if known else f"GPTQModel 7.7 does not list {architecture.model_type}"


def _gptqmodel_opens(_: Variant, architecture: Architecture) -> str:
    """Return why GPTQModel's own loader does not open a model, as far as it was run.

    It loads tensors by their stored names (gptqmodel.utils.model, load_checkpoint_in_model_then_tie_weights), which
    transformers converts.
    """
    model_type = architecture.model_type
    for linear in architecture.example_linears:
        wanted = f"{architecture.blocks_path}.{linear.block}.{linear.module}"
        if linear.name != wanted:
            return f"looks for {wanted}, stored is {linear.name}"
        if linear.module in GPTQMODEL_DROPS.get(model_type, ()):
            return f"keeps a random {linear.module} in place of the quantized one"
    left = next((module for module in architecture.left if module.rpartition(".")[2] == "experts"), None)
    if left is not None:
        return f"looks for quantized experts, {left} is not quantized"
    known = model_type in GPTQMODEL_OPENS
    return GPTQMODEL_FAILS.get(model_type, "" if known else f"is not proven with {model_type}")


def _gptqmodel_symmetric(variant: Variant, _: Architecture) -> str:
    """Return the refusal of format "gptq" (gptqmodel.models.loader, from_quantized, MIN_VERSION_WITH_V2)."""
    return "" if variant.sym else "reads asymmetric checkpoints only if GPTQModel made them"


def _no_experts(_: Variant, architecture: Architecture) -> str:
    """Refuse quantized experts where the runtime keeps those of a layer in one parameter.

    Source: optimum 2.3, optimum.gptq.quantizer, replaces linears only. The parameter stays random; a log line is all.
    """
    experts = any(linear.parameter for linear in architecture.example_linears)
    return "computes with random experts in place of the quantized ones" if experts else ""


def _merged_experts(_: Variant, architecture: Architecture) -> str:
    """Refuse experts under names of their own, where the base model has none, but for types with which it was tried."""
    untried = architecture.merges_experts and architecture.model_type not in EXPERTS_BY_NAME
    return "is not proven to read experts one by one that the base model stores as one tensor" if untried else ""


def _nothing_left(_: Variant, architecture: Architecture) -> str:
    """Refuse models with unquantized linears in their blocks, for runtimes that take every linear as quantized."""
    left = next(iter(architecture.left), None)
    return "" if left is None else f"takes every linear of a block as quantized, {left} is not"


def _transformers_fails(_: Variant, architecture: Architecture) -> str:
    """Return which quantized linear transformers cannot open, and why; one that the recipe skips does not matter."""
    names, reason = TRANSFORMERS_FAILS.get(architecture.model_type, ((), ""))
    for linear in architecture.example_linears:
        name = linear.module.rpartition(".")[2]
        if name in names:
            return reason.format(name)
        # optimum takes names from dir(module), which has none that begin with a digit (`_replace_by_quant_layers`).
        if name[0].isdigit():
            return f"does not replace {linear.module}, because its name is a number"
    return ""


def _fused_alike(_: Variant, architecture: Architecture) -> str:
    """Refuse a model that leaves a part of what the runtime computes as one linear."""
    for kind in architecture.kinds:
        quantized = {module for group in kind.groups for module in group.modules}
        for left in kind.left:
            parent, _dot, name = left.rpartition(".")
            members = next((members for members in FUSED_LINEARS.values() if name in members), ())
            partner = next((each for each in members if f"{parent}.{each}" in quantized), None)
            if partner is not None:
                return f"computes {' and '.join(members)} as one linear, {name} is not quantized, {partner} is"
    return ""


def _note(text: str) -> Check:
    return lambda _variant, _architecture: text


def _symmetric_only(variant: Variant, _: Architecture) -> str:
    return "" if variant.sym else "reads symmetric checkpoints only"


def _power_of_two_groups(variant: Variant, _: Architecture) -> str:
    size = variant.group_size
    return "" if size == -1 or size & (size - 1) == 0 else "silently rounds the group size up to a power of two"


def _out_features_multiple(divisor: int) -> Check:
    def check(_: Variant, architecture: Architecture) -> str:
        odd = [linear for linear in architecture.example_linears if linear.out_features % divisor]
        return f"{odd[0].module} has {odd[0].out_features} rows, not a multiple of {divisor}" if odd else ""

    return check


def _transformers_4_40(_: Variant, architecture: Architecture) -> str:
    """Return which parts of a model transformers 4.40.2 does not know; AutoGPTQ 0.7.1 runs with it."""
    found = []
    known = LEGACY_ROPE_TYPES.get(architecture.model_type, ("default",))
    if architecture.model_type in AUTOGPTQ_OPENS and architecture.rope_type not in known:
        found.append(f"knows no rotary embedding of type {architecture.rope_type} (transformers 4.40)")
    elif architecture.model_type == "llama" and architecture.scaled_rope and not is_old_scaling(architecture.config):
        found.append("takes a rope_scaling of a type and a factor above 1 only (transformers 4.40)")
    if not architecture.head_dim_is_derived:
        found.append("takes head_dim to be hidden_size / num_attention_heads (transformers 4.40)")
    if architecture.model_type == "gpt_neox":
        keys = gpt_neox_keys_lacking(architecture.text_config)
        found += [f"reads {key}, which config.json lacks (transformers 4.40)" for key in keys]
    return "; ".join(found)


def _transformers_4_40_window(_: Variant, architecture: Architecture) -> str:
    """Return the length from which transformers 4.40 differs.

    Its sliding window is one token too wide; Qwen2's applies even when the config switches it off.
    """
    if architecture.sliding_window is None or architecture.model_type not in ("mistral", "qwen2"):
        return ""
    return f"past {architecture.sliding_window} tokens its sliding window is not the model's (transformers 4.40)"


def _autogptq_head(_: Variant, architecture: Architecture) -> str:
    if architecture.ties_tensors:
        return "with tied embeddings it computes with a head that it never loads"
    return ""


def _exllama_shapes(_: Variant, architecture: Architecture) -> str:
    """Return which assumption of ExLlama v1 (its model.py at 3b013cd) this model breaks."""
    if architecture.ties_tensors:
        return "needs lm_head.weight, which a model with tied embeddings does not store"
    if any(linear.bias for linear in architecture.example_linears):
        return "silently drops biases"
    if not architecture.head_dim_is_derived:
        return "takes head_dim to be hidden_size / num_attention_heads"
    return "silently ignores rope_scaling" if architecture.scaled_rope else ""


def _gptq_for_llama_kernel(variant: Variant, _: Architecture) -> str:
    if variant.bits == 3 and variant.desc_act and variant.group_size != -1:
        return "its CUDA branch has no act order with groups, its Triton branch has no 3 bits"
    return ""


def _gptq_for_llama_branch(variant: Variant, _: Architecture) -> str:
    if variant.bits == 3:
        return "CUDA branch only"
    return "Triton branch only" if variant.desc_act and variant.group_size != -1 else ""


def _marlin_fits(variant: Variant) -> bool:
    return variant.sym and variant.bits in MARLIN_BITS and variant.group_size in MARLIN_GROUP_SIZES


def _sglang_kernel(variant: Variant, _: Architecture) -> str:
    return "" if _marlin_fits(variant) else "without Marlin: the slower GPTQ kernel, in float16 only"


def _tgi_kernel(variant: Variant, _: Architecture) -> str:
    if _marlin_fits(variant) or (variant.bits == 4 and not variant.desc_act):
        return ""
    return "neither Marlin nor ExLlama fits: the slower Triton kernel"


_VLLM = (vllm_classes, _merged_experts, _fused_alike, vllm_group_sizes, vllm_whole_groups)

RUNTIME_RULES: Mapping[str, RuntimeRules] = {
    "autogptq": RuntimeRules(
        refuses=(
            _bits(2, 3, 4, 8),
            _proven_families(*AUTOGPTQ_OPENS),
            _nothing_left,
            _transformers_4_40,
            _autogptq_head,
        ),
        traps=(_note("needs transformers 4.40; its import breaks on later ones"), _transformers_4_40_window),
    ),
    "exllama": RuntimeRules(
        refuses=(_bits(4), _families("llama"), _nothing_left, _exllama_shapes),
        traps=(_note("needs tokenizer.model"),),
    ),
    "exllamav2": RuntimeRules(
        refuses=(_bits(4), _rules_read_for("llama", "mistral", "qwen2", "qwen3"), _nothing_left, _power_of_two_groups),
        traps=(_note("needs CUDA; without flash-attn set config.no_sdpa = True or its prompt pass is wrong"),),
    ),
    "gptq-for-llama": RuntimeRules(
        refuses=(_bits(2, 3, 4, 8), _families("llama"), _nothing_left, _gptq_for_llama_kernel),
        traps=(_gptq_for_llama_branch,),
    ),
    "transformers": RuntimeRules(
        refuses=(_bits(2, 3, 4, 8), _group_sizes(*GPTQMODEL_GROUP_SIZES), _no_experts, _transformers_fails),
        traps=(_note("through gptqmodel and optimum"),),
    ),
    "gptqmodel": RuntimeRules(
        refuses=(
            _bits(2, 3, 4, 8),
            _gptqmodel_opens,
            _merged_experts,
            _group_sizes(*GPTQMODEL_GROUP_SIZES),
            _gptqmodel_symmetric,
        ),
        traps=(_note("computes in float16 or bfloat16"),),
    ),
    "gptqmodel-marlin": RuntimeRules(
        refuses=(
            _bits(*MARLIN_BITS),
            _gptqmodel_types,
            _group_sizes(*MARLIN_GROUP_SIZES),
            _symmetric_only,
            _out_features_multiple(64),
        ),
        traps=(_note("needs CUDA with compute capability 8.0"),),
    ),
    "onnxruntime": RuntimeRules(
        refuses=(_bits(2, 4, 8), _nothing_left, *ONNXRUNTIME_CHECKS),
        traps=(_note("after conversion, which gives head and embeddings 4 bits by default"), onnxruntime_lengths),
    ),
    "vllm": RuntimeRules(
        refuses=(vllm_bits, *_VLLM, vllm_symmetric, vllm_act_order),
        traps=(vllm_tensor_parallel,),
    ),
    "vllm-cpu": RuntimeRules(
        refuses=(
            vllm_cpu_bits,
            vllm_cpu_classes,
            *_VLLM,
            vllm_symmetric,
            vllm_act_order,
            vllm_cpu_shapes,
            vllm_cpu_heads,
        ),
        traps=(_note("computes in float16 or bfloat16"),),
    ),
    "sglang": RuntimeRules(
        refuses=(_bits(2, 3, 4, 8), _rules_read_for("llama", "mistral", "qwen2", "qwen3"), _fused_alike),
        traps=(_sglang_kernel,),
    ),
    "tgi": RuntimeRules(
        # Its router does not know qwen3: text-generation-inference#3199, open.
        refuses=(_bits(2, 4, 8), _rules_read_for("llama", "mistral", "qwen2")),
        traps=(_tgi_kernel,),
    ),
}


def verdicts(
    variant: Variant, architecture: Architecture, *, lacks_tokenizer_model: bool = False
) -> tuple[Verdict, ...]:
    """Return one verdict per runtime, in the order of `RUNTIMES`.

    Args:
        variant: the parameters.
        architecture: the shapes.
        lacks_tokenizer_model: whether the base model is known to have no tokenizer.model, which ExLlama reads.
    """
    found = tuple(RUNTIME_RULES[name].verdict(name, variant, architecture) for name in RUNTIMES)
    if not lacks_tokenizer_model:
        return found
    return tuple(_without_tokenizer_model(verdict) if verdict.loader == "exllama" else verdict for verdict in found)


def _without_tokenizer_model(verdict: Verdict) -> Verdict:
    lacking = "needs tokenizer.model, which the base model lacks"
    reason = lacking if verdict.can_load else f"{verdict.reason}; {lacking}"
    return Verdict(loader=verdict.loader, can_load=False, reason=reason)
