"""A transformers decoder that runs one block at a time, with weights that are read from disk when they are needed.

The model is built on the meta device, so it takes no memory. The arguments of a block besides the hidden states
(positions, masks, rotary tables) are recorded from the model's own forward, so no architecture is named here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from packager.errors import SourceError
from packager.model.architecture import BLOCK_PREFIX
from packager.model.fused_blocks import fuse

_INNER = BLOCK_PREFIX.rpartition(".")[0]  # the part of the model that has the blocks, but no head
_EMBEDDING = f"{_INNER}.embed_tokens.weight"
_HEAD = "lm_head.weight"
ReadTensor = Callable[[str], Tensor]
Context = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows that go through the blocks together.

    Attributes:
        hidden: [rows, seq_len, hidden_size].
        contexts: for each block, the keyword arguments of its forward; batches of one shape share them.
    """

    hidden: Tensor
    contexts: Sequence[Context]


class Decoder:
    """A causal language model, block by block.

    Create it while no other thread computes: transformers changes torch's default dtype while it builds a model.

    Args:
        folder: with config.json (a checkpoint's quantization_config is ignored: weights come from `read`).
        read: returns a named tensor on the CPU, in any float dtype; raises KeyError or SourceError if there is none.
        device: where blocks are computed.
        dtype: of weights and activations.

    Attributes:
        fused: the modules that run fused kernels where the device is CUDA.

    Raises:
        SourceError: transformers cannot build this architecture. The methods that read weights raise it too, for a
            tensor that is missing.
    """

    def __init__(self, folder: Path, read: ReadTensor, *, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self._read = read
        self._damaged = f"the model in {folder} is damaged"
        self._model = _skeleton(folder, dtype)
        self.fused = fuse(self._model)
        self._reading: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._reading = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.blocks = cast(nn.ModuleList, self._model.get_submodule(BLOCK_PREFIX))
        self._tied = bool(getattr(self._model.config, "tie_word_embeddings", False))
        self._outside = [name for name in self._model.state_dict() if not name.startswith(f"{BLOCK_PREFIX}.")]
        self._loaded: set[str] = set()

    @property
    def vocab_size(self) -> int:
        """The number of logits per token."""
        return int(self._model.config.vocab_size)  # type: ignore[union-attr, arg-type]

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self.blocks)

    def stream(self) -> Iterator[dict[str, Tensor]]:
        """Yield the weights of each block in turn, and read the next block while the caller works on this one.

        Reading of the first block begins with the call.

        Yields:
            Names relative to the block, tensors on the device, in `dtype`.

        Raises:
            SourceError: a tensor holds NaN or Inf, or is missing.
        """
        pool = ThreadPoolExecutor(1, thread_name_prefix="read")
        return self._streamed(pool, pool.submit(self._block_weights, 0))

    def _streamed(
        self, pool: ThreadPoolExecutor, next_weights: Future[dict[str, Tensor]]
    ) -> Iterator[dict[str, Tensor]]:
        with pool:
            for index in range(len(self)):
                weights = next_weights.result()
                if index + 1 < len(self):
                    next_weights = pool.submit(self._block_weights, index + 1)
                if self._reading is not None:
                    for tensor in weights.values():
                        tensor.record_stream(torch.cuda.current_stream(self.device))
                yield weights
                del weights

    def _block_weights(self, index: int) -> dict[str, Tensor]:
        """Read the tensors of a block from disk; on CUDA on a stream of its own, finished on return."""
        prefix = f"{BLOCK_PREFIX}.{index}."
        weights = {}
        with torch.cuda.stream(self._reading) if self._reading is not None else nullcontext():
            for name in self.blocks[index].state_dict():
                tensor = self._read_tensor(prefix + name).to(self.device, self.dtype)
                if not bool(torch.isfinite(tensor).all()):
                    raise SourceError("the weights contain NaN or Inf", where=prefix + name, hint=self._damaged)
                weights[name] = tensor
        return weights

    def load_block(self, index: int, weights: Mapping[str, Tensor]) -> nn.Module:
        """Copy weights into a block, so that they may be overwritten, and return the block."""
        block = self.blocks[index]
        block.load_state_dict({name: tensor.clone() for name, tensor in weights.items()}, assign=True)
        return block.requires_grad_(False)

    def drop_block(self, index: int) -> None:
        """Free a block's weights."""
        self.blocks[index].to("meta")

    def drop_outside_blocks(self) -> None:
        """Free embeddings, norm and head; they are read again when they are needed."""
        self._loaded.clear()
        for name, child in self._model.named_modules():
            if not name.startswith(BLOCK_PREFIX) and next(child.children(), None) is None:
                child.to("meta")

    @torch.no_grad()
    def embed(self, ids: Tensor, *, rows: int) -> list[Batch]:
        """Return the first block's inputs for token ids [num_samples, seq_len], `rows` to a batch."""
        shared: dict[int, tuple[Context, ...]] = {}
        batches = []
        for part in torch.split(ids, rows):
            hidden, contexts = self._embed_batch(part.to(self.device))
            batches.append(Batch(hidden=hidden, contexts=shared.setdefault(part.shape[0], contexts)))
        return batches

    def _embed_batch(self, ids: Tensor) -> tuple[Tensor, tuple[Context, ...]]:
        inputs: list[Tensor] = []
        contexts: list[Context] = []

        def record(hidden: Tensor, **context: Any) -> Tensor:
            inputs.append(hidden)
            contexts.append(context)
            return hidden

        self._load_outside_blocks([name for name in self._outside if name.startswith(f"{_INNER}.")])
        with self._blocks_replaced(record):
            self._model.get_submodule(_INNER)(input_ids=ids, use_cache=False)
        return inputs[0], tuple(contexts)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits [rows, seq_len, vocab] of the last block's outputs [rows, seq_len, hidden_size].

        Every position is computed by itself, so any part of a row, or parts of several rows, may be given as a row.
        """
        hidden = hidden.to(self.device)

        def keep(states: Tensor, **context: Any) -> Tensor:  # noqa: ARG001
            return states

        self._load_outside_blocks([name for name in self._outside if name != _EMBEDDING])
        with self._blocks_replaced(keep):
            return cast(Tensor, self._model(inputs_embeds=hidden, use_cache=False).logits).float()

    @contextmanager
    def _blocks_replaced(self, block_forward: Callable[..., Tensor]) -> Iterator[None]:
        """Run the model's own forward with every block replaced by a function."""
        for block in self.blocks:
            block.forward = block_forward
        try:
            yield
        finally:
            # Not an assignment of the old method: a block that refers to itself is freed by the garbage collector only.
            for block in self.blocks:
                del block.forward

    def check_head(self) -> None:
        """Read and discard the tensors that `embed` does not read, to find damage early. May run beside `embed`.

        Raises:
            SourceError: a tensor holds NaN or Inf, or is missing.
        """
        for name in self._outside:
            if not name.startswith(f"{_INNER}.") and self._stored(name) == name:
                self._read_tensor(name)

    def _load_outside_blocks(self, names: Sequence[str]) -> None:
        """Read those of embeddings, norm and head that are not loaded yet."""
        missing = [name for name in names if name not in self._loaded]
        if not missing:
            return
        state = {name: self._outside_tensor(name) for name in missing}
        self._loaded |= state.keys()
        self._model.load_state_dict(state, strict=False, assign=True)
        for name, module in list(self._model.named_modules()):
            if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
                self._model.set_submodule(name, self._rebuilt(name, module))

    def _outside_tensor(self, name: str) -> Tensor:
        """Return a tensor outside the blocks, on the device; a tied head shares the memory of a loaded embedding."""
        stored = self._stored(name)
        if stored != name and stored in self._loaded:
            return self._model.get_parameter(stored).data
        return self._read_tensor(stored).to(self.device, self.dtype)

    def _read_tensor(self, name: str) -> Tensor:
        try:
            return self._read(name)
        except KeyError as error:
            raise SourceError(
                "the weights lack a tensor that the model needs",
                where=name,
                why=f"there is no {error.args[0] if error.args else name}",
                hint="the installed transformers may build this architecture with other tensors",
            ) from error

    def _stored(self, name: str) -> str:
        """Return the name under which a tensor is stored; a tied head is the embedding."""
        return _EMBEDDING if name == _HEAD and self._tied else name

    def _rebuilt(self, name: str, module: nn.Module) -> nn.Module:
        """Return a module whose buffers are computed and not stored (rotary tables), built again on the device."""
        try:
            return type(module)(self._model.config).to(self.device)
        except TypeError as error:
            raise SourceError(
                "this architecture computes a buffer that cannot be rebuilt", where=name, why=str(error)
            ) from error


def compute_dtype(base_dtype: str, device: torch.device) -> torch.dtype:
    """Return the dtype of weights and activations: the base model's on a GPU, float32 on a CPU.

    Args:
        base_dtype: the base model's, as its files spell it ("F16", "BF16").
        device: where to compute.
    """
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if "BF16" in base_dtype else torch.float16


def _skeleton(folder: Path, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            build = cast(Callable[..., nn.Module], AutoModelForCausalLM.from_config)
            model = build(config, dtype=dtype, attn_implementation="sdpa")
    except (ValueError, KeyError, OSError) as error:
        raise SourceError("transformers cannot build this model", where=str(folder), why=str(error)) from error
    return model.eval()


@torch.no_grad()
def run_blocks(decoder: Decoder, batches: list[Batch]) -> list[Tensor]:
    """Run batches through every block, each block's weights read once; return the last hidden states of each batch.

    Args:
        decoder: whose blocks.
        batches: from `Decoder.embed`; the list is emptied, so that their inputs are freed as the first block runs.
    """
    contexts = [batch.contexts for batch in batches]
    states = [batch.hidden for batch in batches]
    batches.clear()
    for index, weights in enumerate(decoder.stream()):
        block = decoder.load_block(index, weights)
        for number, context in enumerate(contexts):
            states[number] = run_block(block, states[number], context[index])
        decoder.drop_block(index)
    return states


def forward(decoder: Decoder, ids: Tensor, *, rows: int) -> list[Tensor]:
    """Run token ids [num_samples, seq_len] through every block, `rows` to a batch; return the last hidden states."""
    return run_blocks(decoder, decoder.embed(ids, rows=rows))


def run_block(block: nn.Module, hidden: Tensor, context: Context) -> Tensor:
    """Run a block and return its hidden states (some architectures wrap them in a tuple)."""
    output = block(hidden, **context)
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)
