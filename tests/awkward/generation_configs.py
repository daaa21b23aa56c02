"""What people's generation_config.json holds."""

from tests.awkward.scene import Case, trouble


@trouble("builds")
def greedy_with_a_temperature(case: Case) -> None:
    """https://github.com/QwenLM/Qwen3-ASR/issues/210: transformers warns, and computes."""
    case.generation(do_sample=False, temperature=0.0)


@trouble("builds")
def greedy_with_a_share(case: Case) -> None:
    """https://github.com/huggingface/transformers/issues/29988: top_p without sampling."""
    case.generation("do_sample", top_p=0.6, temperature=0.9)


@trouble("builds")
def greedy_with_one_choice(case: Case) -> None:
    """https://github.com/modelscope/ms-swift/issues/1943: top_k of 1, and no sampling."""
    case.generation(do_sample=False, top_k=1, temperature=0.01)


@trouble("either", "temperature")
def sampling_without_heat(case: Case) -> None:
    """https://github.com/haotian-liu/LLaVA/issues/1144: transformers refuses to sample at 0."""
    case.generation(do_sample=True, temperature=0.0)


@trouble("either", "top_p")
def a_share_above_one(case: Case) -> None:
    """https://github.com/haotian-liu/LLaVA/issues/1635: a percentage."""
    case.generation(do_sample=True, top_p=95)


@trouble("builds")
def several_ends_of_a_turn(case: Case) -> None:
    """https://github.com/turboderp-org/exllamav2/pull/449: Llama 3 ends turns and texts in two ways."""
    case.generation(eos_token_id=[2, 3])


@trouble("builds")
def ends_that_differ_from_the_config(case: Case) -> None:
    """https://github.com/NVIDIA/TensorRT-Model-Connect/issues/640: generation_config.json is what counts."""
    case.config(eos_token_id=3)
    case.generation(eos_token_id=[2, 3])


@trouble("either", "eos_token_id")
def an_end_of_a_larger_model(case: Case) -> None:
    """https://github.com/Blaizzy/mlx-vlm/pull/2112: copied from another model."""
    case.generation(eos_token_id=151645)


@trouble("builds")
def generation_padding_of_minus_one(case: Case) -> None:
    """https://github.com/huggingface/transformers/issues/25426: "no padding" as a number."""
    case.generation(pad_token_id=-1)


@trouble("builds")
def lengths_under_two_names(case: Case) -> None:
    """https://github.com/hiyouga/LlamaFactory/issues/2479: both limits at once."""
    case.generation(max_length=4096, max_new_tokens=512)


@trouble("builds")
def beams_that_are_not_used(case: Case) -> None:
    """https://github.com/huggingface/transformers/issues/29988: early_stopping for one beam."""
    case.generation(num_beams=1, early_stopping=True, length_penalty=1.2)


@trouble("builds")
def keys_of_a_server(case: Case) -> None:
    """https://github.com/NVIDIA/TensorRT-LLM/pull/9514: settings that transformers does not know."""
    case.generation(chat_format="chatml", max_window_size=24000, trust_remote_code=True)


@trouble("builds")
def nulls_in_generation(case: Case) -> None:
    """https://github.com/Blaizzy/mlx-vlm/pull/309: keys without a value."""
    case.generation(temperature=None, top_p=None, pad_token_id=None, do_sample=None)


@trouble("builds")
def no_generation_config(case: Case) -> None:
    """https://github.com/hiyouga/LlamaFactory/issues/3238: "Generation config file not found"."""
    (case.model / "generation_config.json").unlink(missing_ok=True)


@trouble("either", "generation_config.json")
def an_empty_generation_config(case: Case) -> None:
    """https://github.com/debpalash/VoiceStudio/pull/1056: a file of no bytes, left by a download."""
    case.write("generation_config.json", b"")


@trouble("either", "generation_config.json")
def a_list_as_generation_config(case: Case) -> None:
    """https://github.com/hiyouga/LlamaFactory/issues/2837: not what it should be."""
    case.write("generation_config.json", "[]")


@trouble("builds")
def generation_of_another_release(case: Case) -> None:
    """https://github.com/huggingface/transformers/issues/7275: keys of releases 2 to 4."""
    case.generation(eos_token_ids=0, bos_token_id=1, transformers_version="4.31.0.dev0", _from_model_config=True)
