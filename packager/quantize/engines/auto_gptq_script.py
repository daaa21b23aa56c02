"""Quantize one model with AutoGPTQ and write each block as soon as it is finished.

Stand-alone, run as `python auto_gptq_script.py JOB.json` in an environment that has AutoGPTQ and a CUDA GPU. The job is
an object: model_dir (config.json and safetensors), rows (a .npy of int64 [num_samples, seq_len]), output_dir,
gpu_memory_bytes (what torch may allocate; null: no limit), quantize (AutoGPTQ's bits, group_size, damp_percent,
desc_act, static_groups, sym, true_sequential).

AutoGPTQ's own code loads the model, runs its blocks, solves and packs. The script changes:
- Linears are packed when they are solved, not all at the end, so that a block can be written and freed.
- Biases are written where the base model has some. AutoGPTQ writes zeros everywhere.
- A zero of 0 (asymmetric, all weights of a group positive) becomes 1 with a slightly larger scale, because the format
  stores zero - 1: AutoGPTQ writes -1 there, whose bits overwrite the seven zeros beside it.
- NaN and Inf in activations, scales that fp16 cannot hold, and factorisations that fail are errors naming the linear.

Standard output is a stream of JSON objects, one per line, each with an "event":
    start   num_blocks
    linear  name, loss, seconds                          a linear was solved and packed
    block   block, file                                  all linears of a block are in output_dir/file (safetensors)
    done    peak_memory_bytes
    error   kind (factorization, activations, scales, memory, unavailable, other), linear, message, traceback
Exit status 0 after done, 1 after error. Everything that libraries print goes to standard error.
"""

import copy
import gc
import importlib
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# At the end of the path, so that our folder hides no package.
sys.path.append(str(Path(__file__).parents[2] / "prove" / "loaders"))
isolated: Any = importlib.import_module("packager_isolated")

BLOCKS = "model.layers."
# Tokens per batch: the float32 inputs of a 13B model's widest linear are then 226 MB.
BATCH_TOKENS = 4096
# AutoGPTQ logs, for each linear, the loss summed over its weights and divided by the number of rows.
LOSS_LOGGER, LOSS_PREFIX = "auto_gptq.quantization.gptq", "avg loss: "

Emit = Callable[[dict[str, Any]], None]


class FailureError(Exception):
    """A failure that the engine explains to the user: its kind, and the linear concerned."""

    def __init__(self, kind: str, message: str, linear: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.linear = linear


def main(job_file: str) -> int:
    """Run a job; return the exit status."""
    emit = protocol()
    isolated.forbid_network()
    try:
        emit({"event": "done", **quantize(json.loads(Path(job_file).read_text(encoding="utf-8")), emit)})
    except (Exception, SystemExit) as error:
        trace = traceback.format_exc()
        sys.stderr.write(trace)
        emit({"event": "error", **described(error), "message": str(error) or type(error).__name__, "traceback": trace})
        return 1
    return 0


def protocol() -> Emit:
    """Return the function that writes events to standard output; everything else now goes to standard error."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def emit(event: dict[str, Any]) -> None:
        stream.write(json.dumps(event) + "\n")
        stream.flush()

    return emit


def described(error: BaseException) -> dict[str, str]:
    """Return an error's kind and linear; errors of AutoGPTQ and torch are recognised by the names of their classes."""
    if isinstance(error, FailureError):
        return {"kind": error.kind, "linear": error.linear}
    kinds = {"OutOfMemoryError": "memory", "ModuleNotFoundError": "unavailable", "MemoryError": "memory"}
    return {"kind": kinds.get(type(error).__name__, "other"), "linear": ""}


def quantize(job: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Load the model and quantize it with an event per block; return the fields of the last event."""
    torch: Any = importlib.import_module("torch")
    if not torch.cuda.is_available():
        raise FailureError("unavailable", f"torch {torch.__version__} sees no CUDA GPU")
    limit = job["gpu_memory_bytes"]
    limit_gpu_memory(torch, limit)
    auto_gptq: Any = importlib.import_module("auto_gptq")
    numpy: Any = importlib.import_module("numpy")
    rows = torch.from_numpy(numpy.load(job["rows"]))
    config = auto_gptq.BaseQuantizeConfig(**job["quantize"])
    # fp16 whatever the base model has: AutoGPTQ keeps scales in the dtype of the weights, and files hold fp16 scales.
    wrapper = auto_gptq.AutoGPTQForCausalLM.from_pretrained(
        job["model_dir"], config, torch_dtype=torch.float16, use_safetensors=True, attn_implementation="sdpa"
    )
    blocks = Blocks(torch, wrapper.model, config, rows_of=rows.shape, output=Path(job["output_dir"]), emit=emit)
    emit({"event": "start", "num_blocks": blocks.count})
    watch(torch, blocks)
    wrapper.quantize(
        [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows],
        batch_size=batch_size(rows.shape[1]),
        use_triton=False,
        cache_examples_on_gpu=fits_on_gpu(torch, rows.shape, wrapper.model.config.hidden_size, limit),
    )
    if blocks.waiting:
        raise FailureError("other", f"AutoGPTQ left out {', '.join(sorted(blocks.waiting)[:3])}")
    return {"peak_memory_bytes": int(torch.cuda.max_memory_allocated())}


def batch_size(seq_len: int) -> int:
    """Return how many rows of `seq_len` tokens make a batch."""
    return max(1, BATCH_TOKENS // seq_len)


def limit_gpu_memory(torch: Any, limit: int | None) -> None:
    """Let torch allocate at most `limit` bytes of the GPU that AutoGPTQ uses, the first; None for no limit."""
    if limit is not None:
        _, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), 0)


def fits_on_gpu(torch: Any, shape: Any, hidden_size: int, limit: int | None) -> bool:
    """Return whether a block's inputs and outputs fit into half of the usable GPU memory; else they stay in RAM."""
    free, _ = torch.cuda.mem_get_info()
    if limit is not None:
        free = min(free, limit)
    return bool(activation_bytes(shape[0], shape[1], hidden_size) <= free // 2)


def activation_bytes(num_samples: int, seq_len: int, hidden_size: int) -> int:
    """Return the fp16 bytes of a block's inputs and outputs for all rows, and of the position ids beside them."""
    return num_samples * seq_len * (2 * 2 * hidden_size + 8)


def watch(torch: Any, blocks: "Blocks") -> None:
    """Replace AutoGPTQ's solver by one that also packs, checks and reports."""
    gptq: Any = importlib.import_module("auto_gptq.quantization.gptq")
    quantizer: Any = importlib.import_module("auto_gptq.quantization.quantizer")
    loop: Any = importlib.import_module("auto_gptq.modeling._base")
    losses = loss_log()
    solve, find_params = gptq.GPTQ.fasterquant, quantizer.Quantizer.find_params

    def find_params_v1(self: Any, x: Any, weight: bool = False) -> None:
        find_params(self, x, weight=weight)
        avoid_zero(torch, self, x)

    def solve_and_pack(self: Any, **parameters: Any) -> Any:
        name, started, rows = blocks.names[id(self.layer)], time.monotonic(), self.nsamples
        if not bool(torch.isfinite(self.H).all()):
            raise FailureError("activations", "the activations contain NaN or Inf", name)
        losses.clear()
        try:
            scale, zero, g_idx = solve(self, **parameters)
        except torch.linalg.LinAlgError as error:
            raise FailureError("factorization", str(error), name) from error
        blocks.add(name, self.layer, (scale, zero, g_idx), total=losses[-1] * rows, started=started)
        return scale, zero, g_idx

    gptq.GPTQ.fasterquant = solve_and_pack
    quantizer.Quantizer.find_params = find_params_v1
    loop.pack_model = lambda **_: None  # every linear is packed already


def loss_log() -> list[float]:
    """Return a list to which the losses that AutoGPTQ logs are appended from now on."""
    losses: list[float] = []

    class Losses(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if text.startswith(LOSS_PREFIX):
                losses.append(float(text.removeprefix(LOSS_PREFIX)))

    logger = logging.getLogger(LOSS_LOGGER)
    logger.setLevel(logging.INFO)
    logger.addHandler(Losses())
    return losses


def avoid_zero(torch: Any, quantizer: Any, x: Any) -> None:
    """Replace a grid's zeros of 0 by 1 and enlarge the scale, as our own engine does: the format cannot store 0."""
    wrong = quantizer.zero == 0
    high = x.flatten(1).amax(1).clamp(min=0).reshape(quantizer.scale.shape)
    quantizer.scale = torch.where(wrong, high / (quantizer.maxq - 1), quantizer.scale)
    quantizer.zero = torch.where(wrong, torch.ones_like(quantizer.zero), quantizer.zero)


def loss_per_output(total: float, seq_len: int, out_features: int) -> float:
    """Return a loss per output feature and calibration token from AutoGPTQ's total.

    AutoGPTQ's total is the sum over all weights of (w - q)^2 / Hinv_ii^2 / 2 with H = 2/rows sum(x x^T): it counts rows
    where H = 2/tokens sum(x x^T) would count tokens, which makes H, and with it the loss, seq_len times as large. (It
    logs that total divided by the rows once more.) Damping is a fraction of mean(diag H) and scales with it; only the
    1 that replaces the diagonal of a dead column does not.
    """
    return total / (seq_len * out_features)


class Blocks:
    """Packs linears when they are solved, and writes a block when all of its linears are packed.

    Attributes:
        names: the full name of each linear by the identity of its module.
        waiting: the linears that are not solved yet.
        count: the number of blocks.
    """

    def __init__(self, torch: Any, model: Any, config: Any, *, rows_of: Any, output: Path, emit: Emit) -> None:
        self._torch, self._config, self._output, self._emit = torch, config, output, emit
        self._seq_len = int(rows_of[1])
        linears = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and name.startswith(BLOCKS)
        }
        self.names = {id(module): name for name, module in linears.items()}
        self.waiting = set(linears)
        self.count = 1 + max(block_of(name) for name in linears)
        self._tensors: dict[str, Any] = {}

    def add(self, name: str, linear: Any, grid: tuple[Any, Any, Any], *, total: float, started: float) -> None:
        """Pack a solved linear and report its loss; write the block if this was its last linear."""
        has_bias = linear.bias is not None
        packed = selected(name, pack(self._torch, linear, grid, self._config), has_bias=has_bias)
        scales = packed[f"{name}.scales"]
        if not bool((self._torch.isfinite(scales) & (scales > 0)).all()):
            raise FailureError("scales", "a scale does not fit float16", name)
        self._tensors.update(packed)
        loss = loss_per_output(total, self._seq_len, linear.weight.shape[0])
        self._emit({"event": "linear", "name": name, "loss": loss, "seconds": time.monotonic() - started})
        self.waiting.remove(name)
        block = block_of(name)
        if not any(block_of(other) == block for other in self.waiting):
            self._write(block)

    def _write(self, block: int) -> None:
        save_file: Any = importlib.import_module("safetensors.torch").save_file
        path = self._output / f"block-{block:05d}.safetensors"
        temporary = path.with_name(f".tmp-{path.name}")
        save_file(self._tensors, str(temporary))
        temporary.replace(path)
        self._tensors = {}
        gc.collect()
        self._emit({"event": "block", "block": block, "file": path.name})


def block_of(name: str) -> int:
    """Return the block of a linear: 3 of `model.layers.3.self_attn.q_proj`."""
    return int(name.removeprefix(BLOCKS).partition(".")[0])


def pack(torch: Any, linear: Any, grid: tuple[Any, Any, Any], config: Any) -> dict[str, Any]:
    """Pack a solved linear with AutoGPTQ on the CPU, as its pack_model does; return its buffers.

    The module is the one that needs no compiled kernel. With groups and act order AutoGPTQ selects another one, because
    the plain module assumes that g_idx is i // group_size.
    """
    kernels: Any = importlib.import_module("auto_gptq.utils.import_utils")
    module_class = kernels.dynamically_import_QuantLinear(
        use_triton=False,
        desc_act=config.desc_act,
        group_size=config.group_size,
        bits=config.bits,
        disable_exllama=True,
        disable_exllamav2=True,
    )
    out_features, in_features = linear.weight.shape
    module = module_class(config.bits, config.group_size, in_features, out_features, True, weight_dtype=torch.float16)
    solved = copy.deepcopy(linear).to("cpu")
    scale, zero, g_idx = (each.detach().to("cpu", copy=True) for each in grid)  # packing subtracts 1 from zero in place
    module.pack(solved, scale, zero, g_idx)
    return dict(module.state_dict())


def selected(name: str, buffers: dict[str, Any], *, has_bias: bool) -> dict[str, Any]:
    """Return the tensors of a linear that a checkpoint contains, by their full names."""
    kept = ("qweight", "qzeros", "scales", "g_idx", *(("bias",) if has_bias else ()))
    return {f"{name}.{kind}": buffers[kind].contiguous() for kind in kept}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
