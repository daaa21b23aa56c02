"""The parameters and row lengths that fit a model; tensors, sizes and shards are in test_architecture.py."""

import pytest

from packager.errors import PlanError
from packager.model.checkpoint import FitProblem, fit_problems, length_problem, split_shards
from packager.model.safetensors_file import TensorInfo
from tests.known_models import known_architecture
from tests.tensor_trees import tree_of
from tests.test_known_models import tiny_config

LARGE = known_architecture(tiny_config(hidden_size=1024, intermediate_size=2048, head_dim=256), "config.json")
ODD = known_architecture(
    tiny_config(hidden_size=48, intermediate_size=72, num_attention_heads=4, head_dim=12), "config.json"
)


def test_every_size_that_divides_all_linears_is_offered() -> None:
    (problem,) = fit_problems(LARGE, group_size=24)
    assert problem.parameter == "group_size"
    assert problem.hint == "these fit every linear: -1, 8, 16, 32, 64, 128, 256, 512, 1024"
    assert not list(fit_problems(LARGE, group_size=1024))
    assert not list(fit_problems(ODD, group_size=-1))


def test_rows_and_columns_must_fill_words() -> None:
    assert not list(fit_problems(ODD, bits=4, group_size=24))
    (problem,) = fit_problems(ODD, bits=3)
    # 48 x 3 = 144 and 72 x 3 = 216 bits are no multiples of 32.
    names = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    assert problem == FitProblem(parameter="bits", message=f"3-bit values of {names} do not fill 32-bit words")
    assert not list(fit_problems(ODD))


assert LARGE.max_position_embeddings is not None
LONGEST = LARGE.max_position_embeddings


@pytest.mark.parametrize("seq_len", [1, LONGEST])
def test_rows_may_be_as_long_as_the_positions(seq_len: int) -> None:
    assert length_problem(LARGE, "calibration.seq_len", seq_len) == ""
    longer = LONGEST + 1
    expected = f"calibration.seq_len {longer} is more than the {longer - 1} positions of the base model"
    assert length_problem(LARGE, "calibration.seq_len", longer) == expected


@pytest.mark.parametrize("name", ["a.weight", "a.\U0001f600.weight", 'a."\\".weight'])
def test_one_large_file_and_the_smallest_that_holds_the_tensors_are_alike(name: str) -> None:
    tensors = tree_of(TensorInfo(name=f"{number}.{name}", dtype="F16", shape=(64, 3)) for number in range(50))
    (large,) = split_shards(tensors, 1 << 30, "model")
    sizes = range(large.size_bytes, 6 * large.size_bytes, 50)
    smallest = next(size for size in sizes if len(split_shards(tensors, size, "model")) == 1)
    assert split_shards(tensors, smallest, "model") == (large,)
    assert len(split_shards(tensors, smallest - 50, "model")) == 2
    assert large.tensor_bytes == 50 * 64 * 3 * 2


def test_a_tensor_outside_of_a_module_that_fits_no_file_is_named() -> None:
    with pytest.raises(PlanError, match=r"^checkpoint.max_shard_bytes: scales does not fit into one weights file"):
        split_shards(tree_of([TensorInfo(name="scales", dtype="F16", shape=(1000,))]), 1000, "model")
