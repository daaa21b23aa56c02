"""Devices that share the rows: the same bytes on any number of them, and one error where one of them fails.

The ranks are threads of one process, and a device may be named twice: CPUs stand for GPUs here.
"""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from packager.errors import MachineError, QuantizeError
from packager.inputs.base_model import SourceModel
from packager.inputs.rows import TokenRows
from packager.model.batches import TOKENS_PER_BATCH
from packager.model.decoder import Decoder
from packager.quantize import block as block_module
from packager.quantize import worker as worker_module
from packager.quantize.block import quantize_block
from packager.quantize.block_store import BlockStore
from packager.quantize.gptq import side_by_side
from packager.quantize.gptq.hessian import Hessian, factorize
from packager.quantize.gptq.row_parts import part_of
from packager.quantize.job import BlockDone, DeviceShare, Event, LinearsDone, QuantizeJob
from packager.quantize.ranks import Owned, RankGroup, RankStopped, SweepRank, connect
from packager.quantize.sweep import quantize
from packager.receipt import LinearRecord
from packager.variant import Variant
from tests.samples import sampled
from tests.sources import open_folder
from tests.tiny_models import open_store, save_model, token_rows, variant

CPU = torch.device("cpu")
PLAIN = variant(group_size=16, act_order="full", scale_search=True)
AT_ONCE = variant(group_size=32, true_sequential=False)
# The tokens of all rows are enough to refine every linear, those of one rank of three are too few.
REFINED = variant(group_size=16, scale_search=True, refine=True)
DRIVER = Path(__file__).with_name("ranks_crash_driver.py")


@pytest.fixture(autouse=True)
def _a_row_is_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TOKENS_PER_BATCH, "cpu", 32)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("quantize")]


def run(
    source: SourceModel, work: Path, *variants: Variant, ranks: int, rows: TokenRows | None = None
) -> tuple[dict[str, tuple[LinearRecord, ...]], list[Event]]:
    steps: list[Event] = []
    stores = {v: open_store(source, work, v) for v in variants}
    job = QuantizeJob(source=source, rows=rows or token_rows(), stores=stores, devices=(CPU,) * ranks)
    return quantize(job, steps.append), steps


def files(work: Path) -> dict[str, bytes]:
    return {path.relative_to(work).as_posix(): path.read_bytes() for path in work.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def on_one(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Variant], Any]:
    """What one device makes of a model, made once: the model, the records and the bytes."""
    made: dict[tuple[str, Variant], Any] = {}

    def of(name: str, v: Variant) -> Any:
        if (name, v) not in made:
            folder = tmp_path_factory.mktemp(name)
            source = open_folder(save_model(folder / "model", name))
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(TOKENS_PER_BATCH, "cpu", 32)
                records, _ = run(source, folder / "work", v, ranks=1)
            made[name, v] = source, records, files(folder / "work")
        return made[name, v]

    return of


CASES = [(name, v, ranks) for ranks in (2, 3, 8) for name in ("llama", "qwen3-moe") for v in (PLAIN, AT_ONCE, REFINED)]
QUICK = (("llama", PLAIN, 3), ("qwen3-moe", PLAIN, 2), ("llama", AT_ONCE, 8), ("llama", REFINED, 3))


@pytest.mark.parametrize(("name", "v", "ranks"), sampled(CASES, *QUICK))
def test_ranks_make_the_bytes_of_one_device(tmp_path, on_one, name, v, ranks):
    source, expected, bytes_of_one = on_one(name, v)
    records, steps = run(source, tmp_path, v, ranks=ranks)
    assert records == expected
    assert files(tmp_path) == bytes_of_one
    (share,) = [step for step in steps if isinstance(step, DeviceShare)]
    assert len(share.devices) == ranks
    blocks = [step.block for step in steps if isinstance(step, BlockDone)]
    assert blocks == [0, 1, 2], "a block is reported once"
    linears = [record for step in steps if isinstance(step, LinearsDone) for record in step.linears]
    assert sorted(linears, key=str) == sorted(records[v.branch], key=str), "each linear is reported once"


def test_the_rows_are_spread_and_every_rank_solves(tmp_path, monkeypatch):
    """Twelve batches on three ranks: four each, in order; four groups of linears on three owners."""
    source, ran = open_folder(save_model(tmp_path / "model", "llama")), []
    solved: list[tuple[int, str]] = []
    embed, solve_linears = Decoder.embed, block_module._BlockSolver._solve_linears
    monkeypatch.setattr(Decoder, "embed", lambda self, ids, *, rows: ran.append(ids) or embed(self, ids, rows=rows))

    def solving(self, mine, H, S, tokens):
        solved.extend((self._job.rank.number, modules[0]) for modules in mine.values())
        return solve_linears(self, mine, H, S, tokens)

    monkeypatch.setattr(block_module._BlockSolver, "_solve_linears", solving)
    run(source, tmp_path / "work", PLAIN, ranks=3)
    assert sorted(len(ids) for ids in ran) == [3, 4, 5]  # 2, 3 and 3 of the eight parts
    by_first = sorted(ran, key=lambda ids: [row.tolist() for row in token_rows().ids].index(ids[0].tolist()))
    assert torch.equal(torch.cat(by_first), token_rows().ids)
    owners = {name: {rank for rank, found in solved if found == name} for _, name in solved}
    assert owners == {
        "self_attn.q_proj": {0}, "self_attn.o_proj": {1}, "mlp.gate_proj": {2}, "mlp.down_proj": {0},
    }  # fmt: skip


@pytest.mark.slow
def test_wide_linears_of_a_group_are_solved_at_the_same_time_by_several_ranks(tmp_path, monkeypatch):
    source, owners = open_folder(save_model(tmp_path / "model", "llama")), {}
    monkeypatch.setattr(side_by_side, "MOST_FEATURES", 70)
    solve_linears = block_module._BlockSolver._solve_linears

    def solving(self, mine, H, S, tokens):
        owners.update(dict.fromkeys(mine.values(), self._job.rank.number))
        return solve_linears(self, mine, H, S, tokens)

    expected, _ = run(source, tmp_path / "one", PLAIN, ranks=1)
    monkeypatch.setattr(block_module._BlockSolver, "_solve_linears", solving)
    records, _ = run(source, tmp_path / "three", PLAIN, ranks=3)
    assert records == expected
    assert files(tmp_path / "three") == files(tmp_path / "one")
    assert {tuple(module.split(".")[1] for module in group): rank for group, rank in owners.items()} == {
        ("q_proj",): 0, ("k_proj", "v_proj"): 1, ("o_proj",): 1, ("gate_proj",): 2, ("up_proj",): 0, ("down_proj",): 0,
    }  # fmt: skip


def test_fewer_batches_than_devices_leave_devices_out(tmp_path):
    source, rows = open_folder(save_model(tmp_path / "model", "llama")), token_rows(2, 32)
    expected, _ = run(source, tmp_path / "one", PLAIN, ranks=1, rows=rows)
    records, steps = run(source, tmp_path / "five", PLAIN, ranks=5, rows=rows)
    assert (records, files(tmp_path / "five")) == (expected, files(tmp_path / "one"))
    assert [len(step.devices) for step in steps if isinstance(step, DeviceShare)] == [2]


def test_variants_and_rows_are_shared_side_by_side(tmp_path, on_one):
    """Two variants on five devices: three share the rows of the first one, two those of the other."""
    source, _, _ = on_one("llama", PLAIN)
    pair = variant(branch="a"), variant(branch="b", act_order="full")
    for v in pair:
        run(source, tmp_path / "alone", v, ranks=1)
    _, steps = run(source, tmp_path / "together", *pair, ranks=5)
    assert files(tmp_path / "together") == files(tmp_path / "alone")
    assert [len(step.devices) for step in steps if isinstance(step, DeviceShare)] == [3, 2]


@pytest.mark.parametrize(("before", "after"), [(3, 1), (1, 2), (2, 8)])
def test_another_number_of_ranks_resumes(tmp_path, monkeypatch, on_one, before, after):
    source, _, expected = on_one("qwen3-moe", PLAIN)
    write = BlockStore.write

    def write_two(store, block, *rest):
        if block == 2:
            raise MachineError("the disk is full")
        write(store, block, *rest)

    monkeypatch.setattr(BlockStore, "write", write_two)
    with pytest.raises(MachineError, match="disk is full"):
        run(source, tmp_path, PLAIN, ranks=before)
    monkeypatch.setattr(BlockStore, "write", write)
    _, steps = run(source, tmp_path, PLAIN, ranks=after)
    assert [step.resumed for step in steps if isinstance(step, BlockDone)] == [True, True, False]
    assert files(tmp_path) == expected


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("where", ["hessian", "copy_from_owners", "batches"])
def test_a_rank_that_fails_ends_the_others_with_its_error(tmp_path, monkeypatch, on_one, failing, where):
    source, _, expected = on_one("llama", PLAIN)
    method, calls = getattr(SweepRank, where), [0]

    def fail(self, *rest):
        if self.number == failing:
            calls[0] += 1
            if calls[0] == (1 if where == "batches" else 6):
                raise QuantizeError(f"rank {failing} is broken")
        return method(self, *rest)

    monkeypatch.setattr(SweepRank, where, fail)
    with pytest.raises(QuantizeError, match=f"rank {failing} is broken"):
        run(source, tmp_path, PLAIN, ranks=3)
    monkeypatch.setattr(SweepRank, where, method)
    run(source, tmp_path, PLAIN, ranks=3)
    assert files(tmp_path) == expected


def test_a_factorisation_that_fails_on_one_rank_is_repeated_on_all(tmp_path, monkeypatch, on_one):
    """As on a GPU, where a block is checked at its end: the owner alone knows that its Hessian cannot be factored."""
    source, expected, bytes_of_one = on_one("llama", PLAIN)
    attempts: list[bool] = []

    class Unchecked(block_module._BlockSolver):
        def __init__(self, block, job, solved, *, checked):
            attempts.append(checked)
            super().__init__(block, job, solved, checked=checked)

    def failing(H, order, *, damp_percent):
        factor = factorize(H, order, damp_percent=damp_percent)
        if H.shape[0] == 96:  # down_proj, which one rank owns
            factor.succeeded.zero_()
        return factor

    def first_unchecked(load, job, solved):
        try:
            return Unchecked(load(), job, solved, checked=False).run(load)
        except block_module._NeedsChecks:
            return Unchecked(load(), job, solved, checked=True).run(load)

    monkeypatch.setattr(block_module, "factorize", failing)
    monkeypatch.setattr(worker_module, "quantize_block", first_unchecked)
    records, _ = run(source, tmp_path, PLAIN, ranks=2)
    assert attempts.count(True) == attempts.count(False) == 2 * 3
    assert (records, files(tmp_path)) == (expected, bytes_of_one)


def test_a_damaged_block_is_read_once_and_made_again(tmp_path, monkeypatch, on_one):
    source, _, expected = on_one("llama", PLAIN)
    read, read_by_ranks = BlockStore.read, []

    def reading(store, block):
        if threading.current_thread().name.startswith("quantize"):
            read_by_ranks.append(block)
        return read(store, block)

    monkeypatch.setattr(BlockStore, "read", reading)
    run(source, tmp_path, PLAIN, ranks=1)
    logged: list[str] = []
    store = open_store(source, tmp_path, PLAIN)
    store._log = logged.append
    damaged = store._blocks[1]["model.layers.1.mlp.down_proj.qweight"]
    content = bytearray(damaged.path.read_bytes())
    content[damaged.offset] ^= 1
    damaged.path.write_bytes(content)
    job = QuantizeJob(source=source, rows=token_rows(), stores={PLAIN: store}, devices=(CPU,) * 3)
    read_by_ranks.clear()
    quantize(job, lambda _: None)
    assert read_by_ranks == [0, 1, 2]
    assert len(logged) == 1
    assert "is quantized again" in logged[0]
    assert files(tmp_path) == expected


@pytest.mark.slow
@pytest.mark.crash
def test_a_killed_run_goes_on_with_another_number_of_ranks(tmp_path, on_one):
    source, _, expected = on_one("llama", PLAIN)
    model = save_model(tmp_path / "model", "llama")
    ended = subprocess.run(
        [sys.executable, str(DRIVER), str(model), str(tmp_path / "work"), "3"], cwd=DRIVER.parents[1], check=False
    )
    assert ended.returncode == -9
    _, steps = run(source, tmp_path / "work", PLAIN, ranks=2)
    resumed = [step.resumed for step in steps if isinstance(step, BlockDone)]
    assert resumed[0]
    assert not resumed[-1]
    assert files(tmp_path / "work") == expected


def each_rank(size: int, work: Callable[[SweepRank], Any]) -> list[Any]:
    """Run something on every rank of a group, in threads, and return or raise what they do, in their order."""
    ranks = RankGroup([CPU] * size).ranks()

    def guarded(rank: SweepRank) -> Any:
        with rank.ending_others():
            return work(rank)

    with ThreadPoolExecutor(size) as pool:
        return [run.result() for run in [pool.submit(guarded, rank) for rank in ranks]]


def inputs_of(num_batches: int, columns: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(columns)
    return [torch.randn(50, columns, generator=generator) for _ in range(num_batches)]


@pytest.mark.parametrize("columns", [7, 200])
@pytest.mark.parametrize("num_batches", [3, 8, 13])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_a_hessian_is_that_of_one_device_bit_by_bit(size: int, num_batches: int, columns: int) -> None:
    inputs = inputs_of(num_batches, columns)
    size = min(size, num_batches)

    def of(rank: SweepRank) -> Hessian:
        found = Hessian(columns, CPU)
        for batch, part in zip(rank.batches(num_batches), rank.parts(num_batches), strict=True):
            found.add(inputs[batch], part)
        return found

    alone = of(RankGroup([CPU]).ranks()[0]).matrix()
    every = torch.cat(inputs).double()
    assert torch.allclose(alone.double(), 2 * every.T @ every / len(every), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(H, alone) for H in each_rank(size, lambda rank: rank.hessian(of(rank), range(size))))
    owner = size - 1
    found = each_rank(size, lambda rank: rank.hessian(of(rank), [owner]))
    assert [H is None for H in found] == [rank != owner for rank in range(size)]
    assert torch.equal(found[owner], alone)


def test_the_order_of_the_sum_matters() -> None:
    """Else the tests of equal bytes would show nothing: batches added one after the other give another float32."""
    inputs = inputs_of(13, 200)
    found, in_a_row = Hessian(200, CPU), Hessian(200, CPU)
    for batch, x in enumerate(inputs):
        found.add(x, part_of(batch, 13))
        in_a_row.add(x)
    assert not torch.equal(found.matrix(), in_a_row.matrix())


def test_no_input_on_any_rank_is_an_error() -> None:
    with pytest.raises(QuantizeError, match="never received an input"):
        each_rank(2, lambda rank: rank.hessian(Hessian(4, CPU), [0]))


def test_ranks_exchange_values_again_and_again() -> None:
    def work(rank: SweepRank) -> list[list[tuple[int, int]]]:
        return [rank.exchange((rank.number, step)) for step in range(200)]

    expected = [[(number, step) for number in range(4)] for step in range(200)]
    assert each_rank(4, work) == [expected] * 4


def test_a_value_is_not_kept_after_the_exchange() -> None:
    group = RankGroup([CPU] * 2)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda rank: rank.exchange(torch.zeros(5)), group.ranks()))
    assert group.posted == [None, None]


def test_every_rank_gets_the_tensors_of_their_owners() -> None:
    def work(rank: SweepRank) -> list[Tensor]:
        tensors = [torch.full((2,), 10.0 * rank.number + number) for number in range(3)]
        rank.copy_from_owners([Owned(tensor=tensor, owner=number) for number, tensor in enumerate(tensors)])
        rank.exchange(None)
        return tensors

    for tensors in each_rank(3, work):
        assert [tensor.tolist() for tensor in tensors] == [[0.0, 0.0], [11.0, 11.0], [22.0, 22.0]]


def test_numbers_are_added_in_the_order_of_the_batches() -> None:
    numbers = [0.1 * number for number in range(8)]
    found = each_rank(3, lambda rank: rank.total([numbers[batch] for batch in rank.batches(8)]))
    assert found == [sum(numbers)] * 3


def test_a_rank_that_waits_ends_when_another_one_fails() -> None:
    ended = []

    def work(rank: SweepRank) -> None:
        if rank.number == 1:
            raise QuantizeError("broken")
        try:
            rank.exchange(None)
        except RankStopped:
            ended.append(rank.number)
            raise

    with pytest.raises((QuantizeError, RankStopped)):
        each_rank(3, work)
    assert sorted(ended) == [0, 2]


def test_a_stop_ends_every_rank_before_the_same_block(tmp_path, monkeypatch, on_one):
    """What a failure in another share does: this share finishes its block, on all ranks, and goes no further."""
    source, _, _ = on_one("llama", PLAIN)
    pair = variant(branch="a"), variant(branch="b")

    def fail_for_b(load, job, solved):
        if job.variant.branch == "b":
            raise QuantizeError("b is broken")
        return quantize_block(load, job, solved)

    monkeypatch.setattr(worker_module, "quantize_block", fail_for_b)
    with pytest.raises(QuantizeError, match="b is broken"):
        run(source, tmp_path, *pair, ranks=5)
    monkeypatch.setattr(worker_module, "quantize_block", quantize_block)
    _, steps = run(source, tmp_path, *pair, ranks=2)
    blocks = [step for step in steps if isinstance(step, BlockDone) and step.branch == "b"]
    assert not any(step.resumed for step in blocks)


def test_cpus_need_no_connection() -> None:
    connect([CPU, CPU])
