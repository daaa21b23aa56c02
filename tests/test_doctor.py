"""`packager doctor`: what it shows of a machine, and what it deletes."""

import fcntl
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from typer.testing import CliRunner, Result

from packager.cli.main import app
from packager.errors import LoaderUnavailableError, MachineError
from packager.inputs import hub_account
from packager.pipeline import machine_checks as checks
from packager.prove import probes
from packager.prove.environments import (
    READY,
    RuntimeContext,
    ensure_environment,
    environment_in_use,
    environment_name,
    environments_folder,
    is_ready,
)
from packager.prove.loaders import LOADERS
from packager.prove.tasks import TASKS_SPEC
from tests.loopback_hub import Account, LoopbackHub
from tests.publish_fixtures import log_in

pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")  # of the Hub's client
TOKEN = "hf_doctor_0123456789"  # noqa: S105 - the loopback Hub's


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with a loader's environment, one of another version, and one more that is in use."""
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    used = environment_name(LOADERS["transformers"])
    for name, size in ((used, 10), ("transformers-000000000000", 2000), ("exllamav2-000000000000", 3000)):
        (tmp_path / "loaders" / name / "lib").mkdir(parents=True)
        (tmp_path / "loaders" / name / "lib" / "a.py").write_bytes(b"x" * size)
        (tmp_path / "loaders" / f"{name}.lock").touch()
    return tmp_path


def doctor(cache: Path, *options: str, input: str = "") -> Result:  # noqa: A002 - typer's word
    command = ["doctor", "--cache", str(cache), "--dist", str(cache / "dist"), *options]
    return CliRunner().invoke(app, command, input=input)


def found(cache: Path) -> dict[str, dict[str, Any]]:
    done = doctor(cache, "--format", "json")
    return {check["name"]: check for check in json.loads(done.stdout)["checks"]}


def test_every_part_is_named_and_nothing_is_changed(cache: Path) -> None:
    before = sorted(cache.rglob("*"))
    done = doctor(cache)
    assert done.exit_code == 0
    names = ["packager", "build extra", "git", "confinement", "memory", "output folder", "cache", "GPU", "Hub"]
    assert [name for name in (*names, *LOADERS) if f"\n{name} " not in done.stdout] == []
    assert "2 loader environments of other versions, 5.00 kB" in done.stdout
    assert sorted(cache.rglob("*")) == before
    checks = found(cache)
    assert checks["packager"]["found"].endswith(f"({sys.executable})")
    assert checks["Hub"]["state"] == "note"
    makers = {name: checks[name]["found"].partition("environment not made yet: ")[2] for name in LOADERS}
    assert makers["transformers"] == "the first build makes it"
    assert makers["exllamav2"] == "the first build on a machine with a CUDA GPU makes it"
    assert makers["vllm"] == "packager verify on a machine with a CUDA GPU makes it"


def test_clean_deletes_what_no_loader_uses_after_a_question(cache: Path) -> None:
    done = doctor(cache, "--clean", input="n\ny\n")
    assert done.exit_code == 0
    left = sorted(path.name for path in (cache / "loaders").glob("*/"))
    assert left == sorted(["exllamav2-000000000000", environment_name(LOADERS["transformers"])])
    assert doctor(cache, "--clean", "--yes").exit_code == 0
    assert [path.name for path in (cache / "loaders").glob("*/")] == [environment_name(LOADERS["transformers"])]


def test_an_environment_that_is_being_made_stays(cache: Path) -> None:
    with (cache / "loaders" / "exllamav2-000000000000.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = doctor(cache, "--clean", "--yes", "--format", "json")
    assert "in use" in done.stderr
    (left,) = json.loads(done.stdout)["unused_environments"]
    assert left == {"folder": str(cache / "loaders" / "exllamav2-000000000000"), "size_bytes": 3000}


def make_ready(cache: Path, name: str) -> Path:
    """Make an environment complete, as far as is seen from outside, and return its Python."""
    folder = cache / "loaders" / name
    (folder / "bin").mkdir()
    (folder / "bin" / "python").touch()
    (folder / READY).write_text(str(folder))
    return folder / "bin" / "python"


def test_an_environment_in_which_a_loader_runs_stays(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = make_ready(cache, "exllamav2-000000000000")
    seen: list[str] = []

    def run(*_: object) -> str:
        done = doctor(cache, "--clean", "--yes", "--format", "json")
        seen.append(done.stderr)
        seen.extend(each["folder"] for each in json.loads(done.stdout)["unused_environments"])
        (job.output_dir / "result.json").write_text("{}")
        return ""

    monkeypatch.setattr(probes, "_run_script", run)
    job = probes.ProbeJob(
        model_dir=cache, device="cpu", input_ids=[], prompts=[], max_new_tokens=1, vocab_size=1,
        output_dir=cache / "out",
    )  # fmt: skip
    context = RuntimeContext(cache=cache, scratch=cache, environ={}, log=print)
    probes.run_probes(LOADERS["exllamav2"], python, [job], 1.0, context)
    said, left = seen
    assert f"not deleted, in use: {python.parent.parent}" in said
    assert left == str(python.parent.parent)
    assert python.exists()
    assert "deleted" in doctor(cache, "--clean", "--yes").stderr
    assert not python.parent.parent.exists()
    (outcome,) = probes.run_probes(LOADERS["exllamav2"], python, [job], 1.0, context)
    assert isinstance(outcome, LoaderUnavailableError)
    assert "was deleted just now" in str(outcome)


def test_loaders_share_an_environment_and_a_second_build_does_not_wait(cache: Path) -> None:
    name = environment_name(LOADERS["transformers"])
    python = make_ready(cache, name)
    context = RuntimeContext(cache=cache, scratch=cache, environ={}, log=print)
    with environment_in_use(python), environment_in_use(python):
        assert ensure_environment(LOADERS["transformers"], context) == python
        (used,) = (each for each in checks.environments(cache) if each.folder.name == name)
        assert not checks.remove_environment(used)
    assert checks.remove_environment(used)


def test_a_python_of_no_environment_needs_no_lock(tmp_path: Path) -> None:
    with environment_in_use(tmp_path / "bin" / "python"):
        assert list(tmp_path.iterdir()) == []


def test_what_a_killed_clean_leaves_is_no_environment(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = make_ready(cache, "exllamav2-000000000000")
    (environment,) = (each for each in checks.environments(cache) if each.folder == python.parent.parent)

    def die(folder: Path) -> None:
        raise KeyboardInterrupt(folder)

    monkeypatch.setattr("packager.pipeline.machine_checks.shutil.rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        checks.remove_environment(environment)
    assert python.exists()
    assert not is_ready(environment.folder)


def test_the_lock_of_a_deleted_environment_still_excludes_others(cache: Path) -> None:
    (environment,) = (each for each in checks.environments(cache) if each.folder.name.startswith("exllamav2"))
    path = cache / "loaders" / f"{environment.folder.name}.lock"
    with path.open("w") as waiting:
        assert checks.remove_environment(environment)
        fcntl.flock(waiting, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with path.open("w") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_cache_that_cannot_be_written_is_an_error_with_a_reason(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr("packager.pipeline.machine_checks.shutil.rmtree", fail)
    (environment, *_) = checks.environments(cache)
    with pytest.raises(MachineError, match="cannot be written"):
        checks.remove_environment(environment)


def test_a_folder_that_cannot_be_looked_at_is_a_note(cache: Path) -> None:
    done = CliRunner().invoke(app, ["doctor", "--cache", str(cache), "--dist", str(cache / ("x" * 300))])
    assert (done.exit_code, "File name too long" in done.stdout) == (0, True)


def test_the_password_of_an_endpoint_is_not_shown(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "is_offline", lambda: False)
    monkeypatch.setenv("HF_ENDPOINT", "https://me:s3cret@hub.example")
    assert found(cache)["Hub"]["found"] == "no token for https://hub.example"


def test_links_in_the_cache_are_not_followed(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    (cache / "loaders" / "gptqmodel-000000000000").symlink_to(tmp_path / "mine")
    (cache / "loaders" / "exllamav2-000000000000" / "link").symlink_to(tmp_path / "mine")
    assert doctor(cache, "--clean", "--yes").exit_code == 0
    assert (tmp_path / "mine" / "file").exists()


def test_an_environment_is_found_by_another_name_of_the_cache(cache: Path, tmp_path: Path) -> None:
    folder = cache / "loaders" / environment_name(LOADERS["transformers"])
    (folder / "bin").mkdir()
    (folder / "bin" / "python").touch()
    (folder / READY).write_text(str(folder.resolve()))
    (tmp_path / "link").symlink_to(cache)
    assert "environment ready, " in found(tmp_path / "link")["transformers"]["found"]


def test_a_folder_that_is_no_environment_stays(cache: Path) -> None:
    for name in ("my thesis", "transformers", "transformers-0000", "x-000000000000.old"):
        (cache / "loaders" / name).mkdir()
        (cache / "loaders" / name / "file").write_text("x")
    done = doctor(cache, "--clean", "--yes", "--format", "json")
    assert json.loads(done.stdout)["unused_environments"] == []
    left = {path.name for path in (cache / "loaders").glob("*/")}
    assert left >= {"my thesis", "transformers", "transformers-0000", "x-000000000000.old"}
    assert "transformers-000000000000" not in left


def test_what_is_no_file_in_the_place_of_a_lock_is_an_error(cache: Path) -> None:
    (cache / "mine").write_text("precious")
    lock = cache / "loaders" / "exllamav2-000000000000.lock"
    for put in (lambda: lock.symlink_to(cache / "mine"), lambda: os.mkfifo(lock), lock.mkdir):
        lock.unlink()
        put()
        done = doctor(cache, "--clean", "--yes")
        assert (done.exit_code, "exllamav2-000000000000" in done.stderr) == (MachineError.exit_code, True)
    assert (cache / "mine").read_text() == "precious"


def test_a_git_that_prints_no_text_is_shown_escaped(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = cache / "bin" / "git"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nprintf '\\377\\033[31m'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    check = found(cache)["git"]
    assert (check["state"], check["found"]) == ("ok", "\ufffd\\x1b[31m")


def test_an_output_folder_that_cannot_be_one_is_said(cache: Path) -> None:
    (cache / "dist").write_text("x")
    assert found(cache)["output folder"]["found"] == f"{cache / 'dist'} is no folder"
    done = doctor(cache, "--dist", "x" * 300, "--format", "json")
    (check,) = (check for check in json.loads(done.stdout)["checks"] if check["name"] == "output folder")
    assert (check["state"], check["found"]) == ("note", f"{'x' * 300}: File name too long")


def test_without_git_the_exit_code_says_so(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    which = shutil.which
    monkeypatch.setattr(
        "packager.pipeline.machine_checks.shutil.which",
        lambda name: None if name in ("git", "git-lfs") else which(name),
    )
    done = doctor(cache, "--format", "json")
    assert done.exit_code == MachineError.exit_code
    by_name = {check["name"]: check["state"] for check in json.loads(done.stdout)["checks"]}
    assert (by_name["git"], by_name["git-lfs"]) == ("missing", "note")


def test_a_program_that_does_not_run_is_no_program(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(8, "Exec format error")

    monkeypatch.setattr("packager.pipeline.machine_checks.subprocess.Popen", fail)
    assert found(cache)["git"]["state"] == "missing"


@pytest.mark.parametrize(
    ("script", "state", "words"),
    [
        ("exec yes git version 9.9", "ok", "git version 9.9"),  # prints without end
        ("exec tr '\\0' x < /dev/zero", "ok", "x" * 100),  # no line at all
        ("echo git version 1; exit 3", "missing", "returned non-zero exit status 3"),
        ("sleep 60 & echo git version 2", "ok", "git version 2"),  # something that outlives it
        ("exit 1", "missing", "exit status 1"),
        ("sleep 60", "missing", "timed out"),
    ],
)
def test_a_program_is_heard_for_one_line(
    cache: Path, monkeypatch: pytest.MonkeyPatch, script: str, state: str, words: str
) -> None:
    program = cache / "git"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr("packager.pipeline.machine_checks.shutil.which", lambda _: str(program))
    monkeypatch.setattr(checks, "_GIT_TIMEOUT_S", 0.5 if script[-2:] == "60" else 10)
    monkeypatch.setattr(checks, "_GIT_END_S", 0.2)
    started = time.monotonic()
    found_ = checks._git()
    assert (found_.grade, words in found_.found) == (state, True), found_
    assert time.monotonic() - started < 20


def test_a_base_install_is_told_what_building_needs(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_: object) -> None:
        raise MachineError("building needs packages", why="missing: torch", hint="pip install 'gptq-packager[build]'")

    monkeypatch.setattr(checks, "require_build_extra", lacking)
    assert found(cache)["build extra"] == {
        "name": "build extra", "state": "note", "found": "missing: torch",
        "hint": "to build: pip install 'gptq-packager[build]'",
    }  # fmt: skip
    assert found(cache)["GPU"]["state"] == "note"


def test_no_confinement_is_said(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "confinement", lambda: "none")
    monkeypatch.setattr(checks, "refusal", lambda how: f"no {how}")
    check = found(cache)["confinement"]
    assert (check["state"], "no bubblewrap" in check["hint"]) == ("note", True)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with LoopbackHub(tmp_path / "hub", tokens={TOKEN: Account("tester")}) as hub:
        log_in(hub, TOKEN, monkeypatch)
        yield hub


def test_the_account_and_its_rights_are_asked_for_and_the_token_is_not_shown(hub: LoopbackHub, tmp_path: Path) -> None:
    done = doctor(tmp_path, "--format", "json")
    assert "logged in as tester at" in done.stdout
    assert TOKEN not in done.output


def test_a_token_that_the_hub_does_not_know_is_no_error(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_other")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert found(tmp_path)["Hub"]["state"] == "note"


@pytest.mark.parametrize(
    ("role", "state", "hint"),
    [("write", "ok", ""), ("fineGrained", "note", "to the repository: "), ("read", "note", "a token that may write")],
)
def test_a_token_that_may_not_write_is_a_note(
    cache: Path, monkeypatch: pytest.MonkeyPatch, role: str, state: str, hint: str
) -> None:
    monkeypatch.setattr(checks, "is_offline", lambda: False)
    monkeypatch.setattr(checks, "has_token", lambda: True)
    monkeypatch.setattr(checks, "hub_account", lambda: hub_account.HubAccount(name="tester", role=role))
    check = found(cache)["Hub"]
    assert (check["state"], hint in (check["hint"] or "")) == (state, True)


def test_a_hub_that_does_not_answer_is_given_up_after_seconds(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr(checks, "is_offline", lambda: False)
    monkeypatch.setattr(checks, "has_token", lambda: True)
    monkeypatch.setattr(checks, "hub_account", lambda: ended.wait(60))
    assert checks._ACCOUNT_TIMEOUT_S <= 10
    monkeypatch.setattr(checks, "_ACCOUNT_TIMEOUT_S", 0.05)
    check = found(cache)["Hub"]
    ended.set()
    assert check["state"] == "note"
    assert "no answer within 0.05 s" in check["found"]


@pytest.mark.parametrize(
    ("account", "role"),
    [
        ({"auth": {"accessToken": {"role": "write"}}}, "write"),
        ({"auth": {"accessToken": {"role": ["x"]}}}, "unknown"),
        ({"auth": None}, "unknown"),
        ({}, "unknown"),
    ],
)
def test_the_role_of_a_token(account: dict[str, Any], role: str) -> None:
    assert hub_account._role(account) == role


def test_the_environment_of_tasks_is_in_use(tmp_path: Path) -> None:
    name = environment_name(TASKS_SPEC)
    (environments_folder(tmp_path) / name).mkdir(parents=True)
    (found,) = checks.environments(tmp_path)
    assert (found.folder.name, found.used) == (name, True)
