"""Damaged and hostile folders: every one is a report, never an exception."""

import copy
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from rich.console import Console

from packager.cli.audit_view import audit_json, print_audit
from packager.prove.audit import audit
from packager.receipt import Provenance
from tests.audit_cases import ACT_ORDER, QWEN
from tests.checkpoints import Checkpoint, edit_text, write_json
from tests.hypothesis_profiles import examples
from tests.known_models import describe_known


def assert_reportable(folder: Path) -> None:
    report = audit(folder, describe=describe_known)
    json.dumps(audit_json(report)).encode("utf-8")
    stream = io.StringIO()
    print_audit(report, Console(file=stream, width=80))
    assert stream.getvalue().encode("utf-8").count(b"\n") == len(report.findings) + 1


@settings(max_examples=examples(60))
@given(data=st.data())
def test_random_damage_never_raises(data: st.DataObject) -> None:
    checkpoint = data.draw(st.sampled_from((Checkpoint(), Checkpoint(shards=2), QWEN, ACT_ORDER)))
    with tempfile.TemporaryDirectory() as temporary:
        folder = checkpoint.write(Path(temporary) / "branch")
        path = folder / data.draw(st.sampled_from(sorted(path.name for path in folder.iterdir())))
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            # Half of the damage goes to the beginning, where the structure of every format is.
            end = data.draw(st.sampled_from((min(300, len(content)), len(content))))
            position = data.draw(st.integers(0, end))
            new = data.draw(
                st.binary(max_size=4) | st.sampled_from((b"[", b"{", b'"', b"---\n", b"```\n", b"\xff" * 8))
            )
            content[position : position + data.draw(st.integers(0, 4))] = new
        path.write_bytes(content[: data.draw(st.sampled_from((len(content), len(content) // 2)))])
        assert_reportable(folder)


WEIRD: tuple[Any, ...] = (
    None, True, -1, 0, 2**40, 10**30, 1e308, 0.5, "", "\ud800", "x" * 2000, "[red]\x1b[31m\n", [], {}, [[]], [None],
    {"a": {}}, ["x", 1], {"": ""}, "/home/x/y",
)  # fmt: skip


def mutated(document: Any, data: st.DataObject) -> Any:
    """Return a JSON document with one value, at any depth, replaced by something odd."""
    result = copy.deepcopy(document)
    parent = result
    while True:
        key = data.draw(st.sampled_from(list(parent) if isinstance(parent, dict) else list(range(len(parent)))))
        if isinstance(parent[key], dict | list) and parent[key] and data.draw(st.booleans()):
            parent = parent[key]
            continue
        parent[key] = data.draw(st.sampled_from(WEIRD))
        return result


@settings(max_examples=examples(60))
@given(data=st.data())
def test_odd_values_never_raise(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Checkpoint(shards=2).write(Path(temporary) / "branch")
        names = sorted(path.name for path in folder.glob("*.json"))
        for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True)):
            write_json(folder / name, mutated(json.loads((folder / name).read_text(encoding="utf-8")), data))
        assert_reportable(folder)


@pytest.mark.parametrize(
    "front_matter",
    [
        "? [a]\n: b",
        "a: &a [*a]",
        "date: 2023-13-45",
        "license: !!python/object:os.system x",
        "base_model: " + "9" * 5000,
        "license: 0x" + "f" * 5000,
        "a: " + "[" * 700,
        "- list",
        "license: !!set {llama2}",
        "x: !!float y",
    ],
    ids=lambda text: text[:20],
)
def test_hostile_front_matter_never_raises(tmp_path: Path, front_matter: str) -> None:
    folder = Checkpoint().write(tmp_path / "branch")
    (folder / "README.md").write_text(f"---\n{front_matter}\n---\n", encoding="utf-8")
    assert_reportable(folder)


@pytest.mark.parametrize("code", ["(" * 500, "-" * 20_000 + "1", "x\x00", "return", "1" * 5000, "\\d", "[" * 90 + "1"])
def test_hostile_python_never_raises(tmp_path: Path, code: str) -> None:
    folder = Checkpoint().write(tmp_path / "branch")
    edit_text(folder, "README.md", "from transformers import AutoModelForCausalLM", f"if True:\n    {code}")
    assert_reportable(folder)


WRONG: dict[str, object] = {
    "linears": [1] * 100_000,
    "loaders": [1] * 100_000,
    "tasks": [1] * 100_000,
    "files": dict.fromkeys(map(str, range(100_000)), 1),
    "parameters": {str(number): () for number in range(100_000)},
}


@pytest.mark.parametrize("field", WRONG)
def test_a_record_of_many_wrong_values_has_few_errors(field: str) -> None:
    """Each error is 1700 bytes: a record of 32 MB would take 2.6 GB."""
    with pytest.raises(ValidationError) as caught:
        Provenance.model_validate({field: WRONG[field]})
    found = [error for error in caught.value.errors() if error["loc"][0] == field]
    assert 1 <= len(found) <= 2  # a linear is that of an expert or another
