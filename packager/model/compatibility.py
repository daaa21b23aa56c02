"""Predict from parameters and shapes alone which runtimes load a variant.

`RUNTIME_RULES` is the one home of the rules, each with the file in which it was read: `plan`, the card, `compat` and
docs/reference/runtimes.md take them from here. A verdict is a prediction: `verify` opens the files, and only what it
opened is called proven.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from packager.model.architecture import Architecture
from packager.model.autogptq_rules import AUTOGPTQ_RULES
from packager.model.gptqmodel_rules import GPTQMODEL_MARLIN_RULES, GPTQMODEL_RULES, TRANSFORMERS_RULES
from packager.model.onnxruntime_rules import ONNXRUNTIME_RULES
from packager.model.rules import (
    TAKE_ONE_WIDTH,
    TAKE_OTHER_RUNTIME,
    TRY_IT,
    RuleFinding,
    RuleKind,
    RulesOf,
    RuntimeRule,
    all_quantized,
    bits_check,
    same_bits,
    take_bits,
    types_check,
)
from packager.model.runtimes import EARLIER_RUNTIMES, OTHER_LOADER, RUNTIMES
from packager.model.sglang_rules import SGLANG_RULES
from packager.model.vllm_rules import VLLM_029_RULES, VLLM_CPU_RULES, VLLM_RULES
from packager.variant import Variant

# refused: by a rule. unknown: no rule refuses it, and nobody ran or read it. limited: it loads, with a drawback.
VerdictStatus = Literal["loads", "limited", "refused", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a loader can open a variant.

    Attributes:
        loader: the runtime's name.
        can_load: the prediction.
        reason: why not; when it can, what a reader must know, or "".
        findings: the same apart, each with its rule's source and advice.
    """

    loader: str
    can_load: bool
    reason: str
    findings: tuple[RuleFinding, ...] = field(default=(), compare=False)

    @property
    def status(self) -> VerdictStatus:
        """The prediction in one word."""
        kinds: set[RuleKind] = {finding.kind for finding in self.findings}
        if not self.can_load:
            return "unknown" if kinds == {"unknown"} else "refused"
        return "limited" if "limits" in kinds else "loads"

    @property
    def is_tried(self) -> bool:
        """Whether a build runs the loader: no rule is against it, or it is another package's, and nobody knows."""
        return self.can_load or (self.loader.startswith(OTHER_LOADER) and self.status == "unknown")


def verdict_of(name: str, rules: tuple[RuntimeRule, ...], variant: Variant, architecture: Architecture) -> Verdict:
    """Apply every rule of a runtime. Where one speaks against loading, only such rules are reported."""
    found = tuple(filter(None, (rule.finding(variant, architecture) for rule in rules)))
    against = tuple(finding for finding in found if finding.kind in ("refuses", "unknown"))
    shown = against or found
    return Verdict(
        loader=name, can_load=not against, reason="; ".join(finding.says for finding in shown), findings=shown
    )


def _exllama_shapes(_: Variant, architecture: Architecture) -> str:
    """Return which assumption of ExLlama v1 this model breaks."""
    if architecture.ties_tensors:
        return "needs lm_head.weight, which a model with tied embeddings does not store"
    if any(linear.bias for linear in architecture.example_linears):
        return "silently drops biases"
    if not architecture.head_dim_is_derived:
        return "takes head_dim to be hidden_size / num_attention_heads"
    return "silently ignores rope_scaling" if architecture.scaled_rope else ""


def _power_of_two_groups(variant: Variant, _: Architecture) -> str:
    size = variant.group_size
    return "" if size == -1 or size & (size - 1) == 0 else "silently rounds the group size up to a power of two"


def _gptq_for_llama_branch(variant: Variant, _: Architecture) -> str:
    """Return which of its three branches read a variant: triton has no 3 bits, old-cuda drops g_idx."""
    scattered = variant.desc_act and variant.group_size != -1
    if variant.bits == 3:
        return "its cuda branch only" if scattered else "its CUDA branches only"
    return "not its old-cuda branch, which drops g_idx" if scattered else ""


def _tgi_kernel(variant: Variant, _: Architecture) -> str:
    marlin = variant.sym and variant.bits in (4, 8) and variant.group_size in (-1, 32, 64, 128)
    if marlin or (variant.bits == 4 and not variant.desc_act):
        return ""
    return "neither Marlin nor ExLlama fits: the slower Triton kernel"


_EXLLAMA = RulesOf(project="ExLlama", version="3b013cd", read="2026-11-23")
_EXLLAMAV2 = RulesOf(project="ExLlamaV2", version="0.3.2", read="2026-11-30")
_GPTQ_FOR_LLAMA = RulesOf(
    project="GPTQ-for-LLaMa", version="e985b70 (triton), cad95ae (cuda), 8e78736 (old-cuda)", read="2026-11-30"
)
_TGI = RulesOf(project="TGI", version="3.3.6-dev0 (db931fc)", read="2026-11-30")
_FOUR = take_bits((4,))
_SKIP_NOTHING = "skip nothing in the recipe (quantize.skip)"
_LACKING_TOKENIZER = _EXLLAMA.refuses(
    lambda _variant, _architecture: "needs tokenizer.model, which the base model lacks",
    "tokenizer",
    TAKE_OTHER_RUNTIME,
)

RUNTIME_RULES: Mapping[str, tuple[RuntimeRule, ...]] = {
    "autogptq": AUTOGPTQ_RULES,
    "exllama": (
        _EXLLAMA.refuses(bits_check(4), "model, Ex4bitLinear", _FOUR),
        _EXLLAMA.refuses(types_check(("llama",), "knows"), "model, ExLlamaConfig", TAKE_OTHER_RUNTIME),
        _EXLLAMA.refuses(all_quantized, "model, Ex4bitLinear", _SKIP_NOTHING),
        _EXLLAMA.refuses(_exllama_shapes, "model", TAKE_OTHER_RUNTIME),
        _EXLLAMA.note("needs tokenizer.model", "tokenizer"),
    ),
    "exllamav2": (
        _EXLLAMAV2.refuses(bits_check(4), "exllamav2.ext, make_q_matrix", _FOUR),
        _EXLLAMAV2.unknown(
            types_check(("llama", "mistral", "qwen2", "qwen3"), "its code was read for"),
            "exllamav2.architecture",
            TRY_IT,
        ),
        _EXLLAMAV2.refuses(all_quantized, "exllamav2.linear", _SKIP_NOTHING),
        _EXLLAMAV2.refuses(
            _power_of_two_groups,
            "exllamav2_ext/cuda/q_matrix.cu, gptq_groupsize",
            "take a branch with group size 32, 64 or 128",
        ),
        _EXLLAMAV2.note(
            "needs CUDA; without flash-attn set config.no_sdpa = True or its prompt pass is wrong", "exllamav2.attn"
        ),
    ),
    "gptq-for-llama": (
        _GPTQ_FOR_LLAMA.refuses(bits_check(2, 3, 4, 8), "quant, QuantLinear", take_bits((2, 3, 4, 8))),
        _GPTQ_FOR_LLAMA.refuses(same_bits, "llama, load_quant; quant, make_quant", TAKE_ONE_WIDTH),
        _GPTQ_FOR_LLAMA.refuses(types_check(("llama",), "knows"), "llama", TAKE_OTHER_RUNTIME),
        _GPTQ_FOR_LLAMA.refuses(all_quantized, "quant, make_quant", _SKIP_NOTHING),
        _GPTQ_FOR_LLAMA.limits(
            _gptq_for_llama_branch,
            "quant_cuda_kernel; quant.quant_linear",
            "take its branch cuda, or triton for other bits",
        ),
    ),
    "transformers": TRANSFORMERS_RULES,
    "gptqmodel": GPTQMODEL_RULES,
    "gptqmodel-marlin": GPTQMODEL_MARLIN_RULES,
    "onnxruntime": ONNXRUNTIME_RULES,
    "vllm": VLLM_RULES,
    "vllm-cpu": VLLM_CPU_RULES,
    "sglang": SGLANG_RULES,
    "tgi": (
        _TGI.refuses(bits_check(2, 4, 8), "text_generation_server.layers.gptq", take_bits((2, 4, 8))),
        _TGI.refuses(same_bits, "text_generation_server.utils.quantization, _get_quantizer_config", TAKE_ONE_WIDTH),
        _TGI.unknown(
            types_check(("llama", "mistral", "qwen2"), "its code was read for"),
            "text_generation_server.models; qwen3: text-generation-inference#3199",
            TRY_IT,
        ),
        _TGI.limits(_tgi_kernel, "text_generation_server.layers.marlin.gptq, can_use_gptq_marlin; layers.gptq"),
    ),
    "vllm-0.29": VLLM_029_RULES,
}


def verdicts(
    variant: Variant, architecture: Architecture, *, lacks_tokenizer_model: bool = False, earlier: bool = False
) -> tuple[Verdict, ...]:
    """Return one verdict per runtime, in the order of `RUNTIMES` and `EARLIER_RUNTIMES`.

    Args:
        variant: the parameters.
        architecture: the shapes.
        lacks_tokenizer_model: whether the base model is known to have no tokenizer.model, which ExLlama reads.
        earlier: whether those of `EARLIER_RUNTIMES` are judged too.
    """
    found = []
    for name in (*RUNTIMES, *(EARLIER_RUNTIMES if earlier else ())):
        rules = RUNTIME_RULES[name]
        if name == "exllama" and lacks_tokenizer_model:
            rules = (*rules, _LACKING_TOKENIZER)
        found.append(verdict_of(name, rules, variant, architecture))
    return tuple(found)
