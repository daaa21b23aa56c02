"""What of this machine's secrets the processes of a fleet get: keys and a passphrase where they publish, a token."""

import io
import json
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from huggingface_hub.errors import GatedRepoError
from typer.testing import CliRunner, Result

from packager.cli.main import app
from packager.cli.task_process import run_one_task
from packager.errors import MachineError, PublishError
from packager.fleet.fleet_release import FleetSettings
from packager.fleet.ray_fleet import RayFleet
from packager.fleet.worker import TaskCall, TaskOrder
from packager.pipeline.build_options import Options
from packager.pipeline.many_recipes import RecipeResult, Results
from packager.pipeline.release import ReleaseChecks, wanted_recipes
from packager.publish.sign_release import SigningKeys
from packager.system.terminal import Terminal
from tests.hub_http import httpx
from tests.import_graph import ROOT
from tests.locks import write_lock
from tests.tiny_recipe import options, write_all, write_recipe

PASSPHRASE = "a secret"  # noqa: S105 - of a key made here
RECIPE = str(ROOT / "recipes" / "demo-llama.yaml")


def key_file(folder: Path, passphrase: str = "") -> Path:
    """Write a private key, encrypted with a passphrase if there is one."""
    encryption = BestAvailableEncryption(passphrase.encode()) if passphrase else NoEncryption()
    path = folder / "sign.key"
    path.write_bytes(Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
    path.chmod(0o600)
    return path


def public_key_file(folder: Path) -> Path:
    path = folder / "old.pub"
    public = Ed25519PrivateKey.generate().public_key()
    path.write_bytes(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return path


def released(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str
) -> tuple[Result, Sequence[tuple[FleetSettings, ReleaseChecks]]]:
    """Run `release` up to its fleet, and return what the fleet gets, if it came so far."""
    reached: list[tuple[FleetSettings, ReleaseChecks]] = []

    def release_by_fleet(paths: Sequence[Path], *rest: Any) -> tuple[RecipeResult, ...]:
        reached.append((rest[3], rest[2]))
        return tuple(RecipeResult(path=path, outcome="published") for path in paths)

    monkeypatch.setattr("packager.fleet.fleet_release.release_by_fleet", release_by_fleet)
    words = ("release", RECIPE, "--dist", str(folder / "dist"), "--device", "cpu", "--yes", *words)
    return CliRunner().invoke(app, words), reached


@pytest.mark.parametrize(
    "where", [("--jobs", "1"), ("--ray", "127.0.0.1:6379", "--store", "store")], ids=lambda x: x[0]
)
def test_trusted_keys_reach_the_processes_of_tasks(
    where: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    public = public_key_file(tmp_path)
    done, ((settings, _),) = released(tmp_path, monkeypatch, *where, "--trusted-key", public.name)
    assert done.exit_code == 0, done.stderr
    executor: Any = settings.open_executor({}, lambda: ())
    command = executor.command if where[0] == "--ray" else executor._command
    assert command[-3:] == ("-m", "packager.cli.task_process", str(public))


def test_nobody_is_asked_for_a_passphrase_that_no_task_would_get(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("packager.cli.signing.sys", SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True)))
    monkeypatch.setattr("typer.prompt", lambda *_, **__: PASSPHRASE)
    monkeypatch.delenv("PACKAGER_SIGN_PASSPHRASE", raising=False)
    words = ("--jobs", "1", "--sign-key", str(key_file(tmp_path, PASSPHRASE)))
    done, reached = released(tmp_path, monkeypatch, *words)
    assert done.exit_code == PublishError.exit_code
    assert "PACKAGER_SIGN_PASSPHRASE has the passphrase" in done.stderr
    assert not reached


@pytest.mark.parametrize("stage", ["publish", "sweep"])
def test_the_process_of_a_task_signs_and_gives_no_target_the_passphrase(
    stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_task(_: TaskOrder, options: Options, __: object, *, keys: SigningKeys | None) -> None:
        seen.append((options, keys))

    seen: list[tuple[Options, SigningKeys | None]] = []
    monkeypatch.setattr("packager.fleet.worker.run_task", run_task)
    monkeypatch.setenv("PACKAGER_SIGN_KEY", str(key_file(tmp_path, PASSPHRASE)))
    order = TaskOrder(recipe="a.yaml", repository="tester/a", inputs="i", store="", stage=stage)
    call = TaskCall(order=order, folder=str(tmp_path))
    if stage == "publish":
        monkeypatch.setenv("PACKAGER_SIGN_PASSPHRASE", PASSPHRASE)
    monkeypatch.setattr(sys, "argv", ["task_process", str(public_key_file(tmp_path)), call.model_dump_json()])
    with redirect_stdout(io.StringIO()) as out:
        run_one_task()
    assert json.loads(out.getvalue())["exit_code"] == 0
    ((options, keys),) = seen
    assert "PACKAGER_SIGN_PASSPHRASE" not in options.environ
    assert "PACKAGER_SIGN_PASSPHRASE" not in os.environ
    if stage == "publish":
        assert keys is not None
        assert keys.signer is not None
        assert len(keys.trusted.keys) == 1
    else:
        assert keys is None


@pytest.mark.parametrize(("read", "token", "why"), [("r", "r", ""), ("", False, "a token: set PACKAGER_READ_TOKEN")])
def test_a_gated_model_is_asked_for_with_the_token_of_the_processes_that_build(
    read: str, token: str | bool, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def auth_check(api: huggingface_hub.HfApi, _: str) -> None:
        asked.append(api.token)
        if asked[-1] != "r":
            raise GatedRepoError("403", response=httpx.Response(403, request=httpx.Request("GET", "https://hub.test")))

    asked: list[str | bool | None] = []
    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", auth_check)
    monkeypatch.setenv("HF_TOKEN", "w")
    monkeypatch.setenv("PACKAGER_READ_TOKEN", read)
    _, ((_, checks),) = released(tmp_path, monkeypatch, "--jobs", "1")
    write_all(tmp_path)
    recipe = write_recipe(tmp_path, {"base_model": {"id": "tester/gated", "revision": "0" * 40}})
    write_lock(recipe, json.loads((tmp_path / "model" / "config.json").read_text()), "tester/gated", "0" * 40)
    results = Results(Terminal(quiet=True), by_path={recipe: RecipeResult(path=recipe)})
    wanted = wanted_recipes(results, options(tmp_path / "dist"), checks)
    assert asked == [token]
    assert [file.path for file in wanted] == ([] if why else [recipe])
    assert why in results.ordered[0].why


def test_the_client_of_ray_gets_what_opens_the_cluster_and_nothing_that_writes(tmp_path: Path) -> None:
    program = "import json, os; print(json.dumps({'refused': ' '.join(os.environ)}))"
    environ = {"PATH": os.environ["PATH"], "HF_TOKEN": "w", "PACKAGER_SIGN_PASSPHRASE": "p", "RAY_AUTH_TOKEN": "t"}
    fleet = RayFleet(
        client=(sys.executable, "-c", program), command=(), client_log=tmp_path / "log", folder=PurePosixPath("/data"),
        orders={}, environ=environ, log=lambda _: None,
    )  # fmt: skip
    with pytest.raises(MachineError) as caught, fleet:
        pass
    assert {"PATH", "RAY_AUTH_TOKEN", "HF_TOKEN_PATH"} <= set(caught.value.why.split())
    assert not {"HF_TOKEN", "PACKAGER_SIGN_PASSPHRASE"} & set(caught.value.why.split())
