"""Every way to break a valid branch that the audit must report, as data for `test_audit.py`."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from packager.model.checkpoint import checkpoint_tensors
from packager.model.safetensors_file import file_order, header_bytes
from packager.variant import Variant
from tests.checkpoints import (
    HIDDEN,
    VOCAB,
    Checkpoint,
    Tensors,
    edit_json,
    edit_tensors,
    edit_text,
    give_other_bits,
    write_json,
)
from tests.known_models import known_architecture

Q = "model.layers.0.self_attn.q_proj"
DOWN_PROJ = [f"model.layers.{block}.mlp.down_proj" for block in range(2)]
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FIRST_SHARD = "model-00001-of-00002.safetensors"
TOKEN = "hf_" + "Abc123" * 6

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"

PLAIN = Checkpoint()
QWEN = Checkpoint(model_type="qwen2")
SHARDED = Checkpoint(shards=2)
ACT_ORDER = Checkpoint(desc_act=True)
ASYMMETRIC = Checkpoint(sym=False)
V2 = Checkpoint(checkpoint_format="gptq_v2")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A change to a valid branch, and the only code that the audit may find then."""

    code: str
    change: Callable[[Path], object]
    checkpoint: Checkpoint = PLAIN
    complete: bool = True
    sealed: bool = True


def case(code: str, change: Callable[[Path], object], **options: Any) -> Any:
    """Return a test parameter: `change`, and the one code that it must lead to."""
    return pytest.param(Case(code=code, change=change, **options), id=code)


def tensors(code: str, change: Callable[[Tensors], object], **options: Any) -> Any:
    """Return a case that changes tensors; provenance, which would change too, is left out."""
    return case(code, lambda folder: edit_tensors(folder, change), complete=False, **options)


def document(code: str, name: str, change: Callable[[dict[str, Any]], object], **options: Any) -> Any:
    return case(code, lambda folder: edit_json(folder, name, change), **options)


def quantization(code: str, change: Callable[[dict[str, Any]], object], **options: Any) -> Any:
    return document(code, "config.json", lambda config: change(config["quantization_config"]), **options)


def card(code: str, old: str, new: str) -> Any:
    return case(code, lambda folder: edit_text(folder, "README.md", old, new))


def declare(folder: Path, **values: object) -> None:
    edit_json(folder, "config.json", lambda config: config["quantization_config"].update(values))
    edit_json(folder, "quantize_config.json", lambda config: config.update(values))


def drop(found: Tensors, prefix: str) -> None:
    for name in [name for name in found if name.startswith(prefix)]:
        del found[name]


def assign(name: str, index: Any, value: Any) -> Callable[[Tensors], object]:
    return lambda found: found[name].__setitem__(index, value)


def unquantize(found: Tensors) -> None:
    drop(found, f"{Q}.")
    found[f"{Q}.weight"] = np.zeros((HIDDEN, HIDDEN), np.float16)


def quantize_head(found: Tensors) -> None:
    del found["lm_head.weight"]
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        found[f"lm_head.{part}"] = found[f"{Q}.{part}"].copy()


def other_method(folder: Path) -> None:
    """Make a checkpoint as llm-compressor writes it: of compressed-tensors."""
    section = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"]}
    edit_json(folder, "config.json", lambda config: config.update(quantization_config=section))

    def pack(found: Tensors) -> None:
        for name in [name for name in found if name.endswith(".g_idx")]:
            linear = name.removesuffix(".g_idx")
            found[f"{linear}.weight_packed"] = found.pop(f"{linear}.qweight")
            found[f"{linear}.weight_scale"] = found.pop(f"{linear}.scales")
            del found[name], found[f"{linear}.qzeros"]

    edit_tensors(folder, pack)


def duplicate_tensor(folder: Path) -> None:
    first, second = sorted(folder.glob("model-*.safetensors"))
    extra = dict(list(load_file(first).items())[:1])
    edit_tensors(folder, lambda found: found.update(extra), second.name)


def write(name: str, content: bytes) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)

    return change


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def copy(name: str, target: str) -> Callable[[Path], object]:
    return lambda folder: shutil.copy(folder / name, folder / target)


def truncate(name: str, length: int) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


def without_metadata(folder: Path) -> None:
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS)


CASES = [
    case("leftover-file", write(".tmp-abc", b"x"), sealed=False),
    case("link-leaves-folder", lambda folder: (folder / "notes.md").symlink_to("/etc/hostname")),
    case("link-leaves-folder", lambda folder: (folder / "notes.md").symlink_to("nowhere")),
    case("link-leaves-folder", lambda folder: (folder / "loop").symlink_to("loop")),
    case("link-leaves-folder", lambda folder: (folder / "sub").symlink_to("/etc")),
    case("not-a-regular-file", lambda folder: os.mkfifo(folder / "pipe")),
    case("empty-file", write("special_tokens_map.json", b"")),
    case("lfs-pointer", write("model.safetensors", POINTER), sealed=False),
    case("file-missing", remove("provenance.json"), sealed=False),
    case("file-missing", remove("README.md")),
    case("file-missing", remove("config.json")),
    case("quantize-config-missing", remove("quantize_config.json")),
    case("generation-config-missing", remove("generation_config.json")),
    case("file-missing", remove("tokenizer_config.json")),
    case("file-missing", lambda folder: [(folder / f"tokenizer.{end}").unlink() for end in ("json", "model")]),
    case("json-damaged", write("special_tokens_map.json", b"{")),
    case("json-damaged", write("special_tokens_map.json", b'{"a": NaN}')),
    case("json-damaged", write("special_tokens_map.json", b"[" * 100_000)),
    case("json-damaged", write("config.json", b"[1, 2]")),
    case("json-damaged", write("provenance.json", b"[]"), sealed=False),
    case("text-damaged", write("README.md", b"\xff\xfe")),
    case("text-damaged", write("special_tokens_map.json", b'{"a": "\xff"}')),
    case("weights-missing", remove(WEIGHTS)),
    case("weights-stray", write("pytorch_model.bin", b"x")),
    case("weights-stray", write("original/consolidated.00.PTH", b"x")),
    case("weights-stray", copy(WEIGHTS, "z.safetensors"), complete=False),
    case("weights-stray", copy(FIRST_SHARD, WEIGHTS), checkpoint=SHARDED, complete=False),
    case("weights-stray", copy(INDEX, "other.safetensors.index.json"), checkpoint=SHARDED),
    case("weights-name", lambda _: None, checkpoint=Checkpoint(weights_name="gptq_model-4bit-32g")),
    document("weights-name-disagrees", "quantize_config.json", lambda config: config.update(model_file_base_name="x")),
    case("index-missing", remove(INDEX), checkpoint=SHARDED),
    case("index-damaged", lambda folder: write_json(folder / INDEX, {"weight_map": []}), checkpoint=SHARDED),
    case("index-damaged", lambda folder: write_json(folder / INDEX, {"weight_map": {"x": 1}}), checkpoint=SHARDED),
    case("index-shard-missing", remove(FIRST_SHARD), checkpoint=SHARDED),
    document("index-shard-missing", INDEX, lambda index: index["weight_map"].update(x="../x"), checkpoint=SHARDED),
    document("index-disagrees", INDEX, lambda index: index["weight_map"].popitem(), checkpoint=SHARDED),
    document("index-disagrees", INDEX, lambda index: index["weight_map"].update(x=FIRST_SHARD), checkpoint=SHARDED),
    document("index-total-size", INDEX, lambda index: index["metadata"].update(total_size=1), checkpoint=SHARDED),
    case("tensor-duplicate", duplicate_tensor, checkpoint=SHARDED),
    case("safetensors-damaged", truncate(WEIGHTS, -1)),
    case("safetensors-damaged", truncate(WEIGHTS, 100)),
    case("safetensors-damaged", truncate(WEIGHTS, 5)),
    case("safetensors-damaged", write(WEIGHTS, b"\xff" * 16)),
    case("safetensors-metadata", without_metadata),
    document("config-value", "config.json", lambda config: config.update(hidden_size="64")),
    document("config-value", "config.json", lambda config: config.pop("torch_dtype")),
    document("config-value", "config.json", lambda config: config.update(num_hidden_layers=10**9)),
    document("config-value", "config.json", lambda config: config.update(torch_dtype=["float16"])),
    document("rope-spelling", "config.json", lambda config: config.update(rope_parameters={"rope_theta": 5e5})),
    document("rope-spelling", "config.json", lambda config: config.update(rope_parameters={"rope_type": "llama3"})),
    document("json-damaged", "config.json", lambda config: config.update(rope_parameters={"factor": 10**400})),
    case(
        "json-damaged",
        lambda folder: edit_text(folder, "config.json", '"vocab_size": 48', '"vocab_size": 48, "x": 1e999'),
    ),
    case(
        "json-damaged",
        lambda folder: edit_text(folder, "config.json", '"vocab_size": 48', '"vocab_size": 48, "vocab_size": 48'),
    ),
    document("json-damaged", "config.json", lambda config: config.update(pad="\ud800")),
    document("quantization-config-missing", "config.json", lambda config: config.pop("quantization_config")),
    document("quantization-config-missing", "config.json", lambda config: config.update(quantization_config=[])),
    quantization("quantization-key-missing", lambda section: section.pop("desc_act")),
    document("quantization-key-missing", "quantize_config.json", lambda config: config.pop("sym")),
    quantization("quantization-key-undeclared", lambda section: section.pop("static_groups")),
    quantization("quantization-value", lambda section: section.update(quant_method="awq")),
    case("quantization-value", lambda folder: declare(folder, bits=True), complete=False),
    case("quantization-value", lambda folder: declare(folder, group_size=0), complete=False),
    quantization("quantization-override", lambda section: section.update(dynamic={"x": {"bits": 8}})),
    quantization("quantization-override", lambda section: section.update(pack_dtype="int64")),
    case("mixed-bits", lambda folder: give_other_bits(folder, 8, DOWN_PROJ)),
    case("checkpoint-format", lambda _: None, checkpoint=V2),
    document("quantize-config-key", "quantize_config.json", lambda config: config.update(static_groups=False)),
    document("quantize-config-disagrees", "quantize_config.json", lambda config: config.update(damp_percent=0.1)),
    document("quantize-config-key", "quantize_config.json", lambda config: config.update(dynamic={"-:^x$": {}})),
    quantization("quantize-config-disagrees", lambda section: section.update(dynamic={"-:^x$": {}})),
    document("model-name-or-path", "quantize_config.json", lambda config: config.update(model_name_or_path="./x")),
    case("architecture-unknown", lambda _: None, checkpoint=Checkpoint(model_type="mystery")),
    tensors("no-quantized-linear", lambda found: [drop(found, f"model.layers.{block}.") for block in (0, 1)]),
    tensors("block-missing", lambda found: drop(found, "model.layers.1.")),
    document("block-unexpected", "config.json", lambda config: config.update(num_hidden_layers=1)),
    tensors("linear-incomplete", lambda found: found.pop(f"{Q}.g_idx")),
    tensors("linear-missing", lambda found: drop(found, f"{Q}.")),
    tensors("linear-unquantized", unquantize),
    tensors("linear-dtype", lambda found: found.update({f"{Q}.scales": found[f"{Q}.scales"].astype(np.float32)})),
    case("linear-shape", lambda folder: declare(folder, group_size=16), complete=False),
    case("linear-shape", lambda folder: declare(folder, bits=8), complete=False),
    tensors("linear-shape", lambda found: found.update({f"{Q}.qzeros": found[f"{Q}.qzeros"][:1].copy()})),
    tensors("linear-shape", lambda found: found.update({f"{Q}.qweight": np.zeros((0, 64), np.int32)})),
    case("group-ragged", lambda _: None, checkpoint=Checkpoint(bits=3, group_size=40, sym=False, desc_act=True)),
    tensors("tensor-missing", lambda found: found.pop("model.norm.weight")),
    tensors(
        "tensor-unexpected",
        lambda found: found.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}),
    ),
    tensors("tensor-shape", lambda found: found.update({"model.norm.weight": np.ones(8, np.float16)})),
    case("other-quantization", other_method, complete=False),
    tensors("dtype-disagrees", lambda found: found.update({"model.norm.weight": np.ones(HIDDEN, np.float64)})),
    tensors("lm-head-missing", lambda found: found.pop("lm_head.weight")),
    tensors("lm-head-quantized", quantize_head),
    quantization("lm-head-quantized", lambda section: section.update(lm_head=True)),
    tensors("bias-needless", lambda found: found.update({f"{Q}.bias": np.zeros(HIDDEN, np.float16)})),
    tensors("bias-missing", lambda found: found.pop(f"{Q}.bias"), checkpoint=QWEN),
    tensors("bias-zero", assign(f"{Q}.bias", slice(None), 0), checkpoint=QWEN),
    tensors("bias-not-finite", assign(f"{Q}.bias", 3, np.nan), checkpoint=QWEN),
    quantization("zeros-format", lambda section: section.update(checkpoint_format="gptq"), checkpoint=V2),
    quantization(
        "zeros-format",
        lambda section: section.update(checkpoint_format="gptq"),
        checkpoint=Checkpoint(checkpoint_format="gptq_v2", bits=3),
    ),
    case("zeros-not-symmetric", lambda folder: declare(folder, sym=True), checkpoint=ASYMMETRIC, complete=False),
    tensors("zeros-not-symmetric", assign(f"{Q}.qzeros", (0, 0), 0)),
    tensors("zeros-range", assign(f"{Q}.qzeros", (1, 2), -1), checkpoint=ASYMMETRIC),
    tensors("scale-not-finite", assign(f"{Q}.scales", (1, 1), np.inf)),
    tensors("scale-not-finite", assign(f"{Q}.scales", (1, 1), np.nan)),
    tensors("scale-negative", assign(f"{Q}.scales", (1, 1), -0.01), checkpoint=ASYMMETRIC),
    tensors("scale-overflow", assign(f"{Q}.scales", (1, 1), 8190)),
    tensors("scale-overflow", assign(f"{Q}.scales", (1, 1), 4370), checkpoint=ASYMMETRIC),
    tensors("scale-zero", assign(f"{Q}.scales", (1, 1), 0)),
    tensors("g-idx-range", assign(f"{Q}.g_idx", 3, 2)),
    tensors("g-idx-range", assign(f"{Q}.g_idx", 3, -1), checkpoint=ACT_ORDER),
    tensors("g-idx-order", lambda found: found.update({f"{Q}.g_idx": found[f"{Q}.g_idx"][::-1].copy()})),
    case("g-idx-order", lambda folder: declare(folder, desc_act=False), checkpoint=ACT_ORDER, complete=False),
    quantization("g-idx-order", lambda section: section.update(static_groups=True), checkpoint=ACT_ORDER),
    tensors("g-idx-groups", assign(f"{Q}.g_idx", slice(None), 0), checkpoint=ACT_ORDER),
    tensors(
        "g-idx-fused", lambda found: found.update({f"{Q}.g_idx": np.roll(found[f"{Q}.g_idx"], 7)}), checkpoint=ACT_ORDER
    ),
    case("tokenizer-json-missing", remove("tokenizer.json")),
    document("tokenizer-damaged", "tokenizer.json", lambda content: content["model"].update(vocab="x")),
    document("tokenizer-damaged", "tokenizer.json", lambda content: content.update(added_tokens=[{"id": "x"}])),
    document("tokenizer-vocab", "tokenizer.json", lambda content: content["model"]["vocab"].update(new=VOCAB)),
    document(
        "tokenizer-vocab", "tokenizer.json", lambda content: content["model"].update(vocab=[["a", 0.0]] * (VOCAB + 1))
    ),
    document(
        "tokenizer-vocab",
        "tokenizer_config.json",
        lambda content: content["added_tokens_decoder"].update({str(VOCAB): {}}),
    ),
    case("tokenizer-vocab", lambda folder: write_json(folder / "added_tokens.json", {"<pad>": VOCAB})),
    document("token-id-unknown", "generation_config.json", lambda content: content.update(eos_token_id=[2, VOCAB])),
    document("token-id-unknown", "generation_config.json", lambda content: content.update(pad_token_id=VOCAB)),
    document("token-id-unknown", "config.json", lambda content: content.update(pad_token_id=-1)),
    document("token-id-unknown", "config.json", lambda content: content.update(bos_token_id=VOCAB)),
    document("token-id-range", "config.json", lambda content: content.update(pad_token_id=VOCAB)),
    document("token-id-range", "config.json", lambda content: content.update(eos_token_id={})),
    document("code-missing", "config.json", lambda content: content.update(auto_map={"AutoConfig": "config_x.X"})),
    document(
        "code-missing",
        "tokenizer_config.json",
        lambda content: content.update(auto_map={"AutoTokenizer": ["tokens_x.X", None]}),
    ),
    document("chat-template-missing", "tokenizer_config.json", lambda content: content.pop("chat_template")),
    document(
        "chat-template-invalid", "tokenizer_config.json", lambda content: content.update(chat_template="{% if %}")
    ),
    document("chat-template-invalid", "tokenizer_config.json", lambda content: content.update(chat_template=[{}])),
    case("chat-template-invalid", write("chat_template.jinja", b"{% endfor %}")),
    document("generation-value", "generation_config.json", lambda content: content.update(temperature=0)),
    document("generation-value", "generation_config.json", lambda content: content.update(top_k=-1)),
    document("generation-value", "generation_config.json", lambda content: content.update(max_new_tokens=0)),
    document("generation-sampling", "generation_config.json", lambda content: content.update(do_sample=False)),
    document(
        "generation-sampling",
        "generation_config.json",
        lambda content: content.update(do_sample=False, temperature=0.0),
    ),
    document("local-path", "config.json", lambda content: content.update(_name_or_path="/srv/models/llama")),
    document("local-path", "quantize_config.json", lambda content: content.update(model_name_or_path="/home/me/llama")),
    document("local-path", "tokenizer_config.json", lambda content: content.update(file="C:\\Users\\me\\x")),
    card("local-path", "# A tiny", "Built from file:///models/x.\n# A tiny"),
    card("host-name", "# A tiny", "rsync me@gpu-box:/x y\n# A tiny"),
    card("host-name", "# A tiny", "See http://ip-10-0-0-1.ec2.internal:8000\n# A tiny"),
    card("secret", "# A tiny", f"HF_TOKEN={TOKEN}\n# A tiny"),
    document("secret", "tokenizer.json", lambda content: content.update(token=TOKEN)),
    card("card-front-matter", "---\nbase", "base"),
    card("card-front-matter", "license: llama2", "license: llama2\nlicense: mit"),
    card("card-front-matter", "license: llama2", "license: [llama2"),
    card("card-license", "license: llama2", "other_key: 1"),
    card("card-license", "license: llama2", "license: llama-two"),
    card("card-license-name", "license: llama2", "license: other"),
    card("card-base-model", "base_model: meta-llama/Llama-2-7b-chat-hf\n", ""),
    card("card-base-model", "base_model: meta-llama/Llama-2-7b-chat-hf\n", "base_model: []\n"),
    card("card-base-model", "meta-llama/Llama-2-7b-chat-hf", "meta-llama/Llama-2-7b-hf"),
    card("card-relation", "base_model_relation: quantized", "base_model_relation: finetune"),
    card("card-metadata", "library_name: transformers\n", ""),
    card("card-metadata", "- gptq\n", "- awq\n"),
    card("card-datasets", "license: llama2", "license: llama2\ndatasets: [wikitext]"),
    card("card-unclosed", "# A tiny model\n", "# A tiny model\n\n<!-- a comment\n"),
    card("card-unclosed", "# A tiny model\n", "# A tiny model\n\n~~~ text\n"),
    card("card-python", "from transformers import", "from transformers import,"),
    card("card-command", "hf download", "huggingface-cli download"),
    card("card-command", "hf download", "GITHUB_ACTIONS=true pip3 install auto-gptq; hf download"),
    card("card-command", 'revision="main"', "trust_remote_code=True"),
    card("card-command", "tiny-GPTQ\n```", "tiny-GPTQ`\n```"),
    case("picture-damaged", write("quality-dark.png", b"GIF89a")),
    card("card-template", "# A tiny model", "# A tiny {{ model }}"),
    case("license-file-missing", remove("USE_POLICY.md")),
    case("license-notice", lambda folder: edit_text(folder, "Notice", "Copyright (c) Meta", "Copyright (c) Beta")),
    document("provenance-invalid", "provenance.json", lambda content: content.pop("branch"), sealed=False),
    document("provenance-invalid", "provenance.json", lambda content: content.update(files=[]), sealed=False),
    case("provenance-file-missing", remove("special_tokens_map.json"), sealed=False),
    case("provenance-file-unlisted", write("NOTES.md", b"x"), sealed=False),
    case("provenance-file-changed", write("special_tokens_map.json", b"{}"), sealed=False),
    case("provenance-file-changed", lambda folder: edit_text(folder, "LICENSE.txt", "LLAMA", "llama"), sealed=False),
    document("provenance-disagrees", "provenance.json", lambda content: content.update(weights_bytes=1), sealed=False),
    document("provenance-disagrees", "provenance.json", lambda content: content["linears"].pop(), sealed=False),
    document(
        "provenance-disagrees", "provenance.json", lambda content: content["parameters"].update(bits=8), sealed=False
    ),
    document(
        "provenance-disagrees",
        "provenance.json",
        lambda content: content["parameters"].update(act_order="full"),
        sealed=False,
    ),
]


def write_13b_block(folder: Path) -> Path:
    """Write a block of Llama-2-13B's shape: 782 MB of holes, with the small tensors of a sound checkpoint."""
    folder.mkdir(exist_ok=True)
    config = Checkpoint().documents()["config.json"]
    config |= {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 1, "num_attention_heads": 40}
    config |= {"num_key_value_heads": 40, "vocab_size": 32000, "max_position_embeddings": 4096}
    declared: Any = config.pop("quantization_config")
    variant = Variant(
        branch="main", bits=4, group_size=32, act_order="none", sym=True, damp_percent=0.01, damp_percent_limit=0.1,
        true_sequential=True, scale_search=False, refine=False, effort="standard", engine="native",
    )  # fmt: skip
    infos = file_order(checkpoint_tensors(known_architecture(config, "config.json"), variant))
    with (folder / WEIGHTS).open("wb") as stream:
        stream.write(header_bytes(infos))
        for info in infos:
            part = info.name.rpartition(".")[2]
            if part == "qzeros":
                stream.write(np.full(info.shape, 0x77777777, "<i4").tobytes())
            elif part == "scales":
                stream.write(np.full(info.shape, 0.01, "<f2").tobytes())
            elif part == "g_idx":
                stream.write((np.arange(info.shape[0]) // 32).astype("<i4").tobytes())
            else:
                stream.seek(info.size_bytes, 1)
        stream.truncate()
    write_json(folder / "config.json", {**config, "quantization_config": declared})
    return folder
