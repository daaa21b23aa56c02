"""The shares of devices: each gets some of the variants and of the host's memory."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from packager.errors import MachineError
from packager.model.devices import limit_gpu_memory
from packager.quantize import device_shares
from packager.quantize.device_shares import share_variants
from packager.quantize.job import DeviceShare
from packager.quantize.memory import HOST_LIMIT_BYTES, USABLE
from packager.variant import Variant
from tests.known_models import known_architecture
from tests.test_known_models import LLAMA_2_13B
from tests.tiny_models import variant

GB = 10**9
GPUS = tuple(torch.device("cuda", number) for number in range(4))
CPU = torch.device("cpu")
FOUR = tuple(variant(branch=name) for name in "abcd")


@dataclass
class Job:
    """The part of a job that `share_variants` reads: 13B, 128 rows of 2048 tokens."""

    stores: dict[Variant, Path]
    devices: tuple[torch.device, ...]
    device_limit: int | None = None
    host_limit: int = HOST_LIMIT_BYTES
    source: SimpleNamespace = field(
        default_factory=lambda: SimpleNamespace(architecture=known_architecture(LLAMA_2_13B, "config.json"))
    )
    rows: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(ids=torch.empty(128, 2048, device="meta")))


def shared(
    *variants: Variant, devices: tuple[torch.device, ...] = GPUS[:1], gpu_gb: float = 80, host_gb: float = 16
) -> list[DeviceShare]:
    stores = dict.fromkeys(variants, Path())
    job: Any = Job(stores=stores, devices=devices, device_limit=int(gpu_gb * GB), host_limit=int(host_gb * GB))
    found = share_variants(job)
    made = [v for share in found for v in share.variants]
    assert sorted(v.branch for v in made) == sorted(v.branch for v in variants)
    for device in devices:
        here = [share.plan.device_bytes for share in found if device in share.devices and device.type == "cuda"]
        assert sum(here) <= gpu_gb * GB * USABLE
    assert sum(share.plan.host_bytes for share in found) <= host_gb * GB
    return found


def branches_by_gpu(found: list[DeviceShare]) -> list[tuple[str, str]]:
    return [
        ("".join(str(device.index) for device in share.devices), "".join(v.branch for v in share.variants))
        for share in found
    ]


@pytest.mark.parametrize(
    ("gpu_gb", "placement", "suspended"), [(80, "device", 16), (40, "device", 16), (24, "device", 16), (12, "host", 4)]
)
def test_a_gpu_gets_the_share_that_fits_it(gpu_gb, placement, suspended):
    (share,) = shared(*FOUR, gpu_gb=gpu_gb)
    assert (share.variants, share.plan.placement, share.plan.suspended_batches) == (FOUR, placement, suspended)


def test_variants_calibrated_in_parallel_need_not_wait_for_each_other():
    (share,) = shared(*(variant(branch=name, true_sequential=False) for name in "abcd"))
    assert share.plan.suspended_batches == 0
    (share,) = shared(variant(branch="a", true_sequential=False), variant(branch="b"))
    assert share.plan.suspended_batches == 16


def test_devices_share_the_variants():
    assert branches_by_gpu(shared(*FOUR, devices=GPUS[:2])) == [("0", "ac"), ("1", "bd")]
    assert branches_by_gpu(shared(*FOUR, devices=GPUS[:3])) == [("0", "ad"), ("1", "b"), ("2", "c")]
    # Half of the host's 16 GB holds the states of half of the variants.
    assert {share.plan.placement for share in shared(*FOUR, devices=GPUS[:2], gpu_gb=12)} == {"host"}


def test_devices_share_the_rows_of_few_variants():
    assert branches_by_gpu(shared(FOUR[0], devices=GPUS)) == [("0123", "a")]
    assert branches_by_gpu(shared(*FOUR[:2], devices=GPUS)) == [("02", "a"), ("13", "b")]
    assert branches_by_gpu(shared(*FOUR[:3], devices=GPUS)) == [("03", "a"), ("1", "b"), ("2", "c")]


def test_tuned_variants_do_not_share_rows() -> None:
    """A share that tunes a variant has one device, and one more set of activations; other shares are as they were."""
    tuned = variant(branch="t", effort="high")
    assert branches_by_gpu(shared(tuned, devices=GPUS)) == [("0", "t")]
    assert branches_by_gpu(shared(tuned, FOUR[0], devices=GPUS)) == [("0", "t"), ("13", "a")]
    (plain,), (high,) = shared(FOUR[0], gpu_gb=140), shared(tuned, gpu_gb=140)
    states = 2 * 128 * 2048 * 5120
    assert high.plan.device_bytes - plain.plan.device_bytes >= states
    (scarce,) = shared(tuned, gpu_gb=24)
    assert scarce.plan.placement in ("host", "disk")


@pytest.mark.parametrize(("num_samples", "devices"), [(8, "0"), (17, "012"), (32, "0123")])
def test_a_device_without_a_batch_gets_no_share(num_samples: int, devices: str) -> None:
    job: Any = Job(
        stores={FOUR[0]: Path()}, devices=GPUS, device_limit=80 * GB,
        rows=SimpleNamespace(ids=torch.empty(num_samples, 2048, device="meta")),
    )  # fmt: skip
    assert branches_by_gpu(share_variants(job)) == [(devices, "a")]


def test_devices_that_share_the_rows_each_need_less() -> None:
    """Activations are split: 13B's rows in 16 batches, of which each of four GPUs has four."""
    (alone,), (four,) = shared(FOUR[0]), shared(FOUR[0], devices=GPUS, host_gb=64)
    states = 2 * 128 * 2048 * 5120
    assert (alone.plan.num_batches, four.plan.num_batches, four.plan.suspended_batches) == (16, 4, 4)
    assert alone.plan.device_bytes - four.plan.device_bytes > 3 / 4 * states


def test_a_cpu_has_one_share():
    (share,) = shared(*FOUR, devices=(CPU,), gpu_gb=1)
    assert (share.variants, share.plan.placement) == (FOUR, "device")


def test_a_share_that_fits_no_device_is_an_error():
    with pytest.raises(MachineError, match="does not fit into this machine's memory"):
        shared(*FOUR, gpu_gb=4)


@pytest.mark.parametrize("fails", [False, True])
def test_the_limit_of_gpu_memory_ends_with_its_body(monkeypatch, fails):
    fractions: list[tuple[float, torch.device]] = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * GB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *rest: fractions.append(rest))
    with pytest.raises(MachineError) if fails else nullcontext(), limit_gpu_memory((CPU, *GPUS[:2]), 20 * GB):
        assert fractions == [(0.25, GPUS[0]), (0.25, GPUS[1])]
        if fails:
            raise MachineError("no")
    assert fractions[2:] == [(1.0, GPUS[0]), (1.0, GPUS[1])]


def test_without_a_limit_nothing_is_changed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *_: pytest.fail("a limit was set"))
    with limit_gpu_memory(GPUS, None), limit_gpu_memory((CPU,), 5):
        pass


@pytest.mark.parametrize(("available", "limit"), [(1000, 800), (7, 5), (None, HOST_LIMIT_BYTES)])
def test_a_fifth_of_the_available_host_memory_is_left_to_others(
    monkeypatch: pytest.MonkeyPatch, available: int | None, limit: int
) -> None:
    monkeypatch.setattr(device_shares, "available_bytes", lambda: available)
    assert device_shares.host_limit_bytes() == limit
