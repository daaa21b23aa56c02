"""Locks of the loaders, and installing from them: one place, a digest for every file, sources built confined."""

import base64
import hashlib
import io
import os
import re
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from packager.errors import LoaderUnavailableError
from packager.prove import environments, fetch_script
from packager.prove.environments import ensure_environment
from packager.prove.installing import left_out, package_place
from packager.prove.loaders import LOADERS, LoaderSpec
from packager.prove.locks import read_lock
from packager.system.confinement import refusal
from tests.test_environments import ANY_HASH, ENVIRON, context, toy_spec, toy_torch  # noqa: F401 - a fixture

SCRIPT = Path(fetch_script.__file__)


# the locks


@pytest.mark.parametrize("spec", LOADERS.values(), ids=LOADERS)
def test_a_lock_fits_its_input(spec: LoaderSpec) -> None:
    """`nox -s locks` was run after the last change of the input."""
    lines = [
        re.sub(r"(^|\s)#.*", "", line).strip() for line in spec.requirements.with_suffix(".in").read_text().splitlines()
    ]
    wanted = [Requirement(line) for line in lines if line and not line.startswith("-")]
    locked = read_lock(spec.requirements)
    assert [(each.name, str(each.specifier)) for each in wanted] == [
        (each.requirement.name, str(each.requirement.specifier)) for each in locked
    ]
    for python in ("3.11.4", "3.12.1", "3.13.0"):
        chosen, found = ([applies(each, python) for each in some] for some in (wanted, [e.requirement for e in locked]))
        assert chosen == found
    options = sorted(line for line in lines if line.startswith("-"))
    assert (
        sorted({"--only-binary :all:", *(f"--no-binary {each.name}" for each in locked if each.from_source)}) == options
    )


def applies(requirement: Requirement, python: str) -> bool:
    environment = {"python_full_version": python, "python_version": python.rpartition(".")[0]}
    return requirement.marker is None or requirement.marker.evaluate(environment)


@pytest.mark.parametrize("spec", LOADERS.values(), ids=LOADERS)
def test_locks_pin_everything_but_torch(spec: LoaderSpec) -> None:
    names = [each.requirement.name for each in read_lock(spec.requirements)]
    assert names == sorted(names, key=str.lower)
    assert not [name for name in names if name.startswith(("torch", "nvidia", "triton"))]
    assert SpecifierSet(spec.requires_python).contains("3.12.0")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("numpy==2.0.0", "numpy==2.0.0: it has no digest (--hash=sha256:...), so any file of that version would do"),
        ("numpy==2.0.0 --hash=md5:00", "numpy==2.0.0: a digest is not 64 hexadecimal digits of sha256"),
        (f"numpy==2.0.0 {ANY_HASH} --hash=sha256:12", "numpy==2.0.0: a digest is not 64 hexadecimal digits of sha256"),
        (f"numpy>=2.0.0 {ANY_HASH}", "numpy>=2.0.0: a lock pins each package to one version, by =="),
        (f"numpy==2.* {ANY_HASH}", "numpy==2.*: a lock pins each package to one version, by =="),
        (f"numpy {ANY_HASH}", "numpy: a lock pins each package to one version, by =="),
        (f"numpy @ https://evil.example/numpy.whl {ANY_HASH}", "a lock pins each package to one version, by =="),
        ("--extra-index-url https://evil.example", "--extra-index-url https //evil.example: a lock has no such option"),
        ("--index-url=https://evil.example", "a lock has no such option"),
        ("--trusted-host evil.example", "a lock has no such option"),
        ("--find-links /tmp", "a lock has no such option"),
        ("-r other.txt", "a lock has no such option"),
        ("-e .", "a lock has no such option"),
        ("numpy==2.0.0 --hash", "numpy==2.0.0 --hash: "),
        ("\x00", "\x00: "),
    ],
)  # fmt: skip
def test_a_lock_that_leaves_something_open_is_refused(line: str, why: str, tmp_path: Path) -> None:
    lock = tmp_path / "toy.txt"
    lock.write_text(f"# toy\n--only-binary :all:\n{line}\n")
    with pytest.raises(LoaderUnavailableError, match="not valid, so nothing is installed") as caught:
        read_lock(lock)
    assert why.replace("https //", "https://") in caught.value.why
    assert (caught.value.where, caught.value.hint) == (str(lock), "write the lock with `nox -s locks`")


# the place


def test_packages_come_from_pypi_or_from_the_one_index_that_is_named() -> None:
    assert package_place({}) == package_place({"PIP_INDEX_URL": " "}) == {"PIP_INDEX_URL": "https://pypi.org/simple"}
    environ = {"PIP_INDEX_URL": "https://mirror.example/simple", "PIP_EXTRA_INDEX_URL": "e", "PIP_FIND_LINKS": "f"}
    assert package_place(environ) == {"PIP_INDEX_URL": "https://mirror.example/simple"}
    assert left_out(environ) == ["PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"]


def test_or_from_one_folder(tmp_path: Path) -> None:
    environ = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_INDEX_URL": "https://mirror.example"}
    assert package_place(environ) == {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    assert left_out(environ) == []
    for several in (f"{tmp_path} {tmp_path}", "", "relative", "https://u:secret@host/page"):
        with pytest.raises(LoaderUnavailableError, match="must name one folder") as caught:
            package_place({**environ, "PIP_FIND_LINKS": several})
        assert "secret" not in str(caught.value)


# installing


def wheel(folder: Path, name: str = "toywheel", more: dict[str, str] | None = None) -> str:
    """Write a wheel of version 1.0; return its sha256."""
    files = {
        f"{name}/__init__.py": "value = 7\n",
        f"{name}/broken.py": "print 'Python 2'\n",
        f"{name}-1.0.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{name}-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        **(more or {}),
    }
    files[f"{name}-1.0.dist-info/RECORD"] = "".join(f"{each},,\n" for each in [*files, f"{name}-1.0.dist-info/RECORD"])
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for each, text in files.items():
            archive.writestr(each, text)
    return hashlib.sha256(path.read_bytes()).hexdigest()


# Its backend writes what it sees into the wheel: whoever builds it shows how confined that was.
BACKEND = """
import json, os, pathlib, socket, zipfile
def reach(port):
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
        return "reached"
    except OSError:
        return "refused"
def build_wheel(folder, config_settings=None, metadata_directory=None):
    seen = {
        "environ": dict(os.environ), "home": os.listdir(os.path.expanduser("~")), "network": reach(PORT),
        "secret": pathlib.Path(SECRET).exists(),
    }
    files = {
        "toysource/__init__.py": "seen = " + repr(seen),
        "toysource-1.0.dist-info/METADATA": "Metadata-Version: 2.1\\nName: toysource\\nVersion: 1.0\\n",
        "toysource-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
        "toysource-1.0.dist-info/RECORD": "",
    }
    name = "toysource-1.0-py3-none-any.whl"
    with zipfile.ZipFile(os.path.join(folder, name), "w") as archive:
        for each, text in files.items():
            archive.writestr(each, text)
    return name
"""


def archive(folder: Path, backend: str) -> str:
    """Write a source archive of toysource 1.0; return its sha256."""
    files = {
        "PKG-INFO": "Metadata-Version: 2.1\nName: toysource\nVersion: 1.0\n",
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        "backend.py": backend,
    }
    path = folder / "toysource-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as out:
        for name, text in files.items():
            entry = tarfile.TarInfo(f"toysource-1.0/{name}")
            entry.size = len(text.encode())
            out.addfile(entry, io.BytesIO(text.encode()))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """The folder that packages come from."""
    folder = tmp_path / "files"
    folder.mkdir()
    return folder


def from_folder(files: Path, **more: str) -> dict[str, str]:
    return {**ENVIRON, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(files), **more}


def output(python: Path, code: str) -> str:
    return subprocess.run([python, "-I", "-c", code], check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.slow
@pytest.mark.usefixtures("toy_torch")
def test_packages_are_installed_and_compiled_and_run_nothing(files: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    digest = wheel(files, more={"toywheel.pth": f"import pathlib; pathlib.Path({str(mark)!r}).touch()\n"})
    spec = toy_spec(tmp_path, f"toywheel==1.0 {ANY_HASH} \\\n    --hash=sha256:{digest}\n")
    lines: list[str] = []
    environ = from_folder(
        files, PIP_TARGET=str(tmp_path / "target"), PIP_EXTRA_INDEX_URL="https://u:secret@evil.example"
    )
    python = ensure_environment(spec, context(tmp_path / "cache", environ, lines.append))
    assert not mark.exists(), "creating an environment ran a package's .pth file"
    assert output(python, "import toywheel; print(toywheel.value)") == "7"
    assert not (tmp_path / "target").exists()
    compiled = (python.parent.parent / "lib").rglob("toywheel/__pycache__/*.pyc")
    assert [path.name.partition(".")[0] for path in compiled] == ["__init__"]
    assert lines[0].startswith(f"toy: creating its environment, 1 packages from {files}, log in ")
    assert lines[1] == "toy: not used: PIP_EXTRA_INDEX_URL; all packages come from one place"
    assert not [line for line in lines if "secret" in line]


@pytest.mark.slow
@pytest.mark.usefixtures("toy_torch")
def test_another_file_under_the_name_of_a_wheel_is_not_installed(files: Path, tmp_path: Path) -> None:
    digest = wheel(files)
    spec = toy_spec(tmp_path, f"toywheel==1.0 {ANY_HASH}\n")
    with pytest.raises(LoaderUnavailableError, match="packages of toy could not be installed") as caught:
        ensure_environment(spec, context(tmp_path / "cache", from_folder(files)))
    assert f"Got        {digest}" in caught.value.why
    assert f"Expected sha256 {0:064d}" in caught.value.why


@pytest.mark.slow
@pytest.mark.usefixtures("toy_torch")
def test_a_source_archive_is_not_built_unless_the_lock_says_so(files: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    digest = archive(files, f"import pathlib; pathlib.Path({str(mark)!r}).touch()")
    spec = toy_spec(tmp_path, f"toysource==1.0 --hash=sha256:{digest}\n")
    with pytest.raises(LoaderUnavailableError, match="packages of toy could not be installed") as caught:
        ensure_environment(spec, context(tmp_path / "cache", from_folder(files)))
    assert "No matching distribution found for toysource==1.0" in caught.value.why
    assert not mark.exists()


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.usefixtures("toy_torch")
def test_a_source_archive_is_built_confined_and_once(files: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.touch()
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        backend = f"PORT = {server.server_port}\nSECRET = {str(secret)!r}\n{BACKEND}"
        spec = toy_spec(tmp_path, f"--no-binary toysource\ntoysource==1.0 --hash=sha256:{archive(files, backend)}\n")
        lines: list[str] = []
        environ = from_folder(files, GH_PAT="t", PIP_INDEX_URL="u", https_proxy="p", HOME=str(tmp_path))
        made = context(tmp_path / "cache", environ, lines.append)
        python = ensure_environment(spec, made)
    seen = eval(output(python, "import toysource; print(toysource.seen)"))  # noqa: S307 - our own text
    assert "secret" not in seen["home"]
    assert not {"GH_PAT", "PIP_INDEX_URL", "https_proxy"} & set(seen["environ"])
    assert lines[1] == f"toy: built toysource-1.0-py3-none-any.whl from source, confinement {made.confinement}"
    if not refusal(made.confinement) and made.confinement != "none":
        assert (seen["network"], seen["secret"]) == ("refused", False)
    (wheel_file,) = (tmp_path / "cache" / "wheels").glob("toysource-1.0-*/*.whl")
    digest = hashlib.sha256(wheel_file.read_bytes()).hexdigest()
    assert f"--hash=sha256:{digest}" in (python.parent.parent / "install.txt").read_text()
    # The kept wheel is used again; not one that was changed.
    for text, built in (("# again\n", False), ("# changed\n", True)):
        spec.requirements.write_text(text + spec.requirements.read_text())
        lines.clear()
        if built:
            wheel_file.write_bytes(wheel_file.read_bytes() + b"\0")
        ensure_environment(spec, made)
        assert any("built toysource" in line for line in lines) == built
    assert any("was changed after it was built" in line for line in lines)


@pytest.mark.usefixtures("toy_torch")
def test_another_archive_under_the_name_of_a_source_is_not_built(files: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    digest = archive(files, f"import pathlib; pathlib.Path({str(mark)!r}).touch()")
    spec = toy_spec(tmp_path, f"--no-binary toysource\ntoysource==1.0 {ANY_HASH}\n")
    with pytest.raises(
        LoaderUnavailableError, match="is not the file that the lock of toy names, so it was not built"
    ) as caught:
        ensure_environment(spec, context(tmp_path / "cache", from_folder(files)))
    assert caught.value.why == f"its sha256 is {digest}, which is not in the lock"
    assert caught.value.where == str(files)
    assert not mark.exists()
    assert not (tmp_path / "cache" / "wheels").exists() or not list((tmp_path / "cache" / "wheels").iterdir())


@pytest.mark.usefixtures("toy_torch")
def test_a_source_that_does_not_build_or_is_not_there_is_named(files: Path, tmp_path: Path) -> None:
    spec = toy_spec(tmp_path, f"--no-binary toysource\ntoysource==1.0 {ANY_HASH}\n")
    with pytest.raises(LoaderUnavailableError, match=r"archive of toysource 1\.0 could not be downloaded") as caught:
        ensure_environment(spec, context(tmp_path / "cache", from_folder(files)))
    assert "LookupError: the folder has no source archive of toysource 1.0" in caught.value.why
    digest = archive(files, "raise SystemExit('no compiler')")
    spec.requirements.write_text(f"--no-binary toysource\ntoysource==1.0 --hash=sha256:{digest}\n")
    with pytest.raises(LoaderUnavailableError, match=r"toysource-1\.0\.tar\.gz could not be built for toy") as caught:
        ensure_environment(spec, context(tmp_path / "cache", from_folder(files)))
    assert caught.value.where.endswith("pip.log")
    assert "no compiler" in Path(caught.value.where).read_text()


def test_without_torch_nothing_is_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "find", lambda _: None)
    with pytest.raises(LoaderUnavailableError, match="toy needs torch, which is not installed"):
        ensure_environment(toy_spec(tmp_path), context(tmp_path / "cache"))


# downloading a source archive


class Index(BaseHTTPRequestHandler):
    """An index that asks for a password, and leads to files on another host that must not get it."""

    pages: dict[str, bytes]
    seen: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers["Authorization"]))
        found = self.pages.get(self.path)
        self.send_response(200 if found is not None else 404)
        self.end_headers()
        self.wfile.write(found or b"")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def servers() -> Iterator[list[tuple[str, type[Index]]]]:
    """The addresses and handlers of two servers."""
    handlers = [type("One", (Index,), {"pages": {}, "seen": []}) for _ in range(2)]
    running = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for handler in handlers]
    for server in running:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield [(f"127.0.0.1:{server.server_port}", handler) for server, handler in zip(running, handlers, strict=True)]
    for server in running:
        server.shutdown()
        server.server_close()


def fetched(folder: Path, index: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-I", "-S", str(SCRIPT), str(folder), "toy-source", "1.0"]
    variables = {"PATH": os.defpath, "PIP_INDEX_URL": index, **environ}
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=60)


def test_an_archive_is_found_on_an_index_and_the_password_stays_there(
    tmp_path: Path, servers: list[tuple[str, type[Index]]]
) -> None:
    (index, pages), (host, files) = servers
    names = ["toy_source-1.0-py3-none-any.whl", "toy_source-1.0.1.tar.gz", "other-1.0.tar.gz", "Toy.Source-1.0.tar.gz"]
    links = "".join(f'<a data-x href="http://{host}/f/{name}#sha256=00">{name}</a>\n' for name in names)
    pages.pages["/simple/toy-source/"] = f"<!DOCTYPE html><html><body>{links}</body></html>".encode()
    files.pages["/f/Toy.Source-1.0.tar.gz"] = b"archive"
    done = fetched(tmp_path, f"http://us%40er:pass@{index}/simple/")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "Toy.Source-1.0.tar.gz").read_bytes() == b"archive"
    assert pages.seen == [("/simple/toy-source/", f"Basic {base64.b64encode(b'us@er:pass').decode()}")]
    assert files.seen == [("/f/Toy.Source-1.0.tar.gz", None)]


def test_a_password_may_be_in_netrc(tmp_path: Path, servers: list[tuple[str, type[Index]]]) -> None:
    index, pages = servers[0]
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password pass\n")
    assert fetched(tmp_path, f"http://{index}/simple", NETRC=str(tmp_path / "netrc")).returncode == 1
    assert pages.seen == [("/simple/toy-source/", f"Basic {base64.b64encode(b'user:pass').decode()}")]


@pytest.mark.parametrize(
    ("page", "why"),
    [
        (None, "HTTPError: HTTP Error 404: Not Found"),
        (b"", "LookupError: the index has no source archive of toy-source 1.0"),
        (b"\xff<a href>\x00<a", "LookupError: the index has no source archive of toy-source 1.0"),
        (
            b'<a href="file:///etc/toy-source-1.0.tar.gz">',
            "ValueError: the index names a file that is neither at https",
        ),
        (b'<a href="ftp://host/toy-source-1.0.tar.gz">', "ValueError: the index names a file that is neither at https"),
        (b'<a href="toy-source-1.0.tar.gz">', "HTTPError: HTTP Error 404: Not Found"),
    ],
)
def test_an_index_without_the_archive(
    page: bytes | None, why: str, tmp_path: Path, servers: list[tuple[str, type[Index]]]
) -> None:
    index, handler = servers[0]
    if page is not None:
        handler.pages["/simple/toy-source/"] = page
    done = fetched(tmp_path, f"http://user:secret@{index}/simple")
    assert done.returncode == 1
    assert done.stderr.startswith(why)
    assert "secret" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_archive_without_end_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_script, "MAX_ARCHIVE_BYTES", 10)
    (tmp_path / "toy-1.0.tar.gz").write_bytes(b"0" * 11)
    (tmp_path / "out").mkdir()
    client, _ = fetch_script.opener("file:///")
    with pytest.raises(ValueError, match="has over 10 bytes"):
        fetch_script.download_archive(client, (tmp_path / "toy-1.0.tar.gz").as_uri(), tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "found"),
    [
        ("auto_gptq-0.7.1.tar.gz", True), ("auto-gptq-0.7.1.tar.gz", True), ("Auto.GPTQ-0.7.1.zip", True),
        ("auto_gptq-0.7.10.tar.gz", False), ("auto_gptq-0.7.1.tar.bz2", False), ("gptq-0.7.1.tar.gz", False),
        ("auto_gptq-0.7.1-cp311-cp311-manylinux_2_17_x86_64.whl", False), ("", False),
    ],
)  # fmt: skip
def test_the_name_of_an_archive(file: str, found: bool) -> None:
    assert fetch_script.is_archive(file, "auto-gptq", "0.7.1") == found
