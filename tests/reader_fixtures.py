"""Environments of readers of published files: no token, no settings, an empty home, and a loopback Hub."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from packager.system.files import file_record

BIN = str(Path(sys.executable).parent)
TIMEOUT_S = 120.0
Environ = Mapping[str, str]
_KEPT = {"PATH", "LANG", "LC_ALL", "SSL_CERT_FILE", "SSL_CERT_DIR"}


def new_reader(home: Path, repositories: str) -> dict[str, str]:
    """Return the environment of a new reader.

    Args:
        home: the reader's home folder, which is created.
        repositories: the address that git uses instead of https://huggingface.co/.
    """
    home.mkdir()
    (home / "gitconfig").write_text(f'[url "{repositories}"]\n\tinsteadOf = https://huggingface.co/\n')
    kept = {name: text for name, text in os.environ.items() if name in _KEPT}
    return {
        **kept,
        "HOME": str(home),
        "TMPDIR": str(home),
        "PATH": os.pathsep.join([BIN, kept.get("PATH", os.defpath)]),
        "GIT_CONFIG_GLOBAL": str(home / "gitconfig"),
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_TERMINAL_PROMPT": "0",
    }


def on_the_hub(reader: Environ, endpoint: str, *, xet: bool = False) -> dict[str, str]:
    """Return the environment in which the Hub's own clients take `endpoint` for the Hub.

    Xet is not negotiated: a client with Xet needs a setting for a server without it.
    """
    return {
        **reader,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": f"{reader['HOME']}/huggingface",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "*",
        **({} if xet else {"HF_HUB_DISABLE_XET": "1"}),
    }


def run(command: Sequence[str | Path], environ: Environ, folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run a command without a terminal and return its result, whatever the exit status."""
    return subprocess.run(
        list(map(str, command)),
        env=dict(environ),
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )


def succeed(command: Sequence[str | Path], environ: Environ, folder: Path) -> str:
    """Run and return the standard output; a failure shows what was written."""
    ended = run(command, environ, folder)
    assert ended.returncode == 0, f"exit status {ended.returncode}\n{ended.stdout}\n{ended.stderr[-4000:]}"
    assert "Traceback" not in ended.stderr, ended.stderr[-4000:]
    return ended.stdout


def fetch(script: str, environ: Environ, work: Path) -> Path:
    """Run a card's shell commands in a new folder, and return the one folder that they make there."""
    work.mkdir()
    succeed(["bash", "-euo", "pipefail", "-c", script], environ, work)
    (fetched,) = work.iterdir()
    return fetched


def published_files(folder: Path) -> dict[str, str]:
    """Return the sha256 of every downloaded file, without the files of git and of the Hub's client."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {
        name: file_record(path).sha256
        for name, path in names.items()
        if not name.startswith((".git/", ".cache/huggingface/"))
    }


def assert_audit_passes(folder: Path, environ: Environ) -> None:
    """Run `packager audit` on a folder as its reader would."""
    report = json.loads(succeed([f"{BIN}/packager", "audit", folder, "--format", "json"], environ, folder))
    assert report["passed"] is True
    assert report["findings"] == []
