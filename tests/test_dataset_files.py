"""Splits of datasets on the Hub: by the rules of the library datasets, only from the Hub, and without a network."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError

from packager.errors import CalibrationError, SourceError
from packager.inputs.dataset_files import download_split, splits_of
from tests.hub_http import httpx

COMMIT = "b08601e04326c79dfdd32d625aee71d232d685c3"
CONFIGS: dict[str, Any] = {
    "license": "cc-by-sa-3.0",
    "configs": [
        {
            "config_name": "raw",
            "data_files": [
                {"split": "train", "path": "raw/train-*"},
                {"split": "test", "path": ["raw/test-*.parquet", "more/**"]},
            ],
        },
        {"config_name": "small", "data_files": "small/*.jsonl", "default": True},
        {"config_name": "folder", "data_dir": "by_name"},
    ],
}
NAMES = (
    "README.md", "raw/train-00000-of-00002.parquet", "raw/train-00001-of-00002.parquet", "raw/test-00000.parquet",
    "more/deep/test.jsonl", "small/a.jsonl", "small/deep/b.jsonl", "by_name/train.jsonl", "by_name/dev.jsonl",
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("raw", {"train": NAMES[1:3], "test": NAMES[3:5]}),
        ("small", {"train": NAMES[5:6]}),
        (None, {"train": NAMES[5:6]}),
        ("folder", {"train": NAMES[7:8], "validation": NAMES[8:9]}),
    ],
)
def test_the_front_matter_names_the_files(config: str | None, expected: dict[str, Sequence[str]]) -> None:
    assert splits_of(NAMES, CONFIGS, config, "a/b") == {split: list(names) for split, names in expected.items()}


@pytest.mark.parametrize(
    ("names", "config", "expected"),
    [
        (["data/train-00000-of-00001-ab.parquet", "data/x_sft-00000-of-00001.parquet", "test.txt"], None,
         {"train": 1, "x_sft": 1}),
        (["train/a.jsonl", "train/b.jsonl", "test/a.jsonl"], None, {"train": 2, "test": 1}),
        (["my_train.csv", "my_eval.csv", "LICENSE.txt", "picture.png"], None, {"train": 1, "test": 1}),
        (["restrain.jsonl"], None, {"train": 1}),
        (["plain/train/0000.parquet", "other/train/0000.parquet"], "plain", {"train": 1}),
        (["picture.png"], None, {}),
    ],
)  # fmt: skip
def test_names_tell_the_split_without_front_matter(
    names: list[str], config: str | None, expected: dict[str, int]
) -> None:
    assert {split: len(files) for split, files in splits_of(names, {}, config, "a/b").items()} == expected


@pytest.mark.parametrize("config", ["rawer", "data"])
def test_an_unknown_configuration_is_refused_with_those_that_are_there(config: str) -> None:
    with pytest.raises(CalibrationError, match="no configuration") as caught:
        splits_of(NAMES, CONFIGS, config, "a/b")
    assert '"raw", "small", "folder"' in caught.value.why
    with pytest.raises(CalibrationError, match="no configuration"):
        splits_of(["train.jsonl"], {}, config, "a/b")


@pytest.mark.parametrize("pattern", ["/etc/passwd", "../../etc/passwd", "https://example.com/x.jsonl", "hf://a/b", "["])
def test_a_pattern_never_leads_out_of_the_dataset(pattern: str) -> None:
    front = {"configs": [{"config_name": "default", "data_files": pattern}]}
    assert splits_of(NAMES, front, None, "a/b") == {"train": []}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder that stands for the dataset a/b at COMMIT on the Hub and in its cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "datasets--a--b" / "snapshots" / COMMIT
    folder.mkdir(parents=True)

    def info(_api: object, dataset: str, *, revision: str, files_metadata: bool) -> Any:
        assert (dataset, revision, files_metadata) == ("a/b", COMMIT, True)
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name, size=1, lfs=None) for name in names])

    def download(dataset: str, *, repo_type: str, revision: str, allow_patterns: list[str]) -> str:
        assert (dataset, repo_type, revision) == ("a/b", "dataset", COMMIT)
        return str(folder)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return folder


def write(folder: Path, name: str, *texts: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_a_folder_of_the_same_name_does_not_stand_for_the_hub(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(hub, "train.jsonl", "of the Hub")
    (hub / "README.md").write_text("---\nlicense: cc0-1.0\n---\n# A dataset\n")
    write(tmp_path / "here" / "a" / "b", "train.jsonl", "of the working directory")
    monkeypatch.chdir(tmp_path / "here")
    found = download_split("a/b", COMMIT, None, "train")
    assert [file.path for file in found.files] == [hub / "train.jsonl"]
    assert found.license == "cc0-1.0"


def test_an_unknown_split_or_a_format_that_is_not_read_is_refused(hub: Path) -> None:
    write(hub, "train.jsonl", "one")
    with pytest.raises(CalibrationError, match="no split") as caught:
        download_split("a/b", COMMIT, None, "train[:10%]")
    assert '"train"' in caught.value.why
    (hub / "README.md").write_text("---\nconfigs: [{config_name: x, data_files: 'load.py'}]\n---\n")
    (hub / "load.py").write_text("raise SystemExit\n")
    with pytest.raises(CalibrationError, match="not read") as caught:
        download_split("a/b", COMMIT, None, "train")
    assert "load.py" in caught.value.where
    (hub / "README.md").write_text("---\na: [\n---\n")
    with pytest.raises(CalibrationError, match="front matter"):
        download_split("a/b", COMMIT, None, "train")


def test_a_full_cache_needs_no_network(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the Hub was asked")

    for name in ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"):
        write(hub, f"data/{name}", name)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert len(download_split("a/b", COMMIT, None, "train").files) == 2
    (hub / "data" / "train-00001-of-00002.jsonl").unlink()
    with pytest.raises(SourceError, match="cache lacks a file of the dataset a/b") as caught:
        download_split("a/b", COMMIT, None, "train")
    assert "data/train-00001-of-00002.jsonl" in caught.value.where
    command = f"hf download a/b data/train-00001-of-00002.jsonl --revision {COMMIT} --repo-type dataset"
    assert caught.value.hint.endswith(f": {command}")


def test_the_clients_own_listing_tells_which_file_is_not_cached(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(hub, "one.jsonl", "one")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    listed = [SimpleNamespace(path=name) for name in ("one.jsonl", "two.jsonl")]
    monkeypatch.setattr(huggingface_hub, "get_cached_repo_tree", lambda *_, **__: listed, raising=False)
    with pytest.raises(SourceError) as caught:
        download_split("a/b", COMMIT, None, "train")
    assert "two.jsonl" in caught.value.where


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("call", ["listing", "download"])
def test_a_gated_dataset_is_one_error_with_a_hint(
    hub: Path, monkeypatch: pytest.MonkeyPatch, status: int, call: str
) -> None:
    """The Hub lists a gated dataset to anyone and refuses its files; other servers refuse the listing."""
    write(hub, "train.jsonl", "one")
    response = httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/x"))

    def refuse(*_: object, **__: object) -> None:
        raise GatedRepoError(f"{status} gated", response=response)

    owner, name = (
        (huggingface_hub.HfApi, "dataset_info") if call == "listing" else (huggingface_hub, "snapshot_download")
    )
    monkeypatch.setattr(owner, name, refuse)
    with pytest.raises(SourceError, match="the dataset a/b at b08601e04326 is gated") as caught:
        download_split("a/b", COMMIT, None, "train")
    assert "accept the licence" in caught.value.hint
    assert "hf auth login" in caught.value.hint
