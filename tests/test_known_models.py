"""`known_models` against transformers itself (on the meta device) and against `describe`; plans against real files."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packager.errors import PlanError
from packager.model.architecture import architecture_of
from packager.model.checkpoint import checkpoint_tensors, shard_index, split_shards
from packager.model.safetensors_file import METADATA, TensorInfo
from packager.variant import ActOrder, Variant
from tests.hypothesis_profiles import examples
from tests.known_models import FAMILIES, known_architecture, known_model
from tests.samples import sampled
from tests.tensor_trees import tree_of

LLAMA_2_13B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 40,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
TORCH_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "I32": "int32"}


def variant(**changes: Any) -> Variant:
    values: dict[str, Any] = {
        "branch": "main", "bits": 4, "group_size": 128, "act_order": "none", "sym": True, "damp_percent": 0.01,
        "damp_percent_limit": 0.1, "true_sequential": True, "scale_search": False, "refine": False,
        "effort": "standard", "engine": "native",
    }  # fmt: skip
    return Variant(**{**values, **changes})


def tiny_config(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    config = {
        "model_type": model_type, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 50,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
        "torch_dtype": "float16",
    }  # fmt: skip
    return {key: value for key, value in {**config, **changes}.items() if value is not ...}


def tensors_of_transformers(config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return what `save_pretrained` would store of the model that transformers builds from this config.json."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = getattr(torch, str(config.get("torch_dtype", config.get("dtype"))))
    values = {key: value for key, value in config.items() if key not in ("model_type", "torch_dtype", "dtype")}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **values), dtype=dtype)
    assert [type(model).__name__] == [FAMILIES[config["model_type"]].causal_lm]
    names = {str(dtype): stored for stored, dtype in TORCH_DTYPES.items()}
    tensors = {
        name: (names[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
    }
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    model_type = draw(st.sampled_from(sorted(FAMILIES)))
    kv_heads, share = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads, head_dim = kv_heads * share, 2 * draw(st.integers(1, 9))
    config = tiny_config(
        model_type,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        hidden_size=heads * draw(st.sampled_from([head_dim, 2 * head_dim])),
        intermediate_size=draw(st.integers(1, 80)),
        num_hidden_layers=draw(st.integers(1, 3)),
        vocab_size=draw(st.integers(3, 60)),
        tie_word_embeddings=draw(st.booleans()),
        torch_dtype=draw(st.sampled_from(["float16", "bfloat16", "float32"])),
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
    )
    if model_type != "qwen3" and draw(st.booleans()):
        config["hidden_size"] = heads * head_dim
        del config["head_dim"]
    if model_type == "llama" and share == 1 and draw(st.booleans()):
        del config["num_key_value_heads"]
    return config


@settings(max_examples=examples(40))
@given(config=configs())
def test_base_tensors_are_those_of_transformers(config: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    architecture = known_architecture(config, "config.json")
    ours = {tensor.name: (tensor.dtype, tensor.shape) for tensor in architecture.tensors}
    assert ours == tensors_of_transformers(config)
    assert len(ours) == len(architecture.tensors)
    assert architecture.num_parameters == sum(math.prod(shape) for _, shape in ours.values())


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_a_config_that_transformers_saved_is_read(tmp_path: Path, model_type: str) -> None:
    transformers = pytest.importorskip("transformers")
    values = {key: value for key, value in tiny_config(model_type).items() if key not in ("model_type", "torch_dtype")}
    config = transformers.AutoConfig.for_model(
        model_type, **values, dtype="bfloat16", architectures=[FAMILIES[model_type].causal_lm]
    )
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    ours = known_architecture(tiny_config(model_type, torch_dtype="bfloat16"), "")
    assert replace(known_architecture(saved, ""), config={}) == replace(ours, config={})


TRACED = [
    *map(tiny_config, sorted(FAMILIES)),
    tiny_config(attention_bias=True, mlp_bias=True, num_hidden_layers=1),
    tiny_config("qwen3", tie_word_embeddings=True, hidden_size=128, head_dim=32),
    {**LLAMA_2_13B, "num_hidden_layers": 2},
]


@pytest.mark.parametrize("config", sampled(TRACED, TRACED[0], TRACED[-2]))
def test_it_says_what_a_traced_forward_says(config: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from packager.model.describe import describe

    (tmp_path / "config.json").write_text(json.dumps(config))
    ours, described = known_model(config, "config.json"), describe(tmp_path, None)
    (kind,), (described_kind,) = ours.kinds, described.kinds
    # What is computed in one operation after another is estimated from above.
    assert described_kind.peak_bytes <= kind.peak_bytes <= 1.35 * described_kind.peak_bytes
    same_peak = described_kind.model_copy(update={"peak_bytes": kind.peak_bytes})
    assert kind == same_peak
    expected, found = architecture_of(described, ""), architecture_of(ours, "")
    same: dict[str, Any] = {"kinds": (), "stored": (), "resolved": {}}  # what is not transformers' own knowledge
    assert replace(found, **same) == replace(expected, **same)
    assert found.tree == expected.tree


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_linears_are_every_linear_of_every_block(model_type: str) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    config = tiny_config(model_type)
    values = {key: value for key, value in config.items() if key not in ("model_type", "torch_dtype")}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values))
    expected = {
        name: (module.in_features, module.out_features, module.bias is not None)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    architecture = known_architecture(config, "config.json")
    assert {
        linear.name: (linear.in_features, linear.out_features, linear.bias) for linear in architecture.linears
    } == expected
    block_linears = [linear.module for linear in architecture.example_linears]
    assert [linear.module for linear in architecture.linears] == [*block_linears, *block_linears]
    (kind,) = architecture.kinds
    assert block_linears == [module for group in kind.groups for module in group.modules]


@pytest.mark.parametrize(
    ("group_size", "expected"),
    [(128, 7_255_009_280), (64, 7_502_817_280), (32, 7_998_433_280)],
)
def test_13b_has_the_sizes_of_the_format(group_size: int, expected: int) -> None:
    architecture = known_architecture(LLAMA_2_13B, "config.json")
    assert architecture.num_parameters == 13_015_864_320
    tensors = checkpoint_tensors(architecture, variant(group_size=group_size))
    assert sum(tensor.size_bytes for tensor in tensors) == expected
    (shard,) = split_shards(tensors, 48_000_000_000, "model")
    assert shard.file_name == "model.safetensors"
    assert expected < shard.size_bytes < expected + 200_000


@settings(max_examples=examples(60))
@given(
    config=configs(),
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([-1, 8, 32, 64]),
    act_order=st.sampled_from(get_args(ActOrder)),
)
def test_checkpoint_bytes_follow_the_formula(
    config: dict[str, Any], bits: int, group_size: int, act_order: ActOrder
) -> None:
    factor = 32 // math.gcd(32, bits)
    config |= {"head_dim": factor * 2, "intermediate_size": factor * 3}
    config["hidden_size"] = config["num_attention_heads"] * factor
    architecture = known_architecture(config, "config.json")
    expected = 0
    quantized = set()
    for linear in architecture.linears:
        rows, columns = linear.in_features, linear.out_features
        groups = 1 if group_size == -1 else math.ceil(rows / group_size)
        expected += rows * columns * bits // 8 + groups * columns * bits // 8 + 2 * groups * columns + 4 * rows
        expected += 2 * columns if linear.bias else 0
        quantized |= {f"{linear.name}.weight", f"{linear.name}.bias"}
    expected += sum(tensor.size_bytes for tensor in architecture.tensors if tensor.name not in quantized)
    tensors = checkpoint_tensors(architecture, variant(bits=bits, group_size=group_size, act_order=act_order))
    assert sum(tensor.size_bytes for tensor in tensors) == expected
    assert len({tensor.name for tensor in tensors}) == len(tensors)


def test_a_quantized_linear_has_the_tensors_of_the_format() -> None:
    architecture = known_architecture(tiny_config("qwen2", torch_dtype="bfloat16"), "config.json")
    tensors = {tensor.name: tensor for tensor in checkpoint_tensors(architecture, variant(bits=8, group_size=16))}
    prefix = "model.layers.1.self_attn.k_proj"
    assert {name: (t.dtype, t.shape) for name, t in tensors.items() if name.startswith(prefix)} == {
        f"{prefix}.qweight": ("I32", (16, 32)),
        f"{prefix}.qzeros": ("I32", (4, 8)),
        f"{prefix}.scales": ("F16", (4, 32)),
        f"{prefix}.g_idx": ("I32", (64,)),
        f"{prefix}.bias": ("F16", (32,)),
    }
    assert tensors["lm_head.weight"].dtype == "BF16"
    assert "model.layers.0.self_attn.o_proj.bias" not in tensors


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("max_shard_bytes", [1 << 40, 20_000])
def test_predicted_sizes_are_those_on_disk(tmp_path: Path, dtype: str, max_shard_bytes: int) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    architecture = known_architecture(tiny_config("qwen3", torch_dtype=dtype, num_hidden_layers=12), "config.json")
    tensors = checkpoint_tensors(architecture, variant(group_size=32))
    for shard in split_shards(tensors, max_shard_bytes, "model"):
        made = {t.name: torch.zeros(t.shape, dtype=getattr(torch, TORCH_DTYPES[t.dtype])) for t in shard.tensors}
        save_file(made, tmp_path / shard.file_name, metadata=METADATA)
        assert (tmp_path / shard.file_name).stat().st_size == shard.size_bytes <= max_shard_bytes


@settings(max_examples=examples(60))
@given(max_shard_bytes=st.integers(8_000, 200_000), model_type=st.sampled_from(sorted(FAMILIES)))
def test_shards_hold_everything_once_and_keep_modules_together(max_shard_bytes: int, model_type: str) -> None:
    tensors = checkpoint_tensors(known_architecture(tiny_config(model_type), "config.json"), variant(group_size=32))
    shards = split_shards(tensors, max_shard_bytes, "weights")
    assert [tensor for shard in shards for tensor in shard.tensors] == list(tensors)
    assert all(shard.size_bytes <= max_shard_bytes for shard in shards)
    homes: dict[str, set[str]] = {}
    for shard in shards:
        for tensor in shard.tensors:
            homes.setdefault(tensor.name.rpartition(".")[0], set()).add(shard.file_name)
    assert all(len(files) == 1 for files in homes.values())
    if len(shards) == 1:
        assert shards[0].file_name == "weights.safetensors"
    else:
        count = len(shards)
        assert [shard.file_name for shard in shards] == [
            f"weights-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)
        ]
    assert split_shards(tensors, max_shard_bytes, "weights") == shards


def test_a_module_larger_than_a_shard_is_an_error_naming_it() -> None:
    tensors = tree_of([TensorInfo(name="model.embed_tokens.weight", dtype="F16", shape=(1000, 64))])
    with pytest.raises(PlanError, match=r"model\.embed_tokens does not fit") as caught:
        split_shards(tensors, 100_000, "model")
    assert "limit is 100000" in caught.value.why
    assert split_shards(tensors, 129_000, "model")[0].size_bytes <= 129_000


def test_the_index_names_every_tensor_and_the_total() -> None:
    tensors = checkpoint_tensors(known_architecture(tiny_config(), "config.json"), variant(group_size=32))
    shards = split_shards(tensors, 20_000, "model")
    index = json.loads(shard_index(shards))
    assert len(shards) > 1
    assert index["metadata"] == {"total_size": sum(tensor.size_bytes for tensor in tensors)}
    assert set(index["weight_map"]) == {tensor.name for tensor in tensors}
    assert set(index["weight_map"].values()) == {shard.file_name for shard in shards}


def test_an_unknown_family_names_the_known_ones() -> None:
    with pytest.raises(PlanError) as caught:
        known_architecture({**LLAMA_2_13B, "model_type": "mamba"}, "some/config.json")
    message = str(caught.value)
    assert 'some/config.json: model_type "mamba" is not known here' in message
    assert all(name in message for name in FAMILIES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "64"}, 'hidden_size is "64", expected an integer from 1 to'),
        ({"hidden_size": True}, "hidden_size is true, expected an integer"),
        ({"hidden_size": 64.0}, "hidden_size is 64.0, expected an integer"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"vocab_size": -5}, "vocab_size is -5"),
        ({"vocab_size": 10**30}, "vocab_size is 1000000000000000000000000000000, expected"),
        ({"num_hidden_layers": 10**6}, "expected an integer from 1 to 1000"),
        ({"intermediate_size": [96]}, "intermediate_size is [96]"),
        ({"max_position_embeddings": ...}, "max_position_embeddings is missing"),
        ({"attention_bias": 1}, "attention_bias is 1, expected true or false"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"torch_dtype": ...}, "torch_dtype (or dtype) is missing"),
        ({"torch_dtype": "int8"}, 'torch_dtype is "int8", expected one of float16, bfloat16, float32'),
        ({"torch_dtype": 16}, "torch_dtype is 16"),
        ({"dtype": "bfloat16"}, 'torch_dtype and dtype disagree: "float16" and "bfloat16"'),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 4"),
        ({"head_dim": ..., "num_attention_heads": 6}, "num_attention_heads 6 does not divide hidden_size 64"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"architectures": ["LlamaModel"]}, 'architectures is ["LlamaModel"], expected ["LlamaForCausalLM"]'),
        ({"quantization_config": {"bits": 4}}, "already quantized"),
        ({"rope_scaling": 4}, "rope_scaling is 4, expected an object or null"),
        ({"model_type": "qwen3", "head_dim": ...}, "head_dim is missing"),
        ({"model_type": "mistral", "num_key_value_heads": ...}, "num_key_value_heads is missing"),
    ],
)
def test_bad_values_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError) as caught:
        known_architecture(tiny_config(**changes), "config.json")
    assert message in str(caught.value)
    assert caught.value.where == "config.json"


def test_all_bad_values_are_named_at_once() -> None:
    with pytest.raises(PlanError) as caught:
        known_architecture({"model_type": "llama"}, "config.json")
    for key in ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "torch_dtype"):
        assert f"{key}" in caught.value.why


@pytest.mark.parametrize(
    ("changes", "scaled"),
    [
        ({}, False),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, True),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, True),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, False),
    ],
)
def test_scaled_rope_is_noticed(changes: dict[str, Any], scaled: bool) -> None:
    assert known_architecture(tiny_config(**changes), "config.json").scaled_rope is scaled
