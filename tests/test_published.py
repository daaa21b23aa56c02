"""Verifying published repositories: real git repositories, one thing wrong with each, and hostile ones."""

import io
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from packager.cli.main import app
from packager.cli.published_view import print_published as print_report
from packager.cli.published_view import published_json as report_json
from packager.errors import AuditError, MachineError, PublishError
from packager.prove import audit
from packager.publish import targets
from packager.publish.branches import publish_branches
from packager.publish.published import PUBLISHED_RULES, PublishedReport, verify_published
from packager.publish.published.card import is_rounded, table_rows
from packager.publish.targets import StoredFile
from packager.publish.targets.local import LocalTarget
from tests import checkpoints
from tests.audit_cases import FIRST_SHARD, INDEX, WEIGHTS, Q
from tests.checkpoints import Checkpoint, edit_json, edit_tensors, edit_text, seal
from tests.golden_files import check_golden
from tests.publish_fixtures import describe
from tests.samples import sampled

REPOSITORY = "tester/tiny-GPTQ"
MAIN, VARIANT = "main", "gptq-4bit-16g-actorder_True"
MADE: Mapping[str, Checkpoint] = {MAIN: Checkpoint(), VARIANT: Checkpoint(group_size=16, desc_act=True, shards=2)}
HEADINGS = "| Branch | Bits | Group Size | Act Order (desc_act) | Damp % | GPTQ Dataset | Seq Len | File Size |"
PROVENANCE, README = "provenance.json", "README.md"


def row(branch: str, folder: Path) -> str:
    """Return a branch's row of the card's table."""
    parameters = json.loads((folder / PROVENANCE).read_text())
    used, size = parameters["parameters"], parameters["weights_bytes"] / 1000
    figures = f"{used['bits']} | {used['group_size']} | {used['desc_act']} | 0.01 | text \\| more | 32 | {size:.2f} kB"
    return f"| [`{branch}`](https://huggingface.co/{REPOSITORY}/tree/{branch}) | {figures} |"


def reseal(folder: Path, branch: str) -> None:
    """Let provenance.json be that of the files as they are."""
    made = MADE[branch]
    used = {key: getattr(made, key) for key in ("bits", "group_size", "desc_act", "sym")}
    seal(folder, parameters={**used, "damp_percent": 0.01})
    edit_json(folder, PROVENANCE, lambda record: record.update(branch=branch, model=made.description()))


_READ: dict[str, bytes] = {}


class Target(LocalTarget):
    """A local target with a false listing on request; it records the largest read."""

    lie: Callable[[dict[str, StoredFile]], object] = staticmethod(lambda files: files)
    fails: str = ""
    largest: int = 0
    exported: int = 0

    def read_back(self, commit: str) -> Mapping[str, StoredFile]:
        files = dict(super().read_back(commit))
        self.lie(files)
        return files

    def read_bytes(self, commit: str, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        if name == self.fails:
            raise PublishError("gone", where=self.where, why="404")
        # A blob's id is that of its content, and most tests publish the same files: each is read once.
        if (blob_id := self._stored(commit, name)) not in _READ:
            _READ[blob_id] = super().read_bytes(commit, name)
        data = _READ[blob_id][start:][:size]
        self.largest = max(self.largest, len(data))
        return data

    def export(self, commit: str, name: str, path: Path) -> None:
        self.exported += 1
        super().export(commit, name, path)


class PublishedFixture:
    """Two branches that can be damaged before they are published, made unless the folder has them already."""

    def __init__(self, tmp_path: Path) -> None:
        self.root = tmp_path / "hub"
        self.target = Target(self.root, REPOSITORY)
        self.folders = {branch: tmp_path / "dist" / branch for branch in MADE}
        self.lines: list[str] = []
        if self.main.exists():
            return
        for branch, made in MADE.items():
            reseal(made.write(self.folders[branch]), branch)
        self.write_card()

    @property
    def main(self) -> Path:
        return self.folders[MAIN]

    def write_card(self, change: Callable[[str], str] = lambda table: table) -> None:
        """Put the table into main's card."""
        rows = [row(branch, folder) for branch, folder in self.folders.items()]
        table = "\n".join([HEADINGS, "| ---" * 8 + " |", *rows, "", "More words.", ""])
        (self.main / README).write_text(checkpoints.README + "\n" + change(table), encoding="utf-8")
        reseal(self.main, MAIN)

    def publish(self, *branches: str) -> None:
        self.publish_to(self.target, *branches)

    def publish_to(self, target: targets.Target, *branches: str) -> None:
        contents = [describe(self.folders[branch], branch) for branch in branches or self.folders]
        publish_branches(contents, target, self.lines.append)
        self.lines.clear()

    def verify(self, *branches: str, full: bool = False) -> PublishedReport:
        return verify_published(self.target, self.lines.append, branches=branches, full=full)

    def found(self, *branches: str, full: bool = False) -> dict[str, list[str]]:
        """Return the messages by rule."""
        messages: dict[str, list[str]] = {}
        for finding in self.verify(*branches, full=full).findings:
            text = f"{finding.branch}: {finding.file}: {finding.message}"
            messages.setdefault(finding.rule, []).append(text)
        return messages


@pytest.fixture
def fixture(tmp_path: Path) -> PublishedFixture:
    return PublishedFixture(tmp_path)


def test_what_was_published_is_proven_and_how_deep_is_said(fixture: PublishedFixture) -> None:
    fixture.publish()
    report = fixture.verify()
    assert report.findings == ()
    assert [proof.branch for proof in report.branches] == [MAIN, VARIANT]
    for proof, documents in zip(report.branches, (3, 4), strict=True):
        assert proof.num_read == documents, "config.json, quantize_config.json, README.md, the index"
        assert proof.num_stated + proof.num_read == proof.num_files - 1, "all but provenance.json itself"
        assert proof.num_tensors == 63
    assert report.card_rows == 2
    assert fixture.lines == ["main: ok", f"{VARIANT}: ok"]
    assert fixture.target.exported == 0


def test_full_reads_every_byte_and_audits(
    fixture: PublishedFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    fixture.publish()
    report = fixture.verify(full=True)
    assert report.findings == ()
    for proof in report.branches:
        assert (proof.num_stated, proof.num_read, proof.audited) == (0, proof.num_files - 1, True)
    assert any(line.startswith(f"  {VARIANT}: {FIRST_SHARD}, ") for line in fixture.lines)
    left = [path.name for path in scratch.iterdir() if not path.name.startswith("packager-view-")]
    assert left == [], "what was downloaded is deleted"


def forget_sha256(files: dict[str, StoredFile]) -> None:
    for name, file in files.items():
        files[name] = replace(file, sha256="")


def test_what_has_no_stated_sha256_is_read(fixture: PublishedFixture) -> None:
    fixture.publish()
    fixture.target.lie = forget_sha256
    report = fixture.verify()
    assert report.findings == ()
    assert [(proof.num_stated, proof.num_read) for proof in report.branches] == [
        (0, proof.num_files - 1) for proof in report.branches
    ]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A change, and the only rule that it may break."""

    rule: str
    change: Callable[[PublishedFixture], object]
    words: str = ""


def append(fixture: PublishedFixture, branch: str, name: str, data: bytes = b" ") -> None:
    path = fixture.folders[branch] / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes((path.read_bytes() if path.exists() else b"") + data)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def damage(change: Callable[[Path], object], branch: str = MAIN) -> Callable[[PublishedFixture], object]:
    """Change a branch's files, and let the record be that of the files as they are then."""

    def changed(fixture: PublishedFixture) -> None:
        change(fixture.folders[branch])
        reseal(fixture.folders[branch], branch)

    return changed


def record(change: Callable[[dict[str, Any]], object], branch: str = VARIANT) -> Callable[[PublishedFixture], object]:
    return lambda fixture: edit_json(fixture.folders[branch], PROVENANCE, change)


def table(old: str, new: str) -> Callable[[PublishedFixture], object]:
    def replaced(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    return lambda fixture: fixture.write_card(replaced)


def declare(folder: Path, **values: object) -> None:
    edit_json(folder, "config.json", lambda config: config["quantization_config"].update(values))
    edit_json(folder, "quantize_config.json", lambda config: config.update(values))


def header(data: bytes) -> Callable[[PublishedFixture], object]:
    """Let main's weights begin with these bytes."""
    return damage(lambda folder: (folder / WEIGHTS).write_bytes(data))


ANOTHER_ROW = "| `gptq-8bit-128g` | 8 | 128 | False | 0.01 | x | 32 | 1 kB |\n\nMore words."
CASES = [
    Case(rule="remote-file-missing", change=lambda f: (f.main / "USE_POLICY.md").unlink(), words="USE_POLICY"),
    Case(rule="remote-file-unlisted", change=lambda f: append(f, VARIANT, "notes/x.txt"), words="notes/x.txt"),
    Case(rule="remote-file-changed", change=lambda f: append(f, VARIANT, "tokenizer.json"), words="bytes"),
    Case(rule="remote-file-changed", change=lambda f: flip(f.main / WEIGHTS), words="the sha256"),
    Case(rule="remote-file-changed", change=lambda f: flip(f.main / README), words="its content has"),
    Case(rule="repository-differs", change=record(lambda found: found.update(repository="a/tiny-GPTQ")), words='"a/t'),
    Case(rule="repository-differs", change=record(lambda found: found.update(repository="iny-GPTQ"))),
    Case(rule="branch-differs", change=record(lambda found: found.update(branch=MAIN)), words="branch is gptq-4"),
    Case(rule="branch-differs", change=record(lambda found: found["parameters"].update(desc_act=False)),
         words="differ from those in the name gptq-4bit-16g-actorder_True"),
    Case(rule="branch-differs", change=record(lambda found: found["parameters"].update(act_order="static")),
         words="differ from those in the name gptq-4bit-16g-actorder_True"),
    Case(rule="provenance-invalid", change=record(lambda found: found.pop("files")), words="provenance.json: files"),
    Case(rule="provenance-missing", change=lambda f: (f.folders[VARIANT] / PROVENANCE).unlink()),
    Case(rule="provenance-disagrees", change=record(lambda found: found.update(weights_bytes=5)), words="weights_byte"),
    Case(rule="provenance-disagrees", change=record(lambda found: found["linears"].pop()), words="13 linears"),
    Case(rule="linear-shape", change=damage(lambda folder: declare(folder, group_size=64)), words="group_size 64"),
    Case(rule="linear-shape", change=damage(lambda folder: declare(folder, bits=8)), words="8 bits"),
    Case(rule="index-disagrees", change=damage(
        lambda folder: edit_json(folder, INDEX, lambda found: found["weight_map"].pop(f"{Q}.g_idx")), VARIANT
    )),
    Case(rule="linear-incomplete", change=damage(
        lambda folder: edit_tensors(folder, lambda found: found.pop(f"{Q}.g_idx"))
    ), words="lacks g_idx"),
    Case(rule="file-missing", change=damage(lambda folder: (folder / "tokenizer_config.json").unlink())),
    Case(rule="weights-stray", change=damage(lambda folder: (folder / "pytorch_model.bin").write_bytes(b"x"))),
    Case(rule="quantize-config-disagrees", change=damage(
        lambda folder: edit_json(folder, "quantize_config.json", lambda found: found.update(damp_percent=0.1))
    )),
    Case(rule="safetensors-damaged", change=header(b"\xff" * 100), words="header claims"),
    Case(rule="safetensors-damaged", change=header(b"\x08"), words="header claims 8 bytes, the file has 1"),
    Case(rule="safetensors-damaged", change=header((2).to_bytes(8, "little") + b"{}more"), words="describes 0 bytes"),
    Case(rule="safetensors-damaged", change=header((9 * 10**5).to_bytes(8, "little") + b"[" * 9 * 10**5)),
    Case(rule="header-too-large", change=header((65 * 10**6).to_bytes(8, "little") + b" " * 65 * 10**6)),
    Case(rule="text-damaged", change=damage(
        lambda folder: (folder / README).write_bytes((folder / README).read_bytes() + b" " * 8 * 10**6)
    ), words="too many"),
    Case(rule="card-table", change=table(HEADINGS, "no headings"), words="no table"),
    Case(rule="card-table", change=table("\n\nMore words.", "\n" + ANOTHER_ROW.replace("gptq-8bit-128g", MAIN)),
         words="two rows for main"),
    Case(rule="card-branch-missing", change=table("\n\nMore words.", "\n" + ANOTHER_ROW), words="gptq-8bit-128g"),
    Case(rule="card-branch-unlisted", change=table(f"[`{VARIANT}`]", "[`main2`]"), words=VARIANT),
    Case(rule="card-figure", change=table("| 4 | 32 |", "| 3 | 32 |"), words="main: Bits is \"3\", its record has 4"),
    Case(rule="card-figure", change=table("| 4 | 16 |", "| 4 | -1 (whole row) |"), words="Group Size"),
    Case(rule="card-figure", change=table("| True |", "| False |"), words="Act Order"),
    Case(rule="card-figure", change=table("| True |", "| True (static) |"), words="Act Order"),
    Case(rule="card-figure", change=table("| 32 | False | 0.01 |", "| 32 | False | 0.1 |"), words="Damp %"),
    Case(rule="card-figure", change=table("more | 32 | ", "more | 33 | "), words="Seq Len"),
    Case(rule="card-figure", change=table("kB |", "MB |"), words="File Size"),
]  # fmt: skip


def fixture_with(tmp_path: Path, made: Checkpoint, branch: str, **parameters: Any) -> PublishedFixture:
    """A repository with main and one other branch, whose record has these parameters."""
    fixture = PublishedFixture(tmp_path)
    folder = made.write(tmp_path / "made" / branch)
    seal(folder, parameters={"bits": 4, "group_size": 16, "sym": True, "damp_percent": 0.01, **parameters})
    edit_json(folder, PROVENANCE, lambda record: record.update(branch=branch, model=made.description()))
    fixture.folders = {MAIN: fixture.main, branch: folder}
    fixture.write_card()
    return fixture


@pytest.mark.parametrize("act_order", ["static", "group"])
def test_a_branch_of_another_act_order_is_as_its_record_says(tmp_path: Path, act_order: str) -> None:
    name = f"gptq-4bit-16g-actorder_{act_order}"
    made = Checkpoint(group_size=16, static_groups=act_order == "static")
    fixture = fixture_with(tmp_path, made, name, desc_act=False, act_order=act_order)
    fixture.publish()
    (message,) = fixture.found()["card-figure"]
    assert f'{name}: Act Order (desc_act) is "False", its record has "False ({act_order})"' in message
    fixture.write_card(lambda text: text.replace("| 16 | False |", f"| 16 | False ({act_order}) |"))
    fixture.publish()
    assert fixture.found(full=True) == {}


@pytest.mark.parametrize("branch", [VARIANT, "gptq-4bit-16g-actorder_static"])
def test_a_branch_that_an_earlier_version_made_with_static_groups_verifies(tmp_path: Path, branch: str) -> None:
    """Its configs and its record say desc_act true, as did its name unless the recipe gave one."""
    made = Checkpoint(group_size=16, desc_act=True, static_groups=True)
    fixture = fixture_with(tmp_path, made, branch, desc_act=True, static_groups=True)
    fixture.publish()
    assert fixture.found(full=True) == {}


# One case of each rule that is not the audit's own, and one of the audit's.
OF_AUDIT = {*audit.AUDIT_RULES, "header-too-large"}
SOME = [case for case in {case.rule: case for case in CASES}.values() if case.rule not in OF_AUDIT]


@pytest.mark.parametrize(
    "case",
    sampled(CASES, *SOME, next(case for case in CASES if case.rule in audit.AUDIT_RULES)),
    ids=lambda case: f"{case.rule} {case.words}".strip(),
)
def test_one_thing_that_is_wrong_is_found(fixture: PublishedFixture, case: Case) -> None:
    case.change(fixture)
    fixture.publish()
    found = fixture.found()
    assert any(case.words in message for message in found[case.rule])
    assert fixture.target.largest <= 10_000_000
    thorough = fixture.found(full=True)
    assert case.rule in thorough or case.rule in ("header-too-large", "text-damaged"), "limits are for bounded reads"
    if case.rule not in ("header-too-large", "text-damaged"):
        assert any(case.words in message for message in thorough[case.rule])


def test_every_rule_of_its_own_has_a_case() -> None:
    elsewhere = {"branch-unreadable", "files-too-many", "main-missing", "digest-unknown"}
    elsewhere |= {"address-differs", "head-foreign", "branch-copied"}  # tests/test_published_targets.py
    elsewhere |= {"loader-failed", "loader-not-run"}  # tests/test_published_loaders.py
    elsewhere |= {"signature-missing", "signature-invalid", "statement-differs"}  # tests/test_signatures.py
    elsewhere |= {"release-differs", "release-old", "release-unsigned", "release-set-back"}  # likewise
    assert (
        set(PUBLISHED_RULES) - set(audit.AUDIT_RULES)
        == {case.rule for case in CASES if case.rule not in audit.AUDIT_RULES} | elsewhere
    )


def test_a_branch_that_somebody_else_made_has_no_record(fixture: PublishedFixture, tmp_path: Path) -> None:
    fixture.publish()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.txt").write_text("x")
    publish_branches([describe(tmp_path / "other", "other")], fixture.target, fixture.lines.append)
    assert list(fixture.found()) == ["provenance-missing"]
    assert fixture.found(MAIN, VARIANT) == {}


def test_only_the_branches_named_are_looked_at(fixture: PublishedFixture) -> None:
    edit_json(fixture.main, PROVENANCE, lambda found: found.update(branch="other"))
    fixture.publish()
    report = fixture.verify(VARIANT)
    assert (report.findings, report.card_rows) == ((), None)
    assert list(fixture.found(MAIN)) == ["branch-differs"]
    with pytest.raises(PublishError, match="there is no branch mian"):
        fixture.verify("mian")


def test_without_main_the_others_are_looked_at(fixture: PublishedFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    fixture.publish()
    states = {branch: state for branch, state in fixture.target.read_branches().items() if branch != MAIN}
    monkeypatch.setattr(fixture.target, "read_branches", lambda: states)
    assert list(fixture.found()) == ["main-missing"]


def alone(fixture: PublishedFixture, branch: str) -> LocalTarget:
    """Publish a variant into a repository of its own, and return that."""
    repository = REPOSITORY if branch == MAIN else f"{REPOSITORY}-{branch}"
    fixture.write_card(lambda table: table.replace("| Branch |", "| Variant |"))
    folder = fixture.folders[branch]
    if branch != MAIN:
        (folder / README).write_bytes((fixture.main / README).read_bytes())
        reseal(folder, branch)
    edit_json(folder, PROVENANCE, lambda found: found.update(layout="repos"))
    target = LocalTarget(fixture.root, repository)
    publish_branches([replace(describe(folder, branch), branch=MAIN)], target, fixture.lines.append)
    return target


@pytest.mark.parametrize("branch", [MAIN, VARIANT])
def test_a_variant_in_a_repository_of_its_own_lies_on_its_main(fixture: PublishedFixture, branch: str) -> None:
    report = verify_published(alone(fixture, branch), fixture.lines.append)
    assert report.findings == ()
    assert report.card_rows == 1, "the other rows lead to other repositories"


def test_a_variant_in_another_s_repository_is_found(fixture: PublishedFixture) -> None:
    target = alone(fixture, VARIANT)
    misplaced = LocalTarget(fixture.root, f"{REPOSITORY}-another")
    shutil.move(fixture.root / "models" / f"{REPOSITORY}-{VARIANT}", fixture.root / "models" / f"{REPOSITORY}-another")
    (finding,) = verify_published(misplaced, fixture.lines.append).findings
    assert finding.rule == "repository-differs"
    assert target.where != misplaced.where


def test_nothing_published_cannot_be_read(fixture: PublishedFixture) -> None:
    with pytest.raises(PublishError, match="nothing is published here"):
        fixture.verify()


def test_one_branch_that_cannot_be_read_is_a_finding_all_of_them_are_an_error(fixture: PublishedFixture) -> None:
    fixture.publish()
    fixture.target.fails = INDEX
    assert fixture.found() == {"branch-unreadable": [f"{VARIANT}: : gone: 404"]}
    fixture.target.fails = PROVENANCE
    with pytest.raises(PublishError, match="gone"):
        fixture.verify()


def test_full_needs_space(fixture: PublishedFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    fixture.publish()
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(MachineError, match="no space for main") as caught:
        fixture.verify(full=True)
    assert "TMPDIR" in caught.value.hint


# Hostile repositories


HUGE = StoredFile(size_bytes=10**40, sha256="0" * 64)
LIES: Sequence[tuple[str, Callable[[dict[str, StoredFile]], object]]] = [
    ("file-name", lambda files: files.update({"../../../outside": HUGE})),
    ("file-name", lambda files: files.update({"/absolute": HUGE})),
    ("file-name", lambda files: files.update({".git/config": HUGE})),
    ("file-name", lambda files: files.update({"a\nb": HUGE})),
    ("remote-file-unlisted", lambda files: files.update({"x.bin": replace(HUGE, size_bytes=10**4200)})),
    ("file-name", lambda files: files.update({f"{WEIGHTS}/x": HUGE, f"{FIRST_SHARD}/x": HUGE})),
    ("not-a-regular-file", lambda files: files.update({"config.json": StoredFile(size_bytes=0)})),
    ("not-a-regular-file", lambda files: files.update({"x": StoredFile(size_bytes=-5, sha256="0")})),
    ("remote-file-changed", lambda files: files.update({"tokenizer.json": HUGE})),
    ("remote-file-unlisted", lambda files: files.update({"more.safetensors": HUGE})),
    ("provenance-invalid", lambda files: files.update({PROVENANCE: HUGE})),
    ("remote-file-missing", lambda files: [files.pop(name) for name in list(files) if name != PROVENANCE]),
    ("files-too-many", lambda files: files.update({f"{n}.json": HUGE for n in range(20_000)})),
]


@pytest.mark.parametrize(("rule", "lie"), sampled(LIES, *LIES[::3], LIES[-1]))
def test_a_listing_that_lies_is_a_finding(
    fixture: PublishedFixture, rule: str, lie: Callable[[dict[str, StoredFile]], object], tmp_path: Path
) -> None:
    fixture.publish()
    fixture.target.lie = lie
    before = {path for path in tmp_path.rglob("*") if ".git" not in path.parts}
    report = fixture.verify()
    assert rule in {finding.rule for finding in report.findings}
    assert len(report.findings) < 200
    print_report(report, Console(file=io.StringIO(), width=120))
    json.dumps(report_json(report))
    assert fixture.target.largest <= 10_000_000
    assert {path for path in tmp_path.rglob("*") if ".git" not in path.parts} == before


FAKE = {"size_bytes": 10**40, "sha256": "x" * 1000}
RECORDS: Sequence[tuple[str, bytes | Callable[[dict[str, Any]], object]]] = [
    ("provenance-invalid", b"\xff\xfe{}"),
    ("provenance-invalid", b'{"files": ' * 50_000),
    ("provenance-invalid", b"[]"),
    ("provenance-invalid", b" " * 8_000_001),
    ("provenance-invalid", b'{"linears": [' + b"1," * 600_000 + b"1]}"),
    ("provenance-invalid", lambda found: found["files"].update(x={"size_bytes": 1, "sha256": 1})),
    ("remote-file-missing", lambda found: found["files"].update({"../../etc/passwd": FAKE})),
    ("remote-file-missing", lambda found: found["files"].update(
        {f"../{n}\x1b[2J": FAKE for n in range(5000)}
    )),
    ("remote-file-changed", lambda found: found["files"]["config.json"].update(size_bytes=10**4000)),
    ("remote-file-changed", lambda found: found["files"]["Notice"].update(sha256="\x1b[2J" * 10**4)),
    ("branch-differs", lambda found: found.update(branch="\n[bold]" * 10**5)),
    ("provenance-disagrees", lambda found: found["parameters"].update(bits=10**60)),
    ("provenance-disagrees", lambda found: found.update(weights_bytes=-(10**60))),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "content"), sampled(RECORDS, *RECORDS[::4]), ids=range(len(RECORDS)))
def test_a_hostile_record_is_a_finding(
    fixture: PublishedFixture, rule: str, content: bytes | Callable[[dict[str, Any]], object]
) -> None:
    path = fixture.folders[VARIANT] / PROVENANCE
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        document = json.loads(path.read_text())
        content(document)
        sys.set_int_max_str_digits(0)
        path.write_text(json.dumps(document))
        sys.set_int_max_str_digits(sys.int_info.default_max_str_digits)
    fixture.publish()
    for report in (fixture.verify(), fixture.verify(full=True)):
        assert rule in {finding.rule for finding in report.findings}
        for finding in report.findings:
            assert (finding.file + finding.message).isprintable()
            assert len(finding.message) < 2000
        assert len(report.findings) < 100
        print_report(report, Console(file=io.StringIO(), width=120))
        json.dumps(report_json(report))


def test_an_index_that_names_files_outside_reads_none(fixture: PublishedFixture) -> None:
    folder = fixture.folders[VARIANT]
    edit_json(folder, INDEX, lambda found: found["weight_map"].update({f"{Q}.g_idx": "../../../../etc/passwd"}))
    reseal(folder, VARIANT)
    fixture.publish()
    assert "index-shard-missing" in fixture.found()


def claim_size(fixture: PublishedFixture, name: str, size_bytes: int, sha256: str | None = None) -> None:
    """Let the record of main and the listing agree on a size that a file does not have."""
    edit_json(fixture.main, PROVENANCE, lambda found: found["files"][name].update(size_bytes=size_bytes))
    fixture.target.lie = lambda files: files
    fixture.publish()

    def lie(files: dict[str, StoredFile]) -> None:
        stored = files[name]
        files[name] = replace(stored, size_bytes=size_bytes, sha256=stored.sha256 if sha256 is None else sha256)

    fixture.target.lie = lie


@pytest.mark.parametrize("size_bytes", [10**9, 1 << 62])
def test_what_no_sha256_is_stated_of_is_read_up_to_a_limit(fixture: PublishedFixture, size_bytes: int) -> None:
    claim_size(fixture, "tokenizer.json", size_bytes, sha256="")
    fixture.target.fails = "tokenizer.json"
    assert "digest-unknown" in fixture.found(MAIN)


@pytest.mark.parametrize("data", [b"", b"\x08", b"\xff" * 8, (10**18).to_bytes(8, "little")])
def test_a_header_of_any_length_in_a_file_of_any_size_is_read_in_bounds(fixture: PublishedFixture, data: bytes) -> None:
    (fixture.main / WEIGHTS).write_bytes(data + b" " * 100 if data else data)
    reseal(fixture.main, MAIN)
    claim_size(fixture, WEIGHTS, 10**30)
    assert "header-too-large" in fixture.found(MAIN)
    claim_size(fixture, WEIGHTS, 1 << 40)
    fixture.target.largest = 0
    report = fixture.verify(MAIN)
    assert {finding.rule for finding in report.findings} & {"header-too-large", "safetensors-damaged"}
    assert fixture.target.largest < 100_000


def test_names_of_branches_are_shown_without_what_a_terminal_obeys(
    fixture: PublishedFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixture.publish()
    states = fixture.target.read_branches()
    odd = "\x9b2J[red]\u202e"  # git allows all of that
    monkeypatch.setattr(fixture.target, "read_branches", lambda: {**states, odd: states[VARIANT]})
    report = fixture.verify(full=True)
    stream = io.StringIO()
    print_report(report, Console(file=stream, width=200))
    shown = f"{stream.getvalue()}{fixture.lines}"
    assert "\\x9b2J[red]\\u202e" in shown
    assert all(line.isprintable() for line in (*stream.getvalue().splitlines(), *fixture.lines))
    assert json.loads(json.dumps(report_json(report)))["branches"][2]["branch"] == odd
    with pytest.raises(PublishError) as caught:
        fixture.verify("mian")
    assert all(line.isprintable() for line in str(caught.value).splitlines())


def test_a_listed_size_that_no_file_system_can_have(fixture: PublishedFixture) -> None:
    claim_size(fixture, WEIGHTS, 1 << 62)
    assert "header-too-large" in fixture.found(MAIN)


@pytest.mark.parametrize(
    "text",
    ["", "|", "|\n" * 10**5, HEADINGS, HEADINGS * 1000, f"{HEADINGS}\n|\n{'|' * 10**6}", "\\|" * 10**5 + "|"],
)
def test_a_hostile_card_has_no_table(text: str) -> None:
    assert list(table_rows(text)) == []


def test_a_table_of_many_rows_is_cut(fixture: PublishedFixture) -> None:
    rows = "\n".join(ANOTHER_ROW.partition("\n")[0].replace("128g", str(n)) for n in range(15_000))
    fixture.write_card(lambda table: table.replace("\n\nMore words.", f"\n{rows}\n"))
    fixture.publish()
    (messages,) = fixture.found().values()
    assert len(messages) == 21
    assert messages[-1].endswith("and 978 more findings of this rule")


def test_sizes_are_compared_as_they_are_rounded() -> None:
    assert is_rounded("7.26 GB", 7_255_000_000)
    assert is_rounded("7.26 GB", 7_264_999_999)
    assert not is_rounded("7.26 GB", 7_254_000_000)
    assert not is_rounded("7.26", 7)
    assert is_rounded("17 B", 17)


# What people and programs see


def test_the_words(fixture: PublishedFixture, update_golden: bool) -> None:
    flip(fixture.folders[VARIANT] / "tokenizer.model")
    fixture.write_card(lambda table: table.replace("| 4 | 16 |", "| 4 | 128 |"))
    fixture.publish()
    report = fixture.verify()
    proofs = tuple(replace(proof, commit=letter * 40) for proof, letter in zip(report.branches, "ab", strict=True))
    stream = io.StringIO()
    shown = replace(report, where="https://huggingface.co/tester/tiny-GPTQ", branches=proofs)
    print_report(shown, Console(file=stream, width=200))
    text = "".join(f"{line.rstrip()}\n" for line in stream.getvalue().splitlines())
    check_golden("cli/verify_published.txt", text, update_golden)


def packager(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="packager")
    return result.exit_code, result.stdout, result.stderr


def test_the_command_s_exit_codes(fixture: PublishedFixture, tmp_path: Path) -> None:
    fixture.publish()
    where = fixture.root / "models" / REPOSITORY
    code, out, err = packager("verify-published", where, "--full")
    assert code == 0
    assert "passed  0 errors, 0 warnings; the table of main's card: 2 rows compared" in out
    assert f"  {VARIANT}: config.json, " in err
    edit_text(fixture.main, README, "tiny", "tinier")
    fixture.publish(MAIN)
    code, out, _ = packager("verify-published", where, "--format", "json", "-q")
    result = json.loads(out)
    assert (code, result["passed"]) == (AuditError.exit_code, False)
    (finding,) = result["branches"][0]["findings"]
    assert (finding["branch"], finding["file"], finding["rule"]) == (MAIN, README, "remote-file-changed")
    assert result["branches"][1]["passed"]
    code, out, err = packager("verify-published", where, "--branch", "nobody")
    assert (code, out) == (PublishError.exit_code, "")
    assert packager("verify-published", tmp_path / "nowhere")[0] == PublishError.exit_code
