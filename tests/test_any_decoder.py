"""Any decoder of transformers: described, run block by block, quantized, packed; docs/reference/architectures.md."""

import json
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any, cast

import pytest
from transformers.models.llama import modeling_llama

from packager.cli.plan_view import left_lines
from packager.errors import SourceError
from packager.model import trace
from packager.model.architecture import architecture_of
from packager.model.checkpoint import block_keys
from packager.model.describe import describe
from tests.proven_decoders import check_forward, facts_of, stored_in
from tests.samples import sampled
from tests.tiny_decoders import NAMES, tiny_decoder

README = Path(__file__).parent.parent / "README.md"
PROVEN = json.loads((Path(__file__).parent.parent / "docs/reference/architectures.json").read_text())
# Dense; Conv1D; linear attention; a tower that reads images; blocks of several kinds and experts; experts stored as one
# tensor, which transformers' table of conversions does not name one by one.
SAMPLE = ("llama", "gpt2", "qwen3_5_text", "llava", "lfm2_moe", "gemma4_text:experts")


@pytest.mark.parametrize("name", sampled(SAMPLE, "lfm2_moe"))
def test_a_sample_is_as_the_reference_says(name, tmp_path):
    assert facts_of(name, tmp_path) == PROVEN[name]


@pytest.mark.slow
def test_loaded_tensors_outlive_the_computing_of_buffers(tmp_path):
    """ZayaModel has parameters of its own, which its initialisation would overwrite."""
    base = tiny_decoder("zaya", tmp_path)
    check_forward("zaya", base, stored_in(base))


@pytest.mark.long
@pytest.mark.pinned
@pytest.mark.parametrize("name", [name for name in NAMES if name in PROVEN and name not in SAMPLE])
def test_each_is_as_the_reference_says(name, tmp_path):
    """Of a refused one the fact counts: the reason quotes errors of transformers and torch, which differ by machine."""
    facts = facts_of(name, tmp_path)
    assert ("refused" in facts) is ("refused" in PROVEN[name])
    assert "refused" in facts or facts == PROVEN[name]


def test_a_model_that_changes_its_embeddings_in_place_does_not_change_the_states(tmp_path):
    base = tiny_decoder("git", tmp_path)
    check_forward("git", base, stored_in(base))


def test_an_input_that_is_changed_in_place_is_another_input(tmp_path, monkeypatch):
    """The Hessian of gate_proj is not that of up_proj where the states are scaled between the two."""

    def forward(self, states):
        gate = self.act_fn(self.gate_proj(states))
        return self.down_proj(gate * self.up_proj(states.mul_(2)))

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    monkeypatch.setattr(trace, "_kept", OrderedDict())
    groups = describe(tiny_decoder("llama", tmp_path), None).kinds[0].groups
    found = [[linear.module for linear in group.linears] for group in groups]
    assert found[2:] == [["mlp.gate_proj"], ["mlp.up_proj"], ["mlp.down_proj"]]


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_config_that_asks_for_an_attention_that_is_not_installed_is_built(tmp_path, key):
    folder = tiny_decoder("llama", tmp_path)
    before = describe(folder, None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: "flash_attention_2"}))
    assert describe(folder, None).kinds == before.kinds


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "leftovers"),
    [
        ("qwen3_moe", {"output_router_logits": True}),
        ("llama", {"output_hidden_states": True}),
        ("llama", {"return_dict": False}),
        ("llama", {"output_attentions": True, "attn_implementation": "eager"}),
        ("llava", {"text_config": {"output_hidden_states": True}}),
    ],
    ids=["router logits", "hidden states", "tuples", "attentions", "of a part"],
)
def test_what_a_training_run_asked_for_changes_nothing(tmp_path, name, leftovers):
    folder = tiny_decoder(name, tmp_path)
    before = describe(folder, None)
    config = json.loads((folder / "config.json").read_text())
    for key, value in leftovers.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(config))
    assert describe(folder, None).kinds == before.kinds
    if "return_dict" not in leftovers:  # with which the check itself would get a tuple from transformers
        check_forward(name, folder, stored_in(folder))


def test_most_decoders_are_built():
    refused = [name for name, facts in PROVEN.items() if "refused" in facts]
    assert PROVEN.keys() <= set(NAMES)
    assert len(PROVEN) - len(refused) >= 55
    assert len(refused) <= 12


def test_experts_that_no_linear_holds_are_left_by_name(tmp_path):
    """Llama 4 has a forward of its own for them. The experts of GPT-OSS have biases."""
    for name, module, reason in (
        ("llama4_text", "feed_forward.experts", "its weights of three dimensions are no linear's"),
        ("gpt_oss", "mlp.experts", "its experts have biases, which no runtime was proven to read"),
    ):
        locked = describe(tiny_decoder(name, tmp_path / name), None)
        assert all(kind.left[module].startswith(reason) for kind in locked.kinds)
        architecture = architecture_of(locked, "")
        (line,) = [line for line in left_lines(architecture) if module in line]
        assert line.startswith(f"Not quantized, because {reason}")
        path = re.escape(architecture.blocks_path)
        dynamic = cast(dict[str, Any], block_keys(architecture)["dynamic"])
        assert rf"-:^{path}\.\d+\.{re.escape(module)}$" in dynamic


def test_experts_that_are_not_understood_are_left_and_the_rest_is_described(tmp_path, monkeypatch):
    def unknown(name, module):
        raise SourceError("the experts are not understood", where=name, why="they have another parameter")

    monkeypatch.setattr("packager.model.described_groups.recognised", unknown)
    locked = describe(tiny_decoder("gemma4_text:experts", tmp_path), None)
    for kind in locked.kinds:
        assert kind.left["experts"] == "the experts are not understood: they have another parameter"
        assert kind.groups


def test_a_config_without_a_dtype_needs_the_weights(tmp_path):
    folder = tiny_decoder("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="does not give the dtype of the weights") as caught:
        describe(folder, None)
    assert caught.value.why == "torch_dtype (or dtype) is missing"


def test_the_readme_counts_the_mixtures_of_experts():
    """A router is left wherever there are experts; experts that are left are a module of that name."""
    reasons = {
        name: {module: reason for kind in facts.get("kinds", ()) for module, reason in kind["left"].items()}
        for name, facts in PROVEN.items()
    }
    left = {name for name, found in reasons.items() if any(module.endswith(".experts") for module in found)}
    routed = {name for name, found in reasons.items() if "it routes tokens to experts" in found.values()}
    counted = re.search(r"The experts of (\d+) of them are quantized, of (\d+) left", README.read_text())
    assert counted is not None
    assert [int(number) for number in counted.groups()] == [len(routed - left), len(left)]


def test_the_readme_counts_the_decoders_that_are_proven():
    counted = re.search(r"\[(\d+) architectures\]\(docs/reference/architectures.md\)", README.read_text())
    assert counted is not None
    assert int(counted[1]) == sum("refused" not in facts for facts in PROVEN.values())
