"""A publisher that is killed or a Hub that fails, at any point: this run or the next one ends with the right result."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from packager.errors import PackagerError
from tests.loopback_hub import Account, FaultKind, LoopbackHub
from tests.recipe_fixtures import ROOT
from tests.test_hub_target import TOKEN, HubFixture, hub

__all__ = ["hub"]
pytestmark = [
    pytest.mark.crash,
    pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning"),
]


@pytest.mark.parametrize("planned", [False, True], ids=["publish", "saved plan"])
def test_killed_at_any_moment_and_run_again_it_ends_the_same(tmp_path: Path, planned: bool) -> None:
    command = [sys.executable, "-m", "tests.hub_crash_driver", str(tmp_path), "--runs", "10", "--seed", "3"]
    command += ["--planned"] if planned else []
    environ = {**os.environ, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert sum(found["branches complete when killed"].values()) == 10
    assert len(found["branches complete when killed"]) > 1


KINDS: tuple[FaultKind, ...] = ("status", "status-after", "cut", "cut-after", "cut-body", "cut-answer")


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_may_fail_once(
    tmp_path: Path, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, kind: FaultKind
) -> None:
    """Each request fails in two of the six ways, one before and one after the Hub has done what it asks for."""
    requests_may_fail(tmp_path, hub, monkeypatch, kind, first=KINDS.index(kind) // 2, step=len(KINDS) // 2)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_every_request_may_fail_once(
    tmp_path: Path, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, kind: FaultKind
) -> None:
    requests_may_fail(tmp_path, hub, monkeypatch, kind, first=0, step=1)


def requests_may_fail(
    tmp_path: Path, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, kind: FaultKind, *, first: int, step: int
) -> None:
    """The run succeeds, or reports the failure and the next run succeeds; no uploaded byte is sent again."""
    HubFixture(tmp_path, hub).publish()
    errors, fired, places = [], 0, range(first, len(hub.requests), step)
    for place in places:
        with LoopbackHub(tmp_path / f"hub-{place}", tokens=hub.tokens) as other:
            monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", other.endpoint)
            fixture = HubFixture(tmp_path, other)
            fault = other.fault("", kind, after=place, status=503)
            try:
                fixture.publish()
            except PackagerError as error:
                errors.append(f"request {place}: {error}")
                fixture.publish()
            fired += fault.fired
            fixture.assert_published()
            arrived = [upload.oid for upload in other.uploaded if upload.accepted]
            assert len(arrived) == len(set(arrived))
    assert not errors
    assert fired >= len(places) - 2  # the client caches an answer or two


PUBLISH = """
import sys
from pathlib import Path
from packager.publish.branches import publish_branches
from packager.publish.targets.hub import HubTarget
from tests.publish_fixtures import REPOSITORY, describe
contents = [describe(folder, folder.name) for folder in sorted(Path(sys.argv[1]).iterdir(), reverse=True)]
publish_branches(contents, HubTarget(REPOSITORY), print)
"""


def test_each_step_of_an_upload_by_xet_may_fail_once(tmp_path: Path) -> None:
    with LoopbackHub(tmp_path / "hub", tokens={TOKEN: Account("somebody")}, xet=True) as hub:
        fixture = HubFixture(tmp_path, hub)
        faults = [
            hub.fault("GET .*/xet-write-token/", "status", status=503),
            hub.fault("POST /_xet/v1/xorbs/", "cut-body"),
            hub.fault("POST /_xet/v1/shards", "status-after", status=503),
            hub.fault("POST .*/commit/", "cut-after"),
        ]
        own = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
        environ = {**os.environ, **own, "HF_HUB_DISABLE_XET": "0", "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-c", PUBLISH, str(fixture.dist)]
        done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert [fault.fired for fault in faults] == [1] * len(faults)
        assert not hub.uploaded
        fixture.assert_published()
