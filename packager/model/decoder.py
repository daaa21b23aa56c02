"""A transformers decoder that runs one block at a time, with weights that are read from disk when they are needed.

The model is built on the meta device, so it takes no memory. The arguments of a block besides the hidden states
(positions, masks, rotary tables) are recorded from the model's own forward, so no architecture is named here.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, cast

import torch
from torch import Tensor, nn

from packager.errors import SourceError
from packager.model.batches import BLOCK_READERS
from packager.model.computed_buffers import compute_buffers
from packager.model.contexts import Context, OutputOf, shared_contexts
from packager.model.fused_blocks import fuse
from packager.model.skeleton import build_skeleton, place
from packager.model.staged_copies import StagedCopies
from packager.model.stored_names import ReadTensor, StoredNames, saved_tensors
from packager.model.trace import Trace, blocks_replaced, trace

# Values of a tensor that are checked at once.
_CHECKED_AT_ONCE = 2**26


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows that go through the blocks together.

    Attributes:
        hidden: [rows, seq_len, hidden_size].
        contexts: for each block, the other arguments of its forward; batches of one shape share them.
    """

    hidden: Tensor
    contexts: Sequence[Context]


class _LastBlockReached(Exception):  # noqa: N818
    """Internal signal: the model's forward needs not run further."""


class Decoder:
    """A causal language model, block by block.

    Create it while no other thread computes: transformers changes torch's default dtype while it builds a model.

    Args:
        folder: with config.json (a checkpoint's quantization_config is ignored: weights come from `read`).
        read: returns a named tensor, in any float dtype; raises KeyError or SourceError if there is none. On a GPU it
            may use the current stream.
        names: of the tensors that `read` has; None for those that transformers stores.
        dequantized: see `StoredNames`.
        device: where blocks are computed.
        dtype: of weights and activations.

    Attributes:
        fused: the modules that run fused kernels where the device is CUDA.

    Raises:
        SourceError: transformers cannot build this architecture, or its blocks cannot be run one by one. The methods
            that read weights raise it too, for a tensor that is missing.
    """

    def __init__(
        self,
        folder: Path,
        read: ReadTensor,
        *,
        names: Collection[str] | None = None,
        dequantized: Collection[str] = (),
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.device = device
        self.dtype = dtype
        self._read = read
        self._damaged = f"the model in {folder} is damaged"
        with torch.device("meta"):
            self._model = build_skeleton(folder, dtype)
        stored = saved_tensors(self._model) if names is None else names
        self._names = StoredNames(self._model, stored, dequantized)
        self._trace: Trace = trace(self._model)
        self.fused = fuse(self._model)
        place(self._model, device)
        self._reading: torch.cuda.Stream | None = None
        self._staged = StagedCopies(device)
        if device.type == "cuda":
            self._reading = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._path = self._trace.blocks_path
        self.blocks = cast(nn.ModuleList, self._model.get_submodule(self._path))
        tied: Mapping[str, str] = getattr(self._model, "all_tied_weights_keys", None) or {}
        self._tied = {name: source for name, source in tied.items() if name not in self._names.conversions}
        self._loaded: set[str] = set()

    @property
    def vocab_size(self) -> int:
        """The number of logits per token."""
        return int(self._model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self.blocks)

    def groups(self, index: int) -> tuple[tuple[str, ...], ...]:
        """Return the names of a block's modules that see the same input, in the order in which it reaches them."""
        return self._trace.blocks[index].groups

    def stream(self, *, on_host: bool = False) -> Iterator[dict[str, Tensor]]:
        """Yield the weights of each block in turn, and read the next block while the caller works on this one.

        Reading of the first block begins with the call.

        Args:
            on_host: leave the weights in host memory.

        Yields:
            Names relative to the block, tensors on the device or the host, in `dtype`.

        Raises:
            SourceError: a tensor holds NaN or Inf, or is missing.
        """
        pool = ThreadPoolExecutor(1, thread_name_prefix="read")
        read = partial(self._block_weights, device=torch.device("cpu") if on_host else self.device)
        return self._streamed(pool, read, pool.submit(read, 0))

    def _streamed(
        self,
        pool: ThreadPoolExecutor,
        read: Callable[[int], dict[str, Tensor]],
        next_weights: Future[dict[str, Tensor]],
    ) -> Iterator[dict[str, Tensor]]:
        with pool:
            for index in range(len(self)):
                weights = next_weights.result()
                if index + 1 < len(self):
                    next_weights = pool.submit(read, index + 1)
                for tensor in weights.values():
                    if tensor.is_cuda:
                        tensor.record_stream(torch.cuda.current_stream(self.device))
                yield weights
                del weights

    def _block_weights(self, index: int, *, device: torch.device) -> dict[str, Tensor]:
        """Read the tensors of a block from disk; to a GPU on a stream of its own, finished on return."""
        prefix = f"{self._path}.{index}."
        places = self.blocks[index].state_dict()
        sources = {name: self._tied.get(prefix + name, prefix + name) for name in places}  # blocks may share a module
        checking = Lock()

        def weight(name: str, readers: ThreadPoolExecutor | None = None) -> Tensor:
            with self._on_reading_stream():
                tensor, dtype = self._read_tensor(sources[name], readers), self._dtype_of(places[name])
                tensor = self._staged.copy(tensor, dtype) if device.type == "cuda" else tensor.to(device, dtype)
                with checking:
                    if not _all_finite(tensor):
                        raise SourceError("the weights contain NaN or Inf", where=prefix + name, hint=self._damaged)
                return tensor

        if self.device.type != "cuda":
            return {name: weight(name) for name in places}
        # Parameters that are made of many stored tensors, such as those of experts, are large: one after the other.
        large = [name for name in places if self._names.is_converted(sources[name])]
        with ThreadPoolExecutor(BLOCK_READERS, thread_name_prefix="read") as readers:
            alone = [name for name in places if name not in large]
            found = dict(zip(alone, readers.map(weight, alone), strict=True))
            found |= {name: weight(name, readers) for name in large}
        return {name: found[name] for name in places}

    def _on_reading_stream(self) -> AbstractContextManager[Any]:
        """Return a context in which this thread's GPU work waits for no block, and no block for it."""
        return torch.cuda.stream(self._reading) if self._reading is not None else nullcontext()

    def _dtype_of(self, place: Tensor) -> torch.dtype:
        """Return the dtype in which the model computes with a tensor: integers, and what it keeps in float32, stay."""
        return self.dtype if place.dtype in (torch.float16, torch.bfloat16) else place.dtype

    def load_block(self, index: int, weights: Mapping[str, Tensor]) -> nn.Module:
        """Copy weights into a block on the device, so that they may be overwritten, and return the block."""
        block = self.blocks[index]
        block.to("meta")  # frees the weights of the variant before
        copies = {name: tensor.to(self.device, copy=True) for name, tensor in weights.items()}
        block.load_state_dict(copies, assign=True)
        prefix = f"{self._path}.{index}"
        compute_buffers(self._model, [f"{prefix}.{name}".rstrip(".") for name, _ in block.named_modules()], self.device)
        return block.requires_grad_(False)

    def drop_block(self, index: int) -> None:
        """Free a block's weights."""
        self.blocks[index].to("meta")

    def drop_outside_blocks(self) -> None:
        """Free embeddings, norm and head; they are read again when they are needed."""
        self._loaded.clear()
        for name, module in self._model.named_modules():
            if name != self._path and not name.startswith(f"{self._path}."):
                for tensors in (module._parameters, module._buffers):
                    for key, tensor in tensors.items():
                        if tensor is not None and not tensor.is_meta:
                            tensors[key] = _on_meta(tensor)

    @torch.no_grad()
    def embed(self, ids: Tensor, *, rows: int) -> list[Batch]:
        """Return the first block's inputs for token ids [num_samples, seq_len], `rows` to a batch."""
        earlier: dict[int, Sequence[Context]] = {}
        batches = []
        for part in torch.split(ids, rows):
            hidden, contexts = self._embed_batch(part.to(self.device))
            contexts = shared_contexts(contexts, earlier.get(part.shape[0]))
            earlier.setdefault(part.shape[0], contexts)
            batches.append(Batch(hidden=hidden, contexts=contexts))
        return batches

    def _embed_batch(self, ids: Tensor) -> tuple[Tensor, Sequence[Context]]:
        inputs: list[Tensor] = []
        contexts: list[Context] = []
        outputs: dict[OutputOf, Tensor] = {}

        def record(*args: Any, **kwargs: Any) -> Any:
            hidden, *others = args or (kwargs.pop("hidden_states"),)
            inputs.append(hidden)
            number, traced = len(contexts), self._trace.blocks[len(contexts)]
            contexts.append(
                Context(args=tuple(others), kwargs=kwargs, block=number, passed=traced.passed, outputs=outputs)
            )
            if len(contexts) == len(self):
                raise _LastBlockReached
            return traced.outputs(hidden, {item: OutputOf(block=number, item=item) for item in traced.passed})

        self._load_modules(self._trace.embedding_modules)
        try:
            with blocks_replaced(self.blocks, record):
                self._model(input_ids=ids, use_cache=False)
        except _LastBlockReached:
            return inputs[0], tuple(contexts)
        raise SourceError("the model did not reach its last block", where=f"{self._path}.{len(self) - 1}")

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits [rows, seq_len, vocab] of the last block's outputs [rows, seq_len, hidden_size].

        Every position is computed by itself, so any part of a row, or parts of several rows, may be given as a row.
        """
        hidden = hidden.to(self.device)
        index = -1

        def replace(*_: Any, **__: Any) -> Any:
            nonlocal index
            index += 1
            # What the model computed before its first block does not matter: these are the last block's outputs.
            return self._trace.blocks[index].outputs(hidden)

        self._load_modules(self._trace.head_modules)
        # Not the states themselves: a model may add positions to its embeddings in place.
        inputs = {"inputs_embeds": torch.zeros_like(hidden)}
        if not self._trace.head_takes_states:
            inputs = {"input_ids": torch.zeros(hidden.shape[:2], dtype=torch.int64, device=self.device)}
        with blocks_replaced(self.blocks, replace):
            return cast(Tensor, self._model(**inputs, use_cache=False).logits).float()

    def check_head(self) -> None:
        """Read and discard the tensors that `embed` does not read, to find damage early; beside the blocks.

        Raises:
            SourceError: a tensor holds NaN or Inf, or is missing.
        """
        for name in set(self._trace.head_modules) - set(self._trace.embedding_modules):
            for tensor in self._stored_of(name):
                if tensor not in self._tied:
                    self._read_tensor(tensor)

    def _load_modules(self, names: Sequence[str]) -> None:
        """Read the tensors of the named modules themselves, which are outside the blocks, if they are not loaded."""
        missing = [tensor for name in names for tensor in self._stored_of(name) if tensor not in self._loaded]
        for tensor in missing:
            module, _, key = tensor.rpartition(".")
            place = self._model.get_submodule(module)
            loaded = self._outside_tensor(tensor)
            if key in place._parameters:
                place._parameters[key] = nn.Parameter(loaded, requires_grad=False)
            else:
                place._buffers[key] = loaded
            self._loaded.add(tensor)
        compute_buffers(self._model, names, self.device)

    def _stored_of(self, name: str) -> list[str]:
        """Return the full names of the parameters and stored buffers of a module itself."""
        module = self._model.get_submodule(name)
        computed = module._non_persistent_buffers_set
        stored = [key for key in (*module._parameters, *module._buffers) if key not in computed]
        present = [key for key in stored if getattr(module, key) is not None]
        return [f"{name}.{key}" if name else key for key in present]

    def _outside_tensor(self, name: str) -> Tensor:
        """Return a tensor outside the blocks, on the device; a tied head shares the memory of a loaded embedding."""
        source = self._tied.get(name, name)
        if source != name and source in self._loaded:
            return self._model.get_parameter(source).data
        place = self._model.get_parameter(name) if _is_parameter(self._model, name) else self._model.get_buffer(name)
        return self._read_tensor(source).to(self.device, self._dtype_of(place))

    def _read_tensor(self, name: str, readers: ThreadPoolExecutor | None = None) -> Tensor:
        """Read a parameter; the stored tensors of which it is made side by side, where readers are given.

        They are put together in host memory: several copies of a layer's experts would not fit on a GPU.
        """

        def on_host(stored: str) -> Tensor:
            with self._on_reading_stream():
                return self._read(stored).cpu()

        try:
            if readers is None:
                return self._names.read(name, self._read)
            stored = self._names.conversions[name].names
            return self._names.read(name, dict(zip(stored, readers.map(on_host, stored), strict=True)).__getitem__)
        except KeyError as error:
            raise SourceError(
                "the weights lack a tensor that the model needs",
                where=name,
                why=f"there is no {error.args[0] if error.args else name}",
                hint="the installed transformers may build this architecture with other tensors",
            ) from error


def _is_parameter(model: nn.Module, name: str) -> bool:
    module, _, key = name.rpartition(".")
    return key in model.get_submodule(module)._parameters


def _on_meta(tensor: Tensor) -> Tensor:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.to("meta"), requires_grad=False)
    return tensor.to("meta")


def compute_dtype(base_dtype: str, device: torch.device) -> torch.dtype:
    """Return the dtype of weights and activations: the base model's on a GPU, float32 on a CPU.

    Args:
        base_dtype: the base model's, as its files spell it ("F16", "BF16").
        device: where to compute.
    """
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if "BF16" in base_dtype else torch.float16


@torch.no_grad()
def run_blocks(decoder: Decoder, batches: list[Batch]) -> list[Tensor]:
    """Run batches through every block, each block's weights read once; return the last hidden states of each batch.

    The next block is read beside each one, and no further one: a GPU that is slower than the disk would fill up.

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
        if decoder.device.type == "cuda":
            torch.cuda.current_stream(decoder.device).synchronize()
        decoder.drop_block(index)
    return states


def forward(decoder: Decoder, ids: Tensor, *, rows: int) -> list[Tensor]:
    """Run token ids [num_samples, seq_len] through every block, `rows` to a batch; return the last hidden states."""
    return run_blocks(decoder, decoder.embed(ids, rows=rows))


def run_block(block: nn.Module, hidden: Tensor, context: Context) -> Tensor:
    """Run a block and return its hidden states (some architectures wrap them in a tuple)."""
    args, kwargs = context.given()
    output = block(hidden, *args, **kwargs)
    if context.passed:
        context.keep(output)
    return cast(Tensor, output[0] if isinstance(output, (tuple, list)) else output)


def _all_finite(tensor: Tensor) -> bool:
    """Return whether there is no NaN or Inf, part by part: torch takes five bytes beside each value that it checks."""
    parts = torch.split(tensor.reshape(-1), _CHECKED_AT_ONCE)
    return all(bool(torch.isfinite(part).all()) for part in parts)
