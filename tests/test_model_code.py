"""What a model's chat template and tokenizer may do: the same as in transformers, but not for long and not in here."""

import json
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from packager.errors import CalibrationError
from packager.inputs import limits
from packager.inputs.chat import encode_texts
from packager.inputs.limits import Chat, ModelProcess, TextGroup
from tests.samples import sampled
from tests.tiny_recipe import save_tokenizer, sentences

HI: Mapping[str, str] = {"role": "user", "content": "Hi <b> & \u00fc"}
CHAT = Chat(messages=({"role": "system", "content": "Be kind."}, HI), add_generation_prompt=True)
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\\n' + m['content']}}{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "special tokens": "{{ bos_token }}{% for m in messages %}{{ m.content | trim }}{{ eos_token }}{% endfor %}",
    "blocks": "{% for m in messages %}\n  {% if loop.first %}\n    {{ m.role }}\n  {% endif %}\n{% endfor %}\n",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "loop controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "json": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "tools": "{{ 'none' if not tools }}{{ 'none' if documents is none }}{{ xml is defined }}",
    "dict": "{{ dict(a=1) }}{{ dict.fromkeys('ab') }}",
    "date": "{% macro day() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}{{ day() }}{{ strftime_now is defined }}",
}


@pytest.fixture(scope="module")
def process() -> Iterator[ModelProcess]:
    with ModelProcess() as process:
        yield process


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_templates_render_as_in_transformers(
    process: ModelProcess, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    monkeypatch.setattr(chat_template_utils, "datetime", SimpleNamespace(now=lambda: datetime(2024, 7, 26)))
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **special)
    chats = [CHAT, Chat(messages=(HI,))]
    wanted = [
        tokenizer.apply_chat_template(
            [dict(message) for message in chat.messages], chat_template=template, tokenize=False,
            add_generation_prompt=chat.add_generation_prompt,
        )
        for chat in chats
    ]  # fmt: skip
    assert process.render_chats(template, tokenizer.special_tokens_map, chats) == wanted


HOSTILE_TEMPLATES = {
    "loops": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "processor time"),
    "power": ("{{ 9 ** 99999999 }}", "processor time"),
    "memory": ("{{ 'x' * 9999999999 }}", "too much memory"),
    "long": ("{{ 'x' * 30000000 }}", "more than 20000000 characters"),
    "doubling": ("{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}", ""),
    "recursion": ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "recursion"),
    "nesting": ("{{" + "(" * 5000, "recursion"),
    "escape": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "attribute": ("{{ messages.append.__self__.__class__ }}", "unsafe"),
    "change": ("{{ messages.append(1) }}", "unsafe|not safely callable"),
    "files": ("{% include '/etc/passwd' %}", "no loader"),
    "surrogate": ("{{ '\\ud800' }}", "surrogates not allowed"),
    "syntax": ("{% for %}", "Expected"),
    "refusal": ("{{ raise_exception('only users') }}", "for messages of system, user: only users"),
    "undefined": ("{{ a.b.c }}", "undefined"),
    "type": ("{{ 1 + 'a' }}", "unsupported operand"),
}


SOME = ("memory", "recursion", "escape", "files", "syntax")  # a test below has one that takes too much time


@pytest.mark.parametrize(
    ("template", "reason"),
    sampled(HOSTILE_TEMPLATES.values(), *(HOSTILE_TEMPLATES[name] for name in SOME)),
    ids=HOSTILE_TEMPLATES,
)
def test_hostile_templates_are_refused(
    process: ModelProcess, monkeypatch: pytest.MonkeyPatch, template: str, reason: str
) -> None:
    monkeypatch.setattr(limits, "RENDER_CPU_S", 1)
    started = time.monotonic()
    with pytest.raises(CalibrationError, match="cannot be rendered") as caught:
        process.render_chats(template, {"bos_token": "<s>"}, [CHAT])
    assert any(part in caught.value.why.lower() for part in reason.lower().split("|"))
    assert time.monotonic() - started < 20  # the limit of time on the clock is 24 s
    assert len(caught.value.why) < 1000


def test_a_template_sees_nothing_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    environ = limits._environ()
    assert set(environ) == {"PYTHONPATH", "RAYON_NUM_THREADS", "MALLOC_ARENA_MAX", "LC_ALL"}
    assert "hf_secret" not in json.dumps(environ)


@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_texts_are_encoded_as_in_transformers(process: ModelProcess, tmp_path: Path, add_special_tokens: bool) -> None:
    save_tokenizer(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    texts = [sentences(5, seed=1), "", "<s> old </s>", "\u00fc\U0001f600", "a" * 1000]
    groups = [
        TextGroup(texts=texts, add_special_tokens=add_special_tokens),
        TextGroup(texts=[], add_special_tokens=True),
    ]
    wanted = tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    assert encode_texts(tokenizer, groups, process) == [wanted, []]


def tokenizer_with(pattern: str) -> Tokenizer:
    vocab = {"a": 0, "[UNK]": 1}
    tokenizer = Tokenizer(models.WordLevel(vocab, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return tokenizer


def test_a_pattern_of_exponential_time_ends(process: ModelProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_ENCODE_CPU_S", 1)
    group = TextGroup(texts=["a" * 5000 + "!"] * 5, add_special_tokens=False)
    with pytest.raises(CalibrationError, match="cannot encode the texts") as caught:
        process.encode(tokenizer_with("(a|aa|a?a)+$").to_str(), [group])
    assert caught.value.why


def damaged(document: dict[str, Any], **changes: Any) -> bytes:
    return json.dumps({**document, **changes}).encode()


def hostile_tokenizers() -> dict[str, bytes]:
    """Return contents of tokenizer.json that the library must refuse, or that must not harm this process."""
    sound: dict[str, Any] = json.loads(tokenizer_with("a").to_str())
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    large = "(((a{1,999}){1,999}){1,999}){1,999}"
    deep: dict[str, Any] = {"type": "Sequence", "pretokenizers": []}
    for _ in range(200):
        deep = {"type": "Sequence", "pretokenizers": [deep]}
    return {
        "empty": b"",
        "no model": damaged(sound, model=None),
        "no type": damaged(sound, model={}),
        "ids": damaged(sound, model={"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "a"}),
        "large ids": damaged(sound, model={"type": "BPE", "vocab": {"a": 2**32}, "merges": []}),
        "merges": damaged(sound, model={"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}),
        "pattern": damaged(sound, pre_tokenizer={**split, "pattern": {"Regex": "(" * 1000}}),
        "large pattern": damaged(sound, pre_tokenizer={**split, "pattern": {"Regex": large}}),
        "charsmap": damaged(sound, normalizer={"type": "Precompiled", "precompiled_charsmap": "/////w=="}),
        "short charsmap": damaged(sound, normalizer={"type": "Precompiled", "precompiled_charsmap": "AA=="}),
        "deep": damaged(sound, pre_tokenizer=deep),
        "unigram": damaged(sound, model={"type": "Unigram", "vocab": [], "unk_id": 5}),
    }  # fmt: skip


@pytest.mark.parametrize("name", hostile_tokenizers())
def test_a_damaged_tokenizer_is_an_error_or_none(process: ModelProcess, tmp_path: Path, name: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(hostile_tokenizers()[name])
    if name == "large pattern":  # it is compiled when it is used
        process.check_tokenizer_file(path)
        return
    with pytest.raises(CalibrationError, match="the base model's tokenizer cannot be read") as caught:
        process.check_tokenizer_file(path)
    assert 0 < len(caught.value.why) < 1000


@pytest.mark.slow
def test_each_question_has_limits_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RENDER_CPU_S", 1)
    with ModelProcess() as process:
        for _ in range(2):  # together more than the memory of a question
            large = "{% set many = bos_token * 600000000 %}{{ many[:1] }}"
            assert process.render_chats(large, {"bos_token": "x"}, [CHAT]) == ["x"]
        with pytest.raises(CalibrationError, match="cannot be rendered"):
            process.render_chats(HOSTILE_TEMPLATES["loops"][0], {}, [CHAT])
        assert process.render_chats("a", {}, [CHAT]) == ["a"]


def test_a_process_that_is_gone_or_late_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "model_code", SimpleNamespace(__name__="absent"))
    with ModelProcess() as process, pytest.raises(CalibrationError, match="cannot be rendered") as caught:
        process.render_chats("a", {}, [CHAT])
    assert "No module named" in caught.value.why
    monkeypatch.undo()
    monkeypatch.setattr(limits, "_WALL_S", 0)
    monkeypatch.setattr(limits, "_WALL_FACTOR", 0)
    started = time.monotonic()
    with ModelProcess() as process, pytest.raises(CalibrationError, match="cannot be rendered") as caught:
        process.render_chats(HOSTILE_TEMPLATES["loops"][0], {}, [CHAT])
    assert "processor time" in caught.value.why
    assert time.monotonic() - started < 5  # the fork is killed, not waited for


def test_added_tokens_are_kept(process: ModelProcess, tmp_path: Path) -> None:
    tokenizer = tokenizer_with("a")
    tokenizer.add_special_tokens([AddedToken("<x>", special=True)])
    assert process.encode(tokenizer.to_str(), [TextGroup(texts=["a<x>"], add_special_tokens=False)]) == [[[0, 2]]]
    split = process.encode(
        tokenizer.to_str(), [TextGroup(texts=["a<x>"], add_special_tokens=False)], split_special_tokens=True
    )
    assert 2 not in split[0][0]
    tokenizer.post_processor = processors.TemplateProcessing(single="<x> $A", special_tokens=[("<x>", 2)])
    groups = [TextGroup(texts=["a"], add_special_tokens=added) for added in (True, False)]
    assert process.encode(tokenizer.to_str(), groups) == [[[2, 0]], [[0]]]
