"""Find a decoder's blocks, and what its forward does with them, by one forward on tensors without data.

The model is built in torch's FakeTensorMode: every tensor has a shape and a dtype and takes no memory, so the largest
model is traced in about a second, and no name of an architecture is needed. docs/reference/architectures.md lists
the architectures that this suits, and what each refusal means.
"""

import copy
import json
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv

from packager.errors import SourceError
from packager.model.experts import is_experts
from packager.model.traced_forward import TracedBlock, TracedForward, modules_outside

TRACED_TOKENS = 61  # a prime number, see `_Memory` in traced_forward.py
_MOST_KEPT = 8
_KEYS_AND_VALUES = ("keys", "values")  # what a window limits
_READS_VALUES = (GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException)


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
        cache_bytes_per_token: what the model caches of each token.
        windows: by the number of tokens that layers keep, which are not all, their part of `cache_bytes_per_token`.
        state_bytes: what the model caches besides, however many tokens there are.
    """

    blocks_path: str
    blocks: tuple[TracedBlock, ...]
    embedding_modules: tuple[str, ...]
    head_modules: tuple[str, ...]
    head_takes_states: bool
    num_tokens: int
    hidden_size: int
    cache_bytes_per_token: int
    windows: Mapping[int, int]
    state_bytes: int


_kept: OrderedDict[str, Trace] = OrderedDict()


def trace(model: nn.Module) -> Trace:
    """Trace the model's forward for one row of `TRACED_TOKENS` tokens.

    A build runs the base model and every variant: models of one class, config and dtype are traced once.

    Args:
        model: on the meta device; it is not changed.

    Raises:
        SourceError: the forward fails, or its blocks cannot be run one by one; names the module and the reason.
    """
    config: Any = model.config
    content = json.dumps(_without_paths(json.loads(config.to_json_string(use_diff=False))))
    key = f"{type(model).__qualname__} {next(model.parameters()).dtype} {content}"
    if key not in _kept:
        _kept[key] = _traced(model, TRACED_TOKENS)
        while len(_kept) > _MOST_KEPT:
            _kept.popitem(last=False)
    return _kept[key]


def _without_paths(config: object) -> object:
    """Return a config, and the configs in it, without the folders that they were read from."""
    if not isinstance(config, dict):
        return config
    return {name: _without_paths(value) for name, value in config.items() if name != "_name_or_path"}


def _traced(model: nn.Module, num_tokens: int) -> Trace:
    model = copy.deepcopy(model)
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()) as mode:
        model.to_empty(device="cpu")
        path, blocks, skipped = _find_blocks(model, num_tokens)
        tracer = TracedForward(model, path, blocks, skipped, num_tokens)
        with tracer.recording():
            _forward(model, num_tokens, skipped)
        traced = tracer.blocks()
        head = _trace_head(model, path, traced, tracer.hidden, mode)
        per_token, windows, states = _trace_cache(model, num_tokens, skipped)
    return Trace(
        blocks_path=path, blocks=traced, embedding_modules=tuple(tracer.before), head_modules=head[0],
        head_takes_states=head[1], num_tokens=num_tokens, hidden_size=tracer.hidden.shape[-1],
        cache_bytes_per_token=per_token, windows=windows, state_bytes=states,
    )  # fmt: skip


def _find_blocks(model: nn.Module, num_tokens: int) -> tuple[str, nn.ModuleList, tuple[nn.Module, ...]]:
    """Find the ModuleList that holds the decoder's blocks: of those that are called, the one with the most weights.

    Returns:
        Its name, the list, and the modules that cannot be traced, see `_data_dependent_modules`.

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
        skipped = _data_dependent_modules(model, num_tokens)
    found = [(sum(p.numel() for p in lists[name].parameters()), name) for name in called]
    if not found:
        raise SourceError("the model has no list of blocks", why="its forward calls no member of an nn.ModuleList")
    path = max(found)[1]
    return path, lists[path], skipped


def _outermost_lists(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, nn.ModuleList):
            yield path, child
        else:
            yield from _outermost_lists(child, f"{path}.")


def _trace_head(
    model: nn.Module, path: str, blocks: Sequence[TracedBlock], hidden: Tensor, mode: FakeTensorMode
) -> tuple[tuple[str, ...], bool]:
    """Return `Trace.head_modules` and `Trace.head_takes_states`."""

    def called(inputs: Mapping[str, Tensor]) -> tuple[str, ...]:
        names: list[str] = []
        reached = iter(blocks)
        with ExitStack() as stack:
            skip = lambda *_, **__: next(reached).outputs(hidden)  # noqa: E731
            stack.enter_context(blocks_replaced(model.get_submodule(path), skip))
            for name, module in modules_outside(model, path):
                note = lambda *_, name=name: names.append(name)  # noqa: E731
                stack.callback(module.register_forward_pre_hook(note).remove)
            with torch.no_grad():
                model(**inputs, use_cache=False)
        return tuple(dict.fromkeys(names))

    try:
        with _values_refused(mode):  # a model may search its embeddings for the tokens of its inputs
            return called({"inputs_embeds": hidden}), True
    except Exception:  # noqa: BLE001 - the code of any model; it may need token ids beside embeddings
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long)
    try:
        return called({"input_ids": ids}), False
    except Exception as error:
        raise _cannot_run(error) from error


@contextmanager
def _values_refused(mode: FakeTensorMode) -> Iterator[None]:
    """Raise for an operation whose result's shape, or a Python number, depends on the values of tensors."""
    shape_env, mode.shape_env = mode.shape_env, None
    try:
        yield
    finally:
        mode.shape_env = shape_env


def _trace_cache(model: nn.Module, num_tokens: int, skipped: Sequence[nn.Module]) -> tuple[int, Mapping[int, int], int]:
    """Return `Trace.cache_bytes_per_token`, `Trace.windows` and `Trace.state_bytes`.

    A layer of the cache names its window, which may be longer than any row that is traced; after a step it keeps one
    token less (transformers.cache_utils, DynamicSlidingWindowLayer, 5.23). All else either grows with the row or not.
    """
    fewer, more = (_cached(model, length, skipped) for length in (num_tokens, 2 * num_tokens))
    per_token = states = 0
    windows: Counter[int] = Counter()
    for (window, before), (_, after) in zip(fewer, more, strict=True):
        for name, tensor in after.items():
            if name in _KEYS_AND_VALUES and window > 1 and tensor.shape[-2]:
                size = _size_bytes(tensor) // tensor.shape[-2]
                windows[window - 1] += size
            else:
                size = (_size_bytes(tensor) - _size_bytes(before[name])) // num_tokens if name in before else 0
                states += max(0, _size_bytes(tensor) - 2 * num_tokens * size)
            per_token += size
    return per_token, windows, states


def _size_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _cached(model: nn.Module, num_tokens: int, skipped: Sequence[nn.Module]) -> list[tuple[int, dict[str, Tensor]]]:
    """Return the window of each layer that caches, 0 without one, and what is cached of one row, by name."""
    ids = torch.zeros(1, num_tokens, dtype=torch.long)
    try:
        with torch.no_grad(), modules_skipped(model, skipped):
            output = model(input_ids=ids, use_cache=True)
    except Exception as error:
        raise _cannot_run(error) from error
    caches: list[Any] = [getattr(output, name, None) for name in ("past_key_values", "cache_params")]
    layers = next((cache.layers for cache in caches if hasattr(cache, "layers")), ())
    return [(getattr(layer, "sliding_window", None) or 0, dict(_tensors_of(layer))) for layer in layers]


def _tensors_of(layer: object) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that a layer of a cache holds, numbers apart, in its attributes or in dicts there."""
    for name, value in vars(layer).items():
        for key, each in value.items() if isinstance(value, dict) else (("", value),):
            if isinstance(each, Tensor) and each.ndim:
                yield f"{name}{key}", each


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


def _forward(model: nn.Module, num_tokens: int, skipped: Sequence[nn.Module] = ()) -> None:
    try:
        _run(model, num_tokens, skipped)
    except SourceError:
        raise
    except Exception as error:
        raise _cannot_run(error) from error


def _run(model: nn.Module, num_tokens: int, skipped: Sequence[nn.Module]) -> None:
    device = next(model.parameters()).device
    with torch.no_grad(), modules_skipped(model, skipped):
        model(input_ids=torch.zeros(1, num_tokens, dtype=torch.long, device=device), use_cache=False)


def _cannot_run(error: Exception, where: str = "") -> SourceError:
    what = "transformers cannot run this model on tokens alone"
    if isinstance(error, _READS_VALUES):
        why = "which operations its code calls depends on the values of tensors"
        return SourceError("the model cannot be traced", where=where, why=why)
    return SourceError(what, where=where, why=f"{type(error).__name__}: {error}")


def _data_dependent_modules(model: nn.Module, num_tokens: int) -> tuple[nn.Module, ...]:
    """Return the modules inside blocks whose Python code reads values of tensors, so that they cannot be traced.

    Experts of old modules are such: which tokens they see depends on the data. Each is assumed to return a tensor like
    its input; where that is wrong, the module around it is taken in its place.

    Raises:
        SourceError: the forward fails for another reason, or outside the modules of a block.
    """
    inside = {id(module) for _, blocks in _outermost_lists(model) for block in blocks for module in block.modules()}
    inside -= {id(block) for _, blocks in _outermost_lists(model) for block in blocks}
    names = {id(module): name for name, module in model.named_modules()}
    skipped: dict[int, nn.Module] = {}
    running: list[nn.Module] = []
    first: SourceError | None = None
    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_pre_hook(lambda module, *_: running.append(module)).remove)
            stack.callback(module.register_forward_hook(lambda *_: running.pop() and None).remove)
        while True:
            running.clear()
            try:
                _run(model, num_tokens, tuple(skipped.values()))
                return tuple(skipped.values())
            except Exception as error:
                reads_values = isinstance(error, _READS_VALUES)
                culprit = next((module for module in reversed(running) if id(module) not in skipped), None)
                if first is None:
                    first = _cannot_run(error, names[id(culprit)] if reads_values and culprit is not None else "")
                    first.__cause__ = error
                    if not reads_values:
                        raise first from error
                if culprit is not None and id(culprit) in inside:
                    skipped |= {id(module): module for module in model.modules() if type(module) is type(culprit)}
                    continue
                raise first from first.__cause__


@contextmanager
def modules_skipped(model: nn.Module, modules: Sequence[nn.Module] = ()) -> Iterator[None]:
    """Let experts modules, and others, return tensors like their inputs: the tokens of each expert depend on data."""
    skipped: list[Any] = [*(module for module in model.modules() if is_experts(module)), *modules]
    for module in skipped:
        module.forward = lambda hidden_states, *_args, **_kwargs: torch.empty_like(hidden_states)
    try:
        yield
    finally:
        for module in skipped:
            del module.forward
