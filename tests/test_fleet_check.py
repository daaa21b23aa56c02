"""The simulation of a fleet and the pipeline, side by side: a few recipes of benchmarks/fleet_check.py."""

import importlib
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RECIPES = 12
MEGABYTES_PER_S = 0.3  # GPUs and the link are about as busy: each mistake shows
TOLERANCE = 0.15


@pytest.fixture
def fleet_check(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("fleet_check")


@pytest.mark.long
def test_a_release_over_a_slow_link_takes_the_time_of_its_simulation(fleet_check: Any, tmp_path: Path) -> None:
    setting = fleet_check.Setting(work=tmp_path / "real", places=2, bytes_per_s=MEGABYTES_PER_S * 1e6)
    found = fleet_check.compare(tmp_path, recipes=RECIPES, calibrating=2 * len(fleet_check.HIDDEN), setting=setting)
    tables, real_s = fleet_check.shown(found), found.real.makespan_s
    assert found.simulated.makespan_s == pytest.approx(real_s, rel=TOLERANCE), tables
    assert found.simulated.taken == pytest.approx(found.real.taken, rel=TOLERANCE), tables
    # A mistake in the simulation changes it by more than the tolerance, and takes it away from the pipeline.
    for mistake in ("twice the bandwidth", "half the bandwidth", "nothing fetched ahead"):
        wrong_s = found.mistaken[mistake].makespan_s
        assert wrong_s != pytest.approx(found.simulated.makespan_s, rel=TOLERANCE), (mistake, tables)
        assert abs(wrong_s - real_s) > abs(found.simulated.makespan_s - real_s), (mistake, tables)


@pytest.mark.slow
def test_concurrent_transfers_share_a_link_and_lose_none_of_its_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Three send as much each: the last ends when the link has let all of it through; the other direction is free."""
    from concurrent.futures import ThreadPoolExecutor
    from time import monotonic

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    linked_tasks = importlib.import_module("linked_tasks")
    (tmp_path / "link").write_bytes(bytes(16))
    began = monotonic()

    def send(_: int) -> float:
        linked_tasks.Link(tmp_path / "link", 1e6).carry("up", 200_000)
        return monotonic() - began

    with ThreadPoolExecutor(4) as pool:
        received = pool.submit(linked_tasks.Link(tmp_path / "link", 1e6).carry, "down", 600_000)
        ended = list(pool.map(send, range(3)))
        received.result()
    assert max(ended) >= 0.6 - 1e-6
