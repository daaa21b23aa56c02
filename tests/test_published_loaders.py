"""verify-published --loaders: the loaders of a branch's own record open what was downloaded.

The loader is a stand-in in this process, which computes what a right one does, or something else.
"""

import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from packager.cli.main import app
from packager.cli.published_view import print_published as print_report
from packager.cli.published_view import published_json as report_json
from packager.errors import AuditError, LoaderError, LoaderUnavailableError, MachineError
from packager.model.decoder import Decoder, forward
from packager.model.packing import CheckpointReader
from packager.prove import verify
from packager.prove.environments import RuntimeContext
from packager.prove.loaders import LoaderSpec
from packager.prove.probes import ProbeJob, ProbeResult
from packager.publish.branches import publish_branches
from packager.publish.published import PublishedReport, verify_published
from packager.publish.targets.local import LocalTarget
from packager.system.files import sha256_file
from tests import tiny_recipe
from tests.checkpoints import edit_json
from tests.publish_fixtures import describe
from tests.test_house_rules import loaded_by
from tests.tiny_recipe import ACT_ORDER, BRANCHES, MAIN, REPOSITORY, THREE_BITS

pytestmark = pytest.mark.slow

EXTRA = {"loaders.required": ["transformers"], "loaders.if_available": ["exllamav2"]}
PROVENANCE = "provenance.json"


def a_bit_off(logits: torch.Tensor) -> torch.Tensor:
    return logits * 1.0001


@dataclass
class StandIn:
    """A loader in this process.

    Attributes:
        opened: the bits of what it opened, in order.
        outputs: the folders that it was given for its files.
        change: what it does to the right logits.
        missing: why its environment cannot be made.
    """

    opened: list[int] = field(default_factory=list)
    outputs: list[Path] = field(default_factory=list)
    change: Callable[[torch.Tensor], torch.Tensor] = a_bit_off
    missing: str = ""

    def ensure(self, spec: LoaderSpec, *_: object) -> Path:
        if self.missing:
            raise LoaderUnavailableError(f"the packages of {spec.name} could not be installed", why=self.missing)
        return Path("python")

    def probe(self, _: LoaderSpec, __: Path, jobs: Sequence[ProbeJob], *___: object) -> list[ProbeResult | LoaderError]:
        return [self._open(job) for job in jobs]

    def _open(self, job: ProbeJob) -> ProbeResult:
        config = json.loads((job.model_dir / "config.json").read_text())
        bits = config["quantization_config"]["bits"]
        self.opened.append(bits)
        self.outputs.append(job.output_dir)
        reader = CheckpointReader(job.model_dir, bits)
        decoder = Decoder(job.model_dir, reader, device=torch.device(job.device), dtype=torch.float32)
        generated = []
        for prompt in job.prompts:
            ids = list(prompt)
            for _ in range(job.max_new_tokens):
                ids.append(int(logits_of(decoder, [ids])[0, -1].argmax()))
            generated.append(tuple(ids[len(prompt) :]))
        weights = sorted(job.model_dir.glob("*.safetensors"))
        return ProbeResult(
            logits=self.change(logits_of(decoder, job.input_ids)).numpy().astype(np.float32),
            generated=tuple(generated),
            versions={"python": "3"},
            device=job.device,
            dtype="float32",
            kernel="ours",
            weights_sha256={path.name: sha256_file(path) for path in weights},
            load_s=0.0,
            forward_s=0.0,
            peak_memory_bytes=0,
        )


def logits_of(decoder: Decoder, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    ids = torch.tensor(rows)
    (state,) = forward(decoder, ids, rows=len(rows))
    return decoder.logits(state)


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    made = StandIn()
    install(made, monkeypatch)
    return made


def install(loader: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "ensure_environment", loader.ensure)
    monkeypatch.setattr(verify, "run_probes", loader.probe)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The local target's root, with a tiny release that the loaders have opened."""
    folder = tmp_path_factory.mktemp("release")
    with pytest.MonkeyPatch.context() as patch:
        install(StandIn(), patch)
        recipe = tiny_recipe.write_all(folder, EXTRA)
        tiny_recipe.build(recipe, folder / "dist")
        tiny_recipe.publish(recipe, folder / "dist")
    return folder / "dist"


class LoadersFixture:
    """A copy of the release that may be changed."""

    def __init__(self, dist: Path) -> None:
        self.dist, self.lines = dist, list[str]()
        self.where = tiny_recipe.hub_folder(dist)

    def verify(self, *branches: str) -> PublishedReport:
        context = RuntimeContext(cache=self.dist / "cache", scratch=self.dist, environ={}, log=self.lines.append)
        target = LocalTarget(self.dist / "hub", REPOSITORY)
        return verify_published(target, self.lines.append, branches=branches, loaders=context, device="cpu")

    def change(self, branch: str, change: Callable[[Path], object]) -> None:
        """Publish a branch after an edit of its folder."""
        folder = tiny_recipe.workspace(self.dist).folder(branch)
        change(folder)
        publish_branches([describe(folder, branch)], LocalTarget(self.dist / "hub", REPOSITORY), self.lines.append)

    def run(self, *options: str) -> tuple[int, str, str]:
        where = [str(self.where), "--loaders", "--device", "cpu", "--cache", str(self.dist / "cache")]
        result = CliRunner().invoke(app, ["verify-published", *where, *options], prog_name="packager")
        return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def fixture(published: Path, tmp_path: Path) -> LoadersFixture:
    shutil.copytree(published, tmp_path / "dist", symlinks=True)
    return LoadersFixture(tmp_path / "dist")


def loaders_of(report: PublishedReport) -> Mapping[str, dict[str, str]]:
    return {proof.branch: {record.loader: record.status for record in proof.loaders} for proof in report.branches}


def test_the_loaders_of_the_record_open_what_was_downloaded(fixture: LoadersFixture, loader: StandIn) -> None:
    report = fixture.verify()
    assert report.findings == ()
    assert (report.full, loader.opened) == (True, [4, 4, 3])
    assert loaders_of(report) == {branch: {"transformers": "passed", "exllamav2": "not run"} for branch in BRANCHES}
    for proof in report.branches:
        passed, absent = proof.loaders
        assert (passed.required, passed.tokens_generated) == (True, passed.tokens_equal)
        assert passed.tokens_generated > 0
        assert passed.relative_error == pytest.approx(0.0001, rel=0.01)
        refused = proof.branch == "three-bits"
        reason = "refused by rule, says the branch's record" if refused else "needs CUDA, and this run computes on cpu"
        assert reason in absent.reason


def test_the_files_of_loaders_lie_in_the_scratch_folder_and_are_deleted(
    fixture: LoadersFixture, loader: StandIn
) -> None:
    fixture.verify()
    assert len(set(loader.outputs)) == 3
    for folder in loader.outputs:
        assert folder.is_relative_to(fixture.dist)
        assert not folder.exists()
    assert list(fixture.dist.glob("packager-*")) == []


def test_a_gpu_that_is_absent_is_reported_before_anything_is_read(
    fixture: LoadersFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = fixture.run("--device", "cuda")
    assert (code, out) == (MachineError.exit_code, "")
    assert "no CUDA GPU" in err
    assert MAIN not in err


def test_people_and_programs_see_it(fixture: LoadersFixture, loader: StandIn) -> None:
    report = fixture.verify(MAIN)
    stream = io.StringIO()
    print_report(report, Console(file=stream, width=200))
    assert "transformers: passed, relative error 0.00010, top-1 1.000" in stream.getvalue()
    assert "exllamav2: not run, needs CUDA, and this run computes on cpu" in stream.getvalue()
    (branch,) = json.loads(json.dumps(report_json(report)))["branches"]
    assert [found["status"] for found in branch["loaders"]] == ["passed", "not run"]
    assert len(loader.opened) == 1


def test_a_loader_that_computes_something_else_exits_with_8(fixture: LoadersFixture, loader: StandIn) -> None:
    loader.change = lambda logits: logits.roll(1, dims=-1)
    code, out, _ = fixture.run("--branch", THREE_BITS, "--format", "json")
    assert code == LoaderError.exit_code
    (branch,) = json.loads(out)["branches"]
    (finding,) = branch["findings"]
    assert (finding["branch"], finding["rule"], finding["file"]) == (THREE_BITS, "loader-failed", "transformers")
    assert "logits differ by" in finding["message"]
    assert not branch["passed"]


def test_weights_of_another_digest_than_the_record_s_fail(fixture: LoadersFixture, loader: StandIn) -> None:
    right: Any = loader.probe

    def other(*arguments: object) -> list[ProbeResult]:
        return [replace(result, weights_sha256={"model.safetensors": "0"}) for result in right(*arguments)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "probe", other)
        install(loader, patch)
        (finding,) = fixture.verify(MAIN).findings
    assert "it read other weights than were packed" in finding.message


def test_a_required_loader_that_cannot_run_here_is_said_and_no_failure(
    fixture: LoadersFixture, loader: StandIn
) -> None:
    loader.missing = "no index can be reached"
    code, out, _ = fixture.run("--format", "json")
    assert code == 0
    for branch in json.loads(out)["branches"]:
        (finding,) = branch["findings"]
        assert (finding["rule"], finding["severity"]) == ("loader-not-run", "warning")
        assert "no index can be reached" in finding["message"]


def test_a_branch_that_is_wrong_is_not_opened(fixture: LoadersFixture, loader: StandIn) -> None:
    fixture.change(ACT_ORDER, lambda folder: (folder / "LICENSE.txt").write_text("Do what you want.\n"))
    code, out, _ = fixture.run("--format", "json")
    assert code == AuditError.exit_code
    assert loader.opened == [4, 3]
    broken = json.loads(out)["branches"][1]
    assert {finding["rule"] for finding in broken["findings"]} == {"remote-file-changed", "loader-not-run"}
    assert {found["reason"] for found in broken["loaders"]} == {"the branch failed the checks before this one"}


def test_whatever_a_record_names_as_a_loader(fixture: LoadersFixture, loader: StandIn) -> None:
    record = {"loader": "x\x1b[2J", "required": True, "status": "passed"}
    names = [{**record, "loader": f"../{number}\n" * 100} for number in range(1000)]
    again = {**record, "loader": "transformers"}

    def edit(folder: Path) -> None:
        loaders = [record, *names, again, {**again, "required": False}]
        edit_json(folder, PROVENANCE, lambda found: found.update(loaders=loaders))

    fixture.change(MAIN, edit)
    report = fixture.verify(MAIN)
    assert loader.opened == [4]
    (proof,) = report.branches
    assert [(found.status, found.required) for found in proof.loaders] == [("passed", True)] + [("not run", True)] * 5
    assert all(found.loader.isprintable() for found in proof.loaders)
    assert report.passed, "what this version does not know is no failure"


def test_a_record_without_loaders_is_said(fixture: LoadersFixture, loader: StandIn) -> None:
    fixture.change(MAIN, lambda folder: edit_json(folder, PROVENANCE, lambda found: found.update(loaders=[])))
    (finding,) = fixture.verify(MAIN).findings
    assert (finding.rule, finding.severity) == ("loader-not-run", "warning")
    assert loader.opened == []


@pytest.mark.parametrize("error", [ValueError("odd\x1b"), KeyError("model.embed_tokens"), RuntimeError("shape")])
def test_a_forward_that_fails_is_the_branch_s_fault(
    fixture: LoadersFixture, loader: StandIn, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(verify, "reference", fail)
    report = fixture.verify(MAIN, THREE_BITS)
    assert {finding.rule for finding in report.findings} == {"loader-failed"}
    assert all("our own forward of it failed: " in finding.message for finding in report.findings)
    assert all(finding.message.isprintable() for finding in report.findings)
    assert report.loader_failed
    assert loader.opened == []


def test_a_gpu_without_memory_is_this_machine_s(
    fixture: LoadersFixture, loader: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried")

    monkeypatch.setattr(verify, "reference", fail)
    with pytest.raises(MachineError, match="the GPU's memory is exhausted"):
        fixture.verify(MAIN)
    assert loader.opened == []


def test_without_the_build_extra_it_says_what_is_missing_first(
    fixture: LoadersFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = metadata.version

    def without_torch(name: str) -> str:
        if name == "torch":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", without_torch)
    code, out, err = fixture.run()
    assert (code, out) == (MachineError.exit_code, "")
    assert "missing: torch" in err
    assert "gptq-packager[build]" in err


@pytest.mark.parametrize("options", [[], ["--full"]])
def test_without_loaders_it_needs_no_torch(fixture: LoadersFixture, options: list[str]) -> None:
    modules, output = loaded_by("verify-published", str(fixture.where), *options)
    assert not modules & {"torch", "transformers", "datasets", "tokenizers", "huggingface_hub"}
    assert "passed" in output


def test_a_record_has_no_loader_of_another_package_run(
    fixture: LoadersFixture, loader: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody may have written the record: it imports no package, installed or not."""
    record = {"loader": "plugin:acme", "required": True, "status": "passed"}
    fixture.change(MAIN, lambda folder: edit_json(folder, PROVENANCE, lambda found: found.update(loaders=[record])))
    monkeypatch.setattr("packager.prove.other_loader.entry_points", lambda **_: pytest.fail("packages are searched"))
    report = fixture.verify(MAIN)
    ((found,),) = [proof.loaders for proof in report.branches]
    assert (found.loader, found.status) == ("plugin:acme", "not run")
    assert found.reason.startswith("it is another package's, which is run for a recipe of yours")
    assert loader.opened == []
