"""Find a decoder's blocks, and what its forward does with them, by one forward on tensors without data.

The model is built in torch's FakeTensorMode: every tensor has a shape and a dtype and takes no memory, so the largest
model is traced in about a second, and no name of an architecture is needed. docs/reference/any-decoder.md describes
what a decoder must be like, and what each refusal means.
"""

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

from packager.errors import SourceError

Group = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TracedBlock:
    """One block of the traced forward.

    Attributes:
        groups: names inside the block of the linears and experts modules that see the same input, in the order in which
            the block reaches them. An experts module is a group by itself.
        held: for each group, bytes of activations that are alive when the block reaches it.
        peak: most bytes of activations that are alive inside the block.
        unreached: linears that the forward did not reach.
        returns_tuple: the block returns a tuple whose first item is the hidden states.
    """

    groups: tuple[Group, ...]
    held: tuple[int, ...]
    peak: int
    unreached: tuple[str, ...]
    returns_tuple: bool


@dataclass(frozen=True, kw_only=True)
class Trace:
    """The result of one traced forward.

    Attributes:
        blocks_path: the name of the ModuleList that holds the blocks.
        blocks: in order.
        embedding_modules: names of the modules outside the blocks whose forward runs before the first block.
        head_modules: names of the modules outside the blocks that run when the blocks are left out: what is after the
            last block, and what cannot be avoided before the first.
        head_takes_states: for `head_modules` the model was given hidden states in place of embeddings; else token ids.
        num_tokens: of the traced forward; `held` and `peak` of the blocks are for as many.
        hidden_size: width of the blocks' inputs and outputs.
        cache_bytes_per_token: what the model caches of each further token.
    """

    blocks_path: str
    blocks: tuple[TracedBlock, ...]
    embedding_modules: tuple[str, ...]
    head_modules: tuple[str, ...]
    head_takes_states: bool
    num_tokens: int
    hidden_size: int
    cache_bytes_per_token: int


def is_experts(module: nn.Module) -> bool:
    """Return whether a module holds the weights of all experts of a layer, as transformers builds them.

    Source: `use_experts_implementation` in transformers 5, integrations/moe.py, which sets these attributes.
    """
    return all(hasattr(module, name) for name in ("is_transposed", "is_concatenated", "has_gate", "down_proj"))


def calibrated_modules(block: nn.Module) -> dict[str, nn.Module]:
    """Return by name the modules of a block whose weights can be quantized: linears, and experts modules."""
    return {
        name: module for name, module in block.named_modules() if isinstance(module, nn.Linear) or is_experts(module)
    }


def trace(model: nn.Module, num_tokens: int) -> Trace:
    """Trace the model's forward for one row of `num_tokens` tokens.

    Args:
        model: on the meta device; it is not changed.
        num_tokens: tokens of the row.

    Raises:
        SourceError: the forward fails, or its blocks cannot be run one by one; names the module and the reason.
    """
    model = copy.deepcopy(model)
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
        model.to_empty(device="cpu")
        path, blocks = find_blocks(model, num_tokens)
        tracer = _Tracer(model, path, blocks)
        with tracer.hooks(), tracer.memory:
            _forward(model, num_tokens)
        head = _trace_head(model, path, tracer.hidden)
        cached = [_cache_bytes(model, length) for length in (num_tokens, 2 * num_tokens)]
    return tracer.result(num_tokens, head, (cached[1] - cached[0]) // num_tokens)


def find_blocks(model: nn.Module, num_tokens: int) -> tuple[str, nn.ModuleList]:
    """Return the ModuleList that holds the decoder's blocks: of those that are called, the one with the most weights.

    Raises:
        SourceError: there is none.
    """
    lists = dict(_outermost_lists(model))
    called: set[str] = set()

    def mark(name: str) -> Callable[..., None]:
        return lambda *_: called.add(name)

    with ExitStack() as stack:
        for name, modules in lists.items():
            for module in modules:
                stack.callback(module.register_forward_pre_hook(mark(name)).remove)
        _forward(model, num_tokens)
    found = [(sum(p.numel() for p in lists[name].parameters()), name) for name in called]
    if not found:
        raise SourceError("the model has no list of blocks", why="its forward calls no member of an nn.ModuleList")
    path = max(found)[1]
    return path, lists[path]


def _outermost_lists(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, nn.ModuleList):
            yield path, child
        else:
            yield from _outermost_lists(child, f"{path}.")


def _trace_head(model: nn.Module, path: str, hidden: Tensor) -> tuple[tuple[str, ...], bool]:
    """Return `Trace.head_modules` and `Trace.head_takes_states`."""

    def called(inputs: Mapping[str, Tensor]) -> tuple[str, ...]:
        names: list[str] = []
        with ExitStack() as stack:
            stack.enter_context(blocks_replaced(model.get_submodule(path), lambda states, *_, **__: states))
            for name, module in _outside(model, path):
                note = lambda *_, name=name: names.append(name)  # noqa: E731
                stack.callback(module.register_forward_pre_hook(note).remove)
            with torch.no_grad():
                model(**inputs, use_cache=False)
        return tuple(dict.fromkeys(names))

    try:
        return called({"inputs_embeds": hidden}), True
    except Exception:  # noqa: BLE001 - the code of any model; it may need token ids beside embeddings
        return called({"input_ids": torch.zeros(hidden.shape[:2], dtype=torch.long)}), False


def _cache_bytes(model: nn.Module, num_tokens: int) -> int:
    """Return the bytes of the tensors that the model caches of one row; 0 for a model that caches nothing."""
    with torch.no_grad(), experts_skipped(model):
        output = model(input_ids=torch.zeros(1, num_tokens, dtype=torch.long), use_cache=True)
    layers = getattr(getattr(output, "past_key_values", None), "layers", ())
    tensors = [value for layer in layers for value in vars(layer).values() if isinstance(value, Tensor)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _outside(model: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if name != path and not name.startswith(f"{path}."):
            yield name, module


@contextmanager
def blocks_replaced(blocks: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Run the model's own forward with every block replaced by a function of its arguments."""
    for block in blocks.children():
        block.forward = forward
    try:
        yield
    finally:
        # Not an assignment of the old method: a block that refers to itself is freed by the garbage collector only.
        for block in blocks.children():
            del block.forward


def _forward(model: nn.Module, num_tokens: int) -> None:
    device = next(model.parameters()).device
    with torch.no_grad():
        try:
            with experts_skipped(model):
                model(input_ids=torch.zeros(1, num_tokens, dtype=torch.long, device=device), use_cache=False)
        except SourceError:
            raise
        except Exception as error:
            raise SourceError(
                "transformers cannot run this model on tokens alone", why=f"{type(error).__name__}: {error}"
            ) from error


@contextmanager
def experts_skipped(model: nn.Module) -> Iterator[None]:
    """Let experts modules return tensors like their inputs: the tokens of each expert depend on data."""
    experts: list[Any] = [module for module in model.modules() if is_experts(module)]
    for module in experts:
        module.forward = lambda hidden_states, *_args, **_kwargs: torch.empty_like(hidden_states)
    try:
        yield
    finally:
        for module in experts:
            del module.forward


class _Memory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the bytes of the storages that operations make, as long as a tensor of theirs is alive."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        weights = (*model.parameters(), *model.buffers())
        self._weights = {_storage(weight) for weight in weights}
        self._references: dict[int, int] = {}
        self._sizes: dict[int, int] = {}
        self.alive = 0
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else (result,):
            # A view of a weight takes no memory of its own.
            if isinstance(item, Tensor) and (storage := _storage(item)) not in self._weights:
                self._add(item, storage)
        self.peak = max(self.peak, self.alive)
        return result

    def _add(self, tensor: Tensor, storage: int) -> None:
        if storage not in self._references:
            self._references[storage], self._sizes[storage] = 0, tensor.untyped_storage().nbytes()
            self.alive += self._sizes[storage]
        self._references[storage] += 1
        weakref.finalize(tensor, self._remove, storage).atexit = False

    def _remove(self, storage: int) -> None:
        self._references[storage] -= 1
        if not self._references[storage]:
            del self._references[storage]
            self.alive -= self._sizes.pop(storage)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@dataclass(kw_only=True)
class _Record:
    """What hooks saw of one block: `(name, shares the input before, bytes alive)` of calibrated modules, and the peak.

    It keeps no input alive: that would count as the block's own memory.
    """

    seen: list[tuple[str, bool, int]] = field(default_factory=list)
    last_input: weakref.ref[Tensor] | None = None
    peak: int = 0
    returns_tuple: bool = False


class _Tracer:
    """Hooks for one forward."""

    def __init__(self, model: nn.Module, path: str, blocks: nn.ModuleList) -> None:
        self._model, self._path, self._blocks = model, path, blocks
        self.memory = _Memory(model)
        self._records: list[_Record] = []
        self._before: list[str] = []
        self._output: Tensor | None = None
        self.hidden = torch.empty(0)
        self._outside_bytes = 0

    @contextmanager
    def hooks(self) -> Iterator[None]:
        with ExitStack() as stack:
            for index, block in enumerate(self._blocks):
                stack.callback(block.register_forward_pre_hook(self._enter(index), with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(self._leave).remove)
                for name, module in calibrated_modules(block).items():
                    stack.callback(module.register_forward_pre_hook(self._reach(name), with_kwargs=True).remove)
            for name, module in _outside(self._model, self._path):
                stack.callback(module.register_forward_pre_hook(self._called(name)).remove)
            yield

    def _enter(self, index: int) -> Callable[..., None]:
        where = f"{self._path}.{index}"

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if len(self._records) != index:
                raise SourceError(
                    "the model does not run its blocks one after the other", where=where,
                    why=f"its forward reaches this block as number {len(self._records)}",
                )  # fmt: skip
            hidden = args[0] if args else kwargs.get("hidden_states")
            if not isinstance(hidden, Tensor):
                raise SourceError("the block's first argument is not the hidden states", where=where)
            if self._output is not None and hidden is not self._output:
                raise SourceError(
                    "the model computes something between two blocks", where=where,
                    why="its input is not the output of the block before it",
                )  # fmt: skip
            self._outside_bytes = self.memory.alive
            self.memory.peak = 0
            self.hidden = hidden
            self._records.append(_Record())

        return enter

    def _reach(self, name: str) -> Callable[..., None]:
        def reach(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            record = self._records[-1]
            shares_input = record.last_input is not None and record.last_input() is x
            record.seen.append((name, shares_input, self.memory.alive - self._outside_bytes))
            record.last_input = weakref.ref(x)

        return reach

    def _leave(self, _: nn.Module, __: Any, output: Any) -> None:
        record = self._records[-1]
        record.returns_tuple = isinstance(output, tuple)
        hidden = output[0] if record.returns_tuple else output
        self._output = hidden if isinstance(hidden, Tensor) else None
        record.peak = self.memory.peak - self._outside_bytes

    def _called(self, name: str) -> Callable[..., None]:
        def called(*_: object) -> None:
            if not self._records and name not in self._before:
                self._before.append(name)

        return called

    def result(self, num_tokens: int, head: tuple[tuple[str, ...], bool], cache_bytes_per_token: int) -> Trace:
        if len(self._records) != len(self._blocks):
            raise SourceError(
                "the model does not run all its blocks", where=self._path,
                why=f"its forward reaches {len(self._records)} of {len(self._blocks)}",
            )  # fmt: skip
        blocks = []
        for block, record in zip(self._blocks, self._records, strict=True):
            groups: list[list[str]] = []
            held: list[int] = []
            for name, shares_input, alive in record.seen:
                if shares_input and not is_experts(block.get_submodule(name)):
                    groups[-1].append(name)
                else:
                    groups.append([name])
                    held.append(alive)
            reached = {name for name, _, _ in record.seen}
            blocks.append(
                TracedBlock(
                    groups=tuple(map(tuple, groups)),
                    held=tuple(held),
                    peak=record.peak,
                    unreached=tuple(name for name in calibrated_modules(block) if name not in reached),
                    returns_tuple=record.returns_tuple,
                )
            )
        return Trace(
            blocks_path=self._path, blocks=tuple(blocks), embedding_modules=tuple(self._before), head_modules=head[0],
            head_takes_states=head[1], num_tokens=num_tokens, hidden_size=self.hidden.shape[-1],
            cache_bytes_per_token=cache_bytes_per_token,
        )  # fmt: skip
