"""Convert GPTQ checkpoints for ONNX Runtime, compute with it on the CPU, write its logits and tokens to files.

Stand-alone, run as `python onnxruntime_probe.py JOB.json ...` where onnxruntime-genai, onnxruntime and onnx are
installed; `packager_isolated.py` describes a job and its output files. Exit status 1 if any job failed.

onnxruntime-genai's model builder reads the checkpoint and writes an ONNX model, whose quantized linears are nodes of
the operator com.microsoft.MatMulNBits. The builder ignores options that it does not know. By default it quantizes what
the checkpoint left in float16, and lets activations be rounded to int8. So the nodes are compared with the checkpoint.
"""

import importlib
import json
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# At the end of the path, so that our folder hides no package.
sys.path.append(str(Path(__file__).parent))
isolated: Any = importlib.import_module("packager_isolated")

PACKAGES = (
    *("onnxruntime-genai", "onnxruntime", "onnx", "onnx-ir", "transformers", "tokenizers", "safetensors", "numpy"),
    "torch",
)
PROVIDER = "CPUExecutionProvider"
# Activations in float32, not in int8.
ACCURACY_LEVEL = 1
# "int4" keeps what is quantized already; the head and the embeddings must be named, or they get 4 bits too.
PRECISION = "int4"
OPTIONS = {
    "accuracy_level": str(ACCURACY_LEVEL),
    "nodes_to_exclude": "/lm_head/MatMul,/model/embed_tokens/Gather",
    # The ring that replaces the cache of sliding windows by default is for the runtime of onnxruntime-genai.
    "windowed_kv_cache": "false",
    "hf_token": "false",
    "hf_remote": "false",
}
# What the builder makes of a linear that holds several, as it is stored or as a node.
PARTS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "query_key_value": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "dense_h_to_4h": ("gate_proj", "up_proj"),
    "dense": ("o_proj",),
    "dense_4h_to_h": ("down_proj",),
}
STORED = re.compile(r"\.layers\.(\d+)\.(?:.*\.)?(\w+)\.qweight$")
NODE = re.compile(r"^/model/layers\.(\d+)/(?:.*/)?(\w+)/MatMulNBits$")
_NUMPY_TYPES = {"tensor(int64)": "int64", "tensor(int32)": "int32", "tensor(float)": "float32"}


def probe(job: dict[str, Any], output: Path) -> dict[str, Any]:
    """Convert the checkpoint, compute the rows' logits, generate greedily.

    The ONNX model lies in a folder of its own below `output`, which is removed at the end.

    Returns:
        The fields of result.json for a job that succeeded.

    Raises:
        RuntimeError: what the builder made is not what the checkpoint says.
    """
    torch: Any = importlib.import_module("torch")
    onnxruntime: Any = importlib.import_module("onnxruntime")
    builder: Any = importlib.import_module("onnxruntime_genai.models.builder")
    folder = Path(job["model_dir"])
    digests = isolated.weights_digests(folder)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=output, prefix=".onnx-") as made:
        convert(builder, folder, Path(made))
        check_nodes(folder, Path(made))
        decoder = OnnxDecoder(onnxruntime, Path(made))
        load_s = time.perf_counter() - started
        started = time.perf_counter()
        rows = (torch.from_numpy(decoder.logits(row)) for row in job["input_ids"])
        isolated.write_logits(output / "logits.npy", rows, len(job["input_ids"]))
        forward_s = time.perf_counter() - started
        ends = isolated.end_tokens(folder)
        clock = isolated.DecodeClock()
        generated = [decoder.greedy(prompt, job["max_new_tokens"], ends, clock) for prompt in job["prompts"]]
    return {
        "versions": isolated.versions(PACKAGES),
        "device": "cpu",
        "dtype": "float32",
        "kernel": f"com.microsoft.MatMulNBits ({PROVIDER})",
        "weights_sha256": digests,
        "generated": generated,
        **clock.fields(),
        "load_s": load_s,
        "forward_s": forward_s,
        "peak_memory_bytes": isolated.peak_memory_bytes(torch, "cpu"),
    }


def convert(builder: Any, folder: Path, made: Path) -> None:
    """Write an ONNX model of the checkpoint in `folder` to the empty folder `made`."""
    places = ("", str(folder), str(made), PRECISION, "cpu", str(made / "cache"))
    options = builder.parse_extra_options(*places, [f"{key}={value}" for key, value in OPTIONS.items()])
    builder.create_model(*places, **options)


def check_nodes(folder: Path, made: Path) -> None:
    """Compare the quantized nodes of an ONNX model with the quantized linears of its checkpoint.

    Raises:
        RuntimeError: other linears are quantized, or in another way: bits, group size, act order, activations.
    """
    onnx: Any = importlib.import_module("onnx")
    quantization = isolated.quantization_config(folder)
    nodes = list(onnx.load(str(made / "model.onnx"), load_external_data=False).graph.node)
    problems = [
        f"{node.name} is of type {node.op_type}" for node in nodes if re.search(r"Quant|Integer|MoE|Bnb4", node.op_type)
    ]
    shapes = tensor_shapes(folder)
    stored = [(part, name) for name in shapes for part in parts_of(STORED.search(name))]
    bits = {part: bits_of(shapes, name) for part, name in stored}
    found: Counter[tuple[int, str]] = Counter()
    for node in nodes:
        if node.op_type == "MatMulNBits":
            parts = list(parts_of(NODE.search(node.name)))
            found.update(parts)
            problems += [] if parts else [f"{node.name} is quantized, in the checkpoint it is not"]
            wanted_bits = bits.get(parts[0], 0) if parts else 0
            problems += [f"{node.name} has {each}" for each in differences(node, quantization, wanted_bits)]
    wanted = Counter(part for part, _ in stored)
    if not wanted:
        problems.append("the checkpoint has no quantized linear")
    problems += [
        f"block {block} has {found[block, name]} quantized {name}, the checkpoint has {wanted[block, name]}"
        for block, name in sorted(wanted | found)
        if found[block, name] != wanted[block, name]
    ]
    if problems:
        more = f"; {len(problems) - 5} more" if len(problems) > 5 else ""
        raise RuntimeError(f"the builder made another model than the checkpoint's: {'; '.join(problems[:5])}{more}")


def parts_of(match: re.Match[str] | None) -> Iterator[tuple[int, str]]:
    """Yield the block and the name of each linear that a tensor or a node, by its name, holds."""
    if match is not None:
        for part in PARTS.get(match[2], (match[2],)):
            yield int(match[1]), part


def differences(node: Any, quantization: dict[str, Any], bits: int) -> list[str]:
    """Return what a MatMulNBits node has that differs from its linears' bits and the checkpoint's config."""
    has = {attribute.name: attribute.i for attribute in node.attribute}
    group_size = has["K"] if quantization["group_size"] == -1 else quantization["group_size"]
    wanted = {"bits": bits, "block_size": group_size, "accuracy_level": ACCURACY_LEVEL}
    found = [
        f"{name} {has.get(name, 0)}, {value} wanted" for name, value in wanted.items() if has.get(name, 0) != value
    ]
    # Its inputs: activations, weights, scales, zeros, g_idx, bias.
    ordered = len(node.input) > 4 and bool(node.input[4])
    if ordered is not bool(quantization["desc_act"]):
        found.append(f"{'a' if ordered else 'no'} g_idx, desc_act is {quantization['desc_act']}")
    return found


def tensor_shapes(folder: Path) -> dict[str, list[int]]:
    """Return the shapes of all tensors of the checkpoint by their names."""
    safetensors: Any = importlib.import_module("safetensors")
    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(str(file), framework="numpy") as stored:
            shapes |= {name: stored.get_slice(name).get_shape() for name in list(stored.keys())}
    return shapes


def bits_of(shapes: dict[str, list[int]], qweight: str) -> int:
    """Return the bits of a linear, by its words and its columns: `dynamic` may give it others than the config's."""
    return 32 * shapes[qweight][0] // shapes[f"{qweight.removesuffix('.qweight')}.g_idx"][0]


class OnnxDecoder:
    """An ONNX model that maps token ids, and the keys and values of the tokens before them, to logits."""

    def __init__(self, onnxruntime: Any, made: Path) -> None:
        """Open the model in `made`."""
        self._numpy: Any = importlib.import_module("numpy")
        options = onnxruntime.SessionOptions()
        # The other loaders compute at the same time; threads that wait for a core would spin.
        options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "0"))
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(str(made / "model.onnx"), options, providers=[PROVIDER])
        decoder = json.loads((made / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
        self._cache_shape = (1, decoder["num_key_value_heads"], 0, decoder["head_size"])
        self._outputs = [each.name for each in self._session.get_outputs()]
        types = {each.name: each.type for each in (*self._session.get_inputs(), *self._session.get_outputs())}
        self._types = {name: _NUMPY_TYPES[kind] for name, kind in types.items()}

    def logits(self, ids: list[int]) -> Any:
        """Return the logits float32 [len(ids), vocab] of tokens with nothing before them."""
        return self._step(ids, 0, {})["logits"][0]

    def greedy(self, prompt: list[int], max_new_tokens: int, ends: list[int], clock: Any) -> list[int]:
        """Return the tokens generated greedily after `prompt`; an end-of-sequence token is the last one."""
        new: list[int] = []
        ids, start = prompt, 0
        cache: dict[str, Any] = {}
        clock.begin(len(prompt))
        while len(new) < max_new_tokens and (not new or new[-1] not in ends):
            found = self._step(ids, start, cache)
            start += len(ids)
            cache = {name.replace("present", "past_key_values", 1): value for name, value in found.items()}
            ids = [int(found["logits"][0, -1].argmax())]
            new += ids
            clock.tick()
        return new

    def _step(self, ids: list[int], start: int, cache: dict[str, Any]) -> dict[str, Any]:
        """Return all outputs for tokens that follow `start` others, whose keys and values are in `cache`."""
        numpy = self._numpy
        values = {
            "input_ids": [ids],
            "attention_mask": [[1] * (start + len(ids))],
            "position_ids": [list(range(start, start + len(ids)))],
        }
        feed = {}
        for each in self._session.get_inputs():
            dtype = self._types[each.name]
            if each.name.startswith("past_key_values."):
                feed[each.name] = cache.get(each.name, numpy.zeros(self._cache_shape, dtype))
            elif each.name in values:
                # Positions of models with images are [3, 1, tokens]: the three axes are equal in text.
                row = numpy.array(values[each.name], dtype)
                feed[each.name] = numpy.broadcast_to(row, (*each.shape[:-2], *row.shape))
            else:
                raise RuntimeError(f"the model has an input {each.name}, which this script cannot fill")
        return dict(zip(self._outputs, self._session.run(self._outputs, feed), strict=True))


if __name__ == "__main__":
    sys.exit(isolated.main(probe, sys.argv[1:]))
