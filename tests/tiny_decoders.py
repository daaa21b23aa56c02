"""A tiny random model of every decoder architecture that transformers has: a config whose sizes are shrunk by name."""

import copy
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

VOCABULARY = 512
FIRST_TEXT_ID, LAST_TEXT_ID = 3, 479
"""Ids of ordinary tokens: padding, start and end lie below, the places of images and sounds above."""

# In every config and its sub-configs: what a field of this name becomes. Widths are multiples of 32.
_SIZES: dict[str, int] = {
    name: value
    for value, names in {
        VOCABULARY: "vocab_size vocab_size_per_layer_input unpadded_vocab_size decoder_vocab_size audio_vocab_size",
        256: "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions context_length"
        " original_max_position_embeddings",
        128: "intermediate_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dff d_inner dim_ff"
        " d_ff intermediate_size_mlp dense_intermediate_size mamba_d_ssm mlp_dim",
        64: "hidden_size n_embd d_model emb_dim embedding_size embedding_dim word_embed_proj_dim lru_width"
        " moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size"
        " moe_shared_expert_intermediate_size expert_ffn_hidden_size shared_intermediate_size"
        " hidden_size_global out_hidden_size attention_hidden_size backbone_hidden_size output_channels"
        " adapter_in_dim adapter_out_dim image_size crop_size num_position_embeddings codebook_size"
        " text_hidden_size adapter_input_size projection_dim projector_hidden_size nemo_conv_channels"
        " ext_pw_out_channel depthwise_separable_out_channel downsample_hidden_size projection_hidden_size"
        " share_expert_dim image_token_embed_dim num_embeddings base_channels",
        32: "head_dim swa_head_dim v_head_dim qk_rope_head_dim qk_nope_head_dim kv_lora_rank q_lora_rank"
        " o_lora_rank index_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim"
        " hidden_size_per_layer_input laurel_rank dim_head kv_channels mamba_n_heads mamba_num_heads"
        " adapter_rank router_hidden_size ple_embed_dim global_head_dim dim_model_base feature_size",
        16: "mamba_d_state state_size ssm_state_size mamba_dt_rank time_step_rank d_rel hc_lowrank",
        8: "num_experts n_routed_experts num_local_experts moe_num_experts sliding_window sliding_window_size"
        " swa_window_size attention_chunk_size attention_window_size window_size local_attention index_topk"
        " mamba_chunk_size rotary_dim floor_scale log_scaling_n_floor rel_extent index_block_size",
        4: "num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads attention_heads"
        " num_heads swa_num_attention_heads num_attention_heads_per_layer num_sliding_attention_heads"
        " index_n_heads linear_num_value_heads linear_num_heads mamba_d_head mamba_head_dim zero_expert_num",
        2: "num_key_value_heads swa_num_key_value_heads num_kv_heads kv_n_heads linear_num_key_heads"
        " num_experts_per_tok moe_topk moe_top_k moe_k n_group index_topk_blocks decoder_layers encoder_layers"
        " n_layer n_layers num_layers num_hidden_layers depth num_global_layers conf_num_hidden_layers",
        1: "topk_group first_k_dense_replace num_dense_layers n_shared_experts num_shared_experts"
        " moe_num_shared_experts moe_layer_start_index",
    }.items()
    for name in names.split()
}  # fmt: skip
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "unk_token_id": 3}


def _mrope(*sections: int) -> dict[str, Any]:
    """Return rotary parameters with one section per axis of an image; the sum is half of what is rotated."""
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}


# What an architecture needs besides.
_OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 256},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": _mrope(2, 3, 3), "full_attention": _mrope(2, 3, 3)},
    },
    "cosmos3_edge": {"text_config": {"rope_parameters": _mrope(8, 4, 4)}},
    "chameleon": {"vocabulary_map": {"<image>": 508}, "vq_config": {"base_channels": 32}},
    "cohere2_vision": {"alignment_intermediate_size": 128},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8}},
    "deepseek_ocr2": {
        "text_config": {
            "mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2, "n_routed_experts": 8,
            "n_shared_experts": 1,
        },
    },
    "deepseek_v2": {"first_k_dense_replace": 1, "num_experts_per_tok": 2},
    "dots1": {"moe_intermediate_size": 64, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2,
              "first_k_dense_replace": 1},
    "dots3_note_text": {
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 32, "swa_kv_lora_rank": 32,
        "swa_head_dim": 64, "swa_qk_nope_head_dim": 32, "swa_v_head_dim": 32,
    },
    "emu3": {
        "vocabulary_map": {"<image>": 508, "<|extra_200|>": 509, "<|visual token 000000|>": 480},
        "vq_config": {"base_channels": 32},
    },
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": _mrope(3, 3, 2)}},
    "flint": {"mlp_only_layers": [0]},
    "gemma3n_text": {
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
        "intermediate_size": 128, "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "glm4v_moe": {"text_config": {"rope_parameters": _mrope(2, 1, 1)}},
    "glm5_next": {
        "text_config": {"index_kpool": 4, "linear_num_heads": 4},
    },
    "granite4_vision": {
        "deepstack_layer_map": [[-1, 0]], "spatial_target_layers": [0, 1, 0, 1], "downsample_rate": "1/2",
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "inkling2_text": {
        "n_layers_per_attn_res_block": 2, "num_hidden_layers": 4, "layer_types": ["hybrid_sliding", "hybrid"] * 2,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    },
    "hunyuan_vl": {"text_config": {"rope_parameters": _mrope(4, 6, 6)}},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2},
    "helium": {"head_dim": 16},
    "janus": {"vq_config": {"base_channels": 32}},
    "kosmos-2.5": {"text_config": {"embed_dim": 64, "layers": 2}, "latent_query_num": 8},
    "kosmos-2": {"text_config": {"embed_dim": 64, "layers": 2}},
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "block_multiple_of": 32},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3, "num_dense_layers": 1},
    "llama4": {
        "vision_config": {"projector_input_dim": 64, "projector_output_dim": 64, "vision_output_dim": 64},
    },
    "mamba2": {"num_heads": 32, "head_dim": 4, "n_groups": 2, "chunk_size": 8},
    "mistral_large4": {"text_config": {"kv_source_layers": None}},
    "mllama": {
        "text_config": {"num_hidden_layers": 2, "cross_attention_layers": [1]},
        "vision_config": {"vision_output_dim": 384},
    },
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "muse_spark": {
        "text_config": {"moe_hidden_size": 32},
        "audio_config": {"num_hidden_layers": 2, "patch_sizes": [16, 6], "hidden_sizes": [32, 64], "depths": [1, 1],
                         "out_hidden_size": 64},
    },
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "nemotron_h": {"n_groups": 2, "chunk_size": 8},
    "paddleocr_vl": {"text_config": {"rope_parameters": _mrope(4, 6, 6)}},
    "qwen2_vl": {"vision_config": {"embed_dim": 64}, "text_config": {"rope_parameters": _mrope(2, 3, 3)}},
    "qwen4_exp_text": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 32, "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "step3p7": {"text_config": {"sliding_window": 8}},
    "zamba": {
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "mamba_dt_rank": 32,
        "attention_hidden_size": 128, "attention_head_dim": 32,
    },
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
_OVERRIDES |= {
    name: {"text_config": _OVERRIDES[name + "_text"]}
    for name in ("cohere_compass", "dots3_note", "gemma3n", "inkling2", "qwen4_exp")
}
_OVERRIDES |= {
    name: {"text_config": {"rope_parameters": _mrope(2, 3, 3)}}
    for name in ("glm46v", "glm4v", "glm_ocr", "glmga", "qwen2_5_omni_thinker", "qwen2_5_vl")
}


# Other forms of an architecture, named type:form.
_FORMS: dict[str, dict[str, Any]] = {
    "bloom:post_norm_residual": {"apply_residual_connection_post_layernorm": True},
    "deepseek_v3:direct_queries": {"q_lora_rank": None},
    "falcon:new": {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    "gemma4_text:experts": {
        "enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64,
    },
    "gemma4_text:shared_keys": {
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
    },
    "gpt_bigcode:multi_head": {"multi_query": False},
    "granitemoehybrid:dense": {"num_local_experts": 0, "layer_types": ["mamba", "attention"]},
    "llama:biased": {"attention_bias": True, "mlp_bias": True},
    "llama:tied": {"tie_word_embeddings": True},
    "mistral_large4:shared_keys": {"text_config": {"kv_source_layers": [0, 0, 2]}},
    "opt:projected": {"word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "phi:normed_queries": {"qk_layernorm": True},
    "qwen2:windowed": {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
    "qwen3_moe:dense_first": {"mlp_only_layers": [0]},
    "stablelm:parallel": {"use_parallel_residual": True, "qk_layernorm": True},
}  # fmt: skip

_TEXT = """
    afmoe apertus arcee aria_text axk1 axk2 bailing_hybrid bamba beam biogpt bitnet bloom blt codegen cohere cohere2
    cohere2_moe cohere_compass_text ctrl cwm dbrx deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 diffllama doge dots1
    dots3_note dots3_note_text emu3 ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon falcon_h1 falcon_mamba flex_olmo
    flint fuyu gemma gemma2 gemma3 gemma3_text gemma3n_text gemma4 gemma4_text gemma4_unified gemma4_unified_text git
    glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa got_ocr2 gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese
    gpt_oss gptj granite granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium hrm_text
    hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 hyperclovax inkling2_text inkling_text internlm3 iquestcoder jais2 jamba
    jetmoe kimi_linear kolibri1 laguna lfm2 lfm2_moe lfm3 llama llama4 llama4_text longcat_flash mamba mamba2 mellum
    mimo_v2_flash minicpm3 minimax minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral mllama
    modernbert-decoder moshi moss_transcribe_diarize mpt nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe
    openai-gpt opt persimmon phi phi3 phi4_multimodal phimoe qwen2 qwen2_moe qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text
    qwen3_5_text qwen3_moe qwen3_next qwen4_exp qwen4_exp_text recurrent_gemma rwkv seed_oss smollm3 solar_open stablelm
    starcoder2 trocr vaultgemma xglm xlstm youtu zamba zamba2 zaya
"""
_IMAGE_TEXT = """
    aria aya_vision chameleon cohere2_vision cohere_compass cosmos3_edge cosmos3_omni deepseek_ocr2 deepseek_vl
    deepseek_vl_hybrid ernie4_5_vl_moe exaone4_5 glm46v glm4v glm4v_moe glm5_next glm_ocr glmga granite4_vision
    granite_docling hunyuan_vl hyperclovax_vision_v2 idefics2 idefics3 inkling2 internvl janus kimi_k25 kosmos-2.5
    lfm2_vl lfm3_vl lighton_ocr llava llava_next llava_next_video llava_onevision minicpm_ocr minicpmv4_6 minicpmv4_7
    minimax_m3_vl mistral3 mistral4 mistral_large4 molmo2 muse_glimmer muse_spark nemotron_h_omni ovis2 paddleocr_vl
    pp_chart2table qianfan_ocr qwen2_5_omni_thinker qwen2_5_vl qwen2_vl qwen3_omni_moe_thinker qwen3_vl qwen3_vl_moe
    smolvlm step3p7 unlimited_ocr video_llama_3 video_llava vipllava
"""
ARCHITECTURES = (*_TEXT.split(), *_IMAGE_TEXT.split())
"""Model types of transformers' causal language models and, in the second part, of its readers of images and text."""

LEFT_OUT = {
    model_type: (reason, message)
    for (reason, message), model_types in {
        ("encoder-decoder", "encoder-decoder"): "bart bigbird_pegasus blenderbot blenderbot-small florence2 marian"
        " mbart musicgen musicgen_melody mvp pegasus pix2struct plbart pp_formulanet prophetnet t5gemma2 udop"
        " vision-encoder-decoder whisper",
        ("an encoder", "a later token changes"): "bert bert-generation big_bird camembert data2vec-text electra ernie"
        " megatron-bert rembert roberta roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl",
        ("an encoder that needs its language set", "Input language unknown"): "xmod",
        ("reads its prompt in both directions", "a later token changes"): "cpmant paligemma xlnet",
        ("no decoder unless asked; then hashes later positions with earlier ones", "is_decoder=True"): "reformer",
        ("drafts for another model, needs its keys and values", "hidden_size_per_layer_input|layer types using"):
        "gemma4_assistant gemma4_unified_assistant",
        ("predicts a block of tokens by diffusion", "must be tuple of ints"): "diffusion_gemma",
        ("needs an image", "pixel_values"): "blip blip-2 idefics instructblip instructblipvideo kosmos-2",
        ("needs the package timm", "requires the timm library"): "fast_vlm gemma3n perception_lm",
        ("needs the package scipy", "No module named 'scipy'"): "inkling_mm_model",
        ("predicts a robot's actions", "'state'"): "pi0",
        ("reads proteins; no auto class opens its config", "Unrecognized configuration class"): "evolla",
        ("transformers does not load what it saves", "missing_keys"): "shieldgemma2",
    }.items()
    for model_type in model_types.split()
}  # fmt: skip
"""Why the other model types of both lists are not here, and a pattern of the message with which one fails."""

NAMES = (*ARCHITECTURES, *_FORMS)


def tiny_config(name: str) -> "PretrainedConfig":
    """Return a small config of a model type or form in which every kind of block of the default config occurs."""
    from transformers import CONFIG_MAPPING

    model_type = name.partition(":")[0]
    kind = CONFIG_MAPPING[model_type]
    overrides = copy.deepcopy(_OVERRIDES.get(model_type, {}) | _FORMS.get(name, {}))  # a config changes what it gets
    config: PretrainedConfig = kind(**_shrunk(kind(), overrides))
    return config


def tiny_model(name: str, *, seed: int = 0) -> "PreTrainedModel":
    """Return a random float32 model of one of NAMES."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = _auto_class(name).from_config(tiny_config(name), dtype=torch.float32)
        _randomize(model)
        for key, buffer in model.named_buffers():
            if key.endswith("tid2eid"):  # DeepSeek-V4 looks up a token's experts by its id
                buffer.copy_(torch.rand(len(buffer), _SIZES["n_routed_experts"]).argsort()[:, : buffer.shape[1]])
    model.eval()
    return model


def tiny_decoder(name: str, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Save a random model of one of NAMES as a base model's folder, its tensors named as published checkpoints are."""
    model = tiny_model(name, seed=seed)
    for tensor in model.state_dict(keep_vars=True).values():  # not model.to(): that breaks complex buffers
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    model.save_pretrained(folder)
    return folder


def open_decoder(folder: Path, name: str) -> "tuple[PreTrainedModel, dict[str, Any]]":
    """Open a folder with transformers; return the model and its lists of missing, unexpected and mismatched keys."""
    model, report = _auto_class(name).from_pretrained(folder, output_loading_info=True, dtype="auto")
    return model.eval(), report


def token_ids(rows: int = 2, length: int = 24, *, seed: int = 0) -> torch.Tensor:
    """Return random ids of ordinary tokens `[rows, length]`."""
    return torch.randint(FIRST_TEXT_ID, LAST_TEXT_ID, (rows, length), generator=torch.Generator().manual_seed(seed))


def _auto_class(name: str) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    composite = name.partition(":")[0] in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return AutoModelForImageTextToText if composite else AutoModelForCausalLM


def _shrunk(config: "PretrainedConfig", overrides: dict[str, Any]) -> dict[str, Any]:
    """Return the fields to make a small config with, read from a default one; an override of a sub-config is a dict."""
    from transformers import PretrainedConfig

    fields = {field.name: field.default for field in dataclasses.fields(config)}
    small: dict[str, Any] = {}
    places = iter(range(LAST_TEXT_ID + 1, VOCABULARY))
    for name, default in fields.items():
        value = vars(config).get(config.attribute_map.get(name, name))
        if isinstance(value, PretrainedConfig):
            small[name] = type(value)(**_shrunk(value, overrides.get(name, {})))
        elif name in _TOKENS and value is not None:
            small[name] = _TOKENS[name]
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            small[name] = next(places)
        elif name in {"head_dim", "num_key_value_heads"} or (
            name in _SIZES and default is not None and type(value) is int and value > 0
        ):
            small[name] = _SIZES[name]
    if "kv_lora_rank" in fields and "num_key_value_heads" in small:  # one latent serves every head
        small["num_key_value_heads"] = small["num_attention_heads"]
    small |= _short_lists(config, fields)
    subs = {name for name, value in small.items() if isinstance(value, PretrainedConfig)}
    return small | {name: value for name, value in overrides.items() if name not in subs}


def _short_lists(config: "PretrainedConfig", fields: dict[str, Any]) -> dict[str, Any]:
    """Cut each list that has an entry per layer to the layers that show each combination of entries once."""
    count_name = next((name for name in _LAYER_COUNTS if name in fields), "")
    values = vars(config)
    count = values.get(count_name)
    lists = {
        name: value for name in fields if isinstance(value := values.get(name), list) and len(value) == count
        and name not in {"kv_source_layers", "moe_layers"}
    }  # fmt: skip
    if not lists or not isinstance(count, int):
        return {}
    kinds = [repr([value[layer] for value in lists.values()]) for layer in range(count)]
    kept = {kinds.index(kind) for kind in kinds} | ({1} if len(set(kinds)) == 1 else set())
    small = {
        name: [_SIZES[name] if name in _SIZES else value[layer] for layer in sorted(kept)]
        for name, value in lists.items()
    }
    return {count_name: len(kept), **small}


def _randomize(model: nn.Module) -> None:
    """Draw every stored tensor: weights normal, norms about 1, biases small, so that a lost one shows."""
    embeddings = {module.weight.data_ptr() for module in model.modules() if isinstance(module, nn.Embedding)}
    done: set[int] = set()
    with torch.no_grad():
        for tensor in model.state_dict(keep_vars=True).values():
            if (
                not tensor.is_floating_point()
                or tensor.data_ptr() in done
                or not (tensor.numel() and tensor.isfinite().all())
            ):
                continue  # an infinite bound stays
            done.add(tensor.data_ptr())
            spread = tensor.std(correction=0).item()
            if tensor.data_ptr() in embeddings:
                tensor.normal_(0, 0.3)
            elif tensor.dim() > 1 and abs(tensor.mean().item()) < 0.3 * spread + 1e-6:
                tensor.normal_(0, tensor.shape[-1] ** -0.5)
            elif spread < 1e-6:
                tensor.add_(torch.rand_like(tensor), alpha=0.6).sub_(0.3)
            elif isinstance(tensor, nn.Parameter):  # decay rates and time steps: near what the model starts with
                tensor.mul_(1 + 0.2 * (torch.rand_like(tensor) - 0.5))
