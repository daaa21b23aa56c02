"""The choice of a mix's bits: exact against every choice there is, and sizes against the planned tensors."""

import math
import random
from itertools import product
from pathlib import Path

import pytest

from packager.model.checkpoint import quantized_tensors
from packager.model.safetensors_file import DTYPE_BYTES
from packager.quantize.choose_bits import choose_bits, least_loss, mixed_groups, most_size
from packager.recipe.file import RecipeFile
from packager.variant import Bits, BitsMix

ALL_BITS: tuple[Bits, ...] = (2, 3, 4, 8)
DEMO = RecipeFile.load(Path(__file__).resolve().parent.parent / "recipes" / "demo-llama.yaml").architecture


def size_of(bits: tuple[Bits, ...], sizes: list[int]) -> int:
    return sum(each * size for each, size in zip(bits, sizes, strict=True))


def loss_of(bits: tuple[Bits, ...], losses: list[dict[Bits, float]]) -> float:
    return sum(loss[each] for each, loss in zip(bits, losses, strict=True))


def least_of_all(losses: list[dict[Bits, float]], sizes: list[int], limit: int) -> float:
    """Return the least loss of all choices that fit, of which there are few enough to try each."""
    return min(loss_of(bits, losses) for bits in product(*losses) if size_of(bits, sizes) <= limit)


@pytest.mark.parametrize("seed", range(4))
def test_no_other_choice_that_fits_has_a_lower_loss(seed: int) -> None:
    """Losses over eight orders of magnitude, some equal, some that rise with the bits; sizes alike and not."""
    dice = random.Random(seed)
    for _ in range(40):
        bits = sorted(dice.sample(ALL_BITS, dice.randint(2, 4)))
        losses = [
            {each: dice.choice([0.5, 10 ** dice.uniform(-6, 2)]) * 2.0 ** (-2 * each * dice.random()) for each in bits}
            for _ in range(dice.randint(1, 6))
        ]
        sizes = [dice.choice([8, 24, dice.randint(1, 1000)]) for _ in losses]
        limit = int(dice.uniform(bits[0], bits[-1]) * sum(sizes))
        found = least_loss(losses, sizes, limit)
        assert size_of(found, sizes) <= limit
        assert math.isclose(loss_of(found, losses), least_of_all(losses, sizes, limit), rel_tol=1e-12)


def test_a_large_model_is_within_the_bound_that_a_price_gives() -> None:
    """500 groups: by weak duality no choice is below it, and the loss of one group above it is what rounding costs."""
    dice = random.Random(0)
    losses: list[dict[Bits, float]] = [
        {bits: dice.uniform(0.1, 1) * 2.0 ** (-2 * bits) for bits in ALL_BITS} for _ in range(500)
    ]
    sizes = [dice.choice([10, 30, 54, 27]) * 2_621_440 for _ in losses]
    limit = int(3.4 * sum(sizes))
    found = least_loss(losses, sizes, limit)
    bounds = []
    for step in range(200):
        price = 10 ** (-10 - step / 100)
        least = (min(x[bits] + price * bits * size for bits in x) for x, size in zip(losses, sizes, strict=True))
        bounds.append(sum(least) - price * limit)
    assert size_of(found, sizes) <= limit
    assert max(bounds) <= loss_of(found, losses) <= max(bounds) * 1.001
    assert found == least_loss(losses, sizes, limit)


@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_sizes_are_those_of_the_packed_words(group_size: int) -> None:
    specs = {linear.name: linear for linear in DEMO.linears}
    groups = mixed_groups(DEMO, group_size)
    assert [name for group in groups for name in group.linears] == [linear.name for linear in DEMO.linears]
    for group, bits in product(groups, ALL_BITS):
        words = [
            math.prod(tensor.shape) * 8 * DTYPE_BYTES[tensor.dtype]
            for name in group.linears
            for tensor in quantized_tensors(specs[name], bits=bits, group_size=group_size)
            if tensor.name.endswith(("qweight", "qzeros"))
        ]
        assert sum(words) == bits * group.size
    assert most_size(groups, BitsMix(bits=(2, 8), mean=4.7)) == math.floor(sum(g.size for g in groups) * 47 / 10)


def test_linears_that_see_the_same_input_have_the_same_bits() -> None:
    """One of q, k and v alone would take 8 bits."""
    groups = mixed_groups(DEMO, 128)
    names = [name for group in groups for name in group.linears]
    losses: dict[Bits, dict[str, float]] = {4: dict.fromkeys(names, 1e-3), 8: dict.fromkeys(names, 1e-6)}
    losses[4]["model.layers.3.self_attn.k_proj"] = 1.0
    chosen = dict(choose_bits(groups, BitsMix(bits=(4, 8), mean=4.4), losses))
    assert list(chosen) == names
    assert {chosen[f"model.layers.3.self_attn.{part}_proj"] for part in "qkv"} == {8}
    assert all(len({chosen[name] for name in group.linears}) == 1 for group in groups)
