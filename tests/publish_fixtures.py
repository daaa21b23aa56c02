"""Fixtures of the publishing tests: folders to publish, and git without the user's settings."""

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from packager.publish.branches import BranchContent
from packager.publish.sign_release import ReleaseSigner, SigningKeys
from packager.publish.signing_keys import Signer
from packager.publish.targets.git_locks import GitWaits
from packager.system.files import file_record, list_files

if TYPE_CHECKING:
    import pytest

    from tests.loopback_hub import LoopbackHub

REPOSITORY = "somebody/Model-GPTQ"
VARIANT = "gptq-4bit-32g-actorder_True"
IDENTITY = {
    "GIT_AUTHOR_NAME": "A Person", "GIT_AUTHOR_EMAIL": "person@example.org",
    "GIT_COMMITTER_NAME": "A Person", "GIT_COMMITTER_EMAIL": "person@example.org",
}  # fmt: skip
SHORT_WAITS = GitWaits(publisher_s=0.2, staging_s=2.0, orphan_s=0.1, retries_s=(0.01, 0.02, 0.03, 0.04))


def make_content(dist: Path, branch: str, files: Mapping[str, bytes]) -> BranchContent:
    """Write a folder with `files` and describe it truthfully."""
    folder = dist / branch
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return describe(folder, branch)


def describe(folder: Path, branch: str) -> BranchContent:
    """Describe a folder as it is now."""
    records = {name: file_record(folder / name) for name in list_files(folder)}
    return BranchContent(branch=branch, folder=folder, files=records, message=f"Publish {branch}")


def hub_folder(root: Path) -> Path:
    """Return where a local target with this root keeps the repository."""
    return root / "models" / REPOSITORY


def git(*arguments: str, cwd: Path | None = None) -> str:
    """Run git without the user's settings."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    neutral = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    result = subprocess.run(
        ["git", *arguments],
        cwd=cwd,
        env={**environment, **neutral, **IDENTITY},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"git {' '.join(arguments)}: {result.stderr}"
    return result.stdout


def trees(repository: Path) -> dict[str, str]:
    """Return each branch's tree id."""
    lines = git("for-each-ref", "--format=%(refname:lstrip=2) %(tree)", "refs/heads", cwd=repository).splitlines()
    return dict(line.split() for line in lines)


def heads(repository: Path) -> dict[str, str]:
    """Return each branch's head commit."""
    lines = git("for-each-ref", "--format=%(refname:lstrip=2) %(objectname)", "refs/heads", cwd=repository).splitlines()
    return dict(line.split() for line in lines)


def files_in(folder: Path) -> dict[str, bytes]:
    """Return the content of a worktree's files."""
    paths = (path for path in folder.rglob("*") if path.is_file() and ".git" not in path.relative_to(folder).parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def leftovers(root: Path) -> list[str]:
    """Return the temporary files and locks of killed runs below a target's root."""
    ours = hub_folder(root).with_name(f".{hub_folder(root).name}.lock")
    names = (path for path in root.rglob("*") if path != ours)
    odd = (path for path in names if path.name.startswith((".tmp-", "tmp_", "packager-")) or path.suffix == ".lock")
    return sorted(path.relative_to(root).as_posix() for path in odd)


def fixed_signer(folder: Path) -> ReleaseSigner:
    """Return a signer with a fixed key, which writes its statements to `folder`."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.from_private_bytes(bytes([7]) * 32)
    return ReleaseSigner(REPOSITORY, SigningKeys(signer=Signer(key)), folder)


class Prepared:
    """Folders that tests begin with: each is made once by every worker of a test run, and copied for each test."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def copy(self, name: str, make: Callable[[Path], object], folder: Path) -> None:
        """Copy the folder `name` into the existing `folder`; `make` makes it if it is not there yet."""
        if not (self._root / name).exists():
            (self._root / name).mkdir()
            make(self._root / name)
        shutil.copytree(self._root / name, folder, symlinks=True, dirs_exist_ok=True)


def log_in(hub: "LoopbackHub", token: str, monkeypatch: "pytest.MonkeyPatch") -> None:
    """Point this process's Hub client to a loopback Hub, without Xet."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_TOKEN", token)


def shim(folder: Path, script: str, monkeypatch: "pytest.MonkeyPatch") -> None:
    """Put a `git` first on the PATH that runs `script`, in which $real is git, then the real one."""
    real = next(path for entry in os.get_exec_path() if (path := Path(entry) / "git").exists())
    folder.mkdir()
    (folder / "git").write_text(f'#!/bin/sh\nreal=\'{real}\'\n{script}\nexec "$real" "$@"\n')
    (folder / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
