"""A large base model is hashed while its blocks are quantized; nothing is made of them before the digests agree."""

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from packager.errors import SourceError
from packager.inputs import weights_digests
from packager.inputs.weights_digests import WeightsDigests
from packager.pipeline import base_model_origin, flow
from packager.pipeline.build_state import BuildState
from packager.pipeline.quantize_progress import QuantizeView
from packager.quantize.job import BlockDone, Event
from packager.receipt import FileRecord
from packager.recipe.file import RecipeFile
from packager.system.files import sha256_file
from packager.system.parallel import run_at_low_priority
from packager.system.terminal import Terminal
from tests import tiny_recipe
from tests.locks import write_lock
from tests.tiny_models import save_model
from tests.tiny_recipe import MAIN

ONE = {"variants": [{"branch": MAIN}]}
WEIGHTS = "model.safetensors"
BLOCKS = 3
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _every_model_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_digests, "_LONG_TO_HASH_BYTES", 1)


class Stopped(BaseException):
    """What a kill is here: nothing handles it."""


def build(recipe: Path, dist: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Build, and return the messages."""
    capsys.readouterr()
    flow.build(RecipeFile.load(recipe), tiny_recipe.options(dist), Terminal())
    return capsys.readouterr().err


def kill_after_the_first_block(patch: pytest.MonkeyPatch) -> None:
    show = QuantizeView.report

    def report(view: QuantizeView, event: Event) -> None:
        show(view, event)
        if isinstance(event, BlockDone):
            raise Stopped

    patch.setattr(QuantizeView, "report", report)


def hold(patch: pytest.MonkeyPatch) -> threading.Event:
    """Let hashing wait until the event is set, or hashing is ended."""
    release = threading.Event()

    def held(path: Path, on_bytes: Callable[[int], None]) -> str:
        while not release.wait(0.01):
            on_bytes(0)
        return sha256_file(path, on_bytes)

    patch.setattr(weights_digests, "sha256_file", held)
    return release


def resumed(messages: str) -> bool:
    return f"{MAIN} block 1/{BLOCKS} resumed" in messages


@pytest.mark.slow
def test_a_build_that_hashes_beside_makes_the_same_branch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe.write_all(tmp_path, ONE)
    messages = build(recipe, tmp_path / "beside", capsys)
    assert "of the base model beside the work" in messages
    assert "the base model is hashed, after" in messages
    monkeypatch.setattr(weights_digests, "_LONG_TO_HASH_BYTES", 10**9)
    assert "beside the work" not in build(recipe, tmp_path / "before", capsys)
    found = [tiny_recipe.workspace(tmp_path / name).read_receipt(MAIN) for name in ("beside", "before")]
    assert found[0] is not None
    assert found[1] is not None
    assert found[0].stages == found[1].stages
    for each in ("files", "base_model"):
        assert getattr(found[0].provenance, each) == getattr(found[1].provenance, each)
    assert "nothing to do" in build(recipe, tmp_path / "beside", capsys)


def test_packing_waits_for_the_digests(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, release = tiny_recipe.write_all(tmp_path, ONE), hold(monkeypatch)
    monkeypatch.setattr(weights_digests, "_SHOW_EVERY_S", 0.05)
    packed: list[bool] = []

    def stop(*_: object) -> None:
        packed.append(release.is_set())
        raise Stopped

    monkeypatch.setattr("packager.pipeline.pack.pack_checkpoint", stop)
    wait = base_model_origin.BaseOrigin.wait

    def waiting(origin: base_model_origin.BaseOrigin) -> None:
        threading.Timer(0.3, release.set).start()
        wait(origin)

    monkeypatch.setattr(base_model_origin.BaseOrigin, "wait", waiting)
    with pytest.raises(Stopped):
        build(recipe, tmp_path / "dist", capsys)
    assert packed == [True]
    messages = capsys.readouterr().err
    assert f"{MAIN} block {BLOCKS}/{BLOCKS}" in messages, "the sweep did not wait"
    assert "waiting for the digests of the base model: 0 B of" in messages


def change_a_byte(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.seek(-100, os.SEEK_END)
        byte = stream.read(1)
        stream.seek(-100, os.SEEK_END)
        stream.write(bytes([byte[0] ^ 1]))


@pytest.mark.slow
def test_a_text_that_is_edited_during_the_sweep_is_not_the_receipts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keys are made after the sweep, of what the blocks were computed from: the next build begins anew."""
    recipe, text = tiny_recipe.write_all(tmp_path, ONE), tmp_path / "calibration.txt"
    wait = base_model_origin.BaseOrigin.wait

    def edit(origin: base_model_origin.BaseOrigin) -> None:
        text.write_text(tiny_recipe.sentences(60, seed=7))
        wait(origin)

    with monkeypatch.context() as patch:
        patch.setattr(base_model_origin.BaseOrigin, "wait", edit)
        build(recipe, tmp_path / "dist", capsys)
    state = BuildState(RecipeFile.load(recipe), tiny_recipe.options(tmp_path / "dist"), Terminal(quiet=True))
    state.read_receipts()
    assert [each.variant.branch for each in state.missing("weights")] == [MAIN]


@pytest.fixture
def hub_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe of a model on the Hub, one byte of whose weights is not what the Hub states."""
    folder = tiny_recipe.write_all(tmp_path, ONE).parent / "model"
    changes = {**ONE, "base_model": {"id": "tester/tiny", "revision": REVISION}}
    recipe = tiny_recipe.write_recipe(tmp_path, changes)
    write_lock(recipe, json.loads((folder / "config.json").read_text()), "tester/tiny", REVISION)
    right = sha256_file(folder / WEIGHTS)
    change_a_byte(folder / WEIGHTS)

    def model_info(_: object, repo_id: str, *, revision: str, files_metadata: bool) -> SimpleNamespace:
        names = sorted(path.name for path in folder.iterdir())
        lfs = {WEIGHTS: SimpleNamespace(sha256=right)}
        return SimpleNamespace(
            sha=revision, siblings=[SimpleNamespace(rfilename=name, lfs=lfs.get(name), size=1) for name in names]
        )

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    return recipe


def test_a_wrong_byte_ends_the_sweep(
    hub_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = base_model_origin.BaseOrigin.watch

    def after_hashing(origin: base_model_origin.BaseOrigin) -> None:
        while not all(each.done() for each in origin._source.weights._beside.values()):
            time.sleep(0.01)
        watch(origin)

    monkeypatch.setattr(base_model_origin.BaseOrigin, "watch", after_hashing)
    with pytest.raises(SourceError, match="a downloaded file is damaged") as caught:
        build(hub_recipe, tmp_path / "dist", capsys)
    assert caught.value.where.endswith(WEIGHTS)
    assert f"{MAIN} block" not in capsys.readouterr().err, "the first block was not waited for"
    assert not list((tmp_path / "dist").glob("builds/**/*.safetensors"))
    assert tiny_recipe.workspace(tmp_path / "dist").read_receipt(MAIN) is None


def test_a_wrong_byte_that_is_found_late_ends_the_build_before_it_packs(
    hub_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_model_origin.BaseOrigin, "watch", lambda _: None)
    monkeypatch.setattr("packager.pipeline.quantize_stage._packed", lambda *_: pytest.fail("packed"))
    with pytest.raises(SourceError, match="a downloaded file is damaged"):
        build(hub_recipe, tmp_path / "dist", capsys)


@pytest.mark.slow
def test_nothing_is_measured_with_weights_that_are_not_those_of_the_hub(
    hub_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, dist = tmp_path / "model" / WEIGHTS, tmp_path / "dist"
    change_a_byte(weights)  # back: the build is a good one
    build(hub_recipe, dist, capsys)
    before = tiny_recipe.workspace(dist).receipt_path(MAIN).read_bytes()
    change_a_byte(weights)
    longer = RecipeFile.load(hub_recipe, trial=["evaluation.num_tokens=128"])
    with pytest.raises(SourceError, match="a downloaded file is damaged"):
        flow.build(longer, tiny_recipe.options(dist), Terminal())
    assert tiny_recipe.workspace(dist).receipt_path(MAIN).read_bytes() == before


@pytest.mark.slow
def test_blocks_of_a_killed_run_are_resumed_only_with_the_same_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, dist = tiny_recipe.write_all(tmp_path, ONE), tmp_path / "dist"
    for _ in range(2):  # the second run resumes the block, and is killed once more
        with pytest.MonkeyPatch.context() as patch:
            hold(patch)
            kill_after_the_first_block(patch)
            with pytest.raises(Stopped):
                build(recipe, dist, capsys)
        messages = capsys.readouterr().err
    assert resumed(messages)
    assert not any(thread.name.startswith("hash") and thread.is_alive() for thread in settled_threads())
    save_model(tmp_path / "model", "llama", seed=1)  # another model, which nobody had hashed before the kill
    tiny_recipe.save_tokenizer(tmp_path / "model")
    messages = build(recipe, dist, capsys)
    assert "1 finished block is not resumed" in messages
    assert not resumed(messages)
    build(recipe, tmp_path / "anew", capsys)
    assert (
        tiny_recipe.built_files(dist, [MAIN])[f"{MAIN}/{WEIGHTS}"]
        == (tiny_recipe.built_files(tmp_path / "anew", [MAIN])[f"{MAIN}/{WEIGHTS}"])
    )


def settled_threads() -> list[threading.Thread]:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and any(each.name.startswith("hash") for each in threading.enumerate()):
        time.sleep(0.01)
    return threading.enumerate()


@pytest.mark.slow
@pytest.mark.parametrize("same", [True, False], ids=["the same bytes", "other bytes"])
def test_blocks_of_a_hashed_model_are_resumed_with_a_copy_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], *, same: bool
) -> None:
    recipe, dist = tiny_recipe.write_all(tmp_path, ONE), tmp_path / "dist"
    watch = base_model_origin.BaseOrigin.watch

    def after_hashing(origin: base_model_origin.BaseOrigin) -> None:
        origin.wait()
        watch(origin)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base_model_origin.BaseOrigin, "watch", after_hashing)
        kill_after_the_first_block(patch)
        with pytest.raises(Stopped):
            build(recipe, dist, capsys)
    if same:
        shutil.copyfile(tmp_path / "model" / WEIGHTS, tmp_path / "copy")
        (tmp_path / "copy").replace(tmp_path / "model" / WEIGHTS)
    else:
        save_model(tmp_path / "model", "llama", seed=1)
        tiny_recipe.save_tokenizer(tmp_path / "model")
    messages = build(recipe, dist, capsys)
    assert "finished blocks wait for their digests" in messages
    assert resumed(messages) is same


def digests(folder: Path, check: Callable[[Any], None] = lambda _: None) -> WeightsDigests:
    return WeightsDigests(folder, ["a.safetensors", "b.safetensors"], check, lambda _: None)


def test_a_file_that_is_replaced_before_it_is_hashed_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode() * 1000)
    found = digests(tmp_path)
    (tmp_path / "new").write_bytes(b"a" * 1000)  # the same bytes: blocks may have been read of others in between
    (tmp_path / "new").replace(tmp_path / "a.safetensors")
    with found.hashed_beside(), pytest.raises(SourceError, match="changed during the build") as caught:
        found.records()
    assert caught.value.where == str(tmp_path / "a.safetensors")


def test_digests_are_known_when_every_file_is_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode() * 1000)
    checked: list[str] = []
    found, release = digests(tmp_path, checked.extend), hold(monkeypatch)
    expected = {
        f"{name}.safetensors": FileRecord(size_bytes=1000, sha256=sha256_file(tmp_path / f"{name}.safetensors"))
        for name in ("a", "b")
    }
    with found.hashed_beside():
        assert not found.known()
        release.set()
        assert found.records() == expected
    assert found.known()
    assert sorted(checked) == ["a.safetensors", "b.safetensors"]


@pytest.mark.skipif(not hasattr(os, "getpriority"), reason="no priorities here")
def test_a_thread_of_low_priority_leaves_the_others_as_they_are() -> None:
    seen: list[int] = []

    def work() -> None:
        run_at_low_priority()
        seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before
    assert seen == [10 if sys.platform == "linux" else before]
