"""`block_store`: the bytes of the reference implementation, and what is kept when files, disks and inputs go wrong."""

import errno
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from packager.errors import MachineError, PackError
from packager.model.architecture import Architecture
from packager.model.checkpoint import Shard, checkpoint_tensors, split_shards
from packager.model.safetensors_file import METADATA, StoredTensor, stored_tensors
from packager.quantize import block_store as block_store_module
from packager.quantize.block_store import BlockStore
from packager.receipt import LinearRecord
from tests.known_models import known_architecture
from tests.test_known_models import tiny_config
from tests.tiny_models import variant

DTYPES = {"I32": torch.int32, "F16": torch.float16, "BF16": torch.bfloat16}
FINGERPRINT = {"recipe": "a" * 64, "calibration": "c" * 64, "engine": "6", "torch": "2.11.0", "device": "cpu"}
BLOCKS = range(3)


def architecture() -> Architecture:
    return known_architecture(tiny_config(num_hidden_layers=3, torch_dtype="bfloat16", attention_bias=True), "config")


def random_tensors() -> dict[str, Tensor]:
    """Return every tensor of a checkpoint."""
    generator = torch.Generator().manual_seed(5)
    infos = checkpoint_tensors(architecture(), variant(group_size=16))
    return {info.name: torch.randint(-9, 9, info.shape, generator=generator).to(DTYPES[info.dtype]) for info in infos}


class StoreCase:
    """A store, its tensors, and the lines it logged."""

    def __init__(self, root: Path, max_shard_bytes: int = 1 << 30) -> None:
        self.root = root
        self.folder = root / "work" / "main"
        self.tensors = random_tensors()
        self.shards: tuple[Shard, ...] = split_shards(
            checkpoint_tensors(architecture(), variant(group_size=16)), max_shard_bytes, "model"
        )
        self.logged: list[str] = []
        self.store = self.open()

    def open(self, **changes: str) -> BlockStore:
        fingerprint = {**FINGERPRINT, **changes}
        self.store = BlockStore(self.folder, self.shards, architecture(), fingerprint, self.logged.append)
        self.store.open()
        return self.store

    def block(self, block: int) -> dict[str, Tensor]:
        """Return the tensors of a block's linears."""
        linears = {name.removesuffix(".qweight") for name in self.tensors if name.endswith(".qweight")}
        prefix = f"model.layers.{block}."
        return {
            name: tensor
            for name, tensor in self.tensors.items()
            if name.startswith(prefix) and name.rpartition(".")[0] in linears
        }

    def write(self, *blocks: int) -> None:
        for block in blocks:
            self.store.write(block, self.block(block), records(block))

    def base(self) -> dict[str, StoredTensor]:
        """Save what is not quantized and return it as a base model's tensors."""
        quantized = {name for block in BLOCKS for name in self.block(block)}
        path = self.root / "base.safetensors"
        save_file({name: tensor for name, tensor in self.tensors.items() if name not in quantized}, path)
        return stored_tensors(path)

    def reference(self) -> dict[str, bytes]:
        """Return the weights files that the reference implementation makes."""
        made = {}
        for shard in self.shards:
            path = self.root / "reference.safetensors"
            save_file({info.name: self.tensors[info.name] for info in shard.tensors}, path, metadata=METADATA)
            made[shard.file_name] = path.read_bytes()
        return made

    def weights(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(self.store.checkpoint.iterdir())}

    def finished(self) -> list[int]:
        return [block for block in BLOCKS if self.store.records(block) is not None]

    def place(self, name: str) -> StoredTensor:
        (path,) = [
            self.store.checkpoint / shard.file_name
            for shard in self.shards
            if name in {info.name for info in shard.tensors}
        ]
        return stored_tensors(path)[name]

    def flip(self, name: str) -> None:
        """Flip a bit of a stored tensor."""
        place = self.place(name)
        data = bytearray(place.path.read_bytes())
        data[place.offset + place.info.size_bytes - 1] ^= 16
        place.path.write_bytes(data)


def records(block: int) -> tuple[LinearRecord, ...]:
    return tuple(
        LinearRecord(name=f"model.layers.{block}.{name}", loss=(block + 1) / 3, damp_percent=0.01) for name in "qk"
    )


@pytest.fixture
def case(tmp_path: Path) -> StoreCase:
    return StoreCase(tmp_path)


@pytest.fixture(params=[1 << 30, 100_000, 40_000], ids=["one file", "two files", "many files"])
def any_case(request: pytest.FixtureRequest, tmp_path: Path) -> StoreCase:
    return StoreCase(tmp_path, request.param)


def test_the_files_are_the_reference_s_byte_by_byte(any_case: StoreCase) -> None:
    any_case.write(2, 0, 1)
    any_case.store.complete(any_case.base())
    assert any_case.weights() == any_case.reference()


def test_a_later_run_finds_the_blocks_of_an_earlier_one(any_case: StoreCase) -> None:
    any_case.write(0, 2)
    store = any_case.open()
    assert any_case.finished() == [0, 2]
    assert store.records(2) == records(2)
    assert store.read(1) is None
    for block in (0, 2):
        found, expected = store.read(block), any_case.block(block)
        assert found is not None
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert all(found[name].dtype == expected[name].dtype for name in expected)
    assert any_case.logged == []


def test_space_is_taken_before_the_first_block(any_case: StoreCase) -> None:
    for shard in any_case.shards:
        stat = (any_case.store.checkpoint / shard.file_name).stat()
        assert stat.st_size == shard.size_bytes <= stat.st_blocks * 512


@pytest.mark.parametrize("number", [None, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_that_cannot_reserve_space_is_supported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(number, "no")

    if number is None:
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", refuse)
    case = StoreCase(tmp_path)
    case.write(*BLOCKS)
    case.store.complete(case.base())
    assert case.weights() == case.reference()


@pytest.mark.parametrize("kind", ["qweight", "qzeros", "scales", "g_idx", "bias"])
def test_a_flipped_bit_is_noticed_and_logged_and_the_block_quantized_again(any_case: StoreCase, kind: str) -> None:
    any_case.write(*BLOCKS)
    any_case.flip(f"model.layers.1.self_attn.k_proj.{kind}")
    store = any_case.open()
    assert [store.read(block) is None for block in BLOCKS] == [False, True, False]
    assert any_case.logged == ["main: block 1 is quantized again: its bytes are not those that were written"]
    assert any_case.finished() == [0, 2]
    with pytest.raises(PackError, match="1 of 3 blocks are not quantized"):
        store.complete(any_case.base())
    any_case.open()
    assert any_case.finished() == [0, 2]
    any_case.write(1)
    any_case.store.complete(any_case.base())
    assert any_case.weights() == any_case.reference()
    assert len(any_case.logged) == 1


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


@pytest.mark.parametrize("damage", [cut, lambda _: b"", lambda _: b"{}", lambda _: b"\xff\xfe", lambda d: d + b"{"])
def test_a_damaged_journal_costs_its_block_only(case: StoreCase, damage: Callable[[bytes], bytes]) -> None:
    case.write(*BLOCKS)
    path = case.folder / "block-00001.json"
    path.write_bytes(damage(path.read_bytes()))
    case.open()
    assert case.finished() == [0, 2]
    assert case.logged == ["main: block 1 is quantized again: its journal is damaged"]
    case.open()
    assert len(case.logged) == 1


def test_work_of_another_fingerprint_is_discarded_with_the_reason(case: StoreCase) -> None:
    case.write(*BLOCKS)
    case.open(calibration="d" * 64, torch="2.13.0")
    assert case.finished() == []
    assert case.logged == [
        "main: 3 finished blocks are not resumed: calibration differs, torch was 2.11.0 and is 2.13.0"
    ]
    case.write(1)
    case.open()
    assert case.logged[1:] == [
        "main: 1 finished block is not resumed: calibration differs, torch was 2.13.0 and is 2.11.0"
    ]
    case.write(0)
    case.open(threads="2")
    assert case.logged[2:] == ["main: 1 finished block is not resumed: threads was nothing and is 2"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"recipe": "b" * 64}, "recipe differs"),
        # The recipe's digest is another one with each version of the engine.
        ({"recipe": "b" * 64, "engine": "7"}, "the engine's version was 6 and is 7"),
        ({"recipe": "b" * 64, "engine": f"{'e' * 64}-2"}, "the engine's version differs"),
        (
            {"recipe": "b" * 64, "engine": "7", "torch": "2.13.0"},
            "the engine's version was 6 and is 7, torch was 2.11.0 and is 2.13.0",
        ),
    ],
)
def test_another_engine_version_is_no_other_recipe(case: StoreCase, changes: dict[str, str], reason: str) -> None:
    case.write(1)
    case.open(**changes)
    assert case.logged == [f"main: 1 finished block is not resumed: {reason}"]


def test_temporary_files_of_a_killed_run_are_deleted_before_it_goes_on(case: StoreCase) -> None:
    case.write(0, 2)
    left = [case.folder / ".tmp-68hedvuy", case.store.checkpoint / ".tmp-2b5xw0aa"]
    for path in left:
        path.write_bytes(b"half a file")
    case.open()
    assert not any(path.exists() for path in left)
    assert (case.finished(), case.logged) == ([0, 2], [])


def test_a_store_without_finished_blocks_logs_nothing(case: StoreCase) -> None:
    case.open(torch="3")
    case.open()
    assert case.logged == []


def remove(path: Path) -> None:
    path.unlink()


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def rename_tensor(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"qweight", b"qwaight", 1))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (remove, "model.safetensors is missing"),
        (shorten, "model.safetensors is not the planned file"),
        (rename_tensor, "model.safetensors is not the planned file"),
    ],
)
def test_weights_files_that_are_not_the_planned_ones(
    case: StoreCase, spoil: Callable[[Path], None], reason: str
) -> None:
    case.write(*BLOCKS)
    spoil(case.store.checkpoint / "model.safetensors")
    case.open()
    assert case.finished() == []
    assert case.logged == [f"main: 3 finished blocks are not resumed: {reason}"]
    case.write(*BLOCKS)
    case.store.complete(case.base())
    assert case.weights() == case.reference()


def test_files_of_another_plan_do_not_stay(tmp_path: Path) -> None:
    StoreCase(tmp_path, 40_000).write(0)
    case = StoreCase(tmp_path)
    assert [path.name for path in case.store.checkpoint.iterdir()] == ["model.safetensors"]
    assert list(case.folder.iterdir()) == [case.store.checkpoint]


def refuse_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_is_full_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", refuse_space)
    with pytest.raises(MachineError, match="the disk is full") as caught:
        StoreCase(tmp_path)
    assert caught.value.where == str(tmp_path / "work" / "main" / "checkpoint")
    assert not (tmp_path / "work" / "main").exists()


@pytest.mark.parametrize("function", ["pwrite", "fsync"])
def test_a_disk_that_fills_up_in_the_middle(
    any_case: StoreCase, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    any_case.write(0, 1)
    monkeypatch.setattr(os, function, refuse_space)  # fsync: the journal's
    with pytest.raises(MachineError, match="the disk is full"):
        any_case.write(2)
    with pytest.raises(PackError):
        any_case.store.complete(any_case.base())
    monkeypatch.undo()
    any_case.open()
    assert any_case.finished() == [0, 1]
    assert sorted(path.name for path in any_case.folder.iterdir()) == [
        "block-00000.json", "block-00001.json", "checkpoint",
    ]  # fmt: skip
    any_case.write(2)
    monkeypatch.setattr(os, "pwrite", refuse_space)
    with pytest.raises(MachineError, match="the disk is full"):
        any_case.store.complete(any_case.base())
    monkeypatch.undo()
    any_case.open().complete(any_case.base())
    assert any_case.weights() == any_case.reference()
    assert any_case.logged == []


def test_a_system_call_that_writes_only_a_part(case: StoreCase, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: pwrite(descriptor, data[:999], offset))
    case.write(*BLOCKS)
    case.store.complete(case.base())
    assert case.weights() == case.reference()


@pytest.mark.parametrize("after", ["some bytes", "all bytes"])
def test_a_block_without_a_journal_is_not_finished(
    case: StoreCase, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    case.write(0)
    if after == "all bytes":
        monkeypatch.setattr(block_store_module, "write_atomic", die)
    else:
        pwrite, calls = os.pwrite, iter(range(5))
        monkeypatch.setattr(os, "pwrite", lambda *rest: pwrite(*rest) if next(calls, None) is not None else die())
    with pytest.raises(KeyboardInterrupt):
        case.write(1)
    monkeypatch.undo()
    assert case.finished() == [0]
    case.open()
    assert case.finished() == [0]
    assert case.logged == []


def spoiled(block: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    name = "model.layers.1.mlp.up_proj.scales"
    yield name, {other: tensor for other, tensor in block.items() if other != name}
    yield "model.layers.1.extra", {**block, "model.layers.1.extra": block[name]}
    yield name, {**block, name: block[name].to(torch.bfloat16)}
    yield name, {**block, name: block[name][1:]}
    yield "model.layers.1.input_layernorm.weight", {**block, "model.layers.1.input_layernorm.weight": block[name]}


def test_tensors_that_are_not_the_planned_ones_are_refused(case: StoreCase) -> None:
    before = case.weights()
    for name, tensors in spoiled(case.block(1)):
        with pytest.raises(PackError, match="a block does not have the planned tensors") as caught:
            case.store.write(1, tensors, records(1))
        assert name in caught.value.why
        assert caught.value.where == "main, block 1"
    assert case.weights() == before
    assert case.finished() == []


def test_tensors_need_not_be_contiguous(case: StoreCase) -> None:
    case.store.write(0, {name: tensor.t().contiguous().t() for name, tensor in case.block(0).items()}, records(0))
    found = case.store.read(0)
    assert found is not None
    assert all(torch.equal(found[name], tensor) for name, tensor in case.block(0).items())


def test_a_base_model_without_a_tensor_cannot_complete(case: StoreCase) -> None:
    case.write(*BLOCKS)
    base = case.base()
    with pytest.raises(PackError, match=r"model\.norm\.weight is not in the base model as planned"):
        case.store.complete({name: tensor for name, tensor in base.items() if name != "model.norm.weight"})
    with pytest.raises(PackError, match=r"model\.norm\.weight is not in the base model as planned"):
        case.store.complete({**base, "model.norm.weight": base["lm_head.weight"]})


def test_the_first_missing_block_is_named_in_the_order_of_numbers(tmp_path: Path) -> None:
    model = known_architecture(tiny_config(num_hidden_layers=12), "config")
    shards = split_shards(checkpoint_tensors(model, variant()), 1 << 30, "model")
    store = BlockStore(tmp_path / "main", shards, model, FINGERPRINT, print)
    store.open()
    for block in (0, 1):
        infos = [info for info in shards[0].tensors if info.name.startswith(f"model.layers.{block}.")]
        linears = [info for info in infos if info.name.endswith(("qweight", "qzeros", "scales", "g_idx"))]
        store.write(block, {info.name: torch.zeros(info.shape).to(DTYPES[info.dtype]) for info in linears}, ())
    with pytest.raises(PackError, match="10 of 12 blocks are not quantized") as caught:
        store.complete({})
    assert caught.value.why == "the first is block 2"


def test_several_stores_are_written_from_threads(tmp_path: Path) -> None:
    cases = [StoreCase(tmp_path / str(number)) for number in range(4)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda step: step[0].write(step[1]), [(case, block) for case in cases for block in BLOCKS]))
    for case in cases:
        case.open().complete(case.base())
        assert case.weights() == cases[0].reference()
