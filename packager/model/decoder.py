"""A transformers decoder that is visited one block at a time: its weights come from disk and go again.

The model is built on the meta device, so it costs no memory; embeddings, norms and head are loaded once, blocks when
their turn comes. What a block is called with besides the hidden states (positions, masks, rotary tables) is recorded
from the model's own forward, so nothing here knows any architecture.
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
ReadTensor = Callable[[str], Tensor]
Context = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows that travel through the blocks together.

    Attributes:
        hidden: [rows, seq_len, hidden_size].
        contexts: for each block, the keyword arguments its forward gets; batches of one shape share them.
    """

    hidden: Tensor
    contexts: Sequence[Context]


class Decoder:
    """A causal language model, block by block.

    Make it while no other thread computes: transformers changes torch's default dtype while it builds a model.

    Args:
        folder: with config.json (a checkpoint's quantization_config is ignored: weights come from `read`).
        read: returns a named tensor on the CPU, in any float dtype.
        device: where blocks are computed.
        dtype: of weights and activations.

    Attributes:
        fused: the modules that run fused kernels where the device is CUDA.

    Raises:
        SourceError: transformers cannot build this architecture, or a tensor is missing.
    """

    def __init__(self, folder: Path, read: ReadTensor, *, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self._read = read
        self._model = _skeleton(folder, dtype)
        self.fused = fuse(self._model)
        self._reading: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._reading = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.blocks = cast(nn.ModuleList, self._model.get_submodule(BLOCK_PREFIX))
        self._tied = bool(getattr(self._model.config, "tie_word_embeddings", False))
        self._outside = [name for name in self._model.state_dict() if not name.startswith(f"{BLOCK_PREFIX}.")]
        self._loaded: set[str] = set()

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self.blocks)

    def stream(self) -> Iterator[dict[str, Tensor]]:
        """Yield the weights of each block in turn; the next is read while the caller works on this one, the first now.

        Yields:
            Names relative to the block, tensors on the device, in `dtype`.

        Raises:
            SourceError: a tensor holds NaN or Inf.
        """
        pool = ThreadPoolExecutor(1, thread_name_prefix="read")
        return self._streamed(pool, pool.submit(self._block_weights, 0))

    def _streamed(self, pool: ThreadPoolExecutor, coming: Future[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        with pool:
            for index in range(len(self)):
                weights = coming.result()
                if index + 1 < len(self):
                    coming = pool.submit(self._block_weights, index + 1)
                if self._reading is not None:
                    for tensor in weights.values():
                        tensor.record_stream(torch.cuda.current_stream(self.device))
                yield weights
                del weights

    def _block_weights(self, index: int) -> dict[str, Tensor]:
        """Read the tensors of a block from disk; on CUDA beside what is being computed, finished on return."""
        prefix = f"{BLOCK_PREFIX}.{index}."
        weights = {}
        with torch.cuda.stream(self._reading) if self._reading is not None else nullcontext():
            for name in self.blocks[index].state_dict():
                tensor = self._read(prefix + name).to(self.device, self.dtype)
                if not bool(torch.isfinite(tensor).all()):
                    raise SourceError(
                        "the weights contain NaN or Inf", where=prefix + name, hint="the base model is damaged"
                    )
                weights[name] = tensor
        return weights

    def load_block(self, index: int, weights: Mapping[str, Tensor]) -> nn.Module:
        """Give a block its weights (copies, so that they may be overwritten) and return it."""
        block = self.blocks[index]
        block.load_state_dict({name: tensor.clone() for name, tensor in weights.items()}, assign=True)
        return block.requires_grad_(False)

    def drop_block(self, index: int) -> None:
        """Free a block's weights."""
        self.blocks[index].to("meta")

    def drop_outside_blocks(self) -> None:
        """Free embeddings, norm and head, when only blocks are still to be run; they are read again when needed."""
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
    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Return float32 logits [rows, seq_len, vocab] of the last block's outputs for the token ids they belong to."""

        def replace(_: Tensor, **context: Any) -> Tensor:  # noqa: ARG001
            return hidden

        self._load_outside_blocks(self._outside)
        with self._blocks_replaced(replace):
            return cast(Tensor, self._model(input_ids=ids.to(self.device), use_cache=False).logits).float()

    @contextmanager
    def _blocks_replaced(self, block_forward: Callable[..., Tensor]) -> Iterator[None]:
        """Let the model's own forward run with every block replaced by a function."""
        originals = [block.forward for block in self.blocks]
        for block in self.blocks:
            block.forward = block_forward
        try:
            yield
        finally:
            for block, original in zip(self.blocks, originals, strict=True):
                block.forward = original

    def check_head(self) -> None:
        """Read what `embed` does not need, and let it go: reading finds damage. May run beside `embed`.

        Raises:
            SourceError: a tensor holds NaN or Inf, or is missing.
        """
        for name in self._outside:
            if not name.startswith(f"{_INNER}.") and self._stored(name) == name:
                self._read(name)

    def _load_outside_blocks(self, names: Sequence[str]) -> None:
        """Read some of embeddings, norm and head once they are needed, so that whoever runs the model owns them too."""
        missing = [name for name in names if name not in self._loaded]
        if not missing:
            return
        state = {name: self._read(self._stored(name)).to(self.device, self.dtype) for name in missing}
        self._loaded |= state.keys()
        self._model.load_state_dict(state, strict=False, assign=True)
        for name, module in list(self._model.named_modules()):
            if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
                self._model.set_submodule(name, self._rebuilt(name, module))

    def _stored(self, name: str) -> str:
        """Return the name under which a tensor is stored; a tied head is the embedding."""
        return "model.embed_tokens.weight" if name == "lm_head.weight" and self._tied else name

    def _rebuilt(self, name: str, module: nn.Module) -> nn.Module:
        """Return a module whose buffers are computed, not stored (rotary tables), built again on the device."""
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
def forward(
    decoder: Decoder,
    ids: Tensor,
    *,
    rows: int,
) -> list[Tensor]:
    """Run token ids [num_samples, seq_len] through every block, `rows` to a batch; return the last hidden states."""
    batches = decoder.embed(ids, rows=rows)
    states = [batch.hidden for batch in batches]
    for index, weights in enumerate(decoder.stream()):
        block = decoder.load_block(index, weights)
        for number, batch in enumerate(batches):
            states[number] = run_block(block, states[number], batch.contexts[index])
        decoder.drop_block(index)
    return states


def run_block(block: nn.Module, hidden: Tensor, context: Context) -> Tensor:
    """Call a block; return its hidden states (some architectures wrap them in a tuple)."""
    output = block(hidden, **context)
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)
