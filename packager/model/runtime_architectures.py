"""The architectures that runtimes list, each list with its source: facts about the runtimes, not about our engine.

A verdict on a model that a list does not have is "no". `verify` opens the files whatever a list holds.
"""

# Model types: GPTQModel 7.7.0, gptqmodel.models.auto, MODEL_MAP.
GPTQMODEL_TYPES = frozenset(
    """
    afmoe agnes apertus apertus1p5 apertus1p5_text axk2 baichuan bailing_hybrid bailing_moe bloom brumby chatglm
    codegen cohere cohere2 cohere2_moe cohere_compass dbrx dbrx_converted deci deepseek_ocr2 deepseek_v2 deepseek_v3
    deepseek_v32 deepseek_v4 deepseek_vl deepseek_vl_v2 diffusion_gemma dots1 dream ernie4_5 ernie4_5_moe
    ernie4_5_moe_vl ernie4_5_vl_moe exaone exaone4 exaone4_5 exaone4_5_text falcon falcon_h1 falcon_mamba gemma
    gemma2 gemma3 gemma3_text gemma3n gemma3n_text gemma4 gemma4_text gemma4_unified gemma4_unified_text glm glm4
    glm4_moe glm4_moe_lite glm4v glm4v_moe glm4v_moe_text glm5_next glm_moe_dsa glm_ocr glmasr gpt2 gpt_bigcode
    gpt_neo gpt_neox gpt_oss gpt_pangu gptj granite granitemoe granitemoehybrid grinmoe hrm_text hunyuan_v1_dense
    hunyuan_v1_moe hunyuan_vl hy_v3 hymba inkling_mm_model instella intern_s2_preview internlm internlm2 interns1
    internvl internvl_chat jamba k2_horizon kimi_k2 kimi_k25 klear laguna lfm2 lfm2_moe lfm2_vl llada2_moe llama
    llama4 llama4_text llava llava_qwen2 locateanything longcat_flash longllama mage_vl marin mimo mimo_v2 minicpm
    minicpm3 minicpmo minicpmv minicpmv4_6 minimax minimax_m2 minimax_m3_vl ministral3 mistral mistral3 mixtral
    mllama mllama_text_model mobilellm moss mpt muse_glimmer nanbeige nemotron-nas nemotron_h nemotron_h_puzzle
    nemotron_labs_diffusion nemotronh_nano_omni_reasoning_v3 olmo2 olmo3 olmoe openvla opt ouro ovis ovis2 ovis2_5
    ovis2_6_moe ovis2_6_next phi phi3 phi4mm phimoe qwen qwen2 qwen2_5_omni qwen2_5_vl qwen2_5_vl_text qwen2_audio
    qwen2_moe qwen2_vl qwen2_vl_text qwen3 qwen3_moe qwen3_next qwen3_omni_moe qwen3_vl qwen3_vl_moe qwen4_exp
    qwen4_exp_text qwen_drive refinedWeb refinedWebModel seed_oss smollm3 smolvlm solar_open solar_open2 spark2_5
    stablelm stablelm_epoch starcoder2 telechat unlimited-ocr voxtral xing4_0 xverse yi zamba zamba2
    """.split()  # noqa: SIM905
)

# Model types whose checkpoints GPTQModel's own loader opened here, on the CPU, and computed as our forward does. Types
# that are not on the list above are opened by a general class.
GPTQMODEL_OPENS = frozenset(
    """
    apertus arcee bloom codegen cohere cohere2 deepseek_v2 deepseek_v3 dots1 ernie4_5 exaone4 falcon gemma gemma2
    gemma3_text gemma4_text gpt2 gpt_bigcode gptj granite helium hunyuan_v1_moe llama mistral mpt nemotron olmo olmo2
    olmo3 olmoe opt phi qwen2 qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next seed_oss smollm3
    stablelm starcoder2
    """.split()  # noqa: SIM905
)

# Those of them with experts: a branch has the names that it looks for, whether the base model stores the experts of a
# layer one by one or as one tensor. Of others, granitemoe, granitemoeshared and gemma4_text (with experts) were opened,
# and computed logits that are not finite.
EXPERTS_BY_NAME = frozenset(
    "deepseek_v2 deepseek_v3 dots1 hunyuan_v1_moe olmoe qwen2_moe qwen3_5_moe_text qwen3_moe qwen3_next".split()  # noqa: SIM905
)

# Linears of these model types that GPTQModel does not expect quantized (module_tree of gptqmodel.models.definitions).
# It keeps them random, without an error.
_DENSE = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
GPTQMODEL_DROPS: dict[str, tuple[str, ...]] = {
    "qwen2_moe": _DENSE,
    "qwen3_moe": _DENSE,
    "qwen3_next": (*_DENSE, "linear_attn.in_proj_ba"),
}

# Model types that it does not open, or does not compute, although the linears have the names that it looks for.
_UNLIKE_THE_MODEL = "computes something else than the model, without an error"
_SPLITS = "takes mlp.gate_up_proj apart, which is stored as one"
GPTQMODEL_FAILS: dict[str, str] = {
    "ernie4_5_moe": _UNLIKE_THE_MODEL,
    "glm": _SPLITS,
    "glm4": _SPLITS,
    "glm4_moe": "fails in its own router",
    "gpt_neox": "computes with a random head: it looks for lm_head, stored is embed_out",
    "granitemoehybrid": "fails with transformers 5.23, whose mamba layers have no torch_forward",
    "jamba": "needs the package mamba-ssm",
    "lfm2_moe": _UNLIKE_THE_MODEL,
    "phi3": _SPLITS,
}

# Linears that vLLM and SGLang compute as one, by the name of it: packed_modules_mapping of their models (llama,
# deepseek_v2, qwen3_next, qwen3_5). vLLM raises ValueError if only some are quantized
# (model_executor.layers.quantization.utils.gptq_utils, is_layer_gptq_quantized); SGLang asks for the one name only
# (sglang.srt.layers.quantization.utils, get_dynamic_override).
FUSED_LINEARS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}

_INITIALIZES = "initializes {}.weight when it loads, and a quantized linear has none"
_OWN_CLASS = "does not replace {}, whose class is not nn.Linear"

# Linears that transformers 5.23 with optimum 2.3 cannot open quantized, by model type: the last part of the name, and
# why. `_init_weights` of transformers.models takes the weight of these by the name of the linear;
# optimum.gptq.utils, `get_layers`, takes no subclass of nn.Linear.
TRANSFORMERS_FAILS: dict[str, tuple[tuple[str, ...], str]] = {
    "falcon": (("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"), _OWN_CLASS),
    "falcon_mamba": (("out_proj",), _INITIALIZES),
    "gpt2": (("c_proj",), _INITIALIZES),
    "gpt_bigcode": (("c_proj",), _INITIALIZES),
    "mamba": (("out_proj",), _INITIALIZES),
    "mamba2": (("out_proj",), _INITIALIZES),
    "nanochat": (("o_proj",), _INITIALIZES),
    "recurrent_gemma": (
        ("q_proj", "k_proj", "v_proj", "o_proj", "linear_x", "linear_y", "linear_out"),
        _INITIALIZES,
    ),
}
