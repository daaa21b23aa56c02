"""What hooks and operations of one traced forward show of a decoder's blocks, and what forbids to run them alone."""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from packager.errors import SourceError
from packager.model.experts import is_experts

Group = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TracedBlock:
    """One block of the traced forward.

    Attributes:
        groups: names inside the block of the linears and experts modules that see the same input, in the order in which
            the block reaches them. An experts module is a group by itself.
        held: for each group, bytes of activations that are alive when the block reaches it.
        peak: most bytes of activations that are alive inside the block.
        held_pairs, peak_pairs: likewise of activations with a value for each pair of tokens of a row, such as the
            scores of an attention that stores them; `held` and `peak` are without these.
        top_k: for each experts module, how many experts a token goes to; 0 if its arguments do not show it.
        unreached: linears that the forward did not reach.
        skipped: modules whose code reads values of tensors, so that it was not run.
        num_outputs: items of the tuple or list that the block returns, hidden states first; 0: it returns them alone.
        passed: numbers of those items that a later block takes as an argument.
    """

    groups: tuple[Group, ...]
    held: tuple[int, ...]
    held_pairs: tuple[int, ...]
    peak: int
    peak_pairs: int
    top_k: Mapping[str, int]
    unreached: tuple[str, ...]
    skipped: tuple[str, ...]
    num_outputs: int
    passed: tuple[int, ...]

    def outputs(self, hidden: Tensor, others: Mapping[int, Any] | None = None) -> Any:
        """Return hidden states in the form in which the block returns its own, other items None or as given."""
        if not self.num_outputs:
            return hidden
        return (hidden, *((others or {}).get(item) for item in range(1, self.num_outputs)))


def calibrated_modules(block: nn.Module) -> dict[str, nn.Module]:
    """Return by name the modules of a block whose weights can be quantized: linears, and experts modules."""
    return {
        name: module for name, module in block.named_modules() if isinstance(module, nn.Linear) or is_experts(module)
    }


def modules_outside(model: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that are not in the list of blocks at `path`, with their names; the model's own name is ""."""
    for name, module in model.named_modules():
        if name != path and not name.startswith(f"{path}."):
            yield name, module


@dataclass
class _Bytes:
    """Bytes that are alive now, and the most since `most` was set: by token, and of values of pairs of tokens."""

    alive: int = 0
    most: int = 0

    def add(self, size_bytes: int) -> None:
        self.alive += size_bytes
        self.most = max(self.most, self.alive)


class _Memory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the bytes of the storages that operations make, as long as a tensor of theirs is alive.

    A storage of num_tokens^2 values, or a multiple, has values of pairs of tokens: num_tokens is a prime number that
    divides no width of a model. Of torch's own attention the result alone is counted: on the CPU it may store scores of
    pairs, and scaled queries and keys, which its kernels for GPUs do not.
    """

    def __init__(self, model: nn.Module, num_tokens: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._num_pairs = num_tokens**2
        self.in_attention = False
        weights = (*model.parameters(), *model.buffers())
        self._weights = {_storage(weight) for weight in weights}
        self._references: dict[int, int] = {}
        self._sizes: dict[int, tuple[_Bytes, int]] = {}
        self._from_blocks: set[int] = set()
        self._allowed: set[int] | None = None
        self.inside = False
        self.by_token = _Bytes()
        self.by_pair = _Bytes()
        self.late_use = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        used = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)} - self._weights
        result = func(*args, **(kwargs or {}))
        if self._allowed is not None and not self.late_use and (used & self._sizes.keys()) - self._allowed:
            self.late_use = str(func)
        changes = func._schema.is_mutable
        from_blocks = self.inside or not used.isdisjoint(self._from_blocks)
        for item in result if isinstance(result, (tuple, list)) else (result,):
            # A view of a weight takes no memory of its own.
            if isinstance(item, Tensor) and (storage := _storage(item)) not in self._weights:
                self._add(item, storage)
                if self._allowed is not None:
                    self._allowed.add(storage)
                if from_blocks and (changes or storage not in used):  # a view has the values of what it shows
                    self._from_blocks.add(storage)
        return result

    def _add(self, tensor: Tensor, storage: int) -> None:
        if storage not in self._references:
            size_bytes = tensor.untyped_storage().nbytes()
            is_of_pairs = size_bytes // tensor.element_size() % self._num_pairs == 0
            counter = self.by_pair if is_of_pairs else self.by_token
            size_bytes *= not self.in_attention
            self._references[storage], self._sizes[storage] = 0, (counter, size_bytes)
            counter.add(size_bytes)
        self._references[storage] += 1
        weakref.finalize(tensor, self._remove, storage).atexit = False

    def _remove(self, storage: int) -> None:
        self._references[storage] -= 1
        if not self._references[storage]:
            del self._references[storage]
            counter, size_bytes = self._sizes.pop(storage)
            counter.alive -= size_bytes
            self._from_blocks.discard(storage)

    def count(self, tensor: Tensor) -> None:
        """Count the storage of a tensor that was made where nothing is counted."""
        counter, size_bytes = self._sizes[_storage(tensor)]
        if not size_bytes:
            size_bytes = tensor.untyped_storage().nbytes()
            self._sizes[_storage(tensor)] = counter, size_bytes
            counter.add(size_bytes)

    def mark(self, tensor: Tensor) -> None:
        """Note that a block gave a tensor its values."""
        self._from_blocks.add(_storage(tensor))

    def is_from_blocks(self, tensor: Tensor) -> bool:
        """Return whether the values of a tensor depend on what a block computed."""
        return _storage(tensor) in self._from_blocks

    def allow_only(self, tensor: Tensor) -> None:
        """From now on, note in `late_use` the first operation on another tensor that exists already."""
        self._allowed = {_storage(tensor)}


class _Attention(TorchFunctionMode):
    """Tell a `_Memory` what runs inside torch's own attention."""

    def __init__(self, memory: _Memory) -> None:
        super().__init__()
        self._memory = memory

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self._memory.in_attention = func is scaled_dot_product_attention
        try:
            result = func(*args, **(kwargs or {}))
        finally:
            self._memory.in_attention = False
        if func is scaled_dot_product_attention:
            self._memory.count(result)
        return result


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@dataclass(kw_only=True)
class _Record:
    """What hooks saw of one block: `(name, shares the input before, bytes alive, of pairs)` of modules, and the peaks.

    It keeps no input alive: that would count as the block's own memory.
    """

    seen: list[tuple[str, bool, int, int]] = field(default_factory=list)
    last_input: weakref.ref[Tensor] | None = None
    last_version: int = 0
    peak: int = 0
    peak_pairs: int = 0
    top_k: dict[str, int] = field(default_factory=dict)
    num_outputs: int = 0
    passed: list[int] = field(default_factory=list)


class TracedForward:
    """Record one forward of a model.

    Args:
        model: in torch's FakeTensorMode.
        path: the name of the list of its blocks.
        blocks: that list.
        skipped: modules that are not run.
        num_tokens: of the row that the forward is given.

    Attributes:
        before: names of modules outside the blocks that ran before the first block.
        hidden: the input of the last block.
    """

    def __init__(
        self, model: nn.Module, path: str, blocks: nn.ModuleList, skipped: Sequence[nn.Module], num_tokens: int
    ) -> None:
        self._model, self._path, self._blocks = model, path, blocks
        self._skipped = {id(module) for module in skipped}
        self._memory = _Memory(model, num_tokens)
        self._records: list[_Record] = []
        self._output: Tensor | None = None
        self._others: list[tuple[int, int, Tensor]] = []
        self._left_in_containers: list[Tensor] = []
        self._outside_bytes = self._outside_pairs = 0
        self.before: list[str] = []
        self.hidden: Tensor

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the forward that is run meanwhile."""
        with ExitStack() as stack:
            for index, block in enumerate(self._blocks):
                stack.callback(block.register_forward_pre_hook(self._enter(index), with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(self._leave, with_kwargs=True).remove)
                for name, module in calibrated_modules(block).items():
                    reach = self._reach(name, is_experts(module))
                    stack.callback(module.register_forward_pre_hook(reach, with_kwargs=True).remove)
            for name, module in modules_outside(self._model, self._path):
                stack.callback(module.register_forward_pre_hook(self._called(name)).remove)
            stack.enter_context(self._memory)
            stack.enter_context(_Attention(self._memory))
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
            self._check_arguments(hidden, args, kwargs, where)
            by_token, by_pair = self._memory.by_token, self._memory.by_pair
            self._outside_bytes, self._outside_pairs = by_token.alive, by_pair.alive
            by_token.most = by_pair.most = 0
            self._memory.inside = True
            self.hidden = hidden
            self._records.append(_Record())

        return enter

    def _check_arguments(self, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], where: str) -> None:
        """Refuse arguments that are computed from an earlier block's outputs; note those that are its outputs.

        What blocks themselves write to dicts and lists that they share is theirs to read.
        """
        for name, value in (*enumerate(args), *kwargs.items()):
            for tensor, in_container in _tensors(value):
                if tensor is hidden or not self._memory.is_from_blocks(tensor):
                    continue
                if in_container and any(tensor is left for left in self._left_in_containers):
                    continue
                source = next(((block, item) for block, item, other in self._others if other is tensor), None)
                if source is None or in_container or value is not tensor:
                    raise SourceError(
                        "the model gives a block what it computed from another block's outputs", where=where,
                        why=f"in its argument {name}",
                    )  # fmt: skip
                self._records[source[0]].passed.append(source[1])

    def _reach(self, name: str, are_experts: bool) -> Callable[..., None]:
        def reach(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            record = self._records[-1]
            # A tensor that was changed in place since is another input.
            last = record.last_input() if record.last_input is not None else None
            shares_input = last is not None and last is x and record.last_version == last._version
            # Less than before the block if it freed what the model held.
            held = max(self._memory.by_token.alive - self._outside_bytes, 0)
            held_pairs = max(self._memory.by_pair.alive - self._outside_pairs, 0)
            record.seen.append((name, shares_input, held, held_pairs))
            record.last_input, record.last_version = weakref.ref(x), x._version
            if are_experts:
                # Their arguments: hidden_states, top_k_index [tokens, top_k], top_k_weights.
                indices = [*args, *kwargs.values()][1:2]
                record.top_k[name] = indices[0].shape[-1] if indices and isinstance(indices[0], Tensor) else 0

        return reach

    def _leave(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        number, record = len(self._records) - 1, self._records[-1]
        record.num_outputs = len(output) if isinstance(output, (tuple, list)) else 0
        hidden = output[0] if record.num_outputs else output
        if not isinstance(hidden, Tensor):
            raise SourceError(
                "the block does not return hidden states", where=f"{self._path}.{number}",
                why=f"it returns {type(hidden).__name__}",
            )  # fmt: skip
        self._output = hidden
        if record.num_outputs:
            others = enumerate(output[1:], 1)
            self._others += [(number, item, other) for item, other in others if isinstance(other, Tensor)]
        self._left_in_containers = [x for x, shared in _tensors((*args, *kwargs.values())) if shared]
        for tensor in (x for x in tree_leaves(output) if isinstance(x, Tensor)):
            self._memory.mark(tensor)
        record.peak = max(self._memory.by_token.most - self._outside_bytes, 0)
        record.peak_pairs = max(self._memory.by_pair.most - self._outside_pairs, 0)
        self._memory.inside = False
        if len(self._records) == len(self._blocks):
            self._memory.allow_only(hidden)

    def _called(self, name: str) -> Callable[..., None]:
        def called(*_: object) -> None:
            if not self._records and name not in self.before:
                self.before.append(name)

        return called

    def blocks(self) -> tuple[TracedBlock, ...]:
        """Return what was recorded.

        Raises:
            SourceError: the blocks cannot be run one by one.
        """
        if len(self._records) != len(self._blocks):
            raise SourceError(
                "the model does not run all its blocks", where=self._path,
                why=f"its forward reaches {len(self._records)} of {len(self._blocks)}",
            )  # fmt: skip
        if self._memory.late_use:
            raise SourceError(
                "what the model computes after its last block depends on more than that block's output",
                where=f"{self._path}.{len(self._blocks) - 1}",
                why=f"{self._memory.late_use} takes a tensor from before",
            )  # fmt: skip
        return tuple(self._traced(*pair) for pair in zip(self._blocks, self._records, strict=True))

    def _traced(self, block: nn.Module, record: _Record) -> TracedBlock:
        groups: list[list[str]] = []
        held: list[tuple[int, int]] = []
        for name, shares_input, *alive in record.seen:
            if shares_input and not is_experts(block.get_submodule(name)):
                groups[-1].append(name)
            else:
                groups.append([name])
                held.append((alive[0], alive[1]))
        reached = {name for name, *_ in record.seen}
        return TracedBlock(
            groups=tuple(map(tuple, groups)),
            held=tuple(by_token for by_token, _ in held),
            held_pairs=tuple(by_pair for _, by_pair in held),
            peak=record.peak,
            peak_pairs=record.peak_pairs,
            top_k=record.top_k,
            unreached=tuple(name for name in calibrated_modules(block) if name not in reached),
            skipped=tuple(name for name, module in block.named_modules() if id(module) in self._skipped),
            num_outputs=record.num_outputs,
            passed=tuple(sorted(set(record.passed))),
        )


def _tensors(value: Any, shared: bool = False) -> Iterator[tuple[Tensor, bool]]:
    """Yield the tensors in a value, and whether each is in a dict or a list, which blocks share."""
    if isinstance(value, Tensor):
        yield value, shared
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item, shared or isinstance(value, list))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item, True)
