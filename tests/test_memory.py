"""How quantizing fits into memory: the fastest way within the limits, and the error when there is none."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packager.errors import MachineError
from packager.model.architecture import architecture_of
from packager.model.batches import rows_per_batch
from packager.model.lock import LockedTensors
from packager.model.safetensors_file import TensorInfo
from packager.pipeline.plan import make_plan
from packager.prove.evaluation_memory import evaluation_memory
from packager.quantize import memory as memory_module
from packager.quantize.memory import (
    HOST_LIMIT_BYTES,
    USABLE,
    SweepPlan,
    choose_sweep,
    sweep_ways,
)
from packager.quantize.workload import Workload
from packager.recipe.file import RecipeFile
from tests.hypothesis_profiles import examples
from tests.known_models import known_architecture
from tests.test_known_models import LLAMA_2_13B, tiny_config
from tests.tiny_models import variant

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
GB = 10**9


def workload(recipe: str) -> Workload:
    plan = make_plan(RecipeFile.load(RECIPES / recipe))
    calibration = plan.recipe.calibration
    uncorrected = [replace(each.variant, target_correction=0.0) for each in plan.variants]
    return Workload.of(plan.architecture, calibration.num_samples, calibration.seq_len, uncorrected)


LARGE = workload("llama-2-13b-chat.yaml")
SMALL = Workload(
    architecture=known_architecture(tiny_config(), "config.json"),
    num_samples=2048,
    seq_len=32,
    packed_bits=4.625,
    num_variants=3,
)
MODELS = {"13B": LARGE, "tiny": SMALL}
WORKS = st.fixed_dictionaries(
    {
        "model": st.sampled_from(sorted(MODELS)),
        "num_samples": st.sampled_from([1, 8, 100, 128]),
        "num_variants": st.integers(1, 5),
        "true_sequential": st.booleans(),
        "corrected": st.booleans(),
        "refined_group": st.sampled_from([0, 32, 2**31]),
        "packed_bits": st.sampled_from([2.5, 4.625, 8.1875]),
    }
)
# Limits from nothing to plenty, as shares of what the fastest way takes.
SHARES = st.floats(0, 1.2)


def made(fields: dict[str, Any]) -> Workload:
    return replace(MODELS[fields["model"]], **{name: value for name, value in fields.items() if name != "model"})


def limits(work: Workload, device: float, host: float) -> dict[str, int]:
    ways = list(sweep_ways(work, "cuda"))
    return {
        "device_limit": int(device * max(way.device_bytes for way in ways)),
        "host_limit": int(host * max(way.host_bytes for way in ways)),
    }


def fits(way: SweepPlan, *, device_limit: int, host_limit: int) -> bool:
    return way.device_bytes <= device_limit and way.host_bytes <= host_limit


def chosen(work: Workload, device_gb: float, host_gb: float) -> SweepPlan:
    """Return the plan for a GPU of this size."""
    return choose_sweep(work, "cuda", device_limit=int(device_gb * GB * USABLE), host_limit=int(host_gb * GB))


@settings(max_examples=examples(60))
@given(fields=WORKS, device=SHARES, host=SHARES)
def test_the_first_way_that_fits_is_taken(fields, device, host):
    work = made(fields)
    within = limits(work, device, host)
    ways = [way for way in sweep_ways(work, "cuda") if fits(way, **within)]
    if not ways:
        with pytest.raises(MachineError):
            choose_sweep(work, "cuda", **within)
        return
    assert choose_sweep(work, "cuda", **within) == ways[0]
    if ways[0].placement == "disk":
        assert all(way.placement == "disk" for way in ways)


@settings(max_examples=examples(60))
@given(fields=WORKS, device=st.tuples(SHARES, SHARES), host=st.tuples(SHARES, SHARES))
def test_more_memory_is_never_slower(fields, device, host):
    work = made(fields)
    ways = list(sweep_ways(work, "cuda"))

    def rank(device: float, host: float) -> int:
        try:
            return ways.index(choose_sweep(work, "cuda", **limits(work, device, host)))
        except MachineError:
            return len(ways)

    assert rank(max(device), max(host)) <= rank(min(device), min(host))


@settings(max_examples=examples(60))
@given(fields=WORKS, device_type=st.sampled_from(["cpu", "cuda"]))
def test_ways_are_distinct_and_the_fastest_is_first(fields, device_type):
    work = made(fields)
    ways = list(sweep_ways(work, device_type))
    first = ways[0]
    assert (first.num_variants, first.placement) == (work.num_variants, "device")
    assert len({(way.num_variants, way.placement, way.suspended_batches, way.weights) for way in ways}) == len(ways)
    # Running batches again costs more time than moving activations, and moving them more than reading the weights
    # again; what needs the weights on the host comes after all of these, and the disk is the slowest.
    memory = [way for way in ways if way.placement != "disk"]
    assert ways[: len(memory)] == memory
    pace = [(way.weights, -way.suspended_batches, way.placement, -way.num_variants) for way in memory]
    assert pace == sorted(pace)
    for way in ways:
        assert way.num_batches == -(-work.num_samples // work.rows_per_batch(device_type))
        assert 0 <= way.suspended_batches <= way.num_batches
        assert way.device_bytes > 0


@pytest.mark.parametrize("rows", [255, 100_000])
def test_a_plan_of_many_rows_tries_no_more_ways_than_one_of_few(rows: int) -> None:
    work = replace(LARGE, num_samples=rows, seq_len=16_384, ranks=1)
    tried = sorted({way.suspended_batches for way in sweep_ways(work, "cuda")})
    batches = next(sweep_ways(work, "cuda")).num_batches
    assert batches == rows
    assert (tried[0], tried[-1]) == (0, batches)
    steps = [high - low for low, high in pairwise(tried)]
    assert max(steps) <= max(1, batches / 128)
    assert len(tried) <= 256


@settings(max_examples=examples(60))
@given(fields=WORKS)
def test_host_memory_for_the_activations_saves_nothing_while_all_batches_are_suspended(fields):
    """So such a way is never chosen: one variant on the device needs less of both memories and is tried first."""
    ways = list(sweep_ways(made({**fields, "true_sequential": True}), "cuda"))
    (alone,) = [
        way for way in ways
        if (way.placement, way.num_variants, way.suspended_batches, way.weights)
        == ("device", 1, way.num_batches, "device")
    ]  # fmt: skip
    others = [
        way for way in ways
        if (way.placement, way.suspended_batches, way.weights) == ("host", way.num_batches, "device")
    ]  # fmt: skip
    assert all(way.device_bytes >= alone.device_bytes and way.host_bytes >= alone.host_bytes for way in others)


@settings(max_examples=examples(60))
@given(fields=WORKS, device_type=st.sampled_from(["cpu", "cuda"]))
def test_more_tokens_and_variants_need_more_memory(fields, device_type):
    work = made(fields)

    def needed(**changes: Any) -> int:
        return next(sweep_ways(replace(work, **changes), device_type)).device_bytes

    states = {"cpu": 4, "cuda": 2}[device_type] * work.num_samples * work.seq_len * work.architecture.hidden_size
    assert needed(num_variants=work.num_variants + 1) == needed() + states * (2 if work.corrected else 1)
    assert needed(num_samples=2 * work.num_samples) > needed()


def test_placement_and_suspended_batches_determine_the_memory():
    ways = {(way.num_variants, way.placement, way.suspended_batches): way for way in sweep_ways(LARGE, "cuda")}
    states = 2 * 128 * 2048 * 5120
    everything, on_host = ways[4, "device", 16], ways[4, "host", 16]
    assert on_host.host_bytes - everything.host_bytes == 4 * states
    assert on_host.device_bytes < everything.device_bytes - 2 * states
    assert ways[4, "disk", 16].device_bytes == on_host.device_bytes
    assert ways[4, "disk", 16].host_bytes == everything.host_bytes
    assert everything.device_bytes - ways[3, "device", 16].device_bytes == states
    waiting = [ways[1, "host", kept].device_bytes for kept in range(17)]
    assert waiting == sorted(set(waiting))


def test_13b_on_common_gpus():
    on_80 = chosen(LARGE, 80, 16)
    assert (on_80.placement, on_80.num_variants, on_80.suspended_batches) == ("device", 4, 16)
    assert on_80 == next(sweep_ways(LARGE, "cuda"))
    assert on_80.device_bytes < 40 * GB
    # 24 GB at full speed: every batch is suspended inside its block, so nothing is run twice.
    on_24 = chosen(LARGE, 24, 16)
    assert (on_24.placement, on_24.num_variants, on_24.suspended_batches) == ("device", 1, on_24.num_batches)
    on_12 = chosen(LARGE, 12, 16)
    assert (on_12.placement, on_12.num_variants) == ("host", 4)
    assert 0 < on_12.suspended_batches < on_12.num_batches
    assert max(on_24.host_bytes, on_12.host_bytes) <= HOST_LIMIT_BYTES


def test_13b_with_little_host_memory():
    way = chosen(LARGE, 24, 3)
    assert (way.placement, way.num_variants, way.suspended_batches) == ("device", 1, 16)
    way = chosen(LARGE, 7, 3)
    assert (way.placement, way.num_variants, way.weights) == ("disk", 4, "device")
    assert way.host_bytes <= 3 * GB


def test_variants_calibrated_in_parallel_suspend_no_batch():
    """Their batches are never suspended: they run once to calibrate, and once for their outputs."""
    work = replace(LARGE, true_sequential=False)
    assert {way.suspended_batches for way in sweep_ways(work, "cuda")} == {0}
    assert chosen(work, 24, 16).placement == "device"
    assert (chosen(work, 12, 16).placement, chosen(work, 12, 16).num_variants) == ("device", 1)
    assert chosen(work, 8, 16).placement == "host"


@pytest.mark.parametrize("true_sequential", [True, False])
def test_a_cpu_keeps_everything_in_its_memory(true_sequential):
    work = replace(SMALL, true_sequential=true_sequential)
    ways = list(sweep_ways(work, "cpu"))
    assert [way.num_variants for way in ways] == [3, 2, 1]
    assert {(way.placement, way.suspended_batches, way.host_bytes) for way in ways} == {("device", 16, 0)}
    assert choose_sweep(work, "cpu", device_limit=None, host_limit=None) == ways[0]
    assert choose_sweep(work, "cpu", device_limit=ways[0].device_bytes - 1, host_limit=0) == ways[1]


def test_the_error_states_the_memory_that_would_be_enough():
    with pytest.raises(MachineError) as caught:
        choose_sweep(LARGE, "cuda", device_limit=4 * GB, host_limit=16 * GB)
    assert str(caught.value) == (
        "quantizing does not fit into this machine's memory\n"
        "  why: it needs 4.89 GB of the device and 2.12 GB of the host; there are 4.00 GB and 16.00 GB\n"
        "  hint: use a larger GPU, a higher --gpu-memory, or fewer calibration rows"
    )
    assert caught.value.exit_code == 12
    with pytest.raises(MachineError, match=r"there are any number of GB and 2\.00 GB"):
        choose_sweep(LARGE, "cuda", device_limit=None, host_limit=2 * GB)


@settings(max_examples=examples(60))
@given(fields=WORKS)
def test_the_memory_that_the_error_states_is_enough_and_no_more(fields):
    work = made(fields)
    ways = list(sweep_ways(work, "cuda"))
    least = {
        "device_limit": min(way.device_bytes for way in ways),
        "host_limit": min(way.host_bytes for way in ways),
    }
    assert fits(choose_sweep(work, "cuda", **least), **least)
    for limit, size in least.items():
        with pytest.raises(MachineError):
            choose_sweep(work, "cuda", **{**least, limit: size - 1})


@pytest.mark.parametrize(("seq_len", "on_cpu", "on_cuda"), [(2048, 2, 8), (32, 128, 512), (4096, 1, 4), (32768, 1, 1)])
def test_the_tokens_of_a_batch_determine_its_rows(seq_len, on_cpu, on_cuda):
    assert (rows_per_batch(seq_len, "cpu"), rows_per_batch(seq_len, "cuda")) == (on_cpu, on_cuda)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_bytes_of_pairs_count_once_for_each_token_of_the_row(device_type):
    """Attention that stores its scores, with rows of 2048 tokens."""
    plain = replace(LARGE, num_samples=64, seq_len=2048)

    def sized(by_token: int, by_pair: int) -> tuple[int, int]:
        kinds = [
            replace(
                kind, peak_bytes=kind.peak_bytes + by_token, peak_bytes_per_pair=by_pair,
                groups=tuple(
                    group.model_copy(
                        update={"held_bytes": group.held_bytes + by_token, "held_bytes_per_pair": by_pair}
                    )
                    for group in kind.groups
                ),
            )
            for kind in plain.architecture.kinds
        ]  # fmt: skip
        architecture = replace(plain.architecture, kinds=tuple(kinds))
        way = next(sweep_ways(replace(plain, architecture=architecture), device_type))
        measuring = evaluation_memory(architecture, num_tokens=65536, seq_len=2048, device_type=device_type)
        return way.device_bytes, measuring.device_bytes

    assert sized(2048 * 96, 0) == sized(0, 96)
    assert sized(0, 96) > sized(0, 0)


def few_rows_of_gemma() -> Workload:
    """So few that its embedding takes more than its blocks."""
    return replace(workload("real/gemma-3-270m.yaml"), num_samples=8, seq_len=256)


def test_an_embedding_larger_than_the_blocks_is_counted():
    """Gemma 3 270M: as it is stored and in float32, beside the first block and the inputs; on a GPU as it is stored."""
    gemma = few_rows_of_gemma()
    weights, embedding, states = 5_573_632, 262_144 * 640, 8 * 256 * 640
    assert next(sweep_ways(gemma, "cpu")).device_bytes == 4 * states + (2 + 4) * embedding + 4 * weights
    for way in sweep_ways(gemma, "cuda"):
        read_beside = 2 * weights if way.weights == "device" else 0
        assert way.device_bytes >= 2 * states + 2 * embedding + read_beside
    assert min(way.device_bytes for way in sweep_ways(gemma, "cuda")) == 2 * states + 2 * embedding


def test_a_head_of_its_own_and_a_float32_embedding_are_not_converted_beside():
    tied = few_rows_of_gemma()
    embedding, *others = tied.architecture.tensors
    assert embedding.name == "model.embed_tokens.weight"
    needed = next(sweep_ways(tied, "cpu")).device_bytes

    def changed(tensors: list[TensorInfo], tied_names: tuple[str, ...]) -> int:
        stored = tuple(LockedTensors(names=name, dtype=dtype, shape=shape) for name, dtype, shape in tensors)
        architecture = replace(tied.architecture, stored=stored, tied=tied_names)
        return next(sweep_ways(replace(tied, architecture=architecture), "cpu")).device_bytes

    head = embedding._replace(name="lm_head.weight")
    assert changed([head, embedding, *others], ()) == needed
    assert needed - changed([embedding._replace(dtype="F32"), *others], ("lm_head.weight",)) == embedding.size_bytes
    more = embedding._replace(name="model.embed_tokens_per_layer.weight", shape=(262_100, 640))
    assert changed([embedding, more, *others], ("lm_head.weight",)) - needed == 4 * 262_100 * 640


def test_the_partial_sums_of_a_hessian_are_planned():
    """With so many tokens in the running batch that calibrating the widest linear is the peak."""

    def peak(sums: int, *, all_at_once: bool = False) -> int:
        # Of 1, 2, 4 and 8 batches, a device holds 1, 2, 3 and 4 sums at most.
        work = replace(LARGE, num_samples=8 * 2 ** (sums - 1), all_at_once=all_at_once)
        assert work.most_sums("cuda") == sums
        return memory_module._Sizes(work, "cuda").peak(0, 0, 10**6, 10**6, inputs_held=0)

    # 13 panels of 1024 rows and one of 512, each from its own first column on; and 5 panels of 1024 rows.
    wide = 4 * (sum(1024 * (13824 - 1024 * panel) for panel in range(13)) + 512 * 512)
    narrow = 4 * sum(1024 * (5120 - 1024 * panel) for panel in range(5))
    assert peak(4) - peak(1) == 3 * wide
    assert peak(4, all_at_once=True) - peak(1) == 3 * wide + 4 * narrow * 3
    assert wide < 0.55 * 4 * 13824**2


def test_devices_that_share_the_rows_need_less_each():
    def needed(ranks: int) -> int:
        return next(sweep_ways(replace(LARGE, num_variants=1, ranks=ranks), "cuda")).device_bytes

    needs = [needed(ranks) for ranks in (1, 2, 3, 8)]
    assert needs == sorted(needs, reverse=True)
    states = 2 * 128 * 2048 * 5120
    assert needs[0] - needs[1] > states
    ways = {way.num_batches for way in sweep_ways(replace(LARGE, ranks=3), "cuda")}
    assert ways == {6}  # 4, 6 and 6 of 16 batches


LLAMA_405B = {
    **LLAMA_2_13B, "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126,
    "num_attention_heads": 128, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
}  # fmt: skip


# What torch allocated at most on one H200, in GB (docs/explanation/measurements.md, "The plan's memory beside the
# GPU's"), for a Llama's width, MLP, heads and heads of keys, in which way, and what else the workload has.
MEASURED: dict[str, tuple[float, tuple[int, int, int, int], tuple[Any, ...], dict[str, Any]]] = {
    "13B, one": (19.69, (5120, 13824, 40, 40), ("device", 16, "device"), {"num_variants": 1}),
    "13B, four": (27.90, (5120, 13824, 40, 40), ("device", 16, "device"), {"num_variants": 4}),
    "13B, refined in static order": (20.14, (5120, 13824, 40, 40), ("device", 16, "device"), {"refined_group": 128}),
    "13B, one corrected": (35.46, (5120, 13824, 40, 40), ("device", 16, "device"), {"corrected": True}),
    "13B, four corrected": (
        51.58, (5120, 13824, 40, 40), ("device", 16, "device"), {"num_variants": 4, "corrected": True}
    ),
    "70B, one": (43.31, (8192, 28672, 64, 8), ("device", 16, "device"), {}),
    "70B, four": (56.23, (8192, 28672, 64, 8), ("device", 16, "device"), {"num_variants": 4}),
    "70B, one corrected": (71.43, (8192, 28672, 64, 8), ("device", 16, "device"), {"corrected": True}),
    "405B, on 60 GB": (48.38, (16384, 53248, 128, 8), ("host", 2, "host"), {}),
    "405B, on 80 GB": (67.84, (16384, 53248, 128, 8), ("host", 4, "device"), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", MEASURED)
def test_the_plan_is_within_a_tenth_of_what_a_gpu_took(name: str) -> None:
    used, (hidden, intermediate, heads, kv_heads), way, fields = MEASURED[name]
    config = {
        **LLAMA_2_13B, "hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }  # fmt: skip
    fields = {"num_variants": 1, "packed_bits": 4.625 if fields.get("num_variants") == 4 else 4.15625, **fields}
    architecture = known_architecture(config, "config.json")
    work = Workload(architecture=architecture, num_samples=128, seq_len=2048, **fields)
    (planned,) = (
        each.device_bytes for each in sweep_ways(work, "cuda")
        if (each.placement, each.suspended_batches, each.weights, each.num_variants) == (*way, work.num_variants)
    )  # fmt: skip
    assert 1 <= planned / (used * GB) < 1.1


@pytest.mark.slow
def test_the_plan_of_experts_is_what_the_page_says(tmp_path: Path) -> None:
    """docs/explanation/measurements.md: a shape of Qwen3-30B-A3B used 15.1 GB, a layer of DeepSeek-V3 52.5 GB."""
    from transformers import DeepseekV3Config, Qwen3MoeConfig

    from packager.model.describe import describe

    def ways(config: Any, **fields: Any) -> list[SweepPlan]:
        config.save_pretrained(tmp_path / config.model_type)
        architecture = architecture_of(describe(tmp_path / config.model_type, None), "config.json")
        work = Workload(architecture=architecture, num_samples=128, seq_len=2048, **fields)
        return list(sweep_ways(work, "cuda"))

    more: dict[str, Any] = {"head_dim": 128}
    qwen = Qwen3MoeConfig(
        **more, vocab_size=32000, hidden_size=2048, num_hidden_layers=2, num_attention_heads=32, num_key_value_heads=4,
        num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, dtype="float16",
        architectures=["Qwen3MoeForCausalLM"],
    )  # fmt: skip
    deepseek: dict[str, Any] = {
        "first_k_dense_replace": 0,
        "dtype": "bfloat16",
        "architectures": ["DeepseekV3ForCausalLM"],
    }
    (first, *_) = ways(qwen, num_variants=4, packed_bits=4.625)
    assert round(first.device_bytes / 1e9, 2) == 16.45
    layer = DeepseekV3Config(num_hidden_layers=1, **deepseek)
    kept = [way for way in ways(layer, num_variants=1, packed_bits=4.15625) if way.suspended_batches == 4]
    (run,) = (way for way in kept if (way.placement, way.weights) == ("device", "host"))
    assert round(run.device_bytes / 1e9, 2) == 61.37
    assert least_gb(ways(layer, num_variants=4, packed_bits=4.625)) == 48.0
    kimi = DeepseekV3Config(
        **{**deepseek, "first_k_dense_replace": 1}, num_hidden_layers=2, n_routed_experts=384, num_attention_heads=64,
        num_key_value_heads=64, n_group=1, topk_group=1, vocab_size=163840,
    )  # fmt: skip
    assert least_gb(ways(kimi, num_variants=4, packed_bits=4.625)) == 62.4


def least_gb(ways: Sequence[SweepPlan]) -> float:
    return round(min(way.device_bytes for way in ways) / 1e9, 1)


def test_405b_fits_a_card_of_80_gb():
    """Its down_proj decides: two float32 matrices of [53248, 53248], 22.7 GB, and 11.6 GB for its columns."""
    architecture = known_architecture(LLAMA_405B, "config.json")
    work = Workload(architecture=architecture, num_samples=128, seq_len=2048, num_variants=4, packed_bits=4.625)
    way = chosen(work, 80, 128)
    assert (way.num_variants, way.placement, way.weights) == (4, "host", "device")
    assert chosen(work, 60, 128).weights == "host"
    with pytest.raises(MachineError) as caught:
        chosen(work, 48, 128)
    assert "it needs 44.71 GB of the device" in str(caught.value)


def test_packed_blocks_take_what_their_bits_say():
    """Of weights in 4 bits and groups of 32: 4.625 bits each, for one block."""
    fields: dict[str, Any] = {"bits": 4, "group_size": 32}
    four = Workload.of(LARGE.architecture, 8, 2048, [variant(**fields)])
    eight = Workload.of(LARGE.architecture, 8, 2048, [variant(**fields), variant(bits=8, group_size=128)])
    weights = max(kind.weight_elements for kind in LARGE.architecture.kinds)
    assert (four.packed_bits, eight.packed_bits) == (4.625, 8 + 24 / 128)
    assert Workload.of(LARGE.architecture, 8, 2048, [variant(bits=3, group_size=-1)]).packed_bits == 3
    ways = [next(sweep_ways(replace(work, num_variants=1), "cuda")) for work in (four, eight)]
    more = weights * (8.1875 - 4.625) / 8
    assert ways[1].device_bytes - ways[0].device_bytes == pytest.approx(more, abs=2)
    assert ways[1].host_bytes - ways[0].host_bytes == pytest.approx(more, abs=2)


def test_a_batch_that_runs_again_is_beside_all_that_are_suspended():
    """While it is one of them, what it holds where it is suspended is part of what it takes as it runs."""
    ways = {way.suspended_batches: way for way in sweep_ways(LARGE, "cuda") if (way.placement, way.weights) == (
        "device", "device") and way.num_variants == 1}  # fmt: skip
    held = 2 * 8 * 2048 * (13824 + 2 * 5120)  # a batch at down_proj: its input, the MLP's, and the residual
    steps = [ways[kept].device_bytes - ways[kept - 1].device_bytes for kept in range(1, 17)]
    assert set(steps[:-1]) == {held}
    assert 0 <= steps[-1] < held


@pytest.mark.long
def test_a_layer_of_256_experts_fits_a_card_of_80_gb_in_slices(tmp_path, monkeypatch):
    """DeepSeek-V3: 22.5 GB of experts in a block; its measured peak was 45.6 GB, with all batches run again."""
    from transformers import DeepseekV3Config

    from packager.model.describe import describe

    DeepseekV3Config(
        num_hidden_layers=1, first_k_dense_replace=0, dtype="bfloat16", architectures=["DeepseekV3ForCausalLM"]
    ).save_pretrained(tmp_path)
    architecture = architecture_of(describe(tmp_path, None), "config.json")
    work = Workload(architecture=architecture, num_samples=128, seq_len=2048, packed_bits=4.625, num_variants=4)
    experts = [group for group in architecture.group_sizes if group.experts]
    assert [group.experts.count for group in experts if group.experts] == [256, 256]
    assert chosen(work, 80, 128).weights == "host"
    # Without slices all experts of a group are solved at once: 330 GB.
    monkeypatch.setattr(memory_module, "expert_slices", lambda _i, _o, count, _d: [range(count)])
    with pytest.raises(MachineError):
        chosen(work, 200, 128)
