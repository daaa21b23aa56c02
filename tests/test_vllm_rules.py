"""What `plan` predicts of vLLM, what its probe does, and when its environment is made, without vLLM installed."""

import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from packager.model.compatibility import Verdict, verdicts
from packager.model.vllm_rules import VLLM_CLASSES, vllm_cpu_shapes
from packager.prove.environments import READY, environment_name, waits_for_request
from packager.prove.loaders import LOADERS
from packager.prove.locks import read_lock
from tests.known_models import known_architecture
from tests.test_known_models import LLAMA_2_13B, tiny_config, variant

SPEC = LOADERS["vllm-cpu"]
CONFIG = tiny_config("llama", intermediate_size=128, head_dim=32)


def verdict(loader: str, config: Mapping[str, Any] = CONFIG, **parameters: Any) -> Verdict:
    made = verdicts(variant(**{"group_size": 32, **parameters}), known_architecture(config, "config.json"))
    return next(each for each in made if each.loader == loader)


@pytest.mark.parametrize(
    ("parameters", "cuda", "cpu"),
    [
        ({}, "", ""),
        ({"group_size": -1}, "", ""),
        ({"act_order": "static"}, "", ""),
        ({"act_order": "group"}, "", ""),
        # With one group per row the order of the columns changes nothing.
        ({"act_order": "full", "group_size": -1}, "", ""),
        (
            {"act_order": "full"},
            "reads no act order with groups (0.29 did)",
            "reads no act order with groups (0.29 did)",
        ),
        ({"bits": 8}, "", "reads 4 bits only"),
        ({"bits": 3}, "reads 4, 8 bits only", "reads 4 bits only"),
        ({"sym": False}, "reads symmetric checkpoints only", "reads symmetric checkpoints only"),
        ({"group_size": 16}, "reads group sizes -1, 32, 64, 128 only", "reads group sizes -1, 32, 64, 128 only"),
    ],
)
def test_the_parameters_that_are_read(parameters: dict[str, Any], cuda: str, cpu: str) -> None:
    for loader, reason in (("vllm", cuda), ("vllm-cpu", cpu)):
        found = verdict(loader, **parameters)
        assert found.can_load is not bool(reason), found.reason
        assert found.reason == reason or not reason


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({**CONFIG, "head_dim": 16}, "computes no attention with heads of 16 columns"),
        ({**CONFIG, "head_dim": None, "num_attention_heads": 2, "num_key_value_heads": 2}, ""),
        ({**CONFIG, "intermediate_size": 144}, "mlp.down_proj has 144 columns, not a multiple of 32"),
        (LLAMA_2_13B, ""),
    ],
)  # fmt: skip
def test_the_shapes_that_the_kernel_takes(config: dict[str, Any], reason: str) -> None:
    found = verdict("vllm-cpu", config, group_size=-1)
    assert found.can_load is not bool(reason), found.reason
    assert reason in found.reason
    assert verdict("vllm", config, group_size=-1).can_load


def test_rows_of_linears_that_are_computed_as_one_are_added() -> None:
    """k_proj and v_proj of 16 rows each: with q_proj they are 96, which the kernel takes."""

    def shapes(**rows: int) -> str:
        linears = [
            SimpleNamespace(module=f"self_attn.{name}", block=block, in_features=64, out_features=size)
            for block in (0, 1)
            for name, size in rows.items()
        ]
        architecture: Any = SimpleNamespace(example_linears=linears)
        return vllm_cpu_shapes(variant(group_size=32), architecture)

    assert shapes(q_proj=64, k_proj=16, v_proj=16) == ""
    assert shapes(q_proj=48, k_proj=16, v_proj=16) == "self_attn.qkv_proj has 80 rows, not a multiple of 32"
    assert shapes(o_proj=80) == "self_attn.o_proj has 80 rows, not a multiple of 32"


def test_groups_must_fill_the_columns() -> None:
    config = {**CONFIG, "intermediate_size": 96}
    assert "mlp.down_proj has 96 columns, not a multiple of 64" in verdict("vllm", config, group_size=64).reason
    assert verdict("vllm", config, group_size=32).can_load


def test_heads_are_spread_over_gpus_too() -> None:
    """SmolLM2-135M has nine: vLLM asks for a multiple, whatever the groups are."""
    config = {**CONFIG, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576, "head_dim": 64}
    found = verdict("vllm", config)
    assert (found.can_load, found.reason) == (True, "tensor parallel 2 fails: 9 attention heads")


def test_a_class_that_the_registry_dropped_is_refused() -> None:
    """BambaForCausalLM was in vLLM 0.22 and is not in 0.32."""
    assert {"LlamaForCausalLM", "Qwen3ForCausalLM"} < VLLM_CLASSES
    architecture = replace(known_architecture(CONFIG, "config.json"), model_class="BambaForCausalLM")
    for loader in ("vllm", "vllm-cpu"):
        (found,) = [each for each in verdicts(variant(group_size=32), architecture) if each.loader == loader]
        assert "does not list BambaForCausalLM" in found.reason


# When the environment is made


def test_an_environment_on_request_waits_until_it_is_made_or_required(tmp_path: Path) -> None:
    assert SPEC.on_request
    assert [spec.name for spec in LOADERS.values() if spec.on_request] == ["vllm", "vllm-cpu"]
    assert waits_for_request(SPEC, (), tmp_path)
    assert not waits_for_request(SPEC, ("vllm-cpu",), tmp_path)
    assert not waits_for_request(LOADERS["transformers"], (), tmp_path)
    folder = tmp_path / "loaders" / environment_name(SPEC)
    (folder / "bin").mkdir(parents=True)
    (folder / "shared").mkdir()
    (folder / "bin" / "python").touch()
    assert waits_for_request(SPEC, (), tmp_path), "a creation that was killed"
    (folder / READY).write_text(str(folder))
    assert not waits_for_request(SPEC, (), tmp_path)


def test_the_lock_for_cuda_differs_from_the_other_where_vllm_says_so() -> None:
    """So what is learnt of one environment holds for the other, and the rules are about the versions of both."""
    cuda, cpu = (
        {each.name: each.version for each in read_lock(LOADERS[name].requirements)} for name in ("vllm", "vllm-cpu")
    )
    assert cuda.pop("vllm") == cpu.pop("vllm-cpu")
    # vLLM on CUDA wants this version exactly.
    assert (cuda.pop("apache-tvm-ffi"), cpu.pop("apache-tvm-ffi")) == ("0.1.11", "0.1.15.post2")
    assert cuda == cpu


# The probe


@pytest.fixture(scope="module")
def probe() -> Any:
    spec = importlib.util.spec_from_file_location("vllm_probe", SPEC.script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


def test_what_vllm_reads_from_its_environment(probe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"VLLM_CPU_INT4_W4A8": "1"})
    probe.prepare()
    assert os.environ["VLLM_CPU_INT4_W4A8"] == "0", "int8 activations on processors with AMX"
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert os.environ["VLLM_HOST_IP"] == "127.0.0.1"
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"
    assert os.environ["VLLM_USE_FLASHINFER_SAMPLER"] == "0", "not every environment has FlashInfer"


def test_a_vllm_that_cannot_be_imported_says_nothing_of_a_checkpoint(
    probe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.entrypoints", ModuleType("vllm.entrypoints"))
    assert probe.isolated.run_job(probe.probe, {"model_dir": str(tmp_path), "output_dir": str(tmp_path)}) == 1
    written = json.loads((tmp_path / "result.json").read_text())
    assert written["type"] == "UnavailableError", "which is no failure of the loader"
    assert written["message"].startswith("vLLM cannot be imported: ModuleNotFoundError: No module named 'vllm.entry")


@pytest.mark.parametrize(
    ("device", "backend", "wanted"),
    [
        ("cpu", None, {}),
        ("cuda", None, {"gpu_memory_utilization": 0.01}),
        ("cuda", "marlin", {"gpu_memory_utilization": 0.01, "linear_backend": "marlin"}),
    ],
)
def test_what_vllm_is_started_with_on_each_device(
    probe: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    backend: str | None,
    wanted: dict[str, Any],
) -> None:
    """By default it wants 92 % of a GPU's memory to be free, and other loaders run at the same time."""
    write_checkpoint(tmp_path, [0, 0])
    monkeypatch.setattr(probe, "dtype_of", lambda _: "float16")
    started: dict[str, Any] = {}
    vllm = SimpleNamespace(LLM=lambda **options: started.update(options))
    probe.start_engine(vllm, tmp_path, 80, device=device, backend=backend)
    names = ("gpu_memory_utilization", "linear_backend")
    assert {name: started[name] for name in names if name in started} == wanted
    assert started["kv_cache_memory_bytes"] == 64 << 20


def write_checkpoint(folder: Path, g_idx: list[int], **quantization: Any) -> None:
    given = {"bits": 4, "group_size": 2, "desc_act": False, **quantization}
    (folder / "config.json").write_text(json.dumps({"quantization_config": given}))
    tensors = {"a.qweight": np.zeros(1, np.int32), "a.g_idx": np.array(g_idx, np.int32)}
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("g_idx", "group_size", "right"),
    [
        ([0, 0, 1, 1], 2, True), ([0, 0, 0], -1, True), ([0, 0, 1], 2, True),
        ([0, 1, 0, 1], 2, False), ([1, 1, 0, 0], 2, False), ([0, 1, 0], -1, False), ([0, 0, 1, 1], 4, False),
    ],
)  # fmt: skip
def test_a_scattered_g_idx_is_not_opened(
    probe: Any, tmp_path: Path, g_idx: list[int], group_size: int, right: bool
) -> None:
    """vLLM drops it, and gives 16 of 16 greedy tokens of garbage whose logits are off by 0.35."""
    write_checkpoint(tmp_path, g_idx, group_size=group_size)
    if right:
        probe.check_order(tmp_path)
        return
    with pytest.raises(ValueError, match=r"a\.g_idx is not i // group_size, and vLLM drops it"):
        probe.check_order(tmp_path)


def test_vllm_itself_refuses_a_declared_act_order(probe: Any, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, [0, 1, 0, 1], desc_act=True)
    probe.check_order(tmp_path)


def flat(*rows: dict[int, float]) -> Any:
    """Return log-probabilities as vLLM's FlatLogprobs has them: the token that was given comes first, then by rank."""
    ends = np.cumsum([len(row) for row in rows]).tolist()
    return SimpleNamespace(
        start_indices=[0, *ends[:-1]],
        end_indices=ends,
        token_ids=[token for row in rows for token in row],
        logprobs=[value for row in rows for value in row.values()],
    )


class Engine:
    """vLLM's LLM: it gives what is told for the prompt and the token after it."""

    def __init__(self, prompt: Any, after: Any) -> None:
        self.given: list[Any] = []
        self._made = SimpleNamespace(
            prompt_logprobs=prompt, outputs=[SimpleNamespace(logprobs=after, token_ids=[np.int64(7), 2])]
        )

    def generate(self, prompts: list[Any], params: Any, *, use_tqdm: bool) -> list[Any]:
        assert not use_tqdm
        self.given.append((prompts, params))
        return [self._made] * len(prompts)


VLLM = SimpleNamespace(SamplingParams=SimpleNamespace)


def test_logits_are_put_in_the_order_of_the_vocabulary(probe: Any) -> None:
    engine = Engine(flat({}, {2: 0.5, 0: 9.0, 1: -1.0}), flat({1: 3.0, 0: 2.0, 2: 1.0}))
    found = probe.engine_logits(torch, VLLM, engine, [4, 2], 3)
    assert found.tolist() == [[9.0, -1.0, 0.5], [2.0, 3.0, 1.0]]
    ((prompts, params),) = engine.given
    assert prompts == [{"prompt_token_ids": [4, 2]}]
    assert (params.prompt_logprobs, params.logprobs, params.temperature, params.ignore_eos) == (-1, -1, 0.0, True)


@pytest.mark.parametrize(
    ("prompt", "after"),
    [
        (flat({}, {0: 1.0, 1: 1.0}), flat({0: 1.0, 1: 1.0, 2: 1.0})),
        (flat({}, {0: 1.0, 1: 1.0, 2: 1.0}), flat({0: 1.0, 1: 1.0})),
        (flat({}, {0: 1.0, 1: 1.0, 2: float("nan")}), flat({0: 1.0, 1: 1.0, 2: 1.0})),
    ],
)
def test_a_logit_that_vllm_leaves_out_is_an_error(probe: Any, prompt: Any, after: Any) -> None:
    with pytest.raises(RuntimeError, match="left logits out"):
        probe.engine_logits(torch, VLLM, Engine(prompt, after), [4, 2], 3)


def test_greedy_tokens_end_where_the_checkpoint_says(probe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(None, None)
    # Each prompt: 1 s with one token, then 3 s and 1.5 s with two.
    ticks = iter([0.0, 1.0, 10.0, 13.0, 20.0, 21.0, 30.0, 31.5])
    monkeypatch.setattr(probe.time, "perf_counter", lambda: next(ticks))
    found, times = probe.engine_greedy(VLLM, engine, [[1], [3, 4]], 5, [2])
    assert found == [[7, 2], [7, 2]]
    assert times == {"decode_tokens": 2, "decode_s": 2.5, "prefill_tokens": 3, "prefill_s": 2.0}
    assert [(params.max_tokens, params.temperature) for _, params in engine.given] == [(1, 0.0), (5, 0.0)] * 2
    assert {tuple(params.stop_token_ids) for _, params in engine.given} == {(2,)}
    nothing = {"decode_tokens": 0, "decode_s": None, "prefill_tokens": 0, "prefill_s": None}
    assert probe.engine_greedy(VLLM, engine, [[1], [3]], 0, [2]) == ([[], []], nothing)
    assert len(engine.given) == 4


def test_a_model_without_a_quantized_linear_is_an_error(probe: Any) -> None:
    plain = SimpleNamespace(weight=0, quant_method=SimpleNamespace())
    linear = SimpleNamespace(qweight=0, quant_method=SimpleNamespace(kernel=Engine(None, None)))
    model = SimpleNamespace(modules=lambda: [plain, linear, linear])
    assert probe.quantized_linears(model) == [f"{__name__}.Engine"]
    with pytest.raises(RuntimeError, match="no quantized linear"):
        probe.quantized_linears(SimpleNamespace(modules=lambda: [plain]))


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"model_type": "llama"}, "float16"),
        ({"model_type": "gemma2"}, "bfloat16"),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, "bfloat16"),
        ({"model_type": "other", "text_config": {"model_type": "gemma2"}}, "bfloat16"),
    ],
)
def test_the_dtype_is_one_that_vllm_takes(
    probe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], dtype: str
) -> None:
    refused = SimpleNamespace(_FLOAT16_NOT_SUPPORTED_MODELS={"gemma2": "why", "gemma3": "why"})
    monkeypatch.setitem(sys.modules, "vllm.config.model", refused)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert probe.dtype_of(tmp_path) == dtype


def test_keys_and_values_get_the_memory_of_one_row(probe: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert probe.cache_bytes(tmp_path, 80) == 64 << 20
    (tmp_path / "config.json").write_text(json.dumps({"text_config": LLAMA_2_13B}))
    needed = 2 * 2 * 40 * 5120  # keys and values, float16, layers, columns
    assert 256 * needed <= probe.cache_bytes(tmp_path, 80) <= 3 * 256 * needed
    assert 4224 * needed <= probe.cache_bytes(tmp_path, 4112) <= 3 * 4224 * needed
