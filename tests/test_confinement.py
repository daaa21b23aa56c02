"""What a loader's process can reach, in each confinement that this machine allows, and what is read of its results."""

import errno
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from packager.errors import LoaderError
from packager.prove.environments import RuntimeContext
from packager.prove.installing import index_environ
from packager.prove.loaders import LoaderSpec
from packager.prove.probes import ProbeJob, ProbeResult, run_probe
from packager.receipt import Confinement, LoaderRecord
from packager.system import confinement
from packager.system.confinement import View, child_environ, confined_command, private_folder, refusal
from packager.system.files import open_regular
from packager.system.processes import Processes, ending, tail
from tests.samples import sampled

MODES: tuple[Confinement, ...] = ("bubblewrap", "namespaces", "none")
CONFINED = MODES[:2]

# What a hostile runtime does is in the checkpoint's attack.py.
RUNTIME = """
import json, os, pathlib, sys
import numpy as np
job = json.loads(pathlib.Path(sys.argv[1]).read_text())
model, output = pathlib.Path(job["model_dir"]), pathlib.Path(job["output_dir"])
np.save(output / "logits.npy", np.zeros((1, 2, 4), np.float32))
result = {"status": "ok", "versions": {}, "device": "cpu", "dtype": "float32", "kernel": "toy", "weights_sha256": {},
          "generated": [[7]], "load_s": 0.5, "forward_s": 0.25, "peak_memory_bytes": 1}
exec((model / "attack.py").read_text())
if not os.path.lexists(output / "result.json"):
    (output / "tmp").write_text(json.dumps(result))
    (output / "tmp").replace(output / "result.json")
"""


@pytest.fixture(params=MODES)
def how(request: pytest.FixtureRequest) -> Confinement:
    return allowed(request.param)


@pytest.fixture(params=CONFINED)
def confined(request: pytest.FixtureRequest) -> Confinement:
    return allowed(request.param)


def allowed(mode: Confinement) -> Confinement:
    if why := refusal(mode):
        pytest.skip(why)
    return mode


def attack(
    folder: Path, code: str, how: Confinement = "none", *, environ: Mapping[str, str] | None = None, **names: object
) -> ProbeResult:
    """Let a runtime run `code`, in which `names` are set; whatever it puts into `seen` is in the result's versions."""
    model = folder / "model"
    model.mkdir(exist_ok=True)
    constants = "".join(
        f"{name} = {(str(value) if isinstance(value, Path) else value)!r}\n" for name, value in names.items()
    )
    (model / "attack.py").write_text(f"seen = {{}}\n{constants}{code}\nresult['versions'] = seen\n")
    script = folder / "runtime.py"
    script.write_text(RUNTIME)
    spec = LoaderSpec(
        name="toy",
        script=script,
        requirements=script,
        devices=frozenset({"cpu"}),
        requires_python=">=3",
        description="",
    )
    job = ProbeJob(
        model_dir=model, device="cpu", input_ids=[[1, 2]], prompts=[[1]], max_new_tokens=1, vocab_size=4,
        output_dir=folder / "out",
    )  # fmt: skip
    lines: list[str] = []
    context = RuntimeContext(cache=folder, scratch=folder, environ=environ or {}, log=lines.append, confinement=how)
    result = run_probe(spec, Path(sys.executable), job, 60.0, context)
    assert any("unconfined" in line for line in lines) == (how == "none")
    return result


def seen_by(folder: Path, code: str, how: Confinement, **names: Any) -> Mapping[str, str]:
    return attack(folder, code, how, **names).versions


# the environment

FOREIGN = (
    "GH_PAT", "DATABASE_URL", "SSH_AUTH_SOCK", "LD_PRELOAD", "LD_AUDIT", "HF_TOKEN", "HF_HOME", "AWS_PROFILE",
    "KUBECONFIG", "DOCKER_HOST", "XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS", "GIT_ASKPASS", "PYTHONPATH",
    "PYTHONSTARTUP", "PIP_INDEX_URL", "https_proxy", "CUDA_INJECTION64_PATH", "OMP_TOOL_LIBRARIES", "MKL_SECRET",
    "GITHUB_ENV", "ACTIONS_RUNTIME_TOKEN",
)  # fmt: skip


def test_a_loader_gets_a_list_of_variables_and_an_empty_home(tmp_path: Path, how: Confinement) -> None:
    environ = dict.fromkeys(FOREIGN, "secret")
    wanted = {"LANG": "C.UTF-8", "CUDA_VISIBLE_DEVICES": "0", "OMP_NUM_THREADS": "3"}
    code = "seen = {**os.environ, 'files': repr(os.listdir(os.path.expanduser('~')))}"
    seen = seen_by(tmp_path, code, how, environ={**environ, **wanted, "HOME": str(tmp_path), "PATH": "/evil:/usr/bin"})
    assert not set(FOREIGN) & set(seen)
    assert "secret" not in seen.values()
    assert wanted.items() <= seen.items()
    assert seen["files"] == "[]"
    assert "/evil" not in seen["PATH"]
    home = Path(seen["HOME"])
    assert home.name == "home"
    assert not home.exists(), "it is removed afterwards"
    known = {"PATH", "HOME", "TMPDIR", "VIRTUAL_ENV", "PWD", "files", "LC_CTYPE", "SHLVL", "OLDPWD", "_", *wanted}
    assert set(seen) <= {*known, "PACKAGER_ISOLATED"}


def test_pip_gets_one_index_and_no_secret(tmp_path: Path) -> None:
    (tmp_path / ".config" / "pip").mkdir(parents=True)
    (tmp_path / ".config" / "pip" / "pip.conf").write_text("[global]\nextra-index-url = https://evil.example\n")
    passed = {"PIP_INDEX_URL": "u", "HTTPS_PROXY": "p", "no_proxy": "n", "SSL_CERT_FILE": "c", "PIP_CERT": "d"}
    more_places = {"PIP_EXTRA_INDEX_URL": "e", "PIP_FIND_LINKS": "/f", "PIP_TRUSTED_HOST": "h", "PIP_CONFIG_FILE": "/c"}
    dropped = {"PIP_TARGET": "t", "PIP_USER": "1", "HF_TOKEN": "t", "GH_PAT": "t", "LD_PRELOAD": "t", "PYTHONPATH": "t"}
    with private_folder() as folder:
        made = index_environ({**passed, **more_places, **dropped, "HOME": str(tmp_path), "PATH": "/evil"}, folder)
        home = str(folder / "home")
    fixed = {
        "PIP_CONFIG_FILE": "/dev/null", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1",
        "PYTHONNOUSERSITE": "1",
    }  # fmt: skip
    assert made == {**passed, **fixed, "HOME": home, "TMPDIR": home, "PATH": os.defpath}


def test_the_interpreter_finds_its_own_library_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = tmp_path / "python" / "lib", tmp_path / "other"
    own.mkdir(parents=True)
    other.mkdir()
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path / "python"))
    environ = {"LD_LIBRARY_PATH": f"{other}:{own}:relative::/absent"}
    assert child_environ(environ, (), tmp_path)["LD_LIBRARY_PATH"] == str(own)


# network, files and processes

REACH = """
import socket, subprocess
def attempt(name, call):
    try:
        seen[name] = f"reached {call()}"
    except OSError as error:
        seen[name] = "refused"
def tcp():
    return socket.create_connection(("127.0.0.1", port), 1) and ""
def udp():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
        return out.sendto(b"stolen", ("127.0.0.1", port))
def abstract():
    with socket.socket(socket.AF_UNIX) as out:
        return out.connect("\\0" + name)
def at_path():
    with socket.socket(socket.AF_UNIX) as out:
        return out.connect(path)
for each in (tcp, udp, abstract, at_path):
    attempt(each.__name__, each)
code = f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)"
seen["grandchild"] = f"status {subprocess.run([sys.executable, '-c', code], stderr=-3).returncode}"
"""


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Servers of this process, of every kind that a loader might reach; `got` has what they received."""
    name = f"packager-test-{os.getpid()}"
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        socket.socket(socket.AF_UNIX) as abstract,
        socket.socket(socket.AF_UNIX) as at_path,
    ):
        port = tcp.getsockname()[1]
        udp.bind(("127.0.0.1", port))
        udp.setblocking(False)
        abstract.bind(f"\0{name}")
        abstract.listen()
        at_path.bind(str(tmp_path / "agent"))
        at_path.listen()
        yield {"port": port, "name": name, "path": tmp_path / "agent", "udp": udp}


def test_no_process_of_a_loader_reaches_a_network_or_a_socket(
    tmp_path: Path, confined: Confinement, listening: dict[str, Any]
) -> None:
    udp = listening.pop("udp")
    seen = dict(seen_by(tmp_path, REACH, confined, **listening))
    # bubblewrap's loopback interface takes a datagram that nothing receives.
    assert seen.pop("udp") in ("refused", "reached 6")
    with pytest.raises(BlockingIOError):
        udp.recv(10)
    assert seen == {"tcp": "refused", "abstract": "refused", "at_path": "refused", "grandchild": "status 1"}


FILES = """
for name in readable:
    try:
        seen[name] = pathlib.Path(name).read_text()
    except OSError as error:
        seen[name] = "hidden"
for name in writable:
    try:
        pathlib.Path(name).write_text("changed")
        seen[name] = "written"
    except OSError as error:
        seen[name] = "refused"
"""


def test_a_loader_sees_no_file_of_the_user_and_changes_only_its_output(tmp_path: Path, confined: Confinement) -> None:
    token = tmp_path / "home" / ".cache" / "huggingface" / "token"
    token.parent.mkdir(parents=True)
    token.write_text("hf_secret")
    environ = f"/proc/{os.getpid()}/environ"
    new = f"packager-test-{os.getpid()}"
    targets = [tmp_path / "model" / new, tmp_path / "runtime.py", Path(sys.prefix) / new, Path("/usr") / new]
    output = tmp_path / "out" / "new"
    seen = seen_by(
        tmp_path, FILES, confined, readable=[str(token), environ, "/etc/shadow", "/etc/hostname"],
        writable=[*map(str, targets), str(output)],
    )  # fmt: skip
    assert [seen[name] for name in (str(token), environ, "/etc/shadow", "/etc/hostname")] == ["hidden"] * 4
    assert [seen[str(name)] for name in targets] == ["refused"] * 4
    assert not any(target.exists() for target in targets if target.name == new)
    assert output.read_text() == "changed"


def test_what_is_readable_in_a_writable_folder_is_not_writable(tmp_path: Path, confined: Confinement) -> None:
    inner, outer = tmp_path / "a" / "read", tmp_path / "b" / "write"
    for folder in (inner, outer):
        folder.mkdir(parents=True)
    with private_folder() as folder:
        view = View(folder=folder, readable=[inner, tmp_path / "b"], writable=[tmp_path / "a", outer])
        script = 'for d in "$@"; do if echo x > "$d/new"; then echo yes; else echo no; fi; done'
        folders = [str(each) for each in (tmp_path / "a", inner, tmp_path / "b", outer)]
        lines = _output(confined_command(["/bin/sh", "-c", script, "sh", *folders], view, confined), folder)
    assert lines == ["yes", "no", "no", "yes"]


def test_a_loader_sees_no_other_process_and_has_no_rights(tmp_path: Path, confined: Confinement) -> None:
    code = """
for line in open("/proc/self/status"):
    name, _, value = line.partition(":")
    if name.startswith("Cap") or name == "NoNewPrivs":
        seen[name] = value.strip().lstrip("0")
try:
    os.kill(parent, 0)
    seen["parent"] = "there"
except ProcessLookupError:
    seen["parent"] = "gone"
"""
    seen = dict(seen_by(tmp_path, code, confined, parent=os.getpid() if os.getpid() > 1000 else 2**22 - 1))
    assert seen.pop("NoNewPrivs") == "1"
    assert seen.pop("parent") == "gone"
    assert set(seen.values()) == {""}


def test_home_of_the_private_folder_is_all_that_is_kept_of_it(tmp_path: Path, confined: Confinement) -> None:
    with private_folder() as folder:
        (folder / "stderr.txt").write_text("of this process")
        view = View(folder=folder)
        lines = _output(confined_command(["/bin/ls", str(folder)], view, confined), folder)
    assert lines == ["home"]


def _output(command: list[str], folder: Path) -> list[str]:
    with (folder / "out.txt").open("wb") as out, (folder / "err.txt").open("wb") as err:
        status = Processes().run(
            command, folder=folder, environ=child_environ({}, (), folder), out=out, err=err, timeout_s=30.0
        )
    assert status == 0, (folder / "err.txt").read_text()
    return (folder / "out.txt").read_text().split()


# the choice


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The only folder on the PATH, empty; what was found out before is forgotten, and what is found out here too."""
    folder = tmp_path / "tools"
    folder.mkdir()
    confinement._trial.cache_clear()
    monkeypatch.setenv("PATH", str(folder))
    yield folder
    confinement._trial.cache_clear()


def test_without_the_programs_nothing_is_confined_and_why_is_known(tools: Path) -> None:
    assert confinement.confinement() == "none"
    assert refusal("bubblewrap") == "bwrap is not on the PATH"
    assert refusal("namespaces") == "unshare is not on the PATH"
    assert confined_command(["a", "b"], View(folder=tools), "none") == ["a", "b"]


def test_a_program_that_the_kernel_refuses_is_not_used(tools: Path) -> None:
    for name in ("bwrap", "unshare"):
        (tools / name).write_text(f"#!/bin/sh\necho {name}: not permitted >&2\nexit 1\n")
        (tools / name).chmod(0o755)
    assert confinement.confinement() == "none"
    assert refusal("bubblewrap") == "bwrap: not permitted"


def test_where_a_new_proc_is_refused_the_present_one_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, confined: Confinement
) -> None:
    trial = confinement._trial
    monkeypatch.setattr(
        confinement, "_trial", lambda how, *, fresh_proc: "no" if fresh_proc else trial(how, fresh_proc=False)
    )
    assert not refusal(confined)
    with private_folder() as folder:
        command = confined_command(["/bin/cat", f"/proc/{os.getpid()}/environ"], View(folder=folder), confined)
        with (folder / "out.txt").open("wb") as out:
            status = Processes().run(
                command, folder=folder, environ=child_environ({}, (), folder), out=out, err=out, timeout_s=30.0
            )
        assert status == 1
        assert b"Permission denied" in (folder / "out.txt").read_bytes()


def test_records_of_before_have_no_confinement() -> None:
    assert LoaderRecord.model_validate({"loader": "a", "required": True, "status": "passed"}).confinement == ""


# results


def test_an_honest_result_is_read(tmp_path: Path) -> None:
    result = attack(tmp_path, "")
    assert np.array_equal(result.logits, np.zeros((1, 2, 4), np.float32))
    assert result.generated == ((7,),)


LINK = "(output / {0!r}).unlink(missing_ok=True); os.symlink({1!r}, output / {0!r})"
PIPE = "(output / {0!r}).unlink(missing_ok=True); os.mkfifo(output / {0!r})"
HOSTILE = {
    "logits are a link": (LINK.format("logits.npy", "/etc/passwd"), "Too many levels of symbolic links"),
    "logits are a pipe": (PIPE.format("logits.npy"), "not a regular file"),
    "logits are a folder": ("(output / 'logits.npy').unlink(); (output / 'logits.npy').mkdir()", "not a regular file"),
    "logits are objects": ("np.save(output / 'logits.npy', np.array([[[print]*4]*2]), allow_pickle=True)", "object"),
    "logits are doubles": ("np.save(output / 'logits.npy', np.zeros((1, 2, 4)))", "float64"),
    "logits are by columns": (
        "np.save(output / 'logits.npy', np.asfortranarray(np.zeros((1, 2, 4), np.float32)))", "wanted",
    ),
    "logits are fewer": ("np.save(output / 'logits.npy', np.zeros((1, 2, 1), np.float32))", "(1, 2, 1)"),
    "logits are cut": ("os.truncate(output / 'logits.npy', 140)", "in 140 bytes"),
    "logits are huge": ("os.truncate(output / 'logits.npy', 10**9)", "in 1000000000 bytes"),
    "logits are text": ("(output / 'logits.npy').write_text('hello, this is text')", "magic string"),
    "logits are absent": ("(output / 'logits.npy').unlink()", "No such file"),
    "result is a link": (LINK.format("result.json", "/etc/passwd"), "Too many levels of symbolic links"),
    "result is a pipe": (PIPE.format("result.json"), "not a regular file"),
    "result is huge": ("(output / 'result.json').touch(); os.truncate(output / 'result.json', 10**9)", "over 10000000"),
    "result is deep": ("(output / 'result.json').write_text('[' * 10**6)", "recursion limit"),
    "result is no object": ("(output / 'result.json').write_text('7')", "an object"),
    "result is of no kind": ("result['status'] = 'fine'", "status"),
    "result has a long kernel": ("result['kernel'] = 'k' * 1001", "at most 1000 characters"),
    "result has many versions": ("seen = {str(n): 'v' for n in range(101)}", "at most 100 items"),
    "result has text for tokens": ("result['generated'] = ['seven']", "valid array"),
    "result has too many tokens": ("result['generated'] = [[7] * 2]", "generated [2] tokens"),
    "result has too few prompts": ("result['generated'] = []", "generated [] tokens"),
    "result has no number": ("result['load_s'] = float('nan')", "finite number"),
}  # fmt: skip


SOME = ("logits are a link", "logits are objects", "result is a pipe")


@pytest.mark.parametrize(("code", "why"), sampled(HOSTILE.values(), *(HOSTILE[name] for name in SOME)), ids=HOSTILE)
def test_a_result_that_is_not_one_is_an_error_at_once(tmp_path: Path, code: str, why: str) -> None:
    started = time.monotonic()
    with pytest.raises(LoaderError, match="toy wrote a result that cannot be used") as caught:
        attack(tmp_path, code)
    assert why in caught.value.why
    assert time.monotonic() - started < 20


def test_output_of_any_size_is_read_from_its_end(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as stream:
        stream.truncate(10**10)
        stream.seek(0, os.SEEK_END)
        stream.write(b"\nlast but one\nlast\n")
    assert tail(log, 2) == "last but one\nlast"


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name, number in (("pipe", errno.EINVAL), ("link", errno.ELOOP), ("absent", errno.ENOENT)):
        with pytest.raises(OSError, match=name) as caught:
            open_regular(tmp_path / name)
        assert caught.value.errno == number


# processes


def run(folder: Path, code: str, *, max_file_bytes: int = 0) -> tuple[int | None, str]:
    with (folder / "out.txt").open("wb") as out:
        status = Processes().run(
            [sys.executable, "-c", code], folder=folder, environ={}, out=out, err=out, timeout_s=30.0,
            max_file_bytes=max_file_bytes,
        )  # fmt: skip
    return status, (folder / "out.txt").read_text()


def test_no_file_of_a_child_exceeds_the_limit_not_even_its_output(tmp_path: Path) -> None:
    status, _ = run(tmp_path, "while True: print('x' * 100)", max_file_bytes=5000)
    assert status
    assert (tmp_path / "out.txt").stat().st_size == 5000


def test_a_child_leaves_no_core_file_and_is_ended_first_when_memory_runs_out(tmp_path: Path) -> None:
    code = "import resource; print(resource.getrlimit(resource.RLIMIT_CORE), open('/proc/self/oom_score_adj').read())"
    assert run(tmp_path, code) == (0, "(0, 0) 500\n\n")


@pytest.mark.parametrize(("code", "status"), [("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", -9)])
def test_a_command_ends_as_without_a_supervisor(tmp_path: Path, code: str, status: int) -> None:
    assert run(tmp_path, code)[0] == status


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    with (tmp_path / "out.txt").open("wb") as out:
        assert Processes().run(["/absent"], folder=tmp_path, environ={}, out=out, err=out, timeout_s=30.0) == 127
    assert (tmp_path / "out.txt").read_text() == "/absent: No such file or directory\n"


@pytest.mark.parametrize(
    ("status", "text"),
    [(3, "exit status 3"), (-9, "killed by SIGKILL"), (139, "killed by SIGSEGV"), (200, "exit status 200")],
)
def test_ending_names_signals(status: int, text: str) -> None:
    assert ending(status) == text


@pytest.mark.crash
def test_what_a_command_leaves_running_is_ended_with_it(tmp_path: Path) -> None:
    beat = f"import time\nwhile True:\n    open({str(tmp_path / 'beat')!r}, 'a').write('.')\n    time.sleep(0.02)"
    code = f"""
from tests.samples import sampled
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {beat!r}])
while not os.path.exists({str(tmp_path / "beat")!r}):
    time.sleep(0.01)
"""
    assert run(tmp_path, code)[0] == 0
    before = (tmp_path / "beat").stat().st_size
    time.sleep(0.3)
    assert (tmp_path / "beat").stat().st_size == before


def test_ended_children_do_not_disturb_a_task_that_stops(tmp_path: Path) -> None:
    processes, failed = Processes(), list[BaseException]()

    def work(number: int) -> None:
        try:
            with (tmp_path / f"out-{number}").open("wb") as out:
                for _ in range(50):
                    processes.run(["/bin/true"], folder=tmp_path, environ={}, out=out, err=out, timeout_s=30.0)
        except KeyboardInterrupt:
            pass
        except BaseException as error:  # noqa: BLE001 - what a thread ends with is what is tested
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    processes.stop_all()
    for thread in threads:
        thread.join(10)
    assert not failed
    assert not any(thread.is_alive() for thread in threads)
