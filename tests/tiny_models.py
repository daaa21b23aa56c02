"""Tiny random models of each architecture, saved as a base model's folder, and token rows to calibrate them on."""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from packager.inputs.base_model import SourceModel
from packager.inputs.rows import TokenRows
from packager.model.checkpoint import checkpoint_tensors, split_shards
from packager.quantize.block_store import BlockStore
from packager.quantize.sweep import fingerprint
from packager.receipt import TextRecord
from packager.variant import Variant

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "torch_dtype": "float16",
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def _config(name: str, **fields: Any) -> "Callable[[], PretrainedConfig]":
    """Return what makes a config of transformers' class `name`; importing transformers takes two seconds."""

    def make() -> "PretrainedConfig":
        import transformers

        own = copy.deepcopy(fields)  # a config changes the dicts that it is given
        config: PretrainedConfig = getattr(transformers, name)(**_SIZES, **own)
        return config

    return make


CONFIGS = {
    "llama": _config("LlamaConfig"),
    "llama-tied": _config("LlamaConfig", tie_word_embeddings=True),
    "llama-bias": _config("LlamaConfig", attention_bias=True, mlp_bias=True),
    "llama-attention-bias": _config("LlamaConfig", attention_bias=True),
    "llama3-rope": _config(
        "LlamaConfig",
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
            "rope_theta": 500000.0,
        },
    ),
    "mistral": _config("MistralConfig", sliding_window=None),
    "mistral-sliding": _config("MistralConfig", sliding_window=16),
    "mistral-head-dim": _config("MistralConfig", sliding_window=None, head_dim=32),
    "qwen2": _config("Qwen2Config"),
    "qwen3": _config("Qwen3Config", head_dim=32),
}
WITH_EXPERTS = {
    "qwen3-moe": _config(  # the first block is dense
        "Qwen3MoeConfig", num_experts=6, num_local_experts=6, num_experts_per_tok=2, moe_intermediate_size=32,
        mlp_only_layers=[0], head_dim=32,
    ),
}  # fmt: skip


_saved: dict[tuple[str, int, torch.dtype], dict[str, bytes]] = {}


def save_model(folder: Path, name: str, *, seed: int = 0, dtype: torch.dtype = torch.float16) -> Path:
    """Save a random model of CONFIGS or WITH_EXPERTS; biases and norms are random, so that losing one would show."""
    key = (name, seed, dtype)
    if key not in _saved:
        with tempfile.TemporaryDirectory() as made:
            _save(Path(made), name, seed, dtype)
            _saved[key] = {path.name: path.read_bytes() for path in Path(made).iterdir()}
    folder.mkdir(parents=True, exist_ok=True)
    for file, data in _saved[key].items():
        (folder / file).write_bytes(data)
    torch.manual_seed(seed)  # what a test draws next does not depend on whether the model was there
    return folder


def _save(folder: Path, name: str, seed: int, dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config({**CONFIGS, **WITH_EXPERTS}[name](), dtype=torch.float32)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(0, 0.1)
            elif "norm" in key:
                parameter.uniform_(0.5, 1.5)
            elif "lm_head" not in key and "embed" not in key:
                parameter.normal_(0, 0.08)
    model.to(dtype).save_pretrained(folder)


def token_rows(num_samples: int = 12, seq_len: int = 32, *, vocab_size: int = 128, seed: int = 0) -> TokenRows:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab_size, (num_samples, seq_len), generator=generator)
    record = TextRecord(
        source="random", revision=None, config=None, split=None, num_samples=num_samples, seq_len=seq_len, seed=seed,
        text_sha256="0" * 64, digest=f"{seed:064d}",
    )  # fmt: skip
    return TokenRows(ids=ids, record=record)


def variant(**fields: Any) -> Variant:
    defaults: dict[str, Any] = {
        "branch": "main", "bits": 4, "group_size": 32, "act_order": "none", "sym": True, "damp_percent": 0.01,
        "damp_percent_limit": 0.1, "true_sequential": True, "scale_search": False, "refine": False,
        "effort": "standard", "engine": "native",
    }  # fmt: skip
    return Variant(**{**defaults, **fields})


def open_store(
    source: SourceModel, work: Path, v: Variant, *, device: torch.device | None = None, max_shard_bytes: int = 1 << 30
) -> BlockStore:
    """Open a variant's store below `work` for quantizing `token_rows()`."""
    shards = split_shards(checkpoint_tensors(source.architecture, v), max_shard_bytes, "model")
    parts = fingerprint("f" * 64, source.record.digest, token_rows(), device or torch.device("cpu"), engine_version=1)
    store = BlockStore(work / v.branch, shards, source.architecture, parts, print)
    store.open()
    return store
