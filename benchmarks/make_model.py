"""Make a Llama or Qwen3-MoE of any shape with random weights, and a recipe for it; nothing is downloaded.

    python benchmarks/make_model.py FOLDER --layers 40

FOLDER gets model/ (sharded safetensors, fp16, N(0, 0.02), and the demo model's tokenizer), two texts long enough for
the rows that are wanted, and recipe.yaml with the four permutations that people publish. The default shape is that of
Llama-2-13B: 26 GB for 40 layers. With --experts it is a Qwen3-MoE; Qwen3-30B-A3B has --hidden 2048 --heads 32
--kv-heads 4 --head-dim 128 --experts 128 --expert-intermediate 768, 1.3 GB for each layer. Weights are made on the GPU
where there is one, while several threads write earlier ones. The same seed gives the same bytes on the same kind of
device. --config FILE takes the shape of any decoder of transformers from its config.json; only the layers and the
vocabulary are ours.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from packager.inputs.chat_template import chat_template_digest
from packager.inputs.lock_prompt import with_prompt
from packager.model.architecture import architecture_of
from packager.model.describe import describe
from packager.model.lock import Lock, LockedBase, LockedModel
from packager.recipe.file import load_recipe
from packager.recipe.lock_file import lock_path, lock_text
from packager.system.files import write_atomic

DEMO = Path(__file__).parent.parent / "recipes" / "assets" / "demo-llama"
STD = 0.02
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
_WRITERS = 4
_WORDS_PER_DOCUMENT = 150


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model's shape; with the seed and the kind of device, it determines every byte.

    Without experts the model is dense; without head_dim that is hidden / heads. `config` is the text of a config.json
    that takes the place of all sizes but `layers` and `vocab`.
    """

    hidden: int = 5120
    intermediate: int = 13824
    heads: int = 40
    kv_heads: int = 40
    layers: int = 40
    vocab: int = 32000
    head_dim: int = 0
    experts: int = 0
    expert_intermediate: int = 768
    top_k: int = 8
    config: str = ""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Everything that determines what `make` writes; stored beside the model, so that it is written once.

    Without held_out_tokens there are four rows of them, more where rows are short.
    """

    shape: Shape
    rows: int
    seq_len: int
    seed: int
    shard_bytes: int
    on_gpu: bool
    held_out_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """The place of a stored tensor: its shard, and its offset after the header in bytes."""

    name: str
    shape: tuple[int, ...]
    shard: int
    offset: int

    @property
    def elements(self) -> int:
        return int(np.prod(self.shape))


def add_shape_arguments(parser: argparse.ArgumentParser, *, layers: int | None) -> None:
    """Add an option for every field of `Shape`."""
    parser.add_argument(
        "--config", type=Path, help="a config.json whose shape is used; --layers and --vocab alone still count"
    )
    for field in fields(Shape):
        if field.name == "config":
            continue
        default = layers if field.name == "layers" else field.default
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=default, help=f"default {default}")


def shape_of(given: argparse.Namespace) -> Shape:
    """Return the shape that the options of `add_shape_arguments` describe."""
    sizes = {field.name: getattr(given, field.name) for field in fields(Shape) if field.name != "config"}
    return Shape(**sizes, config=given.config.read_text(encoding="utf-8") if given.config else "")


def config_of(shape: Shape, seq_len: int) -> dict[str, Any]:
    """Return config.json in the spellings that transformers 4 and 5 both read."""
    if shape.config:
        own = {"num_hidden_layers": shape.layers, "vocab_size": shape.vocab, "torch_dtype": "float16"}
        ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
        return {**json.loads(shape.config), **own, **ids, "dtype": "float16"}
    experts = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": shape.expert_intermediate,
        "norm_topk_prob": True,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": STD,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": max(4096, seq_len),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_cache": True,
        "vocab_size": shape.vocab,
        **({"head_dim": shape.head_dim} if shape.head_dim else {}),
        **(experts if shape.experts else {}),
    }


def make(folder: Path, spec: ModelSpec) -> float:
    """Write the model, the texts and the recipe, unless the folder has them; return the seconds it took."""
    marker = folder / "made.json"
    wanted = json.dumps(asdict(spec), indent=2).encode() + b"\n"
    if marker.exists() and marker.read_bytes() == wanted:
        return 0.0
    started = time.perf_counter()
    shutil.rmtree(folder / "model", ignore_errors=True)
    marker.unlink(missing_ok=True)
    (folder / "model").mkdir(parents=True)
    config = config_of(spec.shape, spec.seq_len)
    write_atomic(folder / "model" / "config.json", json.dumps(config, indent=2).encode())
    for name in _TOKENIZER:
        shutil.copyfile(DEMO / "model" / name, folder / "model" / name)
    model = describe(folder / "model", None)
    write_weights(folder / "model", model, spec)
    write_texts(folder, spec)
    write_recipe(folder / "recipe.yaml", recipe_of(spec), model)
    write_atomic(marker, wanted)
    return time.perf_counter() - started


def write_recipe(path: Path, recipe: dict[str, Any], model: LockedModel) -> None:
    """Write a recipe and its lock, as `packager lock` would make it of the model and its tokenizer."""
    write_atomic(path, json.dumps(recipe, indent=2).encode())
    folder = path.parent / recipe["base_model"]["path"]
    base = LockedBase(id=recipe["base_model"]["id"], revision=None, files={})
    lock = Lock(
        lock_version=1,
        made_with={"transformers": metadata.version("transformers")},
        base_model=base,
        chat_template_sha256=chat_template_digest(folder),
        model=model,
    )
    lock = with_prompt(lock, load_recipe(path), folder, str(folder), print, partial=False)
    write_atomic(lock_path(path), lock_text(lock).encode())


def write_weights(folder: Path, model: LockedModel, spec: ModelSpec) -> None:
    """Write the shards and their index: the device makes values while threads write earlier ones."""
    pieces, headers = _plan(model, spec.shard_bytes)
    names = [f"model-{number:05d}-of-{len(headers):05d}.safetensors" for number in range(1, len(headers) + 1)]
    device = torch.device("cuda" if spec.on_gpu else "cpu")
    generator = torch.Generator(device).manual_seed(spec.seed)
    largest = max(piece.elements for piece in pieces)
    buffers: queue.Queue[torch.Tensor] = queue.Queue()
    for _ in range(2 * _WRITERS):
        buffers.put(torch.empty(largest, dtype=torch.float16, pin_memory=spec.on_gpu))
    files = [os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644) for name in names]

    def write(piece: _Piece, buffer: torch.Tensor) -> None:
        start = len(headers[piece.shard]) + piece.offset
        _write_all(files[piece.shard], buffer[: piece.elements].view(torch.uint8).numpy(), start)
        buffers.put(buffer)

    try:
        with ThreadPoolExecutor(_WRITERS) as pool:
            for file, header in zip(files, headers, strict=True):
                _write_all(file, np.frombuffer(header, dtype=np.uint8), 0)
            written = []
            for piece in pieces:
                buffer = buffers.get()
                _fill(buffer[: piece.elements], piece, device, generator)
                written.append(pool.submit(write, piece, buffer))
            for each in written:
                each.result()
            # Flush to disk: the next reader may drop the page cache for a cold start.
            list(pool.map(os.fsync, files))
    finally:
        for file in files:
            os.close(file)
    total = sum(2 * piece.elements for piece in pieces)
    index = {"metadata": {"total_size": total}, "weight_map": {piece.name: names[piece.shard] for piece in pieces}}
    write_atomic(folder / "model.safetensors.index.json", json.dumps(index, indent=2).encode())


def _plan(model: LockedModel, shard_bytes: int) -> tuple[list[_Piece], list[bytes]]:
    """Return every tensor's shard and offset, and each shard's header."""
    pieces: list[_Piece] = []
    entries: list[dict[str, Any]] = [{}]
    offset = 0
    for tensor in architecture_of(model, "config.json").tensors:
        size = 2 * int(np.prod(tensor.shape))
        if offset and offset + size > shard_bytes:
            entries.append({})
            offset = 0
        pieces.append(_Piece(name=tensor.name, shape=tuple(tensor.shape), shard=len(entries) - 1, offset=offset))
        span = [offset, offset + size]
        entries[-1][tensor.name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": span}
        offset += size
    headers = []
    for entry in entries:
        text = json.dumps({"__metadata__": {"format": "pt"}, **entry}).encode()
        text += b" " * (-len(text) % 8)
        headers.append(len(text).to_bytes(8, "little") + text)
    return pieces, headers


def _fill(buffer: torch.Tensor, piece: _Piece, device: torch.device, generator: torch.Generator) -> None:
    if len(piece.shape) == 1:  # a norm's weight
        buffer.fill_(1.0)
        return
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    buffer.copy_(torch.empty(piece.elements, dtype=dtype, device=device).normal_(0, STD, generator=generator))


def _write_all(file: int, data: np.ndarray[Any, np.dtype[np.uint8]], offset: int) -> None:
    view = data.data
    while view:
        done = os.pwrite(file, view[: 1 << 28], offset)
        view, offset = view[done:], offset + done


def write_texts(folder: Path, spec: ModelSpec) -> None:
    """Write calibration and evaluation text: random words of the demo's text, as many as the rows need."""
    source = (DEMO / "text" / "calibration.jsonl").read_text(encoding="utf-8").splitlines()
    words = np.array(sorted({word for line in source for word in json.loads(line)["text"].split()}))
    tokenizer = Tokenizer.from_file(str(DEMO / "model" / "tokenizer.json"))
    for number, (name, rows) in enumerate({"calibration": spec.rows, "evaluation": _evaluation_rows(spec)}.items()):
        needed = (rows + 1) * spec.seq_len
        documents = _documents(words, tokenizer, needed, np.random.default_rng([spec.seed, number]))
        lines = "".join(json.dumps({"text": document}, ensure_ascii=False) + "\n" for document in documents)
        write_atomic(folder / f"{name}.jsonl", lines.encode())


def _documents(
    words: np.ndarray[Any, Any], tokenizer: Tokenizer, num_tokens: int, generator: np.random.Generator
) -> Iterator[str]:
    while num_tokens > 0:
        document = " ".join(generator.choice(words, _WORDS_PER_DOCUMENT))
        num_tokens -= len(tokenizer.encode(document).ids)
        yield document


def _evaluation_rows(spec: ModelSpec) -> int:
    return spec.held_out_tokens // spec.seq_len or max(4, -(-64 // spec.seq_len))


def recipe_of(spec: ModelSpec) -> dict[str, Any]:
    """Return the recipe; its variants are those of recipes/llama-2-13b-chat.yaml."""
    return {
        "schema_version": 1,
        "repository": {"id": "benchmark/random-llama-GPTQ"},
        "base_model": {"id": "benchmark/random-llama", "path": "model"},
        "calibration": {"path": "calibration.jsonl", "num_samples": spec.rows, "seq_len": spec.seq_len, "seed": 0},
        "evaluation": {
            "path": "evaluation.jsonl",
            "num_tokens": _evaluation_rows(spec) * spec.seq_len,
            "seq_len": spec.seq_len,
        },
        "defaults": {"bits": 4, "sym": True, "damp_percent": 0.01, "true_sequential": True},
        "variants": [
            {"branch": "main", "group_size": 128, "desc_act": False},
            *({"group_size": group_size, "desc_act": True} for group_size in (32, 64, 128)),
        ],
        "card": {
            "title": "Random Llama",
            "creator": "a random number generator",
            "quantized_by": "benchmark",
            "license": {"id": "apache-2.0"},
            "prompt_template": {"name": "Llama-2-Chat", "template": "[INST] {prompt} [/INST]"},
        },
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    add_shape_arguments(parser, layers=Shape.layers)
    parser.add_argument("--rows", type=int, default=128, help="calibration rows the text must be enough for")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out-tokens", type=int, default=0, help="of the evaluation text (default four rows)")
    parser.add_argument("--shard-bytes", type=int, default=5_000_000_000)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where values are made")
    given = parser.parse_args(arguments)
    spec = ModelSpec(
        shape=shape_of(given),
        rows=given.rows,
        seq_len=given.seq_len,
        seed=given.seed,
        shard_bytes=given.shard_bytes,
        held_out_tokens=given.held_out_tokens,
        on_gpu=given.device == "cuda" or (given.device == "auto" and torch.cuda.is_available()),
    )
    seconds = make(given.folder, spec)
    size = sum(path.stat().st_size for path in (given.folder / "model").iterdir())
    print(f"{given.folder}: {size / 1e9:.2f} GB, {f'made in {seconds:.1f} s' if seconds else 'existed'}")


if __name__ == "__main__":
    main()
