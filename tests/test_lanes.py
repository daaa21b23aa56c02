"""Who makes which variants where, and how: each device has its share and its part of the host's memory."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from packager.errors import MachineError
from packager.model.architecture import read_architecture
from packager.quantize.device_shares import Lane, lanes_of
from packager.quantize.memory import HOST_LIMIT_BYTES, USABLE
from packager.variant import Variant
from tests.test_architecture import LLAMA_2_13B
from tests.tiny_models import variant

GB = 10**9
GPUS = tuple(torch.device("cuda", number) for number in range(4))
CPU = torch.device("cpu")
FOUR = tuple(variant(branch=name) for name in "abcd")


@dataclass
class Job:
    """What `lanes_of` looks at: 13B, 128 rows of 2048 tokens."""

    stores: dict[Variant, Path]
    devices: tuple[torch.device, ...]
    device_limit: int | None = None
    host_limit: int = HOST_LIMIT_BYTES
    source: SimpleNamespace = field(
        default_factory=lambda: SimpleNamespace(architecture=read_architecture(LLAMA_2_13B, "config.json"))
    )
    rows: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(ids=torch.empty(128, 2048, device="meta")))


def lanes(
    *variants: Variant, devices: tuple[torch.device, ...] = GPUS[:1], gpu_gb: float = 80, host_gb: float = 16
) -> list[Lane]:
    stores = dict.fromkeys(variants, Path())
    job = Job(stores=stores, devices=devices, device_limit=int(gpu_gb * GB), host_limit=int(host_gb * GB))
    found = lanes_of(job)  # type: ignore[arg-type]
    made = [v for lane in found for v in lane.variants]
    assert sorted(v.branch for v in made) == sorted(v.branch for v in variants)
    for device in devices:
        here = [lane.plan.device_bytes for lane in found if lane.device == device and device.type == "cuda"]
        assert sum(here) <= gpu_gb * GB * USABLE
    assert sum(lane.plan.host_bytes for lane in found) <= host_gb * GB
    return found


def shares(found: list[Lane]) -> list[tuple[int | None, str]]:
    return [(lane.device.index, "".join(v.branch for v in lane.variants)) for lane in found]


@pytest.mark.parametrize(
    ("gpu_gb", "placement", "suspended"), [(80, "device", 16), (40, "device", 16), (24, "device", 16), (12, "host", 4)]
)
def test_a_gpu_is_given_what_fits_it(gpu_gb, placement, suspended):
    (lane,) = lanes(*FOUR, gpu_gb=gpu_gb)
    assert (lane.variants, lane.plan.placement, lane.plan.suspended_batches) == (FOUR, placement, suspended)


def test_variants_calibrated_in_parallel_need_not_wait_for_each_other():
    (lane,) = lanes(*(variant(branch=name, true_sequential=False) for name in "abcd"))
    assert lane.plan.suspended_batches == 0
    (lane,) = lanes(variant(branch="a", true_sequential=False), variant(branch="b"))
    assert lane.plan.suspended_batches == 16


def test_devices_share_the_variants():
    assert shares(lanes(*FOUR, devices=GPUS[:2])) == [(0, "ac"), (1, "bd")]
    assert shares(lanes(*FOUR, devices=GPUS[:3])) == [(0, "ad"), (1, "b"), (2, "c")]
    assert shares(lanes(*FOUR[:2], devices=GPUS)) == [(0, "a"), (1, "b")]
    # Half of the host's 16 GB holds the states of half of the variants.
    assert {lane.plan.placement for lane in lanes(*FOUR, devices=GPUS[:2], gpu_gb=12)} == {"host"}


def test_a_cpu_has_one_lane():
    (lane,) = lanes(*FOUR, devices=(CPU,), gpu_gb=1)
    assert (lane.variants, lane.plan.placement) == (FOUR, "device")


def test_what_fits_no_lane_is_an_error():
    with pytest.raises(MachineError, match="does not fit into this machine's memory"):
        lanes(*FOUR, gpu_gb=6)
