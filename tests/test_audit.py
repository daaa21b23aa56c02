import io
import json
import os
import shutil
import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from packager.cli.audit_view import audit_json, print_audit
from packager.inputs.describe_in_child import description_by_transformers
from packager.prove.audit import AUDIT_RULES, AuditReport
from packager.prove.audit import audit as audit_folder
from packager.prove.audit.finding import Findings
from packager.prove.audit.values import unpack_rows, value_counts
from packager.system.text import format_bytes, printable, shown
from tests.audit_cases import CASES, TOKEN, WEIGHTS, Case, Q, declare, write_13b_block
from tests.checkpoints import HIDDEN, VOCAB, Checkpoint, edit_json, edit_tensors, edit_text, pack, seal, write_json
from tests.known_models import describe_known
from tests.samples import sampled

# Codes that need more than a change to a file; each has its own test below.
CODES_TESTED_ALONE = {
    "bias-unexpected",
    "tensor-dtype",
    "folder-missing",
    "folder-not-a-model",
    "file-unreadable",
    "folder-overfull",
}
# Of a repository elsewhere: test_audit_published.py.
CODES_TESTED_ALONE |= {"file-name", "file-unhashed", "header-too-large", "weights-unread"}


# As a foreign folder, whose model is described from its config.json; here without transformers.
audit = partial(audit_folder, describe=describe_known)


def codes(report: AuditReport) -> set[str]:
    return {finding.code for finding in report.findings}


@pytest.mark.parametrize(
    "checkpoint",
    [
        Checkpoint(),
        Checkpoint(bits=2, group_size=-1),
        Checkpoint(bits=3),
        Checkpoint(bits=3, group_size=16, sym=False, desc_act=True),
        Checkpoint(bits=8, desc_act=True),
        Checkpoint(desc_act=False, static_groups=True),
        Checkpoint(desc_act=True, static_groups=True),  # static order as earlier versions declared it
        Checkpoint(desc_act=True, group_size=-1),
        Checkpoint(sym=False, seed=3),
        Checkpoint(shards=3),
        Checkpoint(model_type="qwen2", shards=2),
        Checkpoint(config={"dtype": "float16"}),
    ],
    ids=repr,
)
def test_a_valid_branch_has_no_finding(tmp_path: Path, checkpoint: Checkpoint) -> None:
    folder = checkpoint.write(tmp_path / "branch")
    report = audit(folder)
    assert report.findings == ()
    assert report.passed
    facts = report.facts
    assert (facts.bits, facts.group_size) == (checkpoint.bits, checkpoint.group_size)
    assert (facts.desc_act, facts.sym) == (checkpoint.desc_act, checkpoint.sym)
    assert facts.num_linears == 14
    assert facts.weights_bytes == sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("case", CASES)
def test_a_broken_branch_has_exactly_this_finding(tmp_path: Path, case: Case) -> None:
    folder = case.checkpoint.write(tmp_path / "branch")
    case.change(folder)
    if case.sealed and (folder / "provenance.json").exists():
        seal(folder)
    report = audit(folder, complete=case.complete)
    assert codes(report) == {case.code}
    assert report.passed == (AUDIT_RULES[case.code].severity == "warning")
    assert all(finding.where and finding.message and finding.hint for finding in report.findings)


def test_negative_scales_of_a_symmetric_grid_are_valid(tmp_path: Path) -> None:
    folder = Checkpoint().write(tmp_path / "branch")

    def mirror(tensors: dict[str, Any]) -> None:
        for name, tensor in tensors.items():
            if name.endswith(".scales"):
                tensor[:, ::2] *= -1

    edit_tensors(folder, mirror)
    assert codes(audit(folder, complete=False)) == set()


def test_another_dtype_than_the_base_model_s_is_an_error_where_that_is_recorded(tmp_path: Path) -> None:
    folder = with_description(Checkpoint(), tmp_path / "branch")
    edit_tensors(folder, lambda found: found.update({"model.norm.weight": np.ones(HIDDEN, np.float64)}))
    assert "tensor-dtype" in codes(audit_folder(folder))


def test_a_bias_that_the_architecture_lacks_is_an_error_only_if_it_adds_something(tmp_path: Path) -> None:
    """AutoGPTQ, 0.7.1 included, writes biases of 0 everywhere, which change nothing."""
    folder = Checkpoint().write(tmp_path / "branch")
    edit_tensors(folder, lambda found: found.update({f"{Q}.bias": np.zeros(HIDDEN, np.float16)}))
    assert codes(audit(folder, complete=False)) == {"bias-needless"}
    edit_tensors(folder, lambda found: found[f"{Q}.bias"].__setitem__(3, 0.5))
    report = audit(folder, complete=False)
    assert codes(report) == {"bias-needless", "bias-unexpected"}
    assert [finding.code for finding in report.errors] == ["bias-unexpected"]


@pytest.mark.parametrize("declared", [False, None])
def test_scattered_groups_of_a_foreign_checkpoint_need_desc_act(tmp_path: Path, declared: bool | None) -> None:
    """VLLM drops g_idx, and computes garbage where desc_act does not say true (relative error 0.35)."""
    folder = Checkpoint(desc_act=True).write(tmp_path / "foreign")
    assert "g-idx-order" not in codes(audit(folder, complete=False))
    for name in ("provenance.json", "README.md", "LICENSE.txt"):
        (folder / name).unlink()

    def declare_it(section: dict[str, Any]) -> None:
        section.pop("desc_act")
        if declared is not None:
            section["desc_act"] = declared

    edit_json(folder, "config.json", lambda config: declare_it(config["quantization_config"]))
    edit_json(folder, "quantize_config.json", declare_it)
    report = audit(folder, complete=False)
    (found,) = [finding for finding in report.findings if finding.code == "g-idx-order"]
    assert found.severity == "error"
    assert 1 + len(found.also) == report.facts.num_linears
    assert ("is false" if declared is False else "is not declared") in found.message
    assert not report.passed


def test_every_code_has_a_case() -> None:
    assert {parameter.values[0].code for parameter in CASES} | CODES_TESTED_ALONE == set(AUDIT_RULES)
    assert all(code == code.lower() and code.replace("-", "").isalpha() for code in AUDIT_RULES)
    with pytest.raises(KeyError, match="no-such-code"):
        Findings().add("no-such-code", "here", "x")


def test_all_findings_come_at_once(tmp_path: Path) -> None:
    folder = Checkpoint().write(tmp_path / "branch")
    declare(folder, group_size=16)
    edit_json(folder, "config.json", lambda config: config.update(torch_dtype="bfloat16"))
    edit_json(folder, "tokenizer.json", lambda content: content["model"]["vocab"].update(new=99))
    edit_text(folder, "README.md", "license: llama2", "license: other")
    (folder / "model.gguf").write_bytes(b"x")
    (folder / "quantize_config.json").unlink()
    assert codes(audit(folder)) == {
        "quantize-config-missing",
        "weights-stray",
        "linear-shape",
        "dtype-disagrees",
        "tokenizer-vocab",
        "card-license-name",
        "provenance-file-missing",
        "provenance-file-unlisted",
        "provenance-file-changed",
        "provenance-disagrees",
    }


def test_equal_findings_become_one_with_all_locations(tmp_path: Path) -> None:
    folder = Checkpoint().write(tmp_path / "branch")
    edit_tensors(folder, lambda found: [found.pop(name) for name in list(found) if name.endswith("g_idx")])
    (finding,) = audit(folder, complete=False).findings
    assert finding.code == "linear-incomplete"
    assert len({finding.where, *finding.also}) == 14


def test_incomplete_leaves_out_card_and_provenance(tmp_path: Path) -> None:
    folder = Checkpoint().write(tmp_path / "branch")
    for name in ("README.md", "provenance.json", "Notice"):
        (folder / name).unlink()
    assert audit(folder, complete=False).findings == ()
    (folder / "README.md").write_text(f"/home/me {TOKEN}", encoding="utf-8")
    (folder / "provenance.json").write_text("[", encoding="utf-8")
    assert audit(folder, complete=False).findings == ()


def test_a_card_too_long_to_parse_is_a_finding(tmp_path: Path) -> None:
    folder = Checkpoint().write(tmp_path / "branch")
    edit_text(folder, "README.md", "\n# ", "\n" + "- a\n" * 250_000 + "# ")
    seal(folder)
    (finding,) = audit(folder).findings
    assert (finding.code, finding.where) == ("text-damaged", "README.md")
    assert finding.message.endswith("characters are too many for a model card")


def test_a_missing_folder_is_a_finding(tmp_path: Path) -> None:
    report = audit(tmp_path / "nowhere")
    assert codes(report) == {"folder-missing"}
    (tmp_path / "file").touch()
    assert codes(audit(tmp_path / "file")) == {"folder-missing"}


def test_a_folder_with_a_config_alone_lists_all_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mystery", "torch_dtype": "float16"}')
    report = audit(tmp_path)
    assert codes(report) == {
        "file-missing", "quantize-config-missing", "generation-config-missing", "weights-missing",
        "quantization-config-missing", "architecture-unknown",
    }  # fmt: skip
    missing = next(found for found in report.findings if found.code == "file-missing" and "README.md" in found.where)
    assert missing.message == "there is no README.md: the model card"
    assert {finding.where for finding in report.findings if finding.code == "file-missing"} == {
        "tokenizer_config.json", "tokenizer.json", "README.md", "provenance.json",
    }  # fmt: skip


def test_a_folder_that_is_no_model_is_refused_before_anything_in_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Checkpoint().write(tmp_path / "models" / "branch")
    (tmp_path / "models" / "notes.md").write_text(f"token {TOKEN}")
    monkeypatch.setattr("packager.prove.audit.list_folder", None)
    for folder, message in ((tmp_path, ""), (tmp_path / "models", '; there is one in "branch"')):
        (finding,) = audit(folder).findings
        assert (finding.code, finding.severity) == ("folder-not-a-model", "error")
        assert finding.message == f"there is neither config.json nor a weights file{message}"


def test_an_unreadable_file_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Checkpoint().write(tmp_path / "branch")
    open_file = os.open

    def refuse(path: Any, *args: Any, **kwargs: Any) -> int:
        if path == "special_tokens_map.json":
            raise PermissionError(13, "Permission denied")
        return open_file(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    assert codes(audit(folder)) == {"file-unreadable"}


@pytest.mark.parametrize("most", sampled([30, 10_000], 30))
def test_a_folder_of_very_many_files_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    if most < 10_000:
        monkeypatch.setattr("packager.prove.audit.files._MOST_FILES", most)
    for number in range(most + 1):
        (tmp_path / f"{number}.bin").touch()
    assert "folder-overfull" in codes(audit(tmp_path))


def test_weights_without_any_json_are_still_checked(tmp_path: Path) -> None:
    folder = Checkpoint(bits=3).write(tmp_path / "branch")
    edit_tensors(folder, lambda found: found[f"{Q}.scales"].__setitem__((0, 0), np.nan))
    edit_tensors(folder, lambda found: found[f"{Q}.g_idx"].__setitem__(0, 77))
    for path in folder.glob("*.json"):
        path.unlink()
    report = audit(folder, complete=False)
    assert codes(report) == {
        "file-missing", "quantize-config-missing", "generation-config-missing", "scale-not-finite", "g-idx-range",
        "tokenizer-json-missing",
    }  # fmt: skip
    assert report.facts.num_linears == 14


def test_a_hub_cache_snapshot_may_link_to_its_blobs(tmp_path: Path) -> None:
    branch = Checkpoint().write(tmp_path / "branch")
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / ("0" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in branch.iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert audit(snapshot).findings == ()
    shared = tmp_path / "blobs" / "ea" / "weights"
    shared.parent.mkdir(parents=True)
    (blobs / "model.safetensors").rename(shared)
    (blobs / "model.safetensors").symlink_to("../../blobs/ea/weights")
    assert audit(snapshot).findings == ()


def test_files_of_the_tools_that_fetched_the_folder_are_ignored(tmp_path: Path) -> None:
    folder = Checkpoint().write(tmp_path / "branch")
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "weights.bin").write_bytes(b"x")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n", encoding="utf-8")
    assert audit(folder).findings == ()


def test_a_branch_of_2023_has_the_known_findings(tmp_path: Path) -> None:
    folder = Checkpoint(weights_name="gptq_model-4bit-32g").write(tmp_path / "branch")
    edit_json(folder, "config.json", lambda config: config.pop("quantization_config"))
    old = {"bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "sym": True, "true_sequential": True}
    write_json(folder / "quantize_config.json", old)
    edit_json(folder, "generation_config.json", lambda content: content.pop("do_sample"))
    biases = {f"{Q}.bias": np.zeros(HIDDEN, np.float16)}
    edit_tensors(folder, lambda found: found.update(biases), "gptq_model-4bit-32g.safetensors")
    assert codes(audit(folder, complete=False)) == {
        "weights-name",
        "quantization-config-missing",
        "generation-sampling",
        "bias-needless",
    }


def test_unknown_architectures_are_checked_for_consistency(tmp_path: Path) -> None:
    folder = Checkpoint(model_type="mystery").write(tmp_path / "branch")

    def change(found: dict[str, Any]) -> None:
        found[f"{Q}.bias"] = np.zeros(HIDDEN, np.float16)
        name = "model.layers.1.self_attn.q_proj"
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            del found[f"{name}.{part}"]
        found[f"{name}.weight"] = np.zeros((HIDDEN, HIDDEN), np.float16)

    edit_tensors(folder, change)
    edit_json(folder, "config.json", lambda config: config.update(torch_dtype="float64"))
    expected = {"architecture-unknown", "config-value", "bias-zero", "linear-unquantized"}
    assert codes(audit(folder, complete=False)) == expected


def test_vocabularies_may_hold_any_word(tmp_path: Path) -> None:
    folder = Checkpoint().write(tmp_path / "branch")
    (folder / "merges.txt").write_text("/home/u ser\n", encoding="utf-8")
    edit_json(folder, "tokenizer.json", lambda content: content["model"]["vocab"].update({"/root/.cache": VOCAB - 1}))
    assert audit(folder, complete=False).findings == ()


@pytest.mark.parametrize(
    "text",
    [
        "see https://example.org/home/user/x and https://huggingface.co/tmp/x",
        "curl http://localhost:8000/v1/completions; curl http://127.0.0.1/x",
        "docker run --volume $PWD/tmp/x:/data ./tmp/x ~/tmp/x {cache}/tmp/x",
        "git clone git@github.com:/home/x.git; hf_hub_download(hf_token)",
        "Q:\\nWhat?\\nA:\\n",
        "write to team@example.org",
    ],
)
def test_ordinary_text_is_not_private(tmp_path: Path, text: str) -> None:
    folder = Checkpoint().write(tmp_path / "branch")
    (folder / "notes.md").write_text(text, encoding="utf-8")
    edit_json(folder, "tokenizer_config.json", lambda content: content.update(comment=text))
    assert audit(folder, complete=False).findings == ()


def test_secrets_are_not_repeated_and_private_words_are_found(tmp_path: Path) -> None:
    folder = Checkpoint().write(tmp_path / "branch")
    (folder / "notes.txt").write_text(f"made on Gpu-Box-7\ntoken {TOKEN}\n", encoding="utf-8")
    report = audit(folder, complete=False, private_words=["gpu-box-7", ""])
    assert {(finding.code, finding.where) for finding in report.findings} == {
        ("host-name", "notes.txt:1"),
        ("secret", "notes.txt:2"),
    }
    assert TOKEN not in json.dumps(audit_json(report))


def test_remote_code_is_allowed_if_the_model_has_some(tmp_path: Path) -> None:
    folder = Checkpoint().write(tmp_path / "branch")
    edit_json(folder, "config.json", lambda config: config.update(auto_map={"AutoModelForCausalLM": "x.Y"}))
    (folder / "x.py").write_text("class Y: ...\n", encoding="utf-8")
    edit_text(folder, "README.md", 'revision="main"', "trust_remote_code=True")
    seal(folder)
    assert audit(folder).findings == ()


def test_findings_name_the_line(tmp_path: Path) -> None:
    folder = Checkpoint().write(tmp_path / "branch")
    edit_text(folder, "README.md", "hf download", "huggingface-cli download")
    edit_text(folder, "README.md", "# A tiny model", "# A tiny {% model")
    seal(folder)
    lines = (folder / "README.md").read_text(encoding="utf-8").split("\n")
    wanted = {f"README.md:{number}" for number, line in enumerate(lines, 1) if "{% " in line or "-cli" in line}
    assert {finding.where for finding in audit(folder).findings} == wanted


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parent / "golden" / "cards").glob("fixture_*.md")), ids=lambda path: path.stem
)
def test_our_own_cards_pass(tmp_path: Path, path: Path) -> None:
    folder = Checkpoint().write(tmp_path / "branch")
    shutil.copy(path, folder / "README.md")
    seal(folder)
    assert codes(audit(folder)) <= {"card-base-model"}, "they are cards of other models than the test branch"


@pytest.mark.parametrize(
    ("line", "is_reported"),
    [
        ("`{{ x }}`", False),
        ("``{{ ` }}`` and `{{`", False),
        ("    {{ x }}", False),
        ("`` {{ x }} `", True),
        ("` {{ x }}", True),
        ("a {% if %} b", True),
        ("{ { x } }", False),
    ],
)
def test_template_leftovers_are_distinguished_from_code(tmp_path: Path, line: str, is_reported: bool) -> None:
    folder = Checkpoint().write(tmp_path / "branch")
    edit_text(folder, "README.md", "# A tiny model", line)
    seal(folder)
    assert codes(audit(folder)) == ({"card-template"} if is_reported else set())


def read_3bit_as_autogptq(words: list[int]) -> list[int]:
    """Unpack 32 values from 3 words as AutoGPTQ's own 3-bit code places them."""
    first, second, third = (word & 0xFFFFFFFF for word in words)
    values = [first >> (3 * position) & 7 for position in range(10)]
    values.append(first >> 30 | (second & 1) << 2)
    values += [second >> (3 * position + 1) & 7 for position in range(10)]
    values.append(second >> 31 | (third & 3) << 1)
    return values + [third >> (3 * position + 2) & 7 for position in range(10)]


@given(st.sampled_from((2, 3, 4, 8)), st.integers(1, 3), st.randoms())
def test_unpacking_agrees_with_one_long_integer(bits: int, packs: int, random: Any) -> None:
    rows = [[random.randrange(2**bits) for _ in range(32 * packs)] for _ in range(3)]
    words = np.array([pack(row, bits) for row in rows], np.int32)
    assert unpack_rows(words, bits).tolist() == rows
    if bits == 3:
        assert [read_3bit_as_autogptq(row[:3]) for row in words.tolist()] == [row[:32] for row in rows]
    expected = np.bincount(np.array(rows).ravel(), minlength=2**bits)
    assert value_counts(words, bits).tolist() == expected.tolist()
    assert value_counts(np.repeat(words[:1], 5, axis=0), bits).sum() == 5 * 32 * packs


@pytest.mark.parametrize(("bits", "word"), [(4, 0x77777777), (8, 0x7F7F7F7F), (2, 0x55555555)])
def test_symmetric_zeros_are_the_words_of_the_format(bits: int, word: int) -> None:
    middle = 2 ** (bits - 1) - 1
    assert set(pack([middle] * 32, bits)) == {word}
    assert value_counts(np.full((2, 4), word, np.int32), bits)[middle] == 8 * 32 // bits


def test_a_13b_block_is_audited_in_little_memory(tmp_path: Path) -> None:
    """One block of Llama-2-13B's shape: 127 MB of qweight and 655 MB of embeddings that are holes, never read."""
    write_13b_block(tmp_path)
    tracemalloc.start()
    report = audit(tmp_path, complete=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert codes(report) == {"file-missing", "quantize-config-missing", "generation-config-missing"}
    assert report.facts.num_linears == 7
    assert peak < 16_000_000


def test_the_view_has_one_line_per_finding_errors_first(tmp_path: Path) -> None:
    folder = Checkpoint().write(tmp_path / "branch")
    edit_json(folder, "tokenizer_config.json", lambda content: content.pop("chat_template"))
    edit_tensors(folder, lambda found: [found.pop(name) for name in list(found) if name.endswith("v_proj.g_idx")])
    stream = io.StringIO()
    print_audit(audit(folder, complete=False), Console(file=stream, width=60))
    size = (folder / WEIGHTS).stat().st_size
    assert stream.getvalue().splitlines() == [
        "error    linear-incomplete  model.layers.0.self_attn.v_proj (and 1 more): it lacks g_idx"
        "  hint: a quantized linear has qweight, qzeros, scales and g_idx",
        "warning  chat-template-missing  tokenizer_config.json: there is no chat_template"
        "  hint: add chat_template to tokenizer_config.json if the base model has one",
        "failed  1 error, 1 warning; 4 bits, group_size 32, desc_act False, sym True, 14 quantized linears, "
        f"61 tensors, {format_bytes(size)}",
    ]


def test_the_report_as_json_is_plain(tmp_path: Path) -> None:
    folder = Checkpoint(bits=8).write(tmp_path / "branch")
    (folder / "x.bin").write_bytes(b"x")
    report = json.loads(json.dumps(audit_json(audit(folder, complete=False))))
    assert report["passed"] is False
    assert report["facts"]["bits"] == 8
    assert report["findings"][0]["code"] == "weights-stray"
    assert set(report["findings"][0]) == {"code", "severity", "where", "message", "hint", "also"}


def test_untrusted_text_is_made_printable() -> None:
    assert printable("a\n\x1b[31m\ud800é") == "a\\n\\x1b[31m\\ud800é"
    assert len(printable("x" * 10_000)) < 1000
    assert [shown(value) for value in (True, None, "a", {"x": 1}, [1], 1 << 70)] == [
        "true", "null", '"a"', "an object", "a list", "a huge number",
    ]  # fmt: skip


def with_description(checkpoint: Checkpoint, folder: Path, **changes: object) -> Path:
    """Write a branch with the description of its model that builds write, or another one."""
    checkpoint.write(folder)
    edit_json(folder, "provenance.json", lambda record: record.update(model={**checkpoint.description(), **changes}))
    return folder


def test_a_branch_that_describes_its_model_needs_no_transformers(tmp_path: Path) -> None:
    folder = with_description(Checkpoint(model_type="qwen2"), tmp_path / "branch")
    assert audit_folder(folder).findings == ()
    edit_tensors(folder, lambda found: [found.pop(f"{Q}.bias"), found.pop("model.norm.weight")])
    assert {"bias-missing", "tensor-missing"} <= codes(audit_folder(folder))


@pytest.mark.parametrize(
    "changes",
    [
        {"kinds": []},
        {"tensors": [{"names": "model.layers.{0..99999999}.x", "dtype": "F16", "shape": [1]}]},
        {"hidden_size": "64"},
        {"blocks_path": None},
        {"more": 1},
    ],
    ids=str,
)
def test_a_description_that_cannot_be_is_a_finding(tmp_path: Path, changes: dict[str, object]) -> None:
    folder = with_description(Checkpoint(), tmp_path / "branch", **changes)
    found = [finding for finding in audit_folder(folder).findings if finding.code != "architecture-unknown"]
    assert [(finding.code, finding.where) for finding in found] == [("provenance-invalid", "provenance.json: model")]


def test_without_a_description_only_what_holds_for_any_model_is_checked(tmp_path: Path) -> None:
    folder = Checkpoint().write(tmp_path / "branch")
    (finding,) = audit_folder(folder).findings
    assert finding.code == "architecture-unknown"
    assert "provenance.json does not describe" in finding.message


@pytest.mark.slow
def test_transformers_describes_the_model_of_a_foreign_folder(tmp_path: Path, in_process: None) -> None:
    folder = Checkpoint().write(tmp_path / "branch")
    describe = description_by_transformers()
    assert audit_folder(folder, describe=describe).findings == ()
    edit_tensors(folder, lambda found: found.pop("model.norm.weight"))
    assert codes(audit_folder(folder, complete=False, describe=describe)) == {"tensor-missing"}
    other = Checkpoint(model_type="mystery").write(tmp_path / "other")
    (finding,) = audit_folder(other, describe=describe).findings
    assert finding.code == "architecture-unknown"
    assert "transformers does not know this model" in finding.message
