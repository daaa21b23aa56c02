"""The decoder that reads its weights block by block: parts of rows, freed memory, shared heads and missing tensors."""

import copy
import dataclasses
import json
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from packager.errors import SourceError
from packager.inputs.base_model import SourceModel
from packager.model.batches import BLOCK_READERS
from packager.model.decoder import Decoder, forward, run_blocks
from tests.samples import sampled
from tests.sources import open_folder
from tests.tiny_models import save_model, token_rows

CPU = torch.device("cpu")
IDS = token_rows(6, 16).ids


@pytest.fixture(scope="module")
def source_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], SourceModel]:
    made: dict[str, SourceModel] = {}

    def get(name: str) -> SourceModel:
        if name not in made:
            made[name] = open_folder(save_model(tmp_path_factory.mktemp(name), name), base_id="tester/tiny")
        return made[name]

    return get


def decoder_of(source: SourceModel, read: Callable[[str], Tensor] | None = None) -> Decoder:
    return Decoder(source.folder, read or source.read, device=CPU, dtype=torch.float32)


@pytest.mark.parametrize("name", sampled(["llama", "llama-tied", "mistral-sliding", "qwen3"], "llama-tied"))
def test_logits_do_not_depend_on_how_positions_are_grouped(source_of: Callable[[str], SourceModel], name: str) -> None:
    decoder = decoder_of(source_of(name))
    (states,) = forward(decoder, IDS, rows=6)
    expected = decoder.logits(states)
    pieces = torch.split(states.flatten(0, 1), 7)
    found = torch.cat([decoder.logits(piece[None])[0] for piece in pieces])
    assert found.shape == (IDS.numel(), 128)
    assert torch.allclose(found.view_as(expected), expected, atol=1e-6)


def test_batches_of_two_kinds_go_through_the_blocks_together(source_of: Callable[[str], SourceModel]) -> None:
    source, read = source_of("llama"), list[str]()

    def counted(name: str) -> Tensor:
        read.append(name)
        return source.read(name)

    decoder = decoder_of(source, counted)
    batches = [*decoder.embed(IDS, rows=4), *decoder.embed(IDS[:3, :5], rows=2)]
    inputs = [weakref.ref(batch.hidden) for batch in batches]
    found = run_blocks(decoder, batches)
    assert batches == []
    assert all(hidden() is None for hidden in inputs), "the first block's inputs are freed"
    expected = [*forward(decoder_of(source), IDS, rows=4), *forward(decoder_of(source), IDS[:3, :5], rows=2)]
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert len(read) == len(set(read))


@pytest.mark.parametrize("drop", [True, False])
def test_a_tied_head_is_the_embedding(source_of: Callable[[str], SourceModel], drop: bool) -> None:
    decoder = decoder_of(source_of("llama-tied"))
    (states,) = forward(decoder, IDS, rows=6)
    expected = decoder.logits(states)
    head, embedding = (decoder._model.get_parameter(name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    assert head.data_ptr() == embedding.data_ptr()
    if drop:
        decoder.drop_outside_blocks()
        assert torch.equal(decoder.logits(states), expected)
        assert embedding.shape == (128, 64)
        assert decoder._model.get_parameter("model.embed_tokens.weight").is_meta, "logits need no embedding"


def test_tensors_outside_the_blocks_are_freed_and_read_again(source_of: Callable[[str], SourceModel]) -> None:
    decoder = decoder_of(source_of("llama"))
    first = forward(decoder, IDS, rows=6)
    decoder.drop_outside_blocks()
    assert all(parameter.is_meta for parameter in decoder._model.parameters())
    assert torch.equal(first[0], forward(decoder, IDS, rows=6)[0])


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"]
)
def test_a_tensor_that_no_reader_has_is_named(source_of: Callable[[str], SourceModel], name: str) -> None:
    source = source_of("llama")
    tensors = {key: stored for key, stored in source.tensors.items() if key != name}
    stored = {key: source.read(key) for key in tensors}
    for read in (stored.__getitem__, dataclasses.replace(source, tensors=tensors).read):
        decoder = decoder_of(source, read)
        with pytest.raises(SourceError, match="the weights lack a tensor that the model needs") as caught:
            decoder.logits(forward(decoder, IDS, rows=6)[0])
        assert caught.value.where == name
        assert caught.value.hint


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot be read as a JSON object"):
        Decoder(tmp_path, lambda _: torch.empty(0), device=CPU, dtype=torch.float32)


def test_models_of_one_config_are_traced_once(source_of: Callable[[str], SourceModel], tmp_path: Path) -> None:
    first = decoder_of(source_of("llama"))
    variant = Path(shutil.copytree(source_of("llama").folder, tmp_path / "variant"))
    second = decoder_of(open_folder(variant, base_id="tester/tiny"))
    assert second._trace is first._trace
    assert decoder_of(source_of("qwen3"))._trace is not first._trace


def test_a_config_that_transformers_refuses_is_named_with_its_key(tmp_path: Path) -> None:
    config = {"model_type": "llama", "rope_scaling": {"rope_type": "spiral", "factor": 2.0}, "rope_theta": 1e4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="transformers cannot build this model") as caught:
        Decoder(tmp_path, lambda _: torch.empty(0), device=CPU, dtype=torch.float32)
    assert "rope_scaling.rope_type in config.json" in caught.value.why
    assert caught.value.hint


def full_and_sliding(**full: Any) -> dict[str, Any]:
    return {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}


# Rows longer than the model was first trained for, up to the longest one that it takes. By architecture: what differs.
DYNAMIC: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("LlamaConfig", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}),
    "original length": (
        "LlamaConfig",
        {"rope_parameters": {
            "rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16,
        }},
    ),
    "old spelling": ("LlamaConfig", {"rope_scaling": {"type": "dynamic", "factor": 2.5}}),
    "for a kind of attention": (
        "Gemma3TextConfig",
        {"rope_parameters": full_and_sliding(rope_type="dynamic", factor=4.0, rope_theta=1e6), "head_dim": 16,
         "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "alpha": (
        "HunYuanDenseV1Config",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 1.0, "rope_theta": 1e4, "alpha": 1e3}, "head_dim": 16},
    ),
}  # fmt: skip


# Releases before 5.23 read values of tensors for Hunyuan's alpha: it cannot be traced there, and is refused.
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.pinned) if name == "alpha" else name for name in DYNAMIC]
)
@pytest.mark.parametrize("length", sampled([16, 17, 48, 64], 48))
def test_a_dynamic_embedding_is_that_of_transformers(tmp_path: Path, name: str, length: int) -> None:
    class_name, fields = DYNAMIC[name]
    config = getattr(transformers, class_name)(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, **copy.deepcopy(fields),
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    source, ids = open_folder(tmp_path), token_rows(3, length).ids
    decoder = Decoder(source.folder, source.read, device=CPU, dtype=torch.float32)
    found = torch.cat([decoder.logits(states) for states in forward(decoder, ids, rows=2)])
    whole: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(found, whole(ids).logits, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_a_block_for_a_gpu_is_read_by_several_threads(source_of: Callable[[str], SourceModel], name: str) -> None:
    """One thread is slower than two GPUs; the experts' parameters are made of many stored tensors."""
    source, threads = source_of(name), set[str]()

    def read(stored: str) -> Tensor:
        threads.add(threading.current_thread().name)
        time.sleep(0.002)
        return source.read(stored)

    decoder = Decoder(source.folder, read, names=source.tensors, device=CPU, dtype=torch.float32)
    expected = decoder._block_weights(1, device=CPU)
    assert len(threads) == 1
    vars(decoder)["device"] = SimpleNamespace(type="cuda")
    found = decoder._block_weights(1, device=CPU)
    assert len(threads) == 1 + BLOCK_READERS
    assert list(found) == list(expected)
    assert all(torch.equal(tensor, expected[each]) for each, tensor in found.items())


def test_a_gpu_finishes_each_block_before_the_next_but_one_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU is slower than the page cache: blocks that wait for it would fill its memory."""
    steps: list[str] = []

    def stream() -> Iterator[str]:
        for index in range(3):
            steps.append(f"read {index + 1}")  # the next one, while this one is computed
            yield f"weights {index}"

    decoder: Any = SimpleNamespace(
        device=SimpleNamespace(type="cuda"), stream=stream, drop_block=lambda _: None,
        load_block=lambda index, _: steps.append(f"compute {index}"),
    )  # fmt: skip
    waits = SimpleNamespace(synchronize=lambda: steps.append("wait"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: waits)
    run_blocks(decoder, [])
    assert steps == [step for index in range(3) for step in (f"read {index + 1}", f"compute {index}", "wait")]


def test_an_error_of_one_reader_is_raised(source_of: Callable[[str], SourceModel]) -> None:
    source = source_of("llama")

    def read(stored: str) -> Tensor:
        tensor = source.read(stored)
        return tensor * float("nan") if stored.endswith("layers.1.mlp.up_proj.weight") else tensor

    decoder = Decoder(source.folder, read, names=source.tensors, device=CPU, dtype=torch.float32)
    vars(decoder)["device"] = SimpleNamespace(type="cuda")
    with pytest.raises(SourceError, match="NaN or Inf") as caught:
        decoder._block_weights(1, device=CPU)
    assert caught.value.where == "model.layers.1.mlp.up_proj.weight"
