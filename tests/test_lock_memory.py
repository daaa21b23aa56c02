"""The memory figures of a lock against real forwards on the CPU, whose tensors have data."""

import json
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from packager.model.architecture import architecture_of
from packager.model.describe import describe
from packager.model.lock import LockedKind, LockedModel
from packager.model.name_patterns import names_of, read_numbers
from tests.samples import sampled
from tests.tiny_decoders import open_decoder, tiny_decoder, token_ids

# Attention that stores scores for pairs of tokens (gemma2, bloom) and attention that does not; blocks of two kinds, of
# which the second takes less.
NAMES = ("llama", "gpt2", "gemma2", "bloom", "lfm2", "qwen3_5_text")


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make while they, or views of them, are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.holders: Counter[tuple[int, int]] = Counter()
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in (x for x in tree_leaves(result) if isinstance(x, Tensor)):
            storage = (tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
            if storage in self.holders or storage[0] not in given:
                self._hold(tensor, storage)
        self.most = max(self.most, self.now)
        return result

    def _hold(self, tensor: Tensor, storage: tuple[int, int]) -> None:
        self.now += storage[1] * (self.holders[storage] == 0)
        self.holders[storage] += 1
        weakref.finalize(tensor, self._free, storage)

    def _free(self, storage: tuple[int, int]) -> None:
        self.holders[storage] -= 1
        if not self.holders[storage]:
            del self.holders[storage]
            self.now -= storage[1]


class Measured:
    """What one block of a real forward takes: at each module, and at most."""

    def __init__(self) -> None:
        self.held: dict[str, int] = {}
        self.peak = 0


@contextmanager
def measuring(block: nn.Module, live: Live) -> Iterator[Measured]:
    measured, before = Measured(), 0

    def enter(*_: object) -> None:
        nonlocal before
        before = live.now
        live.most = before

    def leave(*_: object) -> None:
        measured.peak = live.most - before

    def reach(name: str) -> Any:
        def note(*_: object) -> None:
            measured.held.setdefault(name, live.now - before)

        return note

    hooks = [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            hooks.append(module.register_forward_pre_hook(reach(name)))
    yield measured
    for hook in hooks:
        hook.remove()


@pytest.fixture(scope="module", params=sampled(NAMES, "llama", "lfm2"))
def described(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[LockedModel, Any]:
    folder = tiny_decoder(request.param, tmp_path_factory.mktemp("m") / "model", dtype=torch.bfloat16)
    return describe(folder, None), open_decoder(folder, request.param)[0]


def measure(model: Any, locked: LockedModel, kind: LockedKind, tokens: int) -> Measured:
    block = model.get_submodule(f"{locked.blocks_path}.{read_numbers(kind.blocks)[0]}")
    with torch.no_grad(), Live() as live, measuring(block, live) as measured:
        model(input_ids=token_ids(1, tokens), use_cache=False)
    return measured


@pytest.mark.parametrize("tokens", sampled([60, 160], 60))
def test_activations_are_those_of_a_real_forward(described: tuple[LockedModel, Any], tokens: int) -> None:
    locked, model = described
    for kind in locked.kinds:
        measured = measure(model, locked, kind, tokens)
        for group in kind.groups:
            planned = tokens * group.held_bytes + tokens**2 * group.held_bytes_per_pair
            assert planned == pytest.approx(measured.held[group.linears[0].module], rel=0.06, abs=600 * tokens // 40)
        planned = tokens * kind.peak_bytes + tokens**2 * kind.peak_bytes_per_pair
        # A plan adds the largest of both parts, which need not be alive at the same time.
        assert 0.9 * measured.peak <= planned <= 1.75 * measured.peak


# Windows in every layer and in some, keys that layers share, states beside keys or in their place, and latent keys.
CACHES = (
    "llama", "mistral", "gemma3_text", "qwen2:windowed", "llama4_text", "gemma3n_text", "qwen3_next", "lfm2", "jamba",
    "mamba2", "deepseek_v3",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", sampled(CACHES, "llama", "gemma3_text", "lfm2"))
def test_the_cache_is_that_of_a_real_forward(name: str, tmp_path: Path) -> None:
    """The windows are of 8 tokens: rows that are shorter, longer, and read token by token."""
    folder = tiny_decoder(name, tmp_path / "model", dtype=torch.bfloat16)
    locked, model = describe(folder, None), open_decoder(folder, name)[0]
    architecture = architecture_of(locked, "")

    def cached(output: Any) -> int:
        cache = getattr(output, "past_key_values", None)
        layers = (output.cache_params if cache is None else cache).layers
        return sum(x.numel() * x.element_size() for layer in layers for x in tree_leaves(vars(layer)) if is_cached(x))

    def is_cached(value: object) -> bool:
        return isinstance(value, Tensor) and value.ndim > 1

    with torch.no_grad():
        for tokens in (3, 7, 8, 40):
            output = model(input_ids=token_ids(1, tokens), use_cache=True)
            assert cached(output) == architecture.cache_bytes(tokens) > 0, tokens
        if getattr(output, "past_key_values", None) is not None:
            model(input_ids=token_ids(1, 1), past_key_values=output.past_key_values, use_cache=True)
            assert cached(output) == architecture.cache_bytes(41)


@pytest.mark.slow
def test_a_window_longer_than_any_traced_row_is_known(tmp_path: Path) -> None:
    """Gemma 3 1B: of 26 layers every sixth keeps all tokens, the others the last 511 before the present one."""
    config = {
        "model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512,
        "vocab_size": 262144, "dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    architecture = architecture_of(describe(tmp_path, None), "")
    layer = 2 * 2 * 256
    assert architecture.cache_bytes(100) == 26 * layer * 100
    assert architecture.cache_bytes(32768) == layer * (4 * 32768 + 22 * 511)


def test_what_a_gpu_does_not_store_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention whose values have another width than its keys: on a CPU torch stores scores, scaled queries and keys.

    A kernel for GPUs stores its result alone: with such a one, the figures are those of a real forward.
    """
    folder = tiny_decoder("deepseek_v3", tmp_path / "model", dtype=torch.bfloat16)
    locked, model = describe(folder, None), open_decoder(folder, "deepseek_v3")[0]

    def fused(query: Tensor, _key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
        return query.new_zeros(*query.shape[:-1], value.shape[-1])

    stored = [measure(model, locked, kind, 60).peak for kind in locked.kinds]
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused)
    for kind, most in zip(locked.kinds, stored, strict=True):
        assert kind.peak_bytes_per_pair == 0
        assert 60 * kind.peak_bytes == measure(model, locked, kind, 60).peak < most / 2


def test_weights_are_those_of_the_files(described: tuple[LockedModel, Any]) -> None:
    locked, _ = described
    stored = [(name, entry.shape) for entry in locked.tensors for name in names_of(entry.names)]
    for kind in locked.kinds:
        number = read_numbers(kind.blocks)[0]
        sizes = [torch.Size(shape).numel() for name, shape in stored if f".{number}." in f".{name}"]
        assert kind.weight_elements == sum(sizes)
