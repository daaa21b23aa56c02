"""Open Llama checkpoints in Acme's runtime, which is plain torch, and write its logits and tokens to files.

Stand-alone, run as `python acme_probe.py JOB.json ...` in an environment of its own, where neither packager nor this
package is installed. `packager_isolated.py` says what a job is and what is written.
"""

import ctypes
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

sys.path.append(os.environ["PACKAGER_ISOLATED"])
isolated: Any = importlib.import_module("packager_isolated")

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "I32": torch.int32}


def read(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of the safetensors files."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        data = bytearray(file.read_bytes())
        begin = 8 + int.from_bytes(data[:8], "little")
        for name, facts in json.loads(data[8:begin]).items():
            if name != "__metadata__":
                first, end = facts["data_offsets"]
                flat = torch.frombuffer(memoryview(data)[begin + first : begin + end], dtype=DTYPES[facts["dtype"]])
                tensors[name] = flat.reshape(facts["shape"])
    return tensors


def unpack(words: Tensor, bits: int) -> Tensor:
    """Unpack int32 [n * bits / 32, m] along the first axis to [n, m]."""
    shifts = torch.arange(0, 32, bits)[:, None]
    values: Tensor = (words[:, None] >> shifts) & (2**bits - 1)
    return values.flatten(0, 1)


class Llama:
    """A Llama with dequantized weights, float32.

    Args:
        folder: the checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.bits = isolated.quantization_config(folder)["bits"]
        self.tensors = read(folder)

    def weight(self, name: str) -> Tensor:
        """Return the weight [out_features, in_features] of a linear."""
        part = {key: self.tensors[f"{name}.{key}"] for key in ("qweight", "qzeros", "scales", "g_idx")}
        groups = part["g_idx"].long()
        zeros = unpack(part["qzeros"].T, self.bits).T + 1  # the format stores zero - 1
        return ((unpack(part["qweight"], self.bits) - zeros[groups]) * part["scales"].float()[groups]).T

    def norm(self, states: Tensor, name: str) -> Tensor:
        """Return the RMSNorm of states [tokens, hidden_size]."""
        weight = self.tensors[f"{name}.weight"].float()
        return functional.rms_norm(states, states.shape[-1:], weight, self.config["rms_norm_eps"])

    def rotate(self, heads: Tensor) -> Tensor:
        """Turn queries or keys [heads, tokens, head_dim] by their positions."""
        dim = heads.shape[-1]
        theta = self.config.get("rope_theta") or self.config["rope_parameters"]["rope_theta"]
        angles = torch.arange(heads.shape[-2])[:, None] * theta ** (-torch.arange(0, dim, 2) / dim)
        cos, sin = (torch.cat([each, each], -1) for each in (angles.cos(), angles.sin()))
        first, second = heads.chunk(2, -1)
        return heads * cos + torch.cat([-second, first], -1) * sin

    def attention(self, states: Tensor, name: str) -> Tensor:
        """Return causal attention over one row."""
        count = self.config["num_attention_heads"]
        shared = count // self.config.get("num_key_value_heads", count)
        query, key, value = (
            (states @ self.weight(f"{name}.{part}_proj").T).view(len(states), -1, self.head_dim).transpose(0, 1)
            for part in "qkv"
        )
        key, value = (each.repeat_interleave(shared, 0) for each in (self.rotate(key), value))
        seen = functional.scaled_dot_product_attention(self.rotate(query), key, value, is_causal=True)
        return seen.transpose(0, 1).flatten(-2) @ self.weight(f"{name}.o_proj").T

    @property
    def head_dim(self) -> int:
        """The length of a head's vectors."""
        return int(self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"])

    def logits(self, ids: list[int]) -> Tensor:
        """Return float32 [tokens, vocab_size] of one row of token ids."""
        embeddings = self.tensors["model.embed_tokens.weight"].float()
        states = embeddings[torch.tensor(ids)]
        for block in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{block}"
            states = states + self.attention(self.norm(states, f"{name}.input_layernorm"), f"{name}.self_attn")
            normed = self.norm(states, f"{name}.post_attention_layernorm")
            gate, up = (normed @ self.weight(f"{name}.mlp.{part}_proj").T for part in ("gate", "up"))
            states = states + (functional.silu(gate) * up) @ self.weight(f"{name}.mlp.down_proj").T
        head = self.tensors.get("lm_head.weight", embeddings)
        return self.norm(states, "model.norm") @ head.float().T


def greedy(model: Llama, prompt: list[int], count: int, ends: list[int], clock: Any) -> list[int]:
    """Return up to `count` tokens after a prompt; an end-of-sequence token is the last one."""
    made: list[int] = []
    clock.begin(len(prompt))
    while len(made) < count and not (made and made[-1] in ends):
        made.append(int(model.logits([*prompt, *made])[-1].argmax()))
        clock.tick()
    return made


def write_logits(path: Path, rows: Tensor) -> None:
    """Write float32 [rows, tokens, vocab_size] as numpy does, which this environment does not have."""
    header = str({"descr": "<f4", "fortran_order": False, "shape": tuple(rows.shape)})
    header += " " * (-(len(header) + 11) % 64) + "\n"
    data = ctypes.string_at(rows.data_ptr(), rows.numel() * 4)
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + data)


def probe(job: dict[str, Any], output: Path) -> dict[str, Any]:
    """Open the checkpoint, compute the rows' logits, generate greedily; return the fields of result.json."""
    folder, started = Path(job["model_dir"]), time.perf_counter()
    digests = isolated.weights_digests(folder)
    model, clock = Llama(folder), isolated.DecodeClock()
    loaded = time.perf_counter()
    write_logits(output / "logits.npy", torch.stack([model.logits(row) for row in job["input_ids"]]))
    forward_s = time.perf_counter() - loaded
    ends = isolated.end_tokens(folder)
    return {
        "generated": [greedy(model, prompt, job["max_new_tokens"], ends, clock) for prompt in job["prompts"]],
        **clock.fields(),
        "versions": isolated.versions(["torch"]),
        "device": "cpu",
        "dtype": "float32",
        "kernel": "acme_probe.Llama",
        "weights_sha256": digests,
        "load_s": loaded - started,
        "forward_s": forward_s,
        "peak_memory_bytes": isolated.peak_memory_bytes(torch, "cpu"),
    }


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(isolated.main(probe, sys.argv[1:]))
