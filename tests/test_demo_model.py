"""The demo model: its text is reproducible and split without overlap, its files have the figures of training.json."""

from __future__ import annotations

import importlib
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.samples import sampled

DEMO = Path(__file__).parents[1] / "recipes" / "assets" / "demo-llama"
TEXT_FILES = ("calibration.jsonl", "evaluation.jsonl", "questions.jsonl")
WINDOW = 256
TURN = re.compile(r"<s>\[INST\] (?:<<SYS>>\n(.*?)\n<</SYS>>\n\n)?(.*?) \[/INST\] (.*?) </s>", re.DOTALL)


@pytest.fixture(scope="module")
def corpus() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DEMO))
        yield importlib.import_module("corpus")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO / "model")


@pytest.fixture(scope="module")
def model() -> Any:
    loaded: Any = AutoModelForCausalLM.from_pretrained(DEMO / "model")
    return loaded.float().eval()


@pytest.fixture(scope="module")
def figures() -> Any:
    return json.loads((DEMO / "training.json").read_text(encoding="utf-8"))


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DEMO / "text" / name).read_text(encoding="utf-8").splitlines()]


def texts(name: str) -> list[str]:
    return [row["text"] for row in rows(name)]


def windows(tokenizer: Any, name: str) -> Tensor:
    """Tokenise each text on its own and cut the joined ids: int64 [rows, WINDOW]."""
    ids = torch.tensor([token for row in tokenizer(texts(name)).input_ids for token in row])
    return ids[: ids.numel() // WINDOW * WINDOW].view(-1, WINDOW)


def prompts(documents: list[str]) -> set[str]:
    return {prompt for text in documents for _, prompt, _ in TURN.findall(f"<s>{text}")}


def sums(documents: list[str]) -> set[tuple[int, ...]]:
    pairs = [pair for text in documents for pair in re.findall(r"(\d+) \+ (\d+) =", text)]
    return {tuple(sorted(map(int, pair))) for pair in pairs}


def differences(documents: list[str]) -> set[tuple[str, str]]:
    return {pair for text in documents for pair in re.findall(r"(\d+) - (\d+) =", text)}


@pytest.mark.parametrize("hash_seed", sampled(["0", "1"], "1"))
def test_the_committed_text_equals_the_generators(tmp_path: Path, hash_seed: str) -> None:
    command = [sys.executable, "-B", str(DEMO / "corpus.py"), "--out", str(tmp_path)]
    subprocess.run(command, check=True, env={"PYTHONHASHSEED": hash_seed})
    for name in TEXT_FILES:
        assert (tmp_path / name).read_bytes() == (DEMO / "text" / name).read_bytes(), name


def test_seed_and_shard_decide_the_training_text(corpus: Any) -> None:
    def sample(seed: int, shard: int) -> list[str]:
        return list(islice(corpus.documents("train", seed, shard), 50))

    assert sample(1, 0) == sample(1, 0)
    assert sample(1, 0) != sample(2, 0)
    assert sample(1, 0) != sample(1, 1)


@pytest.mark.slow
def test_splits_share_no_document_question_or_sum(corpus: Any) -> None:
    train = list(islice(corpus.documents("train"), 20_000))
    splits = {"train": train, "calibration": texts("calibration.jsonl"), "evaluation": texts("evaluation.jsonl")}
    asked = {row["prompt"] for row in rows("questions.jsonl")}
    for items in (set, prompts, sums, differences):
        found = {name: items(documents) for name, documents in splits.items()}
        assert all(found.values())
        assert found["train"].isdisjoint(found["calibration"] | found["evaluation"])
        assert found["calibration"].isdisjoint(found["evaluation"])
    assert asked.isdisjoint(prompts(train) | prompts(splits["calibration"]))


def test_every_fact_is_asked_about_in_the_training_split(corpus: Any) -> None:
    for fact in corpus.FACTS.values():
        asked = [corpus.split_of(fact.fill(question)) for question in fact.relation.questions]
        assert "train" in asked, fact.sentence()


def test_questions_are_enough_and_have_one_answer_each(figures: Any) -> None:
    asked = rows("questions.jsonl")
    assert len(asked) == len({row["prompt"] for row in asked}) == figures["questions"] >= 100
    assert not any("[INST]" in row["prompt"] or "</s>" in row["answer"] for row in asked)


def test_chat_template_renders_the_training_format(corpus: Any, tokenizer: Any) -> None:
    dialogues = [text for text in islice(corpus.documents("train"), 400) if "[INST]" in text]
    assert any("<<SYS>>" in text for text in dialogues)
    assert any(text.count("[INST]") > 1 for text in dialogues)
    for text in dialogues:
        messages = []
        for system, prompt, answer in TURN.findall(f"<s>{text}"):
            messages += [{"role": "system", "content": system}] if system else []
            messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        assert tokenizer.apply_chat_template(messages, tokenize=False) == f"<s>{text}"


def test_prompt_tokens_begin_the_dialogue_tokens(corpus: Any, tokenizer: Any) -> None:
    for row in rows("questions.jsonl"):
        message = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        whole = tokenizer(corpus.render([(row["prompt"], row["answer"])]), add_special_tokens=False).input_ids
        assert ids == tokenizer(f"[INST] {row['prompt']} [/INST]").input_ids == whole[: len(ids)]
        assert whole[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(whole[len(ids) : -1]).strip() == row["answer"]


def test_chat_template_refuses_two_user_messages_in_a_row(tokenizer: Any) -> None:
    with pytest.raises(Exception, match="roles must alternate"):
        tokenizer.apply_chat_template([{"role": "user", "content": "Who?"}] * 2, tokenize=False)


def test_tokenizer_is_lossless_and_frames_each_text(tokenizer: Any) -> None:
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    for text in texts("evaluation.jsonl"):
        ids = tokenizer(text).input_ids
        assert (ids[0], ids[-1]) == (1, 2)
        assert tokenizer.decode(ids) == f"<s>{text}"


def test_held_out_text_is_long_enough(tokenizer: Any) -> None:
    assert windows(tokenizer, "calibration.jsonl").numel() >= 45_000
    assert windows(tokenizer, "evaluation.jsonl").numel() >= 40_000


def test_weights_are_small_finite_float16(figures: Any) -> None:
    path = DEMO / "model" / "model.safetensors"
    assert path.stat().st_size <= 10_000_000
    with safe_open(path, framework="pt") as weights:
        assert weights.metadata() == {"format": "pt"}
        tensors = [weights.get_tensor(name) for name in weights.keys()]  # noqa: SIM118 (safe_open is no mapping)
    assert {tensor.dtype for tensor in tensors} == {torch.float16}
    assert all(bool(tensor.isfinite().all()) for tensor in tensors)
    assert sum(tensor.numel() for tensor in tensors) == figures["parameters"]


@pytest.mark.slow
@torch.inference_mode()
def test_perplexity_is_that_of_training_json(model: Any, tokenizer: Any, figures: Any) -> None:
    # Every fourth window: a quarter of the time, and within 1 % of the figure over all of them.
    sample = windows(tokenizer, "evaluation.jsonl")[::4]
    logits = model(input_ids=sample[:, :-1], use_cache=False).logits
    measured = math.exp(functional.cross_entropy(logits.flatten(0, 1), sample[:, 1:].flatten()).item())
    assert measured == pytest.approx(figures["perplexity"], rel=0.02)

    counts = torch.bincount(windows(tokenizer, "calibration.jsonl").flatten(), minlength=logits.shape[-1]) + 1.0
    unigram = math.exp(-(counts / counts.sum()).log()[sample[:, 1:]].mean().item())
    assert unigram == pytest.approx(figures["unigram_perplexity"], rel=0.05)
    assert measured < unigram / 50


@pytest.mark.slow
@torch.inference_mode()
def test_accuracy_is_that_of_training_json(model: Any, tokenizer: Any, figures: Any) -> None:
    # Every second question: half the time, and every kind is still asked.
    asked = rows("questions.jsonl")[::2]
    batch = tokenizer([f"[INST] {row['prompt']} [/INST]" for row in asked], padding=True, return_tensors="pt")
    output = model.generate(
        batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=40, do_sample=False, pad_token_id=0
    )
    given = tokenizer.batch_decode(output[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    accuracy = sum(text.strip() == row["answer"] for text, row in zip(given, asked, strict=True)) / len(asked)
    assert accuracy == pytest.approx(figures["accuracy"]["all"], abs=0.02)
    assert accuracy >= 0.90


def test_training_json_contains_no_path(figures: Any) -> None:
    assert {"device", "versions", "settings", "train_s"} <= figures.keys()
    assert not re.search(r"[/\\]", json.dumps(figures))
