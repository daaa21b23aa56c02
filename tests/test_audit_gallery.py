"""Broken checkpoints that people reported, each made anew by a few lines and found by the audit.

An id is project#number of the issue or pull request in which the kind was reported; what was read there on 2026-11-30
is in `Report.said`. Where a report has a symptom only, the checkpoint is one that gives this symptom.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from packager.prove.audit import AUDIT_RULES, audit
from packager.prove.audit.finding import Severity
from tests.audit_cases import (
    ACT_ORDER,
    FIRST_SHARD,
    INDEX,
    PLAIN,
    POINTER,
    QWEN,
    SHARDED,
    V2,
    WEIGHTS,
    Q,
    assign,
    declare,
    drop,
    quantize_head,
)  # fmt: skip
from tests.checkpoints import HIDDEN, VOCAB, Checkpoint, Tensors, edit_json, edit_tensors, write_json
from tests.known_models import describe_known
from tests.test_repair import add_zero_biases, to_v2

RAGGED = Checkpoint(group_size=40)
OLD_NAME = Checkpoint(weights_name="gptq_model-4bit-32g")


@dataclass(frozen=True, kw_only=True)
class Report:
    """A report, and the checkpoint that it is about.

    Attributes:
        issue: project#number, on GitHub.
        said: what users saw, in a few words.
        code: the finding.
        change: makes a sound branch one of this kind.
        made: the sound branch.
        itself: the kind is a branch as it was made, and `made` is not sound.
    """

    issue: str
    said: str
    code: str
    change: Callable[[Path], object]
    made: Checkpoint = PLAIN
    itself: bool = False


def tensors(change: Callable[[Tensors], object]) -> Callable[[Path], object]:
    return lambda folder: edit_tensors(folder, change)


def section(**values: Any) -> Callable[[Path], object]:
    return lambda folder: edit_json(
        folder, "config.json", lambda config: config["quantization_config"].update(values)
    )  # fmt: skip


def config(**values: Any) -> Callable[[Path], object]:
    return lambda folder: edit_json(folder, "config.json", lambda found: found.update(values))


def generation(**values: Any) -> Callable[[Path], object]:
    return lambda folder: edit_json(folder, "generation_config.json", lambda found: found.update(values))


def metadata(content: dict[str, str] | None) -> Callable[[Path], object]:
    return lambda folder: save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata=content)


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str, kept: int) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:kept])


def without(*names: str) -> Callable[[Path], object]:
    return lambda folder: [(folder / name).unlink() for name in names]


def nothing(_: Path) -> None:
    pass


def drop_ends(end: str) -> Callable[[Path], object]:
    return tensors(lambda found: [found.pop(name) for name in list(found) if name.endswith(end)])


def transpose_scales(found: Tensors) -> None:
    found[f"{Q}.scales"] = np.ascontiguousarray(found[f"{Q}.scales"].T)


def leave_one(found: Tensors) -> None:
    """Leave one of the two linears unquantized that runtimes compute as one."""
    drop(found, "model.layers.0.mlp.gate_proj.")
    found["model.layers.0.mlp.gate_proj.weight"] = np.zeros((96, HIDDEN), np.float16)


def stale_index(folder: Path) -> None:
    """Keep the index of the model that was quantized."""
    files = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(("a", "b"))}
    write_json(folder / INDEX, {"metadata": {"total_size": 1}, "weight_map": files})


def without_bits(folder: Path) -> None:
    edit_json(folder, "config.json", lambda found: found["quantization_config"].pop("bits"))
    edit_json(folder, "quantize_config.json", lambda found: found.pop("bits"))


def without_any_config(folder: Path) -> None:
    edit_json(folder, "config.json", lambda found: found.pop("quantization_config"))
    (folder / "quantize_config.json").unlink()


def pad_token(folder: Path) -> None:
    write_json(folder / "added_tokens.json", {"[PAD]": VOCAB})


GALLERY = [
    Report(issue="ModelCloud/GPTQModel#1080", said="FileNotFoundError: quantize_config.json",
           code="quantize-config-missing", change=without("quantize_config.json")),
    Report(issue="vllm-project/vllm#13612", said="Cannot find the config file for gptq",
           code="quantization-config-missing", change=without_any_config),
    Report(issue="vllm-project/llm-compressor#959", said="KeyError: weight_scale; config.json says nothing",
           code="quantization-config-missing",
           change=lambda folder: edit_json(folder, "config.json", lambda found: found.pop("quantization_config"))),
    Report(issue="huggingface/text-generation-inference#728", said="weight gptq_bits does not exist",
           code="quantization-key-missing", change=without_bits),
    Report(issue="ml-explore/mlx#743", said="no metadata format, transformers cannot load it",
           code="safetensors-metadata", change=metadata({"made_by": "x"})),
    Report(issue="thisserand/llama2_local#7", said="does not contain metadata", code="safetensors-metadata",
           change=metadata(None)),
    Report(issue="QwenLM/Qwen#601", said="Error no file named ...: model_file_base_name is another name",
           code="weights-name-disagrees", change=lambda folder: edit_json(
               folder, "quantize_config.json", lambda found: found.update(model_file_base_name="qwen-14b-int8"))),
    Report(issue="PromtEngineer/localGPT#399", said="the file is now called model.safetensors",
           code="weights-name-disagrees", made=OLD_NAME, itself=True,
           change=lambda folder: (folder / "gptq_model-4bit-32g.safetensors").rename(folder / WEIGHTS)),
    Report(issue="AutoGPTQ/AutoGPTQ#133", said="Could not find model in TheBloke/WizardLM-*-uncensored-GPTQ",
           code="weights-name", change=nothing, made=OLD_NAME, itself=True),
    Report(issue="AutoGPTQ/AutoGPTQ#292", said="keys q_proj.g_idx are missing, then the process ends",
           code="linear-incomplete", change=drop_ends(".g_idx")),
    Report(issue="qwopqwop200/GPTQ-for-LLaMa#69", said="size mismatch for up_proj.scales: [17920, 1], not [1, 17920]",
           code="linear-shape", change=tensors(transpose_scales)),
    Report(issue="vllm-project/vllm#38966", said="zeros are 8, checkpoint_format is gptq: output !!!",
           code="zeros-format", change=tensors(lambda found: to_v2(found, 4))),
    Report(issue="vllm-project/vllm#26343", said="gibberish with checkpoints of gptq_v2", code="checkpoint-format",
           change=nothing, made=V2, itself=True),
    Report(issue="vllm-project/vllm#54809", said="g_idx is dropped: act order under desc_act false is garbage",
           code="g-idx-order", made=ACT_ORDER, change=lambda folder: declare(folder, desc_act=False)),
    Report(issue="turboderp/exllama#44", said="an act-order model whose group index is all zero", code="g-idx-groups",
           made=ACT_ORDER, change=tensors(lambda found: [
               found[name].fill(0) for name in found if name.endswith(".g_idx")])),
    Report(issue="lm-sys/FastChat#3520", said="Unexpected key(s): rotary_emb.inv_freq", code="tensor-unexpected",
           change=tensors(lambda found: found.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8)}))),
    Report(issue="oobabooga/textgen#1959", said="Unexpected key(s): mlp.gate_proj.bias", code="bias-needless",
           change=tensors(add_zero_biases)),
    Report(issue="QwenLM/Qwen3-VL#416", said="weights were not used: mlp.down_proj.bias", code="bias-needless",
           made=QWEN, change=tensors(lambda found: found.update(
               {"model.layers.0.mlp.down_proj.bias": np.zeros(HIDDEN, np.float16)}))),
    Report(issue="turboderp/exllama#242", said="HeaderTooLarge; git lfs was not enabled", code="lfs-pointer",
           change=write(WEIGHTS, POINTER)),
    Report(issue="hiyouga/LlamaFactory#327", said="some of 15 shards have 135 bytes", code="lfs-pointer",
           made=SHARDED, change=write(FIRST_SHARD, POINTER)),
    Report(issue="turboderp/exllama#176", said="a corrupted tokenizer.model", code="lfs-pointer",
           change=write("tokenizer.model", POINTER)),
    Report(issue="hiyouga/LlamaFactory#5201", said="MetadataIncompleteBuffer", code="safetensors-damaged",
           change=cut(WEIGHTS, -1000)),
    Report(issue="lyogavin/airllm#137", said="an incomplete header: the download was cut off",
           code="safetensors-damaged", change=cut(WEIGHTS, 1000)),
    Report(issue="huggingface/transformers#27923", said="HeaderTooLarge", code="safetensors-damaged",
           change=write(WEIGHTS, b"<!doctype html><title>Sign in</title>")),
    Report(issue="meta-llama/llama-cookbook#189", said="the pad token is 32000, the embedding has 32000 rows",
           code="tokenizer-vocab", change=pad_token),
    Report(issue="huggingface/trl#387", said="pad_token_id is out of the vocabulary: CUDA index error",
           code="token-id-range", change=config(pad_token_id=VOCAB + 1)),
    Report(issue="huggingface/transformers#29988", said="do_sample is False, temperature is 0.9",
           code="generation-sampling", change=generation(do_sample=False, temperature=0.9)),
    Report(issue="QwenLM/Qwen3-ASR#210", said="do_sample False with temperature 1e-06 cannot be saved",
           code="generation-sampling", change=generation(do_sample=False, temperature=1e-06)),
    Report(issue="intel/auto-round#2188", said="a quantized lm_head cannot be saved and opened",
           code="lm-head-quantized", change=tensors(quantize_head)),
    Report(issue="vllm-project/vllm#7086", said="per-module bits: KeyError where the runtime ignores them",
           code="quantization-override", change=section(dynamic={r"+:.*down.*": {"bits": 8}})),
    Report(issue="modelscope/ms-swift#6038", said="The input size is not aligned with the quantized weight shape",
           code="group-ragged", change=nothing, made=RAGGED, itself=True),
    Report(issue="vllm-project/vllm#34859", said="a missing shard is loaded as random weights",
           code="index-shard-missing", made=SHARDED, change=without(FIRST_SHARD)),
    Report(issue="ml-explore/mlx-swift-lm#554", said="the index is that of the unquantized model",
           code="index-shard-missing", change=stale_index),
    Report(issue="ggml-org/llama.cpp#5678", said="Found multiple models, not sure which to pick", code="weights-stray",
           made=SHARDED, change=lambda folder: shutil.copy(folder / FIRST_SHARD, folder / WEIGHTS)),
    Report(issue="intel/ipex-llm#8401", said="Detected 2 .safetensors models, use the first one", code="weights-stray",
           change=lambda folder: shutil.copy(folder / WEIGHTS, folder / "4bit-128g.act-order.safetensors")),
    Report(issue="huggingface/accelerate#1713", said="index.json is missing", code="index-missing", made=SHARDED,
           change=without(INDEX)),
    Report(issue="ModelCloud/GPTQModel#302", said="missing .py files for models using trust_remote_code",
           code="code-missing", change=config(auto_map={"AutoModelForCausalLM": "modeling_x.XForCausalLM"})),
    Report(issue="hiyouga/LlamaFactory#8399", said="chat_template is missing after saving",
           code="chat-template-missing", change=lambda folder: edit_json(
               folder, "tokenizer_config.json", lambda found: found.pop("chat_template"))),
    Report(issue="AutoGPTQ/AutoGPTQ#295", said="probability tensor contains either inf, nan or element < 0",
           code="scale-not-finite", change=tensors(assign(f"{Q}.scales", (0, 0), np.nan))),
    Report(issue="modelscope/ms-swift#994", said="activations explode after quantizing in float16",
           code="scale-overflow", change=tensors(assign(f"{Q}.scales", (0, 0), 30_000))),
    Report(issue="intel/auto-round#1726", said="Fused module mlp.gate_up_proj is quantized in part",
           code="linear-unquantized", change=tensors(leave_one)),
    Report(issue="vllm-project/vllm#2149", said="the tensors are float16, config.json says bfloat16",
           code="dtype-disagrees", change=config(torch_dtype="bfloat16")),
    Report(issue="vllm-project/vllm#28843", said="gptq_marlin_gemm only supports bfloat16 and float16",
           code="linear-dtype", change=tensors(lambda found: found.update(
               {f"{Q}.scales": found[f"{Q}.scales"].astype(np.float32)}))),
    Report(issue="intel/auto-round#168", said="one program reads quantize_config.json, the other config.json",
           code="quantize-config-disagrees", change=section(desc_act=True)),
]  # fmt: skip


def findings(folder: Path) -> dict[str, Severity]:
    report = audit(folder, complete=False, describe=describe_known)
    return {finding.code: finding.severity for finding in report.findings}


@pytest.mark.parametrize("report", GALLERY, ids=lambda report: report.issue)
def test_what_was_reported_is_found_and_not_on_the_sound_model(tmp_path: Path, report: Report) -> None:
    sound = PLAIN if report.itself else report.made
    assert findings(sound.write(tmp_path / "sound")) == {}
    folder = report.made.write(tmp_path / "broken")
    report.change(folder)
    found = findings(folder)
    assert found[report.code] == AUDIT_RULES[report.code].severity
    assert len(found) <= 3, "one mistake is not reported in many words"


def test_the_gallery_has_its_size() -> None:
    assert len({report.issue for report in GALLERY}) == len(GALLERY) >= 30
    assert len({report.code for report in GALLERY}) >= 30
    assert all(report.said for report in GALLERY)
