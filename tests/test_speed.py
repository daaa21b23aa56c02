"""Speeds: decoding is timed token by token, and a card shows figures of runs where the recipe asks for them."""

import importlib.util
import socket
from types import ModuleType
from typing import Any

import pytest

from packager.card import CardTexts, render_card
from packager.card.speed import speed_rows
from packager.prove.loaders import ISOLATED
from packager.receipt import LoaderRunRecord
from packager.recipe import Recipe
from packager.system.processor import processor_name
from tests import card_fixtures as fixtures
from tests.card_page import assert_well_formed, tables
from tests.golden_files import check_golden

RUN = LoaderRunRecord(
    loader="transformers", device="cuda", load_s=4.0, forward_s=0.25, num_tokens=256, seq_len=64,
    peak_memory_bytes=7_900_000_000, beside=3, decode_tokens=45, decode_s=1.5, machine="NVIDIA H100 (fixture)",
)  # fmt: skip
UNTIMED = RUN.model_copy(
    update={"loader": "onnxruntime", "device": "cpu", "decode_tokens": 0, "decode_s": None, "machine": ""}
)


@pytest.fixture(scope="module")
def isolated() -> ModuleType:
    spec = importlib.util.spec_from_file_location("isolated_for_speed", ISOLATED)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_prompt_has_a_time_of_its_own(isolated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two answers: a prompt of 10 s and two tokens of 1 s and 2 s; a prompt of 20 s and one token of 4 s.
    times = iter([0.0, 10.0, 11.0, 13.0, 100.0, 120.0, 124.0])
    monkeypatch.setattr(isolated.time, "perf_counter", lambda: next(times))
    clock = isolated.DecodeClock()
    for prompt, tokens in ((5, 3), (7, 2)):
        clock.begin(prompt)
        for _ in range(tokens):
            clock.tick()
    assert clock.fields() == {"decode_tokens": 3, "decode_s": 7.0, "prefill_tokens": 12, "prefill_s": 30.0}


def test_answers_of_one_token_have_no_time(isolated: ModuleType) -> None:
    clock = isolated.DecodeClock()
    for _ in range(3):
        clock.begin()
        clock.tick()
    assert clock.fields() == {"decode_tokens": 0, "decode_s": None, "prefill_tokens": 0, "prefill_s": None}


def test_a_timed_answer_is_the_answer(isolated: ModuleType, tmp_path: Any) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from tests.tiny_models import save_model

    save_model(tmp_path, "llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = [5, 6, 7]
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    clock = isolated.DecodeClock()
    made = isolated.greedy(torch, model, tmp_path, ids[:3], 6, clock)
    assert made == ids[3 : 3 + len(made)]
    assert (clock.tokens, clock.prompt_tokens) == (len(made) - 1, 3)
    assert min(clock.seconds, clock.prompt_seconds) > 0


def llama(*, speed: bool) -> tuple[Recipe, Any]:
    recipe = fixtures.llama_recipe(speed=speed)
    return recipe, fixtures.llama_receipts(recipe)


def test_what_was_not_measured_is_said_to_be(update_golden: bool) -> None:
    recipe, receipts = llama(speed=True)
    text = render_card(recipe, CardTexts(), receipts, "llama", "main", runs={"main": (RUN, UNTIMED)})
    assert_well_formed(text)
    (rows,) = [table for table in tables(text) if "Decode, tokens/s" in table[0]]
    passed = sum(record.status == "passed" for receipt in receipts for record in receipt.loaders)
    assert len(rows) == 1 + passed
    # 256 tokens in 0.25 s; 45 tokens in 1.5 s.
    assert rows[2][1:] == ["Transformers", "NVIDIA H100 (fixture)", "1,024", "30", "7.90\u00a0GB", "3"]
    assert rows[3][1:] == ["ONNX Runtime", "cpu", "1,024", "not measured", "7.90\u00a0GB", "3"]
    assert rows[1][2:] == ["not measured"] * 4 + ["-"]
    start = text.index("<details>\n<summary>How fast")
    check_golden("cards/speed.md", text[start : text.index("</details>", start)], update=update_golden)


def test_a_card_has_no_times_unless_it_is_asked_for_them() -> None:
    recipe, receipts = llama(speed=False)
    assert "tokens/s" not in render_card(recipe, CardTexts(), receipts, "llama", "main", runs={"main": (RUN,)})
    assert recipe.digest() != llama(speed=True)[0].digest()


def test_rows_are_in_the_order_of_branches_and_not_of_speeds() -> None:
    _, receipts = llama(speed=True)
    fast = RUN.model_copy(update={"forward_s": 0.001})
    rows = speed_rows(receipts, {receipts[3].branch: (fast,)})
    assert list(dict.fromkeys(row.branch for row in rows)) == [receipt.branch for receipt in receipts]


def test_a_processor_s_name_has_no_name_of_the_machine() -> None:
    name = processor_name()
    assert name.endswith(" threads")
    assert socket.gethostname().lower() not in name.lower()
