"""Publishing to servers with the Hub's protocol that others wrote: each difference seen in one of them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest

from packager.errors import PublishError
from packager.publish.branches import publish_branches
from packager.publish.hub_collection import HubCollection
from packager.publish.rollback import RollbackRequest, rollback
from packager.publish.targets import HeadMovedError
from packager.publish.targets.hub import HubTarget
from packager.publish.targets.repository_per_variant import RepositoryPerVariant
from tests.card_fixtures import minimal_receipts, minimal_recipe
from tests.loopback_hub import Account, Call, Dialect, LoopbackHub
from tests.publish_fixtures import REPOSITORY, VARIANT, describe, git, log_in, trees
from tests.samples import sampled
from tests.test_hub_target import RIVAL, TOKEN, HubFixture

pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")
COMMIT = "POST /api/models/.*/commit/"
Open = Callable[..., HubFixture]


@pytest.fixture
def open_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Give a function that opens a server with the named differences."""
    tokens = {TOKEN: Account("somebody"), RIVAL: Account("rival", orgs=("somebody",))}
    opened: list[LoopbackHub] = []

    def open_one(**differences: bool) -> HubFixture:
        hub = LoopbackHub(tmp_path / "hub", tokens=tokens, dialect=Dialect(**differences)).__enter__()
        opened.append(hub)
        log_in(hub, TOKEN, monkeypatch)
        monkeypatch.setattr("time.sleep", lambda _: None)
        return HubFixture(tmp_path, hub)

    yield open_one
    for hub in opened:
        hub.__exit__()


def rival(_: Call) -> None:
    """Commit to the variant's branch as another person."""
    api = huggingface_hub.HfApi(token=RIVAL)
    api.upload_file(path_or_fileobj=b"rival", path_in_repo="NEWS.md", repo_id=REPOSITORY, revision=VARIANT)


def names(fixture: HubFixture, branch: str) -> set[str]:
    return set(git("ls-tree", "-r", "--name-only", branch, cwd=fixture.path).split()) - {".gitattributes"}


@pytest.mark.parametrize("differences", sampled([{"error_codes": False}, {"null_lists": True}], {"null_lists": True}))
def test_a_repository_is_made_where_its_absence_has_no_code_or_its_lists_are_null(
    open_hub: Open, differences: dict[str, bool]
) -> None:
    fixture = open_hub(**differences)
    fixture.publish()
    fixture.assert_published()
    assert fixture.publish().plan.changing == ()


def test_a_server_with_longer_commit_ids_is_refused_before_the_first_byte(open_hub: Open) -> None:
    fixture = open_hub(wide_ids=True)
    huggingface_hub.HfApi(token=TOKEN).create_repo(REPOSITORY)
    assert "its commit ids have 64 digits" in fixture.refused()
    assert fixture.uploaded_bytes() == 0


@pytest.mark.slow
def test_files_are_restored_where_they_cannot_be_described_by_name_and_a_copy_needs_a_size(open_hub: Open) -> None:
    fixture = open_hub(paths_info=False, copy_needs_size=True)
    first = fixture.publish().outcomes[0].commit or ""
    fixture.publish(fixture.change(VARIANT, model_safetensors=b"worse" * 1000, config_json=b'{"worse": 1}'))
    target, uploaded = fixture.target(), fixture.uploaded_bytes()
    made = target.restore(VARIANT, first, parent=target.history(VARIANT)[0].commit, message="Back")
    assert target.read_back(made) == target.read_back(first)
    assert fixture.uploaded_bytes() == uploaded


@pytest.mark.slow
def test_a_small_file_that_is_sent_otherwise_than_listed_is_not_restored(open_hub: Open) -> None:
    fixture = open_hub()
    first = fixture.publish().outcomes[0].commit or ""
    head = fixture.publish(fixture.change(VARIANT, config_json=b'{"worse": 1}')).outcomes[0].commit or ""
    fixture.hub.fault("GET /.*/resolve/.*/config.json", "answer", status=200, body=b"[]")
    with pytest.raises(PublishError, match="is not the file that the server lists"):
        fixture.target().restore(VARIANT, first, parent=head, message="Back")


def test_a_commit_that_came_between_gets_its_files_back(open_hub: Open) -> None:
    fixture = open_hub(compares_parents=False)
    fixture.publish()
    better = fixture.change(VARIANT, config_json=b'{"better": 1}')
    fixture.hub.fault(COMMIT, "call", call=rival)
    with pytest.raises(HeadMovedError) as caught:
        fixture.publish(better)
    text = str(caught.value)
    assert "by rival came between, and this server does not compare the parent of a commit" in text
    assert "the branch has the files of" in text
    assert git("show", f"{VARIANT}:NEWS.md", cwd=fixture.path) == "rival"
    assert git("show", f"{VARIANT}:config.json", cwd=fixture.path) == "{}"
    # A person looks at the branch, and publishes again.
    fixture.publish(better)
    fixture.contents = better
    fixture.assert_published()


@pytest.mark.slow
def test_putting_back_ends_where_commits_keep_coming_between(open_hub: Open) -> None:
    fixture = open_hub(compares_parents=False)
    fixture.publish()
    counter = iter(range(99))

    def busy(_: Call) -> None:
        fixture.hub.commit(REPOSITORY, {"NEWS.md": str(next(counter)).encode()}, branch=VARIANT)

    better = fixture.change(VARIANT, config_json=b'{"better": 1}')
    fixture.hub.fault(COMMIT, "call", times=99, call=busy)
    fixture.hub.requests.clear()
    with pytest.raises(HeadMovedError, match=r"putting back the files of \w+ failed"):
        fixture.publish(better)
    assert len([request for request in fixture.hub.requests if "/commit/" in request.path]) == 2


@pytest.mark.slow
def test_skipped_equal_files_leave_no_half_branch_and_a_second_run_makes_it_no_worse(open_hub: Open) -> None:
    """Both branches have an equal README.md: this server stores it on the first branch only."""
    fixture = open_hub(stores_equal_files=False)
    text = fixture.refused()
    assert "main was published and does not hold the files that were built" in text
    assert "README.md: missing" in text
    assert "its files were removed again" in text
    assert names(fixture, "main") == set()
    assert names(fixture, VARIANT) == set(fixture.contents[1].files)
    before = trees(fixture.path)
    fixture.refused()
    assert trees(fixture.path) == before


@pytest.mark.slow
def test_a_new_branch_that_was_stored_wrongly_is_deleted_again(open_hub: Open) -> None:
    fixture = open_hub()
    fixture.publish(fixture.contents[:1])
    fixture.hub.dialect = Dialect(stores_equal_files=False)
    text = fixture.refused()
    assert f"{VARIANT} was published and does not hold the files that were built" in text
    assert "the new branch was deleted again" in text
    assert VARIANT not in fixture.target().read_branches()
    fixture.hub.dialect = Dialect()
    fixture.publish()
    fixture.assert_published()
    with pytest.raises(HeadMovedError):
        fixture.target().remove(VARIANT, head="0" * 40)
    fixture.assert_published()


def test_a_branch_that_was_stored_wrongly_gets_its_earlier_files_back(open_hub: Open) -> None:
    fixture = open_hub()
    fixture.publish()
    before = trees(fixture.path)
    fixture.change("main", config_json=b'{"new": 1}')
    fixture.hub.dialect = Dialect(stores_equal_files=False)
    better = fixture.change(VARIANT, config_json=b"{}", tokenizer_json=b"{}")
    (fixture.dist / "main" / "tokenizer.json").write_bytes(b"{}")
    better = [describe(fixture.dist / content.branch, content.branch) for content in better]
    with pytest.raises(PublishError) as caught:
        fixture.publish(better)
    assert "main was published and does not hold" in str(caught.value)
    assert "tokenizer.json: missing" in str(caught.value)
    assert f"the branch has the files of {before_head(fixture)} again" in str(caught.value)
    assert trees(fixture.path)["main"] == before["main"]
    # The new head counts as the commit whose files it has.
    report = rollback(fixture.target(), RollbackRequest(branches=("main",)), print)
    assert [entry.action for entry in report.plan.branches] == ["done"]


def before_head(fixture: HubFixture) -> str:
    """Return the commit of main before the wrong one and the one that took it back."""
    return git("rev-parse", "main~2", cwd=fixture.path).strip()[:12]


@pytest.mark.slow
def test_a_commit_that_changes_nothing_is_an_error_that_names_the_cause(open_hub: Open) -> None:
    fixture = open_hub()
    fixture.publish()
    fixture.hub.dialect = Dialect(stores_equal_files=False)
    (fixture.dist / "main" / "new.json").write_bytes(b"{}")
    git_names = names(fixture, "main")
    (fixture.dist / VARIANT / "new.json").write_bytes(b"{}")
    with pytest.raises(PublishError, match="the server made no commit") as caught:
        fixture.publish([describe(fixture.dist / branch, branch) for branch in ("main", VARIANT)])
    assert "some servers skip a file that is equal on another branch" in str(caught.value)
    assert names(fixture, "main") == git_names


def record(fixture: HubFixture) -> None:
    """Give each folder a provenance.json of its files."""
    for content in fixture.contents:
        (content.folder / "provenance.json").unlink(missing_ok=True)
        (receipt, *_) = minimal_receipts(minimal_recipe())
        files = describe(content.folder, content.branch).files
        record = receipt.model_copy(update={"branch": content.branch, "files": dict(files)})
        (content.folder / "provenance.json").write_text(record.model_dump_json())
    fixture.contents = [describe(content.folder, content.branch) for content in fixture.contents]


@pytest.mark.slow
def test_a_commit_without_its_description_is_known_by_its_record(open_hub: Open) -> None:
    fixture = open_hub(descriptions=False)

    record(fixture)
    fixture.publish()
    assert any("the server drops the descriptions of commits" in line for line in fixture.lines)
    target = fixture.target()
    assert {state.foreign_author for state in target.read_branches().values()} == {""}
    assert target.history("main")[0].author == ""
    fixture.hub.commit(REPOSITORY, {"config.json": b"[]"}, branch=VARIANT)
    assert target.read_branches()[VARIANT].foreign_author == "somebody-else", "as long as before, but other content"
    # A release is rolled back, although no trailer names this program.
    fixture.change("main", config_json=b'{"new": 1}')
    record(fixture)
    fixture.publish()
    report = rollback(fixture.target(), RollbackRequest(branches=("main",)), print)
    assert [entry.action for entry in report.plan.branches] == ["restore"]
    assert git("show", "main:config.json", cwd=fixture.path) == "{}"


def test_a_record_that_fits_proves_nothing_where_descriptions_are_kept(open_hub: Open) -> None:
    """A writer can replace the files and the record together."""
    fixture = open_hub()
    record(fixture)
    fixture.publish()
    fixture.hub.dialect = Dialect(descriptions=False)
    fixture.change("main", config_json=b'{"new": 1}')
    record(fixture)
    fixture.publish()
    assert fixture.target().read_branches()["main"].foreign_author == "somebody"
    assert [entry.author for entry in fixture.target().history("main")][:2] == ["somebody", ""]


def publish_with_collection(fixture: HubFixture) -> HubCollection:
    places = {"main": "somebody/M", VARIANT: "somebody/M-v"}
    target = RepositoryPerVariant({branch: HubTarget(place) for branch, place in places.items()})
    collection = HubCollection(
        "M GPTQ", list(places.values()), private=False, log=fixture.lines.append, retry_limit_s=1
    )
    publish_branches(fixture.contents, target, fixture.lines.append, final_steps=[collection])
    return collection


def test_a_server_without_collections_is_published_to_and_the_collection_left_out(open_hub: Open) -> None:
    fixture = open_hub(collections=False)
    publish_with_collection(fixture)
    assert any("left out, this server has no collections (501)" in line for line in fixture.lines)
    assert HubTarget("somebody/M-v").read_branches()["main"].files


@pytest.mark.parametrize(
    "request_line", sampled(["POST /api/collections", "GET /api/collections"], "POST /api/collections")
)
def test_a_collection_that_fails_is_an_error_after_everything_is_published(open_hub: Open, request_line: str) -> None:
    fixture = open_hub()
    fault = fixture.hub.fault(request_line, "status", status=403, message="No collections for you", times=99)
    if request_line.startswith("GET"):
        publish_with_collection(fixture)  # the listing is not needed to make it
        fault.times = 0
    else:
        with pytest.raises(PublishError) as caught:
            publish_with_collection(fixture)
        assert "every branch is published, but a final step failed" in str(caught.value)
        assert "No collections for you" in str(caught.value)
        fault.times = 0
    assert HubTarget("somebody/M").read_branches()["main"].files
    publish_with_collection(fixture)
    collections = json.loads((fixture.hub.root / "collections.json").read_text())
    assert [len(entry["items"]) for entry in collections.values()] == [2]
