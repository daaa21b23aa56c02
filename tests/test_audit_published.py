"""`audit` of a branch where it lies: on the loopback Hub, on a git remote, on servers that lie."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from typer.testing import CliRunner

from packager.cli.main import app
from packager.errors import AuditError, PublishError, UsageError
from packager.prove.audit import AuditReport
from packager.prove.audit import audit as audit_folder
from packager.publish.published import audited
from packager.publish.published.audited import MOST_WEIGHTS_BYTES, AuditedBranch
from packager.publish.targets import BranchState, StoredFile, Target
from packager.publish.targets.branch_address import BranchAddress, branch_address
from tests.audit_cases import WEIGHTS, Q, assign, declare, write_13b_block
from tests.checkpoints import Checkpoint, edit_json, edit_tensors
from tests.known_models import describe_known
from tests.loopback_hub import Answer, LoopbackHub
from tests.publish_fixtures import heads
from tests.test_published import MAIN, REPOSITORY, VARIANT
from tests.test_published import PublishedFixture as LocalFixture
from tests.test_published_targets import TOKEN, PublishedFixture, count_served, hub, on_git, on_hub

__all__ = ["hub", "on_git", "on_hub"]
pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")
audit_published = partial(audited.audit_published, describe=describe_known)
COMMIT = "a" * 40


class FolderTarget:
    """A repository whose one branch is a folder, with false listings and answers on request."""

    where = "hub:tester/tiny-GPTQ"

    def __init__(self, folder: Path, *, states_digests: bool = True) -> None:
        self.folder = folder
        self.states_digests = states_digests
        self.lies: dict[str, StoredFile] = {}
        self.answer: Callable[[str, int, bytes], bytes] = lambda _name, _start, data: data
        self.reads: list[tuple[str, int, int]] = []

    def read_branches(self) -> Mapping[str, BranchState]:
        return {MAIN: BranchState(commit=COMMIT, foreign_author="", files=self.read_back(COMMIT))}

    def read_back(self, commit: str) -> Mapping[str, StoredFile]:
        assert commit == COMMIT
        files = {path.relative_to(self.folder).as_posix(): path for path in self.folder.rglob("*") if path.is_file()}
        return {
            name: StoredFile(
                size_bytes=path.stat().st_size,
                sha256=hashlib.sha256(path.read_bytes()).hexdigest() if self.states_digests else "",
                blob_id="0" * 40,
            )
            for name, path in files.items()
        } | self.lies

    def read_bytes(self, commit: str, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        assert commit == COMMIT
        with (self.folder / name).open("rb") as stream:
            stream.seek(start)
            data = self.answer(name, start, stream.read(-1 if size is None else size))
        self.reads.append((name, start, len(data)))
        return data

    def export(self, commit: str, name: str, path: Path) -> None:
        path.write_bytes(self.read_bytes(commit, name))

    def read_of_weights(self) -> int:
        return sum(size for name, _, size in self.reads if name.endswith(".safetensors"))


def look(target: FolderTarget, **options: Any) -> AuditedBranch:
    return audit_published(cast(Target, target), MAIN, lambda _: None, **options)


def codes(report: AuditReport) -> set[str]:
    return {finding.code for finding in report.findings}


def packager(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="packager")
    return result.exit_code, result.stdout, result.stderr


# What is found is what the folder's audit finds


@pytest.mark.parametrize("full", [False, True], ids=["", "full"])
def test_sound_branches_of_the_hub_have_no_finding(on_hub: PublishedFixture, full: bool) -> None:
    on_hub.publish()
    for branch in (MAIN, VARIANT):
        found = audit_published(on_hub.remote(), branch, on_hub.lines.append, full=full)
        assert found.report.findings == ()
        assert (found.branch, found.commit) == (branch, heads(on_hub.bare)[branch])
        facts = found.report.facts
        assert (facts.linears_read, facts.num_linears, facts.tensors_checked) == (14, 14, 63)
        assert (found.weights_bytes == facts.weights_bytes) is full


@pytest.mark.slow
def test_sound_branches_of_a_git_remote_have_no_finding(on_git: PublishedFixture) -> None:
    on_git.publish()
    for branch in (MAIN, VARIANT):
        found = audit_published(on_git.remote(), branch, on_git.lines.append)
        assert found.report.findings == ()
        assert audit_published(on_git.remote(), branch, on_git.lines.append, full=True).report.findings == ()


Change = Callable[[Path], object]
BROKEN: list[tuple[str, Checkpoint, Change]] = [
    ("g-idx-order", Checkpoint(desc_act=True), lambda folder: declare(folder, desc_act=False)),
    ("scale-not-finite", Checkpoint(), lambda folder: edit_tensors(folder, assign(f"{Q}.scales", (1, 1), np.nan))),
    ("linear-incomplete", Checkpoint(), lambda folder: edit_tensors(folder, lambda found: found.pop(f"{Q}.g_idx"))),
    ("safetensors-damaged", Checkpoint(), lambda folder: (folder / WEIGHTS).write_bytes(b"\xff" * 100)),
    ("file-missing", Checkpoint(), lambda folder: (folder / "config.json").unlink()),
    ("weights-stray", Checkpoint(), lambda folder: (folder / "pytorch_model.bin").write_bytes(b"x")),
    ("provenance-file-changed", Checkpoint(), lambda folder: (folder / "LICENSE.txt").write_text("other text, 36")),
    ("provenance-file-changed", Checkpoint(), lambda folder: edit_tensors(
        folder, lambda found: found["lm_head.weight"].__imul__(2)
    )),
    ("lfs-pointer", Checkpoint(), lambda folder: (folder / WEIGHTS).write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
    )),
    ("empty-file", Checkpoint(), lambda folder: (folder / "special_tokens_map.json").write_bytes(b"")),
    ("text-damaged", Checkpoint(), lambda folder: (folder / "README.md").write_bytes(b" " * 3_000_000)),
    ("secret", Checkpoint(), lambda folder: (folder / "NOTICE").write_text("hf_" + "Abc123" * 6)),
    ("picture-damaged", Checkpoint(), lambda folder: (folder / "quality-dark.png").write_bytes(b"GIF89a")),
]  # fmt: skip


@pytest.mark.parametrize(("code", "checkpoint", "change"), BROKEN, ids=[code for code, _, _ in BROKEN])
def test_a_broken_branch_has_the_findings_of_its_folder(
    tmp_path: Path, code: str, checkpoint: Checkpoint, change: Change
) -> None:
    folder = checkpoint.write(tmp_path / "branch")
    target = FolderTarget(folder)
    assert look(target).report.findings == ()
    change(folder)
    expected = audit_folder(folder, describe=describe_known)
    assert code in codes(expected)
    for options in ({}, {"full": True}, {"complete": False}):
        found = look(target, **options).report
        wanted = audit_folder(folder, describe=describe_known, complete=options.get("complete", True))
        assert {(each.code, each.where) for each in found.findings} == {
            (each.code, each.where) for each in wanted.findings
        }  # fmt: skip


def test_a_repository_that_states_no_digests_is_said_to_be_unhashed(tmp_path: Path) -> None:
    target = FolderTarget(Checkpoint().write(tmp_path / "branch"), states_digests=False)
    (finding,) = look(target).report.findings
    assert (finding.code, finding.severity) == ("file-unhashed", "warning")
    assert {finding.where, *finding.also} == {WEIGHTS, "tokenizer.model"}
    assert look(target, full=True).report.findings == ()


class LargeTarget(FolderTarget):
    """The large branch, without the hashing of its holes."""

    def read_back(self, commit: str) -> Mapping[str, StoredFile]:
        assert commit == COMMIT
        return {
            path.name: StoredFile(size_bytes=path.stat().st_size, sha256="0" * 64) for path in self.folder.iterdir()
        }


def test_less_than_2_mb_of_a_weights_file_travel(tmp_path: Path) -> None:
    target = LargeTarget(write_13b_block(tmp_path / "branch"))
    found = look(target, complete=False)
    assert codes(found.report) == {"file-missing", "quantize-config-missing", "generation-config-missing"}
    assert found.report.facts.weights_bytes > 780_000_000
    assert found.report.facts.linears_read == 7
    assert found.weights_bytes < MOST_WEIGHTS_BYTES
    assert target.read_of_weights() <= found.weights_bytes + 8, "the length of the header is read first"
    with (target.folder / WEIGHTS).open("r+b") as stream:  # the last value of the last g_idx
        position = next(start for name, start, size in target.reads if size == 4 * 13824) + 4 * 13823
        stream.seek(position)
        stream.write(b"\x00\x00\x00\x00")
    assert "g-idx-order" in codes(look(target, complete=False).report)


def test_of_the_hub_only_a_part_of_the_weights_travels(
    on_hub: PublishedFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pad(found: dict[str, Any]) -> None:
        found["model.embed_tokens.weight"] = np.zeros((60_000, 64), np.float16)

    edit_tensors(on_hub.main, pad)
    on_hub.publish(MAIN)
    served = count_served(monkeypatch)
    found = audit_published(on_hub.remote(), MAIN, on_hub.lines.append)
    documents = sum(path.stat().st_size for path in on_hub.main.iterdir() if path.name != WEIGHTS)
    assert found.report.facts.weights_bytes > 7_000_000
    assert "tensor-shape" in codes(found.report)
    assert served["content"] < documents + 100_000


# Refusals


def test_a_branch_that_is_no_model_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "config.json").write_text("{}")
    target = FolderTarget(tmp_path)
    assert codes(look(target).report) == {"folder-not-a-model"}
    assert target.reads == []
    target.lies = {f"{number}.json": StoredFile(size_bytes=1, sha256="0") for number in range(10_001)}
    assert codes(look(target).report) == {"folder-overfull"}
    assert target.reads == []


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere"], UsageError.exit_code, "there is no folder nowhere"),
        (["hub:a/b@"], UsageError.exit_code, "the branch after @ is empty"),
        ([".", "--full"], UsageError.exit_code, "--full is for repositories"),
        (["hub:a/b/c/d"], PublishError.exit_code, "this is not the address of a repository"),
        (["https://me:secret@example.org/x"], PublishError.exit_code, "contains credentials"),
    ],
)
def test_a_wrong_address_is_named(arguments: list[str], code: int, words: str) -> None:
    found, out, err = packager("audit", *arguments)
    assert (found, out) == (code, "")
    assert words in err
    assert "secret" not in err


ENDPOINT = {"HF_ENDPOINT": "https://hub.example.org/base"}


@pytest.mark.parametrize(
    ("text", "environ", "repository", "branch"),
    [
        ("hub:a/b", {}, "hub:a/b", "main"),
        ("hub:a/b@x-1", {}, "hub:a/b", "x-1"),
        ("git@host:a/b", {}, "git@host:a/b", "main"),
        ("git@host:a/b.git@feat/x", {}, "git@host:a/b.git", "feat/x"),
        ("ssh://git@host/a/b@x", {}, "ssh://git@host/a/b", "x"),
        ("https://example.org/a/b.git@x", {}, "https://example.org/a/b.git", "x"),
        ("file:///srv/a.git@x", {}, "file:///srv/a.git", "x"),
        ("https://huggingface.co/a/b", {}, "hub:a/b", "main"),
        ("https://huggingface.co/a/b.git", {}, "hub:a/b", "main"),
        ("https://huggingface.co/a/b/tree/gptq-4bit-32g-actorder_True", {}, "hub:a/b", "gptq-4bit-32g-actorder_True"),
        ("https://huggingface.co/a/b@x", {}, "hub:a/b", "x"),
        ("https://huggingface.co/a/b", ENDPOINT, "https://huggingface.co/a/b", "main"),
        ("https://hub.example.org/base/a/b/tree/x/", ENDPOINT, "hub:a/b", "x"),
        ("https://huggingface.co.example.org/a/b", {}, "https://huggingface.co.example.org/a/b", "main"),
    ],
)
def test_an_address_names_a_repository_and_a_branch(
    text: str, environ: dict[str, str], repository: str, branch: str
) -> None:
    assert branch_address(text, environ) == BranchAddress(repository=repository, branch=branch)


@pytest.mark.parametrize("text", ["", "models/x", "/srv/x", ".", "C:x", "a@b"])
def test_a_folder_is_no_address(text: str) -> None:
    assert branch_address(text, {}) is None


def test_the_folder_of_a_repository_and_a_branch_are_an_address(tmp_path: Path) -> None:
    folder = tmp_path / "x@y"
    folder.mkdir()
    with pytest.raises(UsageError, match="x@y is no git repository"):
        branch_address(f"{folder}@main", {})
    (folder / ".git").mkdir()
    assert branch_address(f"{folder}@a@b", {}) == BranchAddress(repository=str(folder), branch="a@b")
    assert branch_address(f"{folder}@main", {}) == BranchAddress(repository=str(folder), branch=MAIN)
    assert branch_address(str(folder), {}) is None
    with pytest.raises(UsageError, match="the branch after @ is empty"):
        branch_address(f"{folder}@", {})


def test_a_page_and_a_branch_that_disagree_are_refused() -> None:
    with pytest.raises(UsageError, match="the page is that of x, not of y"):
        branch_address("https://huggingface.co/a/b/tree/x@y", {})


# The command


def test_the_command_audits_a_branch_of_the_hub(on_hub: PublishedFixture) -> None:
    for branch, made in ((MAIN, Checkpoint()), (VARIANT, Checkpoint())):
        edit_json(on_hub.folders[branch], "config.json", lambda config: config.update(_name_or_path="/srv/x"))
        assert made
    on_hub.publish()
    code, out, _ = packager("audit", f"hub:{REPOSITORY}@{VARIANT}", "--format", "json")
    result = json.loads(out)
    assert code == AuditError.exit_code
    assert (result["repository"], result["branch"]) == (on_hub.remote().where, VARIANT)
    assert result["commit"] == heads(on_hub.bare)[VARIANT]
    assert 0 < result["weights_bytes_read"] < result["facts"]["weights_bytes"]
    assert {"local-path", "provenance-file-changed"} <= {finding["code"] for finding in result["findings"]}
    code, out, _ = packager("audit", f"hub:{REPOSITORY}@{VARIANT}")
    assert f"values of 14 linears; {VARIANT} of " in out
    code, out, err = packager("audit", f"hub:{REPOSITORY}@nothing")
    assert (code, out) == (PublishError.exit_code, "")
    assert "there is no branch nothing" in err
    assert VARIANT in err


def test_the_command_audits_a_branch_of_a_folder(tmp_path: Path) -> None:
    made = LocalFixture(tmp_path)
    made.publish()
    folder = made.root / "models" / REPOSITORY
    code, out, err = packager("audit", f"{folder}@{VARIANT}", "--format", "json")
    result = json.loads(out)
    assert (code, result["branch"], result["findings"]) == (0, VARIANT, []), err
    assert result["commit"] == heads(folder)[VARIANT]
    code, out, err = packager("audit", f"{folder}@nothing")
    assert (code, out, "there is no branch nothing" in err) == (PublishError.exit_code, "", True)


# Hostile servers


def test_a_header_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    folder = Checkpoint().write(tmp_path / "branch")
    size = 5_000_000_000
    (folder / WEIGHTS).write_bytes((size - 100).to_bytes(8, "little") + b"{" * 1000)
    target = FolderTarget(folder)
    target.lies = {WEIGHTS: StoredFile(size_bytes=size, sha256="0" * 64)}
    found = look(target, complete=False)
    assert codes(found.report) == {"header-too-large"}
    assert target.read_of_weights() == 8


@pytest.mark.parametrize("sent", [0, 3], ids=["nothing", "less"])
def test_a_part_of_another_length_is_no_value(tmp_path: Path, sent: int) -> None:
    target = FolderTarget(Checkpoint().write(tmp_path / "branch"))
    target.answer = lambda _name, start, data: data[:sent] if start else data
    found = look(target)
    (finding,) = found.report.findings
    assert (finding.code, finding.severity) == ("weights-unread", "warning")
    assert f"{sent} bytes came of {WEIGHTS} where" in finding.message
    assert found.report.facts.linears_read == 0


LIES = {
    "file-name": {"../../outside": StoredFile(size_bytes=1, sha256="0")},
    "not-a-regular-file": {"config.json": StoredFile(size_bytes=5)},
    "header-too-large": {WEIGHTS: StoredFile(size_bytes=10**400, sha256="0")},
    "text-damaged": {"README.md": StoredFile(size_bytes=10**400, sha256="0")},
}


@pytest.mark.parametrize("code", LIES)
def test_a_listing_that_lies_is_a_finding(tmp_path: Path, code: str) -> None:
    target = FolderTarget(Checkpoint().write(tmp_path / "branch"))
    target.lies = LIES[code]
    before = set(tmp_path.rglob("*"))
    assert code in codes(look(target).report)
    assert set(tmp_path.rglob("*")) == before
    assert max(size for _, _, size in target.reads) < 100_000


def whole_files(call: Any) -> None:
    del call.headers["Range"]


def moved(answer: Answer) -> Answer:
    """Send the right bytes as another part of the file."""
    headers = {**answer.headers, "Content-Range": answer.headers.get("Content-Range", "").replace("bytes ", "bytes 9")}
    return replace(answer, headers=headers)


@pytest.mark.parametrize(
    "fault", [{"kind": "call", "call": whole_files}, {"kind": "change", "change": moved}], ids=["whole", "moved"]
)
def test_a_server_that_sends_another_part_gives_no_values(
    on_hub: PublishedFixture, hub: LoopbackHub, fault: dict[str, Any]
) -> None:
    on_hub.publish(MAIN)
    hub.fault(r"GET .*(safetensors|/_lfs/)", times=10_000, **fault)
    found = audit_published(on_hub.remote(), MAIN, on_hub.lines.append)
    (finding,) = found.report.findings
    assert finding.code == "weights-unread"
    assert "does not send the part of the file that was asked for" in finding.message
    assert found.report.facts.linears_read == 0


@contextmanager
def another_server(data: bytes) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Serve one file, in parts too, and record the headers of each request."""
    seen: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append({name.lower(): value for name, value in self.headers.items()})
            first, last = (int(number) for number in self.headers["Range"].removeprefix("bytes=").split("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            self.send_header("Content-Length", str(last + 1 - first))
            self.end_headers()
            self.wfile.write(data[first : last + 1])

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_redirect_to_another_host_gets_no_token(on_hub: PublishedFixture, hub: LoopbackHub) -> None:
    on_hub.publish(MAIN)
    repository = hub.repository(REPOSITORY)
    repository.settings = {**repository.settings, "private": True}
    with another_server((on_hub.main / WEIGHTS).read_bytes()) as (address, seen):
        elsewhere = Answer(302, b"", {"Location": f"{address}/{WEIGHTS}"})
        hub.fault(rf"GET .*/resolve/.*{WEIGHTS}", "change", times=10_000, change=lambda _: elsewhere)
        found = audit_published(on_hub.remote(), MAIN, on_hub.lines.append)
    assert found.report.findings == ()
    assert found.report.facts.linears_read == 14
    assert len(seen) > 14
    assert not any("authorization" in headers or TOKEN in str(headers) for headers in seen)
