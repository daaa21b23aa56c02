"""Tiny but complete GPTQ branches for tests, made by numpy and the safetensors library, not by our own writer."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from tests.known_models import known_model

Tensors = dict[str, npt.NDArray[Any]]

_MADE: dict[str, dict[str, bytes]] = {}

HIDDEN, INTERMEDIATE, KEY_VALUES, BLOCKS, VOCAB = 64, 96, 32, 2, 48
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, KEY_VALUES),
    "self_attn.v_proj": (HIDDEN, KEY_VALUES),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INTERMEDIATE),
    "mlp.up_proj": (HIDDEN, INTERMEDIATE),
    "mlp.down_proj": (INTERMEDIATE, HIDDEN),
}
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "mystery": "MysteryForCausalLM"}
NOTICE = """Llama 2 is licensed under the LLAMA 2 Community License,
Copyright (c) Meta Platforms, Inc. All Rights Reserved.
"""
README = """---
base_model: meta-llama/Llama-2-7b-chat-hf
base_model_relation: quantized
library_name: transformers
pipeline_tag: text-generation
model_type: llama
language:
- en
license: llama2
quantized_by: Tester
tags:
- gptq
- 4-bit
---
# A tiny model

Prompts look like `{{ messages }}`, and as code:

    {{ messages }}

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("tester/tiny-GPTQ", revision="main")
```

```bash
hf download tester/tiny-GPTQ --revision main --local-dir tiny-GPTQ
```
"""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The parts of a test branch; the defaults are an ordinary 4-bit Llama."""

    model_type: str = "llama"
    bits: int = 4
    group_size: int = 32
    desc_act: bool = False
    sym: bool = True
    static_groups: bool = False
    checkpoint_format: str = "gptq"
    shards: int = 1
    weights_name: str = "model"
    seed: int = 0
    config: Mapping[str, object] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """Write the whole branch into the new `folder` and return it; the same branch is only made once."""
        key = repr(self)
        if key in _MADE:
            folder.mkdir(parents=True)
            for name, content in _MADE[key].items():
                (folder / name).write_bytes(content)
        else:
            self._make(folder)
            _MADE[key] = {path.name: path.read_bytes() for path in folder.iterdir()}
        return folder

    def _make(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        save_weights(folder, self.tensors(), shards=self.shards, name=self.weights_name)
        for name, content in self.documents().items():
            write_json(folder / name, content)
        (folder / "README.md").write_text(README, encoding="utf-8")
        (folder / "LICENSE.txt").write_text("LLAMA 2 COMMUNITY LICENSE AGREEMENT\n", encoding="utf-8")
        (folder / "USE_POLICY.md").write_text("# Acceptable Use Policy\n", encoding="utf-8")
        (folder / "Notice").write_text(NOTICE, encoding="utf-8")
        (folder / "tokenizer.model").write_bytes(b"\x0a\x05tiny")
        seal(folder, parameters={key: getattr(self, key) for key in ("bits", "group_size", "desc_act", "sym")})

    def description(self) -> dict[str, Any]:
        """Return what a build writes into provenance.json about the model."""
        config = {key: value for key, value in self.documents()["config.json"].items() if key != "quantization_config"}
        return known_model(config, "config.json").model_dump(mode="json", exclude={"config"})

    def documents(self) -> dict[str, dict[str, object]]:
        """Return every JSON file but provenance.json."""
        portable = {
            "bits": self.bits,
            "group_size": self.group_size,
            "damp_percent": 0.01,
            "desc_act": self.desc_act,
            "sym": self.sym,
            "true_sequential": True,
        }
        quantization = {
            "quant_method": "gptq",
            **portable,
            "static_groups": self.static_groups,
            "checkpoint_format": self.checkpoint_format,
            "lm_head": False,
        }
        name = {"model_name_or_path": "tester/tiny-GPTQ", "model_file_base_name": self.weights_name}
        vocab = {f"tok{number}": number for number in range(VOCAB - 1)}
        return {
            "config.json": {**self._config(), **self.config, "quantization_config": quantization},
            "quantize_config.json": {**portable, **name},
            "generation_config.json": {"bos_token_id": 1, "eos_token_id": [2], "do_sample": True, "temperature": 0.6},
            "tokenizer.json": {
                "model": {"type": "BPE", "vocab": vocab, "merges": []},
                "added_tokens": [{"id": VOCAB - 1, "content": "/home/file://"}],
            },
            "tokenizer_config.json": {
                "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
                "added_tokens_decoder": {str(VOCAB - 1): {"content": "<s>"}},
            },
            "special_tokens_map.json": {"bos_token": "<s>"},
        }

    def _config(self) -> dict[str, object]:
        return {
            "architectures": [CLASSES[self.model_type]],
            "model_type": self.model_type,
            "hidden_size": HIDDEN,
            "intermediate_size": INTERMEDIATE,
            "num_hidden_layers": BLOCKS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "vocab_size": VOCAB,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
        }

    def tensors(self) -> Tensors:
        """Return every tensor of the weights."""
        random = np.random.default_rng(self.seed)

        def plain(*shape: int) -> npt.NDArray[np.float16]:
            return random.standard_normal(shape).astype(np.float16)

        tensors: Tensors = {
            "model.embed_tokens.weight": plain(VOCAB, HIDDEN),
            "model.norm.weight": plain(HIDDEN),
            "lm_head.weight": plain(VOCAB, HIDDEN),
        }
        for block in range(BLOCKS):
            prefix = f"model.layers.{block}"
            tensors[f"{prefix}.input_layernorm.weight"] = plain(HIDDEN)
            tensors[f"{prefix}.post_attention_layernorm.weight"] = plain(HIDDEN)
            orders = {size: random.permutation(size) for size in (HIDDEN, INTERMEDIATE)}
            for name, (in_features, out_features) in LINEARS.items():
                parts = self._linear(random, in_features, out_features, orders[in_features])
                if self.model_type == "qwen2" and name.endswith(("q_proj", "k_proj", "v_proj")):
                    parts["bias"] = plain(out_features)
                tensors |= {f"{prefix}.{name}.{part}": value for part, value in parts.items()}
        return tensors

    def _linear(
        self, random: np.random.Generator, in_features: int, out_features: int, order: npt.NDArray[np.int64]
    ) -> Tensors:
        size = in_features if self.group_size == -1 else self.group_size
        groups = -(-in_features // size)
        largest = 2**self.bits - 1
        zeros = np.full((groups, out_features), 2 ** (self.bits - 1))
        if not self.sym:
            zeros = random.integers(1, largest + 1, (groups, out_features))
        stored = zeros - 1 if self.checkpoint_format == "gptq" else zeros
        g_idx = np.arange(in_features) // size
        if self.desc_act and not self.static_groups:
            g_idx[order] = np.arange(in_features) // size
        weights = random.integers(0, largest + 1, (in_features, out_features))
        return {
            "qweight": np.array([pack(column, self.bits) for column in weights.T.tolist()], np.int32).T.copy(),
            "qzeros": np.array([pack(row, self.bits) for row in stored.tolist()], np.int32),
            "scales": random.uniform(0.01, 0.02, (groups, out_features)).astype(np.float16),
            "g_idx": g_idx.astype(np.int32),
        }


def pack(values: Sequence[int], bits: int) -> list[int]:
    """Pack values into signed 32-bit words by way of one long integer."""
    stream = sum(value << (bits * position) for position, value in enumerate(values))
    words = [(stream >> (32 * number)) & 0xFFFFFFFF for number in range(len(values) * bits // 32)]
    return [word - (1 << 32) if word >= 1 << 31 else word for word in words]


def save_weights(folder: Path, tensors: Tensors, *, shards: int = 1, name: str = "model") -> None:
    """Write tensors as one file, or as shards with an index."""
    if shards == 1:
        save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number in range(shards):
        part = {key: tensors[key] for key in sorted(tensors)[number::shards]}
        file_name = f"{name}-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file_name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / f"{name}.safetensors.index.json", index)


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def edit_json(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file in place."""
    content = json.loads((folder / name).read_text(encoding="utf-8"))
    change(content)
    write_json(folder / name, content)


def give_other_bits(folder: Path, bits: int, linears: Sequence[str], *, pattern: str = r"+:.*\.down_proj$") -> Path:
    """Pack linears of an ordinary branch again, of other bits, as GPTQModel does by `dynamic`; return the folder."""
    others = Checkpoint(bits=bits).tensors()

    def change(tensors: Tensors) -> None:
        for name in tensors:
            if name.rpartition(".")[0] in linears:
                tensors[name] = others[name]

    edit_tensors(folder, change)
    dynamic = {pattern: {"bits": bits}}
    edit_json(folder, "config.json", lambda config: config["quantization_config"].update(dynamic=dynamic))
    edit_json(folder, "quantize_config.json", lambda config: config.update(dynamic=dynamic))
    return folder


def edit_tensors(folder: Path, change: Callable[[Tensors], object], name: str = "model.safetensors") -> None:
    """Change the tensors of one safetensors file in place."""
    tensors = {key: value.copy() for key, value in load_file(folder / name).items()}
    change(tensors)
    save_file(tensors, folder / name, metadata={"format": "pt"})


def edit_text(folder: Path, name: str, old: str, new: str) -> None:
    """Replace text in a file, which must contain it."""
    text = (folder / name).read_text(encoding="utf-8")
    assert old in text
    (folder / name).write_text(text.replace(old, new), encoding="utf-8")


def seal(folder: Path, *, parameters: Mapping[str, object] | None = None) -> None:
    """Write provenance.json for the files as they are now, keeping the parameters of an older one."""
    path = folder / "provenance.json"
    if parameters is None:
        parameters = json.loads(path.read_text(encoding="utf-8"))["parameters"]
    path.unlink(missing_ok=True)
    files = {
        file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()
    }
    weights = [name for name in files if name.endswith(".safetensors")]
    text = {"source": "tester/text", "revision": "0" * 40, "config": None, "split": "train", "num_samples": 4}
    text |= {"seq_len": 32, "seed": 0, "text_sha256": "0" * 64, "digest": "0" * 64}
    model = {"id": "meta-llama/Llama-2-7b-chat-hf", "revision": "0" * 40, "digest": "0" * 64, "files": {}}
    write_json(
        path,
        {
            "repository": "tester/tiny-GPTQ",
            "branch": "main",
            "made_with": "gptq-packager 0",
            "recipe_digest": "0" * 64,
            "variant_digest": "0" * 64,
            "parameters": parameters,
            "effective": {},
            "base_model": {**model, "dtype": "F16", "num_parameters": 1},
            "calibration": text,
            "evaluation": text,
            "versions": {},
            "device": "cpu",
            "linears": [
                {"name": f"model.layers.{block}.{name}", "loss": 0.1, "damp_percent": 0.01}
                for block in range(BLOCKS)
                for name in LINEARS
            ],
            "weights_bytes": sum(len(files[name]) for name in weights),
            "files": {
                name: {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
                for name, content in files.items()
                if name != ".gitattributes"
            },
        },
    )
