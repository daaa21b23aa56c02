"""The lock file: the same lock gives the same bytes, and a damaged, foreign or hostile one is refused in a moment."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from packager.errors import PlanError, RecipeError
from packager.model.architecture import architecture_of
from packager.model.lock import Lock, LockedTensors
from packager.recipe import lock_file
from packager.recipe.lock_file import lock_path, lock_text, read_recipe_lock
from tests.locks import lock_of
from tests.recipe_fixtures import CONFIG, RECIPES
from tests.samples import sampled
from tests.test_known_models import LLAMA_2_13B

Json = dict[str, Any]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = lock_path(tmp_path / "recipe.yaml")
    path.write_text(lock_text(lock_of(CONFIG, "demo/demo")))
    return path


def changed(path: Path, change: Callable[[Json], object]) -> Path:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    return path


@pytest.mark.parametrize("config", [CONFIG, LLAMA_2_13B, {**CONFIG, "model_type": "qwen2", "name": "é\u2028{0}"}])
def test_what_is_written_is_read_and_gives_the_same_bytes(tmp_path: Path, config: Json) -> None:
    lock = lock_of(config, "demo/demo", "a" * 40)
    path = tmp_path / "recipe.lock.json"
    path.write_text(lock_text(lock), encoding="utf-8")
    assert read_recipe_lock(path, Path("recipe.yaml")) == lock
    assert lock_text(read_recipe_lock(path, Path("recipe.yaml"))).encode() == path.read_bytes()
    whole = lock.model_dump(mode="json")
    assert whole["model"].pop("own") == []  # written only where there is one
    assert json.loads(path.read_bytes()) == whole
    own = lock.model_copy(update={"model": lock.model.model_copy(update={"own": ("lm_head.weight",)})})
    path.write_text(lock_text(own), encoding="utf-8")
    assert read_recipe_lock(path, Path("recipe.yaml")) == own


def test_a_lock_without_the_cache_is_read_and_written_as_it_was(path: Path) -> None:
    """Older releases did not write which tokens are cached; branches have their descriptions, too."""
    lock = read_recipe_lock(path, Path("recipe.yaml"))
    older = lock_text(lock.model_copy(update={"model": lock.model.model_copy(update={"kv_cache": None})}))
    assert set(lock_text(lock).splitlines()) - set(older.splitlines()) == {
        '  "kv_cache": {"windows": [], "state_bytes": 0},'
    }
    path.write_text(older)
    again = read_recipe_lock(path, Path("recipe.yaml"))
    assert again.model.kv_cache is None
    assert lock_text(again) == older
    assert architecture_of(again.model, "").cache_bytes(1000) == 1000 * lock.model.kv_bytes_per_token


def test_a_lock_is_read_by_people(path: Path) -> None:
    """A tensor or a linear has a line of its own, and no line is an entire block."""
    lines = path.read_text().splitlines()
    assert '   {"names": "model.norm.weight", "dtype": "F16", "shape": [256]}' in {line.rstrip(",") for line in lines}
    assert sum('"module": ' in line for line in lines) == 7


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_lock_of_a_shipped_recipe_is_as_it_would_be_written(recipe: Path) -> None:
    path = lock_path(recipe)
    assert path.read_text(encoding="utf-8") == lock_text(read_recipe_lock(path, Path("recipe.yaml")))


def test_its_name_is_the_recipe_s() -> None:
    assert lock_path(Path("a/my.recipe.yaml")) == Path("a/my.recipe.lock.json")


def tensors(*entries: Json) -> Callable[[Json], object]:
    return lambda lock: lock["model"].update(tensors=list(entries))


def kind(**values: object) -> Callable[[Json], object]:
    return lambda lock: lock["model"]["kinds"][0].update(values)


DAMAGES: dict[str, tuple[Callable[[Json], object], str]] = {
    "another version": (lambda lock: lock.update(lock_version=2), "lock_version: Input should be 1"),
    "an unknown key": (lambda lock: lock.update(extra=1), "extra: Extra inputs are not permitted"),
    "a missing key": (lambda lock: lock["model"].pop("vocab_size"), "model.vocab_size: Field required"),
    "a size as text": (lambda lock: lock["model"].update(vocab_size="512"), "model.vocab_size: Input should be a "),
    "a size of 0": (lambda lock: lock["model"].update(hidden_size=0), "model.hidden_size: Input should be "),
    "a huge size": (lambda lock: lock["model"].update(hidden_size=1 << 60), "model.hidden_size: Input should be less "),
    "a branch": (lambda lock: lock["base_model"].update(revision="main"), "base_model.revision: String should match "),
    "no kinds": (lambda lock: lock["model"].update(kinds=[]), "model.kinds: Tuple should have at least 1 item"),
    "a block is missing": (kind(blocks="1..2"), "model: Value error, the kinds of blocks do not hold each block once"),
    "a block twice": (
        lambda lock: lock["model"]["kinds"].append(lock["model"]["kinds"][0]),
        "model: Value error, the kinds of blocks do not hold each block once",
    ),
    "1001 blocks": (kind(blocks="0..1000"), "the kinds of blocks do not hold each block once"),
    "blocks are a word": (kind(blocks="all"), "model: Value error, 'all' is not a list of numbers such as 0..2,5"),
    "a module that is quantized and left": (
        kind(left={"mlp.down_proj": "x"}),
        "a module of blocks 0..1 is there twice",
    ),
    "a module twice": (
        lambda lock: lock["model"]["kinds"][0]["groups"][0]["linears"][1].update(module="self_attn.q_proj"),
        "a module of blocks 0..1 is there twice",
    ),
    "a group of two widths": (
        lambda lock: (groups := lock["model"]["kinds"][0]["groups"])[0]["linears"].extend(groups.pop()["linears"]),
        "self_attn.q_proj is in a group with linears that take inputs of another width",
    ),
    "no tensors": (tensors(), "model.tensors: Tuple should have at least 1 item"),
    "a negative shape": (tensors({"names": "a", "dtype": "F16", "shape": [-1]}), "model.tensors.0.shape.0: Input "),
    "a shape of true": (tensors({"names": "a", "dtype": "F16", "shape": [True]}), "model.tensors.0.shape.0: Input "),
    "many dimensions": (tensors({"names": "a", "dtype": "F16", "shape": [1] * 33}), "model.tensors.0.shape: Tuple "),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_lock_is_refused(path: Path, name: str) -> None:
    change, expected = DAMAGES[name]
    with pytest.raises(RecipeError) as caught:
        read_recipe_lock(changed(path, change), Path("recipe.yaml"))
    assert f"the lock {path} is not valid: " in str(caught.value)
    assert expected in str(caught.value)
    assert caught.value.hint == "make it: packager lock recipe.yaml"


CONTRADICTIONS: dict[str, tuple[Callable[[Json], object], str]] = {
    "a linear without a tensor": (
        lambda lock: lock["model"]["tensors"].pop(1),
        "model.layers.0.self_attn.q_proj.weight is not a tensor of its shape",
    ),
    "a linear of another shape": (
        lambda lock: lock["model"]["tensors"][1].update(shape=[256, 255]),
        "model.layers.0.self_attn.q_proj.weight is not a tensor of its shape",
    ),
    "a bias without a tensor": (
        lambda lock: lock["model"]["kinds"][0]["groups"][0]["linears"][0].update(bias=True),
        "model.layers.0.self_attn.q_proj.bias is there, or is not, against what the linear says",
    ),
    "an unknown dtype": (lambda lock: lock["model"]["tensors"][0].update(dtype="F17"), "'F17' is no dtype of "),
    "a tensor twice": (
        lambda lock: lock["model"]["tensors"].append(lock["model"]["tensors"][-1]), "a tensor is there twice",
    ),
    "a linear twice": (
        lambda lock: (linears := lock["model"]["kinds"][0]["groups"][0]["linears"]).append(
            {**linears[0], "module": "self_attn.again"}
        ),
        "a linear is there twice",
    ),
    "a tensor of 2^60 bytes": (
        lambda lock: lock["model"]["tensors"][0].update(shape=[1 << 30, 1 << 30]),
        "is larger than any file",
    ),
    "names of 480 parts": (
        lambda lock: lock["model"]["tensors"][0].update(names="x." * 480 + "{0..399998}"),
        "'x.x.x.x.x.x.x.x.x.x.x.x.x.x.x.x.x.x.x.x.'... is longer than 256 characters or 32 parts",
    ),
    "a tied tensor that is stored": (
        lambda lock: lock["model"].update(tied=["model.norm.weight"]),
        "model.norm.weight is tied to another tensor, and a tensor of its own",
    ),
    "a brace": (lambda lock: lock["model"]["tensors"][0].update(names="a.{b}"), "'a.{b}' has a brace that no numbers "),
    "10^12 tensors": (
        lambda lock: lock["model"]["tensors"][0].update(names="a.{0..999}.{0..999}.{0..999}.{0..999}"),
        "stands for more than 400000 names",
    ),
    "10^9 tensors in many patterns": (
        tensors(*({"names": f"a{index}.{{0..399999}}", "dtype": "F16", "shape": [1]} for index in range(2000))),
        "it stands for more than 400000 tensors or linears",
    ),
    "a place with 10^8 numbers": (
        lambda lock: lock["model"]["tensors"][0].update(
            names="{" + ",".join(f"{n}00000..{n + 3}99999" for n in range(1, 200, 4)) + "}"
        ),
        "is not in rising order, or too long",
    ),
    "2 million linears": (
        kind(
            blocks="0..999",
            groups=[{"linears": [{"module": f"{n}", "stored": "a.{block}", "in_features": 1, "out_features": 1,
                                  "bias": False}], "held_bytes": 0} for n in range(2000)],
        ),
        "it stands for more than 400000 tensors or linears",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    sampled(CONTRADICTIONS, *CONTRADICTIONS.keys() - {"2 million linears", "10^9 tensors in many patterns"}),
)
def test_a_lock_that_contradicts_itself_is_refused_in_a_moment(path: Path, name: str) -> None:
    change, expected = CONTRADICTIONS[name]
    changed(path, change)
    started = time.process_time()
    with pytest.raises(PlanError) as caught:
        architecture_of(read_recipe_lock(path, Path("recipe.yaml")).model, path.name)
    assert time.process_time() - started < 8
    assert str(caught.value).startswith("recipe.lock.json: the lock contradicts itself")
    assert expected in caught.value.why
    assert caught.value.hint == "make it anew: packager lock"


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"null", b'{"a": 1, "a": 2}', b"[" * 100_000, b"\xff\xfe", b'{"a": NaN}', b'{"a": 1e999}']
)
def test_what_is_no_json_object_is_refused(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with pytest.raises(RecipeError, match=r"recipe\.lock\.json") as caught:
        read_recipe_lock(path, Path("recipe.yaml"))
    assert caught.value.hint == "make it: packager lock recipe.yaml"
    assert len(str(caught.value)) < 1000


def test_no_file_a_folder_and_a_large_file_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_file, "_MOST_BYTES", 100)
    with pytest.raises(RecipeError, match="cannot be read: it is larger than 100 bytes"):
        read_recipe_lock(path, Path("recipe.yaml"))
    path.unlink()
    with pytest.raises(RecipeError, match=r"there is no lock recipe\.lock\.json beside the recipe"):
        read_recipe_lock(path, Path("recipe.yaml"))
    path.mkdir()
    with pytest.raises(RecipeError, match=r"cannot be read: .*Is a directory"):
        read_recipe_lock(path, Path("recipe.yaml"))


def test_many_tensors_are_few_lines() -> None:
    lock = lock_of(CONFIG, "demo/demo")
    many = LockedTensors(names="e.{0..47}.{0..127}.{0..2}", dtype="F16", shape=(1,))
    model = lock.model.model_copy(update={"tensors": (*lock.model.tensors, many)})
    text = lock_text(Lock(**{**dict(lock), "model": model}))
    assert len(text.splitlines()) == len(lock_text(lock).splitlines()) + 1
    assert len(architecture_of(model, "").tensors) > 48 * 128 * 3
