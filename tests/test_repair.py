"""`fix`: what is certain is repaired into a new folder, no weight changes, and the rest is named."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from packager.cli.main import app
from packager.errors import AuditError, UsageError
from packager.model.decoder import Decoder, forward
from packager.model.packing import CheckpointReader
from packager.prove import repair as repair_module
from packager.prove.audit import audit
from packager.prove.repair import RepairReport, repair
from packager.prove.repair_weights import WeightsEdits, pack_rows
from tests.audit_cases import PLAIN, SHARDED, WEIGHTS, Q, assign, declare, drop
from tests.checkpoints import HIDDEN, Checkpoint, Tensors, edit_json, edit_tensors, pack, write_json
from tests.known_models import describe_known
from tests.samples import sampled


def fixed(folder: Path, **options: Any) -> RepairReport:
    return repair(folder, folder.with_name("fixed"), lambda _: None, describe=describe_known, **options)


def logits(folder: Path, bits: int) -> torch.Tensor:
    """Return the logits of our own forward pass for a row of token ids."""
    decoder = Decoder(folder, CheckpointReader(folder, bits), device=torch.device("cpu"), dtype=torch.float32)
    ids = torch.arange(24).reshape(1, 24)
    with torch.inference_mode():
        return torch.cat([decoder.logits(hidden) for hidden in forward(decoder, ids, rows=1)])


def to_v2(tensors: Tensors, bits: int) -> None:
    """Store the zeros as they are."""
    for name in [name for name in tensors if name.endswith(".qzeros")]:
        rows = [[word & 0xFFFFFFFF for word in row] for row in tensors[name].tolist()]
        streams = [sum(word << (32 * number) for number, word in enumerate(row)) for row in rows]
        count = tensors[name].shape[1] * 32 // bits
        values = [[(stream >> (bits * position)) % (1 << bits) + 1 for position in range(count)] for stream in streams]
        tensors[name] = np.array([pack(row, bits) for row in values], np.int32)


def renumber(tensors: Tensors) -> None:
    """Give the groups of each linear other numbers: the same weights."""
    for name in [name for name in tensors if name.endswith(".g_idx")]:
        linear = name.removesuffix(".g_idx")
        groups = len(tensors[f"{linear}.scales"])
        new = np.roll(np.arange(groups), 1)
        tensors[name] = new[tensors[name]].astype(np.int32)
        for part in ("scales", "qzeros"):
            moved = np.empty_like(tensors[f"{linear}.{part}"])
            moved[new] = tensors[f"{linear}.{part}"]
            tensors[f"{linear}.{part}"] = moved


def add_zero_biases(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.endswith(".qweight")]:
        tensors[name.replace("qweight", "bias")] = np.zeros(tensors[name].shape[1], np.float16)


def each_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit_json(folder, "config.json", lambda config: change(config["quantization_config"]))
    edit_json(folder, "quantize_config.json", change)


def without(*keys: str) -> Callable[[Path], object]:
    return lambda folder: each_config(folder, lambda section: [section.pop(key, None) for key in keys])


@dataclass(frozen=True, kw_only=True)
class Case:
    """A way to break a sound checkpoint; the repair gives the sound one back.

    Attributes:
        code: the finding of the broken one, and the code of a change.
        compared: linears of which all weights are compared.
        same_configs: the configs become those of the sound one.
        left: codes of what nobody knows.
    """

    name: str
    code: str
    change: Callable[[Path], object]
    checkpoint: Checkpoint = PLAIN
    compared: int = 0
    same_configs: bool = True
    left: frozenset[str] = frozenset()


def declare_v2(folder: Path, bits: int) -> None:
    edit_tensors(folder, lambda found: to_v2(found, bits))
    edit_json(folder, "config.json", lambda config: config["quantization_config"].update(checkpoint_format="gptq_v2"))


def old_name(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "gptq_model-4bit-32g.safetensors")
    edit_json(folder, "quantize_config.json", lambda config: config.update(model_file_base_name="gptq_model-4bit-32g"))


STATIC = Checkpoint(sym=False, seed=4)
CASES = [
    Case(name="metadata", code="safetensors-metadata",
         change=lambda folder: save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata={"by": "me"})),
    Case(name="v2 declared v1", code="zeros-format", compared=14,
         change=lambda folder: edit_tensors(folder, lambda found: to_v2(found, 4))),
    Case(name="v2 declared v1, 3 bits", code="zeros-format", compared=14, checkpoint=Checkpoint(bits=3),
         change=lambda folder: edit_tensors(folder, lambda found: to_v2(found, 3))),
    Case(name="v2 declared v2", code="checkpoint-format", compared=14, change=lambda folder: declare_v2(folder, 4)),
    Case(name="v2 declared v2, 8 bits, shards are not needed", code="checkpoint-format", compared=14,
         checkpoint=Checkpoint(bits=8, group_size=-1), change=lambda folder: declare_v2(folder, 8)),
    Case(name="v2 asymmetric", code="checkpoint-format", compared=14, checkpoint=STATIC,
         change=lambda folder: declare_v2(folder, 4)),
    Case(name="v1 declared v2", code="zeros-format", change=lambda folder: edit_json(
        folder, "config.json", lambda config: config["quantization_config"].update(checkpoint_format="gptq_v2"))),
    Case(name="renumbered groups", code="g-idx-order", compared=14,
         change=lambda folder: edit_tensors(folder, renumber)),
    Case(name="renumbered groups, asymmetric", code="g-idx-order", compared=14, checkpoint=STATIC,
         change=lambda folder: edit_tensors(folder, renumber)),
    Case(name="renumbered groups in v2, declared act order", code="zeros-format", compared=14,
         change=lambda folder: [
             edit_tensors(folder, lambda found: [renumber(found), to_v2(found, 4)]), declare(folder, desc_act=True)]),
    Case(name="static order declared desc_act", code="g-idx-order",
         change=lambda folder: declare(folder, desc_act=True)),
    Case(name="act order declared static", code="g-idx-order", checkpoint=Checkpoint(desc_act=True),
         change=lambda folder: declare(folder, desc_act=False)),
    Case(name="zero biases", code="bias-needless", change=lambda folder: edit_tensors(folder, add_zero_biases)),
    Case(name="old name", code="weights-name", change=old_name),
    Case(name="wrong base name", code="weights-name-disagrees", change=lambda folder: edit_json(
        folder, "quantize_config.json", lambda config: config.update(model_file_base_name="x"))),
    Case(name="wrong bits and group size", code="linear-shape",
         change=lambda folder: declare(folder, bits=8, group_size=128)),
    Case(name="missing parameters", code="quantization-key-missing",
         change=without("bits", "group_size", "desc_act", "sym", "quant_method")),
    Case(name="missing parameters of act order", code="quantization-key-missing", checkpoint=Checkpoint(desc_act=True),
         change=without("bits", "group_size", "desc_act", "sym")),
    Case(name="no section", code="quantization-config-missing", same_configs=False,
         left=frozenset({"quantization-key-undeclared"}),
         change=lambda folder: edit_json(folder, "config.json", lambda config: config.pop("quantization_config"))),
    Case(name="no quantize_config.json", code="quantize-config-missing", same_configs=False,
         change=lambda folder: (folder / "quantize_config.json").unlink()),
    Case(name="foreign keys", code="quantize-config-key", change=lambda folder: edit_json(
        folder, "quantize_config.json", lambda config: config.update(lm_head=False, static_groups=False))),
    Case(name="awq", code="quantization-value", change=lambda folder: edit_json(
        folder, "config.json", lambda config: config["quantization_config"].update(quant_method="awq"))),
    Case(name="leaked paths", code="local-path", same_configs=False, change=lambda folder: [
        edit_json(folder, "config.json", lambda config: config.update(_name_or_path="/home/me/models/llama")),
        edit_json(folder, "tokenizer_config.json", lambda config: config.update(vocab_file="C:\\Users\\me\\x")),
        edit_json(folder, "quantize_config.json", lambda config: config.update(model_name_or_path="/workspace/x"))]),
    Case(name="code that is not there", code="code-missing", change=lambda folder: edit_json(
        folder, "config.json", lambda config: config.update(auto_map={"AutoConfig": "config_x.X"}))),
    Case(name="no index", code="index-missing", checkpoint=SHARDED,
         change=lambda folder: (folder / "model.safetensors.index.json").unlink()),
    Case(name="a wrong index", code="index-disagrees", checkpoint=SHARDED, change=lambda folder: edit_json(
        folder, "model.safetensors.index.json", lambda index: index["weight_map"].popitem())),
    Case(name="a wrong total", code="index-total-size", checkpoint=SHARDED, change=lambda folder: edit_json(
        folder, "model.safetensors.index.json", lambda index: index["metadata"].update(total_size=1))),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_broken_checkpoint_becomes_the_sound_one(tmp_path: Path, case: Case) -> None:
    sound = case.checkpoint.write(tmp_path / "sound")
    folder = case.checkpoint.write(tmp_path / "broken")
    case.change(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    report = fixed(folder)
    assert case.code in {change.code for change in report.changes}
    assert report.output == tmp_path / "fixed"
    assert {finding.code for finding in report.left} == case.left, "nothing else was broken"
    assert report.num_compared == case.compared
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before, "the old folder is not touched"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "fixed", "sound"]
    tensors, expected = ({
        name: tensor for path in sorted(found.glob("*.safetensors")) for name, tensor in load_file(path).items()
    } for found in (tmp_path / "fixed", sound))  # fmt: skip
    assert tensors.keys() == expected.keys()
    assert all(np.array_equal(tensors[name], expected[name]) for name in expected)
    assert all(tensors[name].dtype == expected[name].dtype for name in expected)
    if case.same_configs:
        for name in ("config.json", "quantize_config.json"):
            assert json.loads((tmp_path / "fixed" / name).read_text()) == json.loads((sound / name).read_text())
    assert not (tmp_path / "fixed" / "provenance.json").exists()
    again = repair(tmp_path / "fixed", tmp_path / "again", lambda _: None, describe=describe_known)
    assert (again.changes, again.output) == ((), None), "a repaired checkpoint needs no repair"


# Of what is read by a forward pass: zeros, groups, biases, names.
COMPUTED = [case for case in CASES if case.compared or case.name in ("zero biases", "old name", "metadata", "no index")]


@pytest.mark.parametrize("case", sampled(COMPUTED, COMPUTED[1], COMPUTED[8]), ids=lambda case: case.name)
def test_our_forward_computes_the_same_logits(tmp_path: Path, case: Case) -> None:
    sound = case.checkpoint.write(tmp_path / "sound")
    folder = case.checkpoint.write(tmp_path / "broken")
    case.change(folder)
    fixed(folder)
    bits = case.checkpoint.bits
    expected = logits(sound, bits)
    assert expected.abs().max() > 0
    assert torch.equal(logits(tmp_path / "fixed", bits), expected)


def test_metadata_of_others_is_kept(tmp_path: Path) -> None:
    folder = Checkpoint().write(tmp_path / "broken")
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata={"made_by": "somebody"})
    fixed(folder)
    with safe_open(tmp_path / "fixed" / WEIGHTS, framework="numpy") as found:
        assert found.metadata() == {"made_by": "somebody", "format": "pt"}


def test_shards_of_an_old_name_get_a_new_index(tmp_path: Path) -> None:
    folder = Checkpoint(shards=2, weights_name="gptq_model-4bit-32g").write(tmp_path / "broken")
    report = fixed(folder)
    assert report.left == ()
    names = {path.name for path in (tmp_path / "fixed").iterdir() if "safetensors" in path.name}
    assert names == {
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
    }  # fmt: skip


# What is not certain is left


LEFT: dict[str, tuple[str, Callable[[Path], object], Checkpoint]] = {
    "a v2 zero that v1 cannot hold": (
        "checkpoint-format",
        lambda folder: edit_tensors(folder, assign(f"{Q}.qzeros", (0, 0), 0)),
        Checkpoint(sym=False, checkpoint_format="gptq_v2"),
    ),
    "one linear of another format": (
        "zeros-format", lambda folder: edit_tensors(folder, assign(f"{Q}.qzeros", ..., -0x77777778)), Checkpoint(),
    ),
    "one zero of a symmetric grid": (
        "zeros-not-symmetric", lambda folder: edit_tensors(folder, assign(f"{Q}.qzeros", (0, 0), 0)), Checkpoint(),
    ),
    "one linear in another order": (
        "g-idx-groups",
        lambda folder: [
            edit_tensors(folder, assign(f"{Q}.g_idx", slice(None), 0)), declare(folder, desc_act=True),
        ],
        Checkpoint(),
    ),
    "a path in a text": (
        "local-path", lambda folder: (folder / "notes.md").write_text("see /home/me/models"), Checkpoint(),
    ),
    "a token": ("secret", lambda folder: (folder / "notes.md").write_text("hf_" + "Abc123" * 6), Checkpoint()),
    "another damping": (
        "quantize-config-disagrees",
        lambda folder: edit_json(folder, "quantize_config.json", lambda config: config.update(damp_percent=0.1)),
        Checkpoint(),
    ),
    "a bias that is not zero": (
        "bias-unexpected",
        lambda folder: edit_tensors(folder, lambda found: found.update({f"{Q}.bias": np.ones(HIDDEN, np.float16)})),
        Checkpoint(),
    ),
    "a missing tensor": (
        "linear-incomplete", lambda folder: edit_tensors(folder, lambda found: found.pop(f"{Q}.g_idx")), Checkpoint(),
    ),
    "weights that end early": (
        "safetensors-damaged",
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1]),
        Checkpoint(),
    ),
    "damage of a value": (
        "scale-not-finite", lambda folder: edit_tensors(folder, assign(f"{Q}.scales", (1, 1), np.nan)), Checkpoint(),
    ),
    "two sets of weights": (
        "weights-stray", lambda folder: shutil.copy(folder / WEIGHTS, folder / "z.safetensors"), Checkpoint(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_certain_is_left_and_named(tmp_path: Path, name: str) -> None:
    code, change, checkpoint = LEFT[name]
    folder = checkpoint.write(tmp_path / "broken")
    change(folder)
    expected = audit(folder, complete=False, describe=describe_known)
    assert code in {finding.code for finding in expected.findings}
    report = fixed(folder)
    assert (report.changes, report.output) == ((), None)
    assert report.left == expected.findings
    assert not (tmp_path / "fixed").exists()


def test_the_rest_is_named_beside_what_was_repaired(tmp_path: Path) -> None:
    folder = Checkpoint().write(tmp_path / "broken")
    edit_tensors(folder, lambda found: found.pop("model.norm.weight"))
    edit_json(folder, "config.json", lambda config: config.update(_name_or_path="/home/me/x"))
    for dry_run in (True, False):
        report = fixed(folder, dry_run=dry_run)
        assert {finding.code for finding in report.left} == {"tensor-missing"}
        assert not report.passed
        assert (report.output is None) is dry_run
        assert (tmp_path / "fixed").exists() is not dry_run


# The old folder, the new folder


def test_a_repair_that_changes_a_weight_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Checkpoint().write(tmp_path / "broken")
    edit_tensors(folder, lambda found: to_v2(found, 4))
    edited = WeightsEdits.edited

    def wrong(self: WeightsEdits, tensor: str, files: Any) -> bytes | None:
        data = edited(self, tensor, files)
        return data[:-1] + b"\x76" if data and tensor == "model.layers.1.mlp.down_proj.qzeros" else data

    monkeypatch.setattr(WeightsEdits, "edited", wrong)
    with pytest.raises(AuditError, match=r"would change the weights of model\.layers\.1\.mlp\.down_proj"):
        fixed(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_a_killed_repair_leaves_no_folder_under_the_new_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Checkpoint().write(tmp_path / "broken")
    declare(folder, desc_act=True)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(repair_module, "replace_folder", killed)
    with pytest.raises(KeyboardInterrupt):
        fixed(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_links_and_leftovers_do_not_follow(tmp_path: Path) -> None:
    folder = Checkpoint().write(tmp_path / "broken")
    declare(folder, desc_act=True)
    (folder / "notes.md").symlink_to("/etc/hostname")
    (folder / ".tmp-x").write_bytes(b"x")
    (folder / "sub").mkdir()
    (folder / "sub" / "a.txt").write_text("a")
    report = fixed(folder)
    assert report.left == ()
    names = {path.relative_to(tmp_path / "fixed").as_posix() for path in (tmp_path / "fixed").rglob("*")}
    assert "sub/a.txt" in names
    assert not {"notes.md", ".tmp-x"} & names


def test_the_folders_are_apart(tmp_path: Path) -> None:
    folder = Checkpoint().write(tmp_path / "broken")
    (tmp_path / "there").mkdir()
    for output, words in (("there", "exists"), ("broken", "exists"), ("broken/new", "lies in the other")):
        with pytest.raises(UsageError, match=words):
            repair(folder, tmp_path / output, lambda _: None)
    with pytest.raises(AuditError, match=r"neither config\.json nor a weights file"):
        repair(tmp_path / "there", tmp_path / "new", lambda _: None)


def packager(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return done.exit_code, done.stdout


def test_the_command_lists_changes_and_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("packager.inputs.describe_in_child.description_by_transformers", lambda: describe_known)
    folder = Checkpoint().write(tmp_path / "broken")
    edit_tensors(folder, lambda found: to_v2(found, 4))
    edit_json(folder, "tokenizer_config.json", lambda content: content.pop("chat_template"))
    arguments = ("fix", folder, "--output", tmp_path / "fixed")
    code, out = packager(*arguments, "--dry-run", "--format", "json")
    answer = json.loads(out)
    assert (code, answer["output"], answer["passed"]) == (0, None, True)
    assert [change["code"] for change in answer["changes"]] == ["zeros-format", ""]
    assert [finding["code"] for finding in answer["left"]] == ["chat-template-missing"]
    assert not (tmp_path / "fixed").exists()
    code, out = packager(*arguments)
    assert code == 0
    first, second, third, last = out.splitlines()
    assert first.startswith("changed  weights: qzeros of 14 linears are stored as zero - 1")
    assert second.startswith("changed  provenance.json: the file is left out")
    assert third.startswith("left     warning  chat-template-missing")
    assert last.endswith("fixed: 2 changes, the weights of 14 linears compared; 1 finding left")
    code, out = packager("fix", tmp_path / "fixed", "-o", tmp_path / "again")
    assert (code, out.splitlines()[-1]) == (
        0, "nothing was written: there is nothing to repair; 0 changes, 1 finding left",
    )  # fmt: skip
    drop_norm(tmp_path / "fixed")
    assert packager("fix", tmp_path / "fixed", "-o", tmp_path / "again")[0] == AuditError.exit_code


def drop_norm(folder: Path) -> None:
    edit_tensors(folder, lambda found: drop(found, "model.norm"))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packing_agrees_with_one_long_integer(bits: int) -> None:
    values = np.random.default_rng(0).integers(0, 1 << bits, (3, 64)).astype(np.uint8)
    assert pack_rows(values, bits).tolist() == [pack(row, bits) for row in values.tolist()]


def test_configs_of_any_form_are_left(tmp_path: Path) -> None:
    folder = Checkpoint().write(tmp_path / "broken")
    write_json(folder / "quantize_config.json", [1])
    edit_json(folder, "config.json", lambda config: config.update(quantization_config=["x"], auto_map=[1]))
    report = fixed(folder, dry_run=True)
    assert {"json-damaged", "quantization-config-missing"} <= {finding.code for finding in report.left}
