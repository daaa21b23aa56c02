"""What people's config.json holds."""

from tests.awkward.scene import PRIVATE, Case, trouble


@trouble("builds")
def path_of_a_trainer(case: Case) -> None:
    """https://github.com/huggingface/transformers/issues/31861: trainers save where they loaded the model from."""
    case.config(_name_or_path=f"{PRIVATE}/checkpoints/run-7")


@trouble("builds")
def name_of_a_converter(case: Case) -> None:
    """https://github.com/huggingface/transformers/pull/35255: converters leave keys of their own."""
    case.config(_model_name_or_path=f"{PRIVATE}/merge", unsloth_version="2026.8.8", unsloth_fixed=True)


@trouble("builds")
def auto_map_of_known_code(case: Case) -> None:
    """https://github.com/InternLM/lmdeploy/pull/434: a model that transformers knows still names its own code."""
    case.config(auto_map={"AutoModelForCausalLM": "modeling_mine.MineForCausalLM", "AutoConfig": "a--b.MineConfig"})


@trouble("refused", "model_type", "auto_map")
def model_type_of_own_code(case: Case) -> None:
    """https://github.com/huggingface/huggingface.js/pull/467: some models need code that they bring."""
    case.config(model_type="mine", auto_map={"AutoModelForCausalLM": "modeling_mine.MineForCausalLM"})


@trouble("builds")
def padding_of_minus_one(case: Case) -> None:
    """https://github.com/huggingface/transformers/issues/22520: LLaMA's own tokenizer pads with -1."""
    case.config(pad_token_id=-1)


@trouble("either", "pad_token_id")
def padding_beyond_the_vocabulary(case: Case) -> None:
    """https://github.com/OpenGVLab/InternVL/issues/179: a pad token that was added after training."""
    case.config(pad_token_id=128)


@trouble("builds")
def two_way_pretraining(case: Case) -> None:
    """https://github.com/huggingface/transformers/issues/24439: what slices weights fails where they are quantized."""
    case.config(pretraining_tp=2)


@trouble("builds")
def linear_rope_of_old(case: Case) -> None:
    """https://github.com/meta-llama/llama3/issues/299: the old spelling has exactly two fields."""
    case.config("rope_parameters", rope_scaling={"type": "linear", "factor": 2.0}, rope_theta=10000.0)


@trouble("builds")
def linear_rope_of_a_whole_number(case: Case) -> None:
    """https://github.com/modelscope/ms-swift/pull/7198: a factor that is written without a fraction."""
    case.config("rope_parameters", rope_scaling={"type": "linear", "factor": 2}, rope_theta=10000)


@trouble("either", "rope")
def dynamic_rope(case: Case) -> None:
    """https://github.com/foundation-model-stack/foundation-model-stack/issues/384: scaled by the length."""
    case.config("rope_parameters", rope_scaling={"rope_type": "dynamic", "factor": 4.0}, rope_theta=10000.0)


@trouble("builds")
def llama3_rope(case: Case) -> None:
    """https://github.com/huggingface/optimum-habana/issues/1154: six fields, which old runtimes refuse."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    case.config(
        "rope_parameters", rope_scaling={**scaling, "original_max_position_embeddings": 64}, rope_theta=500000.0
    )


@trouble("builds")
def rope_in_the_new_spelling_alone(case: Case) -> None:
    """https://github.com/lum3on/comfyui_HiDream-Sampler/issues/19: each release spells it in another way."""
    case.config("rope_scaling", "rope_theta", rope_parameters={"rope_type": "default", "rope_theta": 500000.0})


@trouble("either", "rope")
def rope_types_that_disagree(case: Case) -> None:
    """https://github.com/runpod-workers/worker-vllm/issues/89: patched by hand to please two releases."""
    scaling = {"type": "linear", "rope_type": "dynamic", "factor": 2.0}
    case.config("rope_parameters", rope_scaling=scaling, rope_theta=10000.0)


@trouble("either", "rope")
def rope_of_an_unknown_type(case: Case) -> None:
    """https://github.com/EvilBT/ComfyUI_SLK_joy_caption_two/issues/1: a type that this release does not know."""
    case.config("rope_parameters", rope_scaling={"rope_type": "spiral", "factor": 2.0}, rope_theta=10000.0)


@trouble("builds")
def no_dtype(case: Case) -> None:
    """https://github.com/huggingface/transformers/pull/21524: then the weights decide."""
    case.config("torch_dtype", "dtype")


@trouble("builds")
def dtype_of_the_training(case: Case) -> None:
    """https://github.com/huggingface/transformers/issues/31861: half weights, and a config that says float32."""
    case.config("torch_dtype", dtype="float32")


@trouble("builds")
def dtype_of_another_half(case: Case) -> None:
    """https://github.com/ml-explore/mlx-lm/pull/117: float16 weights, and a config that says bfloat16."""
    case.config("dtype", torch_dtype="bfloat16")


@trouble("builds")
def dtype_under_two_names(case: Case) -> None:
    """https://github.com/sgl-project/mini-sglang/pull/38: releases 4 and 5 spell the key in two ways."""
    case.config(torch_dtype="float32", dtype="float16")


@trouble("either", "dtype")
def dtype_that_is_automatic(case: Case) -> None:
    """https://github.com/huggingface/transformers/issues/33997: an argument's value that came into the file."""
    case.config("dtype", torch_dtype="auto")


@trouble("either", "dtype")
def dtype_with_its_module(case: Case) -> None:
    """https://github.com/huggingface/transformers/issues/31861: str(torch.float16) instead of its name."""
    case.config("dtype", torch_dtype="torch.float16")


@trouble("builds")
def no_architectures(case: Case) -> None:
    """https://github.com/huggingface/transformers/issues/46512: a config that was made by hand."""
    case.config("architectures")


@trouble("either", "architectures")
def architecture_without_a_head(case: Case) -> None:
    """https://github.com/sgl-project/sglang/pull/33671: the class that somebody saved is not the one that is run."""
    case.config(architectures=["LlamaModel"])


@trouble("either", "architectures")
def architecture_of_another_model(case: Case) -> None:
    """https://github.com/vllm-project/vllm/issues/51063: model_type and architectures name two models."""
    case.config(architectures=["MistralForCausalLM"])


@trouble("refused", "vocab_size", "embed_tokens", "lm_head")
def vocabulary_that_is_too_small(case: Case) -> None:
    """https://github.com/huggingface/transformers/issues/26714: the embedding was enlarged, the config was not."""
    case.config(vocab_size=120)


@trouble("refused", "layers")
def more_blocks_than_weights(case: Case) -> None:
    """https://github.com/unslothai/unsloth-zoo/pull/950: a file of the weights is missing."""
    case.config(num_hidden_layers=4)


@trouble("either", "layers")
def fewer_blocks_than_weights(case: Case) -> None:
    """https://github.com/jzhang38/TinyLlama/issues/127: transformers warns of tensors that it does not use."""
    case.config(num_hidden_layers=2)


@trouble("refused", "quantization_config")
def already_quantized(case: Case) -> None:
    """https://github.com/unslothai/unsloth-zoo/pull/808: merged from a model that was loaded in four bits."""
    case.config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})


@trouble("builds")
def sampling_in_the_config(case: Case) -> None:
    """https://github.com/hiyouga/LlamaFactory/issues/2545: values of generation beside the shapes."""
    case.config(temperature=0.6, top_p=0.9, do_sample=True, max_length=4096)


@trouble("builds")
def several_ends(case: Case) -> None:
    """https://github.com/ModelCloud/GPTQModel/pull/284: Llama 3.1 has a list of them."""
    case.config(eos_token_id=[2, 3])


@trouble("builds")
def nulls_for_defaults(case: Case) -> None:
    """https://github.com/InfiniTensor/InfiniLM/pull/387: every key is there, some without a value."""
    case.config(pad_token_id=None, rope_scaling=None, head_dim=None, quantization_config=None)


@trouble("builds")
def keys_of_other_programs(case: Case) -> None:
    """https://github.com/huggingface/transformers/pull/20043: settings of other programs, nested."""
    case.config(**{"transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}, "is_llama_config": True})


@trouble("either", "tie_word_embeddings")
def no_word_of_tying(case: Case) -> None:
    """https://github.com/stepfun-ai/Step-Audio-EditX/issues/38: then the default of a release decides."""
    case.config("tie_word_embeddings")


@trouble("refused", "model_type")
def no_model_type(case: Case) -> None:
    """https://github.com/huggingface/trl/issues/1587: a config that is none."""
    case.config("model_type")


@trouble("builds")
def attention_of_a_gpu(case: Case) -> None:
    """https://github.com/huggingface/transformers/issues/40264: flash attention, which this machine does not have."""
    case.config(_attn_implementation="flash_attention_2", use_cache=False, _flash_attn_2_enabled=True)


@trouble("either", "config.json")
def config_with_a_byte_order_mark(case: Case) -> None:
    """https://github.com/metalsmith/metadata/issues/20: saved by a Windows editor."""
    case.write("config.json", b"\xef\xbb\xbf" + (case.model / "config.json").read_bytes())


@trouble("refused", "config.json")
def config_with_a_trailing_comma(case: Case) -> None:
    """https://github.com/wwwpf/QzoneExporter/issues/32: edited by hand."""
    text = (case.model / "config.json").read_text(encoding="utf-8").rstrip()
    case.write("config.json", f"{text[:-1].rstrip()},\n}}")


@trouble("refused", "config.json", "NaN")
def config_with_a_number_that_is_none(case: Case) -> None:
    """https://github.com/ultrajson/ultrajson/issues/640: what one reader takes, another refuses."""
    case.write(
        "config.json", (case.model / "config.json").read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": NaN')
    )


@trouble("refused", "max_position_embeddings", "seq_len")
def rows_longer_than_positions(case: Case) -> None:
    """https://github.com/turboderp-org/exllamav2/issues/29: rows of more tokens than the model has positions."""
    case.config(max_position_embeddings=16)


@trouble("builds")
def head_width_in_words(case: Case) -> None:
    """https://github.com/rasbt/LLMs-from-scratch/pull/164: what could be computed is written down."""
    case.config(head_dim=16, attention_dropout=0.0, mlp_bias=False, attention_bias=False)


@trouble("builds")
def dropout_of_the_training(case: Case) -> None:
    """https://github.com/huggingface/transformers/issues/29988: a model that is not in training drops nothing."""
    case.config(attention_dropout=0.1)


@trouble("either", "eos_token_id")
def an_end_beyond_the_vocabulary(case: Case) -> None:
    """https://github.com/salesforce/CodeGen/issues/32: the config's end is not the tokenizer's."""
    case.config(eos_token_id=50256)


@trouble("either", "bos_token_id", "eos_token_id")
def ids_that_are_text(case: Case) -> None:
    """https://github.com/bytedance/xpu-perf/issues/131: ids that were read from a form."""
    case.config(bos_token_id="1", eos_token_id="2")  # noqa: S106 - ids


@trouble("builds")
def a_version_of_the_future(case: Case) -> None:
    """https://github.com/huggingface/transformers/issues/47553: saved by a later release."""
    case.config(transformers_version="9.99.0.dev0")
