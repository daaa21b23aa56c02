"""What `plan` predicts of ONNX Runtime, and what its probe demands of a converted model, without either installed."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from packager.model.architecture import Architecture
from packager.model.compatibility import Verdict, verdicts
from packager.model.onnxruntime_rules import ONNXRUNTIME_FAILS, ONNXRUNTIME_OPENS
from packager.prove.loaders import LOADERS
from packager.prove.probes import ProbeJob, _largest_file_bytes
from packager.prove.tolerances import TOLERANCE, tolerance_of
from tests.known_models import known_architecture
from tests.test_known_models import LLAMA_2_13B, tiny_config, variant

LLAMA = known_architecture(tiny_config("llama", intermediate_size=128), "config.json")


def verdict(architecture: Architecture = LLAMA, **parameters: Any) -> Verdict:
    made = verdicts(variant(**{"group_size": 32, **parameters}), architecture)
    return next(each for each in made if each.loader == "onnxruntime")


def with_config(model_class: str = "LlamaForCausalLM", **fields: Any) -> Architecture:
    return replace(LLAMA, model_class=model_class, config={**LLAMA.config, **fields})


def rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **fields}}


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({}, ""), ({"bits": 2}, ""), ({"bits": 8, "sym": False}, ""), ({"group_size": 16}, ""),
        ({"act_order": "full"}, ""), ({"group_size": -1}, ""), ({"act_order": "full", "group_size": -1}, ""),
        ({"bits": 3}, "reads 2, 4, 8 bits only"),
        ({"group_size": 8}, "powers of two from 16 on, not 8"), ({"group_size": 48}, "not 48"),
        ({"group_size": 128}, "self_attn.q_proj has 64 columns, not a multiple of 128"),
        ({"act_order": "full", "sym": False}, "takes every zero for 8 with act order, without an error"),
        ({"act_order": "full", "bits": 8}, "act order with 4 bits only"),
        ({"act_order": "full", "bits": 2}, "act order with 4 bits only"),
    ],
)  # fmt: skip
def test_the_parameters_that_are_read(parameters: dict[str, Any], reason: str) -> None:
    found = verdict(**parameters)
    assert found.can_load is not bool(reason), found.reason
    assert (reason or "after conversion") in found.reason


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"group_size": 512}, ""), ({"group_size": 256, "bits": 2}, ""), ({"group_size": 256, "act_order": "full"}, ""),
        ({"group_size": 512, "bits": 2}, "up to 256 with 2 bits, not 512"),
        ({"group_size": 512, "act_order": "full"}, "up to 256 with act order, not 512"),
        ({"group_size": -1}, "from 16 on, not whole rows, self_attn.q_proj has 5120 columns"),
    ],
)  # fmt: skip
def test_the_group_sizes_of_a_large_model(parameters: dict[str, Any], reason: str) -> None:
    found = verdict(known_architecture(LLAMA_2_13B, "config.json"), **parameters)
    assert found.can_load is not bool(reason), found.reason
    assert reason in found.reason


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        (with_config(**rope("llama3")), ""),
        (with_config("MistralForCausalLM", **rope("linear", factor=2.0)), ""),
        (with_config(**rope("linear", factor=2.0)), "computes no rotary embedding of type linear"),
        (with_config("Qwen2ForCausalLM", **rope("llama3")), "computes no rotary embedding of type llama3"),
        (with_config("Phi3ForCausalLM", **rope("longrope")), "computes no rotary embedding of type longrope"),
        (with_config("Phi3ForCausalLM", **rope("default", partial_rotary_factor=0.5)), "a head only, not 8"),
        (with_config("Ernie4_5ForCausalLM", compression_ratio=2.0), "reads compression_ratio"),
        (with_config("Ernie4_5ForCausalLM", compression_ratio=1.0), ""),
        (with_config("OtherForCausalLM"), "its model builder (0.18) does not list OtherForCausalLM"),
        (with_config("OlmoForCausalLM"), "computes the norms without their mean"),
    ],
)  # fmt: skip
def test_the_architectures_that_are_converted(architecture: Architecture, reason: str) -> None:
    found = verdict(architecture)
    assert found.can_load is not bool(reason), found.reason
    assert reason in found.reason


def test_a_class_either_opens_or_fails() -> None:
    assert not ONNXRUNTIME_OPENS & ONNXRUNTIME_FAILS.keys()
    assert all(ONNXRUNTIME_FAILS.values())


def test_the_lengths_that_a_converted_model_does_not_know() -> None:
    mistral = verdict(with_config("MistralForCausalLM", sliding_window=64))
    assert mistral.can_load
    assert "past 64 tokens it computes without the sliding window" in mistral.reason
    assert "past" not in verdict(with_config("Qwen2ForCausalLM", sliding_window=64)).reason
    dynamic = verdict(with_config(max_position_embeddings=128, **rope("dynamic", factor=2.0)))
    assert dynamic.can_load
    assert "past 128 tokens its rotary embedding is not the model's" in dynamic.reason


def test_a_dynamic_embedding_with_alpha_is_hunyuan_s_and_of_any_length() -> None:
    with_alpha = rope("dynamic", factor=1.0, alpha=1000.0)
    hunyuan = verdict(with_config("HunYuanDenseV1ForCausalLM", max_position_embeddings=128, **with_alpha))
    assert hunyuan.can_load
    assert "past" not in hunyuan.reason
    for other in (rope("dynamic", factor=2.0), rope("linear", factor=2.0)):
        assert not verdict(with_config("HunYuanDenseV1ForCausalLM", **other)).can_load
    assert "of type dynamic with alpha" in verdict(with_config("LlamaForCausalLM", **with_alpha)).reason


def test_a_model_with_unquantized_linears_in_its_blocks_is_refused() -> None:
    kind = replace(LLAMA.kinds[0], left={"mlp.down_proj": "the recipe skips mlp.down_proj"})
    assert "takes every linear of a block as quantized" in verdict(replace(LLAMA, kinds=(kind,))).reason


# How it runs


def test_it_computes_on_the_cpu_of_every_machine() -> None:
    spec = LOADERS["onnxruntime"]
    assert [spec.device_on(device) for device in ("cpu", "cuda")] == ["cpu", "cpu"]
    assert spec.machine_problem("cuda") == ""
    assert LOADERS["transformers"].device_on("cuda") == "cuda"
    assert LOADERS["exllamav2"].device_on("cpu") == ""


def test_its_logits_must_be_closer_than_those_of_others() -> None:
    assert tolerance_of("onnxruntime", "float32") == 0.0001
    assert tolerance_of("onnxruntime", "float16") == TOLERANCE["float16"]
    assert tolerance_of("transformers", "float32") == TOLERANCE["float32"]


def test_a_probe_may_write_the_checkpoint_in_float32(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"model-{number}.safetensors").write_bytes(bytes(3000))
    job = ProbeJob(
        model_dir=tmp_path, device="cpu", input_ids=[[1, 2]], prompts=[], max_new_tokens=0, vocab_size=100,
        output_dir=tmp_path,
    )  # fmt: skip
    assert _largest_file_bytes(job) == 12_000
    assert _largest_file_bytes(replace(job, vocab_size=1000)) == 16_000


# The nodes of a converted model

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")
NODES = ("attn/qkv_proj", "attn/o_proj", "mlp/down_proj")


def node_of(name: str, *, ordered: bool = True, op_type: str = "MatMulNBits", **attributes: int) -> Any:
    has = {"bits": 4, "block_size": 32, "accuracy_level": 1, "K": 64, "N": 64, **attributes}
    inputs = ["x", "w", "s", "z", *(["g"] if ordered else [])]
    listed = [SimpleNamespace(name=key, i=value) for key, value in has.items()]
    return SimpleNamespace(name=name, op_type=op_type, input=inputs, attribute=listed)


def quantized(block: int, name: str, **fields: Any) -> Any:
    return node_of(f"/model/layers.{block}/{name}/MatMulNBits", **fields)


WIDE = {"wide": ["model.layers.1.mlp.down_proj"]}
RIGHT = [quantized(block, name) for block in (0, 1) for name in NODES] + [node_of("/lm_head/MatMul", op_type="MatMul")]


@pytest.fixture(scope="module")
def probe() -> Any:
    spec = importlib.util.spec_from_file_location("onnxruntime_probe", LOADERS["onnxruntime"].script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


def problem(probe: Any, nodes: list[Any], monkeypatch: pytest.MonkeyPatch, folder: Path, **config: Any) -> str:
    """Return what the probe says of nodes that were made of two blocks of LINEARS, or "".

    `wide` names those that are stored with 8 bits, whatever `bits` are.
    """
    wide = config.pop("wide", ())
    given = {"bits": 4, "group_size": 32, "desc_act": True, **config}
    (folder / "config.json").write_text(json.dumps({"quantization_config": given}))
    names = [f"model.layers.{block}.{name}" for block in (0, 1) for name in LINEARS]
    shapes = {
        f"{name}.{part}": shape
        for name in names
        for part, shape in (
            ("qweight", [2 * (8 if name in wide else given["bits"]), 8]), ("scales", [2, 8]), ("g_idx", [64]),
        )
    }  # fmt: skip
    monkeypatch.setattr(probe, "tensor_shapes", lambda _: shapes)
    graph = SimpleNamespace(graph=SimpleNamespace(node=nodes))
    monkeypatch.setitem(sys.modules, "onnx", SimpleNamespace(load=lambda *_, **__: graph))
    try:
        probe.check_nodes(folder, folder)
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("nodes", "config", "message"),
    [
        (RIGHT, {}, ""),
        ([quantized(b, n) for b in (0, 1) for n in ("attn/q_proj", "attn/k_proj", "attn/v_proj", *NODES[1:])], {}, ""),
        ([quantized(b, n, block_size=64) for b in (0, 1) for n in NODES], {"group_size": -1}, ""),
        ([*RIGHT, node_of("/lm_head/MatMul_Q4")], {}, "/lm_head/MatMul_Q4 is quantized, in the checkpoint it is not"),
        ([*RIGHT, node_of("/embed", op_type="GatherBlockQuantized")], {}, "/embed is of type GatherBlockQuantized"),
        (RIGHT[1:], {}, "block 0 has 0 quantized k_proj, the checkpoint has 1"),
        ([*RIGHT, quantized(2, "mlp/down_proj")], {}, "block 2 has 1 quantized down_proj, the checkpoint has 0"),
        ([*RIGHT, RIGHT[0]], {}, "block 0 has 2 quantized k_proj, the checkpoint has 1"),
        (RIGHT, {"bits": 8}, "has bits 4, 8 wanted"),
        (RIGHT, WIDE, "layers.1/mlp/down_proj/MatMulNBits has bits 4, 8 wanted"),
        ([*RIGHT[:-2], quantized(1, "mlp/down_proj", bits=8), RIGHT[-1]], WIDE, ""),
        (RIGHT, {"group_size": 64}, "has block_size 32, 64 wanted"),
        (RIGHT, {"desc_act": False}, "has a g_idx, desc_act is False"),
        ([quantized(0, NODES[0], ordered=False), *RIGHT[1:]], {}, "has no g_idx, desc_act is True"),
        ([quantized(0, NODES[0], accuracy_level=4), *RIGHT[1:]], {}, "has accuracy_level 4, 1 wanted"),
    ],
)  # fmt: skip
def test_the_nodes_must_be_the_checkpoint_s_linears(
    probe: Any, nodes: list[Any], config: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = problem(probe, nodes, monkeypatch, tmp_path, **config)
    assert message in found
    assert bool(found) is bool(message), found


def test_a_linear_that_holds_several_is_all_of_them(probe: Any) -> None:
    stored = [f"model.layers.3.{name}.qweight" for name in ("self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj")]
    nodes = [
        f"/model/layers.3/{name}/MatMulNBits"
        for name in ("attn/qkv_proj", "mlp/gate_proj", "mlp/up_proj", "mlp/down_proj")
    ]
    found = [
        sorted(part for name in names for part in probe.parts_of(pattern.search(name)))
        for pattern, names in ((probe.STORED, stored), (probe.NODE, nodes))
    ]
    assert found[0] == found[1]
    assert found[0] == [(3, f"{name}_proj") for name in ("down", "gate", "k", "q", "up", "v")]


class Session:
    """An ONNX model whose logits count the tokens so far, in a cache of one head of four columns."""

    def __init__(self, *extra: str) -> None:
        self.fed: list[dict[str, Any]] = []
        names = [
            ("input_ids", "tensor(int64)"),
            ("attention_mask", "tensor(int64)"),
            *((name, "tensor(int64)") for name in extra),
        ]
        caches = [("past_key_values.0.key", "tensor(float)"), ("past_key_values.0.value", "tensor(float)")]
        self.inputs = [SimpleNamespace(name=name, type=kind, shape=["b", "s"]) for name, kind in (*names, *caches)]
        if "position_ids" in extra:
            self.inputs[2].shape = [3, "b", "s"]

    def get_inputs(self) -> list[Any]:
        return self.inputs

    def get_outputs(self) -> list[Any]:
        names = ("logits", "present.0.key", "present.0.value")
        return [SimpleNamespace(name=name, type="tensor(float)") for name in names]

    def run(self, _: list[str], feed: dict[str, Any]) -> list[Any]:
        self.fed.append(feed)
        tokens = feed["input_ids"].shape[1]
        past = feed["past_key_values.0.key"]
        cache = np.concatenate([past, np.ones((1, 1, tokens, 4), np.float32)], axis=2)
        logits = np.zeros((1, tokens, 9), np.float32)
        logits[0, -1, cache.shape[2]] = 1
        return [logits, cache, cache]


def decoder_of(probe: Any, session: Session, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    decoder = {"num_key_value_heads": 1, "head_size": 4}
    (folder / "genai_config.json").write_text(json.dumps({"model": {"decoder": decoder}}))
    options = SimpleNamespace(add_session_config_entry=lambda *_: None)
    runtime = SimpleNamespace(SessionOptions=lambda: options, InferenceSession=lambda *_, **__: session)
    return probe.OnnxDecoder(runtime, folder)


def test_tokens_are_generated_from_the_cache_of_those_before(
    probe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session("position_ids")
    decoder = decoder_of(probe, session, tmp_path, monkeypatch)
    clock = probe.isolated.DecodeClock()
    assert decoder.greedy([5, 6], 4, ends=[], clock=clock) == [2, 3, 4, 5]
    assert [feed["input_ids"].tolist() for feed in session.fed] == [[[5, 6]], [[2]], [[3]], [[4]]]
    assert [feed["attention_mask"].shape for feed in session.fed] == [(1, 2), (1, 3), (1, 4), (1, 5)]
    assert [feed["position_ids"][2, 0].tolist() for feed in session.fed] == [[0, 1], [2], [3], [4]]
    assert decoder.greedy([5, 6], 4, ends=[3], clock=clock) == [2, 3]
    assert decoder.greedy([5, 6], 0, ends=[], clock=clock) == []
    assert clock.tokens == 3 + 1  # the first token of an answer is the prompt's


def test_rows_have_nothing_before_them(probe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session()
    assert decoder_of(probe, session, tmp_path, monkeypatch).logits([1, 2, 3]).shape == (3, 9)
    assert session.fed[0]["past_key_values.0.key"].shape == (1, 1, 0, 4)


def test_an_input_that_is_not_known_is_named(probe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = decoder_of(probe, Session("past_conv.0"), tmp_path, monkeypatch)
    with pytest.raises(RuntimeError, match=r"an input past_conv\.0, which this script cannot fill"):
        decoder.logits([1])
