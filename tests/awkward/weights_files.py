"""What people's weights files hold."""

import json
import math

import torch

from tests.awkward.scene import WEIGHTS, Case, ClashError, Tensors, trouble

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
LINEAR = "model.layers.1.mlp.up_proj.weight"


@trouble("builds")
def tied_and_stored_twice(case: Case) -> None:
    """https://github.com/hiyouga/LlamaFactory/issues/10560: a trainer saves the tied head too."""
    case.tensors(lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    case.config(tie_word_embeddings=True)


@trouble("builds")
def tied_with_a_head_of_its_own(case: Case) -> None:
    """https://github.com/huggingface/transformers/pull/42612: transformers takes the head that is there."""
    case.tensors(lambda tensors: tensors.update({HEAD: torch.flip(tensors[EMBEDDING], (0,)).contiguous()}))
    case.config(tie_word_embeddings=True)


@trouble("builds")
def tied_and_stored_once(case: Case) -> None:
    """https://github.com/huggingface/text-generation-inference/pull/761: no head is stored."""
    case.tensors(lambda tensors: tensors.pop(HEAD, None))
    case.config(tie_word_embeddings=True)


@trouble("refused", "lm_head", "tie_word_embeddings")
def untied_without_a_head(case: Case) -> None:
    """https://github.com/vllm-project/vllm/pull/53020: the head would be random."""
    case.tensors(lambda tensors: tensors.pop(HEAD, None))
    case.config(tie_word_embeddings=False)


@trouble("builds")
def frequencies_of_old(case: Case) -> None:
    """https://github.com/huggingface/transformers/pull/35255: LLaMA 2's files store rotary buffers."""
    frequencies = 1.0 / 10000 ** (torch.arange(0, 16, 2) / 16)
    names = [f"model.layers.{block}.self_attn.rotary_emb.inv_freq" for block in range(3)]
    case.tensors(lambda tensors: tensors.update({name: frequencies.clone() for name in names}))


@trouble("builds")
def no_metadata(case: Case) -> None:
    """https://github.com/ml-explore/mlx/issues/743: no word of the program that the file is made for."""
    case.tensors(lambda _: None, metadata={})


@trouble("builds")
def metadata_of_a_merge(case: Case) -> None:
    """https://github.com/huggingface/accelerate/pull/1151: words of another program."""
    case.tensors(lambda _: None, metadata={"format": "pt", "mergekit_version": "0.0.4.2", "note": "\u00fc" * 50})


@trouble("either", "index", "model.safetensors")
def a_stale_index(case: Case) -> None:
    """https://github.com/Blaizzy/mlx-vlm/pull/1827: model.safetensors was made anew, the index was not."""
    if not (case.model / WEIGHTS).exists():
        raise ClashError(WEIGHTS)
    shards = {EMBEDDING: "model-00001-of-00002.safetensors", HEAD: "model-00002-of-00002.safetensors"}
    case.write("model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": shards}))


@trouble("builds")
def an_index_of_one_file(case: Case) -> None:
    """https://github.com/unslothai/unsloth-zoo/pull/346: an index for a single file."""
    names = dict.fromkeys(case.stored(), WEIGHTS)
    case.write("model.safetensors.index.json", json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))


@trouble("builds")
def two_files(case: Case) -> None:
    """https://github.com/raven-ml/raven/issues/136: shards with their index."""
    case.shards()


@trouble("refused", "model-00002-of-00002.safetensors")
def a_missing_file(case: Case) -> None:
    """https://github.com/unslothai/unsloth/issues/2355: one of two shards."""
    (case.model / case.shards()[1]).unlink()


@trouble("either", "index", "safetensors")
def files_without_their_index(case: Case) -> None:
    """https://github.com/unslothai/unsloth/issues/2355: the index was not uploaded."""
    case.shards()
    (case.model / "model.safetensors.index.json").unlink()


@trouble("builds")
def old_files_beside(case: Case) -> None:
    """https://github.com/unslothai/unsloth-zoo/pull/808: an earlier set of shards, which the index does not name."""
    case.shards()
    case.save({EMBEDDING: torch.zeros(4, 4)}, "model-00001-of-00003.safetensors")


@trouble("builds")
def weights_in_two_formats(case: Case) -> None:
    """https://github.com/vllm-project/vllm/issues/40765: Mistral's own format beside."""
    case.save({"layers.0.attention.wq.weight": torch.ones(8, 8)}, "consolidated.safetensors")
    case.write("params.json", json.dumps({"dim": 64}))


@trouble("builds")
def an_adapter_beside(case: Case) -> None:
    """https://github.com/hiyouga/LlamaFactory/issues/1097: the adapter that was merged."""
    case.save({"base_model.model.lora_A.weight": torch.ones(2, 8)}, "adapter_model.safetensors")


@trouble("builds")
def pickles_beside(case: Case) -> None:
    """https://github.com/axolotl-ai-cloud/axolotl/pull/3095: both forms in one folder."""
    case.write("pytorch_model.bin", b"\x80\x02}q\x00.")
    case.write("training_args.bin", b"\x80\x02}q\x00.")


@trouble("refused", "safetensors", "pickle", "tensors that the model needs")
def pickles_alone(case: Case) -> None:
    """https://github.com/axolotl-ai-cloud/axolotl/pull/3095: no safetensors."""
    for path in case.model.glob("*.safetensors*"):
        path.unlink()
    case.write("pytorch_model.bin", b"\x80\x02}q\x00.")


@trouble("refused", WEIGHTS)
def a_pointer_of_lfs(case: Case) -> None:
    """https://github.com/microsoft/OmniParser/issues/34: cloned without git-lfs."""
    if not (case.model / WEIGHTS).exists():
        raise ClashError(WEIGHTS)
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 269060552\n"
    case.write(WEIGHTS, pointer)


@trouble("refused", WEIGHTS)
def half_a_file(case: Case) -> None:
    """https://github.com/huggingface/transformers/issues/27923: a download that was cut."""
    case.stored()
    data = (case.model / WEIGHTS).read_bytes()
    case.write(WEIGHTS, data[: len(data) // 2])


@trouble("refused", LINEAR, "NaN", late=True)
def a_number_that_is_none(case: Case) -> None:
    """https://github.com/turboderp-org/exllamav3/issues/58: a training that ended in NaN."""
    case.tensors(lambda tensors: tensors[LINEAR].view(-1)[5:6].fill_(math.nan))


@trouble("refused", NORM, "NaN", late=True)
def an_infinite_norm(case: Case) -> None:
    """https://github.com/ModelCloud/GPTQModel/issues/1469: an overflow when the weights became float16."""
    case.tensors(lambda tensors: tensors[NORM][3:4].fill_(math.inf))


@trouble("builds")
def norms_in_float32(case: Case) -> None:
    """https://github.com/AutoGPTQ/AutoGPTQ/issues/708: what a training kept in float32."""

    def change(tensors: Tensors) -> None:
        tensors.update({name: tensor.float() for name, tensor in tensors.items() if "norm" in name})

    case.tensors(change)


@trouble("builds")
def weights_in_float32(case: Case) -> None:
    """https://github.com/huggingface/transformers/issues/12062: everything in float32, and said."""
    case.tensors(lambda tensors: tensors.update({name: tensor.float() for name, tensor in tensors.items()}))
    case.config("torch_dtype", dtype="float32")


@trouble("builds")
def weights_in_bfloat16(case: Case) -> None:
    """https://github.com/vllm-project/compressed-tensors/pull/70: everything in bfloat16, and said."""
    case.tensors(lambda tensors: tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()}))
    case.config("torch_dtype", dtype="bfloat16")


@trouble("builds")
def a_head_in_float32(case: Case) -> None:
    """https://github.com/neuralmagic/sparseml/pull/2312: one tensor in another dtype."""
    case.tensors(lambda tensors: tensors.update({HEAD: tensors[HEAD].float()} if HEAD in tensors else {}))


@trouble("refused", "F8_E4M3", "quantized", "dtype")
def linears_in_eight_bits(case: Case) -> None:
    """https://github.com/foundation-model-stack/fastsafetensors/issues/88: weights that are quantized already."""

    def change(tensors: Tensors) -> None:
        tensors.update(
            {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items() if name.endswith("proj.weight")}
        )

    case.tensors(change)


@trouble("either", "lm_head.bias", "unexpected")
def a_tensor_too_many(case: Case) -> None:
    """https://github.com/johnsmith0031/alpaca_lora_4bit/issues/135: a bias that the model does not have."""
    case.tensors(lambda tensors: tensors.update({"lm_head.bias": torch.zeros(128, dtype=torch.float16)}))


@trouble("either", "base_model.model", "missing", "unexpected")
def names_of_an_adapter(case: Case) -> None:
    """https://github.com/zjunlp/EasyEdit/issues/261: saved while it was wrapped."""

    def change(tensors: Tensors) -> None:
        renamed = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(renamed)

    case.tensors(change)


@trouble("either", "missing", "unexpected", "lm_head", "tensor")
def names_of_the_model_without_a_head(case: Case) -> None:
    """https://github.com/meta-pytorch/gpt-fast/issues/42: saved from the class without a head."""

    def change(tensors: Tensors) -> None:
        renamed = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != HEAD}
        tensors.clear()
        tensors.update(renamed)

    case.tensors(change)
    case.config(tie_word_embeddings=True)


@trouble("either", "model.layers.3", "unexpected")
def a_block_too_many(case: Case) -> None:
    """https://github.com/jzhang38/TinyLlama/issues/127: weights of a block that the config does not count."""

    def change(tensors: Tensors) -> None:
        more = {
            name.replace("layers.2.", "layers.3."): tensor for name, tensor in tensors.items() if "layers.2." in name
        }
        tensors.update({name: tensor.clone() for name, tensor in more.items()})

    case.tensors(change)


@trouble("refused", LINEAR, "missing")
def a_tensor_too_few(case: Case) -> None:
    """https://github.com/huggingface/transformers/pull/43429: transformers makes up what is missing."""
    case.tensors(lambda tensors: tensors.pop(LINEAR, None))


@trouble("refused", LINEAR)
def a_transposed_tensor(case: Case) -> None:
    """https://github.com/sgl-project/SpecForge/issues/139: a size that does not fit."""
    case.tensors(lambda tensors: tensors.update({LINEAR: tensors[LINEAR].T.contiguous()}))


@trouble("builds")
def a_dead_linear(case: Case) -> None:
    """https://github.com/AutoGPTQ/AutoGPTQ/issues/98: rows of zeros, which a grid of no width would represent."""
    case.tensors(lambda tensors: tensors[LINEAR][:16].zero_())


@trouble("builds")
def an_outlier(case: Case) -> None:
    """https://github.com/vllm-project/llm-compressor/issues/1152: one weight is hundreds of times the others."""
    case.tensors(lambda tensors: tensors[LINEAR][0, :1].fill_(40.0))


@trouble("builds")
def a_dead_channel(case: Case) -> None:
    """https://github.com/AutoGPTQ/AutoGPTQ/issues/780: an input that is always zero makes H singular."""
    case.tensors(lambda tensors: tensors["model.layers.1.input_layernorm.weight"][:8].zero_())
