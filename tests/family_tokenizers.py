"""Tokenizers as the families of models have them, made on the spot."""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

Json = dict[str, Any]
_TEXT = (
    "the old bird sings under the green stone , seven houses over a river walk",
    "  two spaces\n\n in lines,\tand a tab. It's 1987; don't stop!",
)
_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
_LLAMA = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": False}


@dataclass(frozen=True, kw_only=True)
class Family:
    """A tokenizer of a family.

    Attributes:
        model_type: of config.json.
        config: of tokenizer_config.json, beside the special tokens and the template.
        make: tokenizer.json's content, without special tokens at a text's ends.
        before: the special tokens before a text.
        after: those after it.
    """

    model_type: str
    config: Mapping[str, Any]
    make: Callable[[], Json]
    before: tuple[str, ...] = ("<s>",)
    after: tuple[str, ...] = ()


def save_family(folder: Path, family: Family) -> None:
    """Write the files of a tokenizer, and a config.json with its model's type."""
    document = family.make()
    ids = {token["content"]: token["id"] for token in document["added_tokens"]}
    names = (*family.before, *family.after)
    text = {"Sequence": {"id": "A", "type_id": 0}}
    tokens: list[Json] = [{"SpecialToken": {"id": name, "type_id": 0}} for name in names]
    if names:
        document["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [*tokens[: len(family.before)], text, *tokens[len(family.before) :]],
            "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in names},
        }
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {**special, "chat_template": _TEMPLATE, "clean_up_tokenization_spaces": False, **family.config}
    contents = {
        "tokenizer.json": document,
        "tokenizer_config.json": config,
        "config.json": {"model_type": family.model_type, "vocab_size": 1024},
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")


def _sentencepiece(shape: Callable[[Tokenizer], None], trained: list[Json] = []) -> Json:  # noqa: B006 - trained once
    """Return a BPE with bytes for unknown characters, as the library's converter makes it of tokenizer.model."""
    if not trained:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))  # noqa: S106 - a token
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
        special = ["<unk>", "<s>", "</s>"]
        pieces = [*special, *(f"<0x{number:02X}>" for number in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=pieces, show_progress=False)
        tokenizer.train_from_iterator(_TEXT, trainer)
        document = json.loads(tokenizer.to_str())
        document["added_tokens"] = [token for token in document["added_tokens"] if token["content"] in special]
        trained.append(document)
    made = Tokenizer.from_str(json.dumps(trained[0]))
    shape(made)
    content: Json = json.loads(made.to_str())
    return content


def _byte_level(shape: Callable[[Tokenizer], None]) -> Json:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    shape(tokenizer)
    content: Json = json.loads(tokenizer.to_str())
    return content


def _prepended(tokenizer: Tokenizer) -> None:
    """As Llama 2 has it: a space before every stretch between special tokens."""
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.pre_tokenizer = None
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )


def _replaced(tokenizer: Tokenizer) -> None:
    """As Gemma has it: no space before a text."""
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])


def _as_it_is(_: Tokenizer) -> None:
    """Leave ByteLevel."""


def _spaced(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def _digits_apart(tokenizer: Tokenizer) -> None:
    split = pre_tokenizers.Split(Regex(r"\d| ?\w+|\s+|[^\s\w]+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def _family(shape: Callable[[Tokenizer], None], config: Mapping[str, Any], model_type: str = "llama",
            **ends: tuple[str, ...]) -> Family:  # fmt: skip
    kind = _sentencepiece if shape in (_prepended, _replaced) else _byte_level
    return Family(model_type=model_type, config=copy.deepcopy(dict(config)), make=lambda: kind(shape), **ends)


def _class(name: str, **more: Any) -> Json:
    return {"tokenizer_class": name, **more}


FAMILIES: Mapping[str, Family] = {
    "llama 2": _family(_prepended, _LLAMA),
    "llama of the legacy": _family(_prepended, {**_LLAMA, "legacy": True}),
    "llama with a prefix space": _family(_prepended, {**_LLAMA, "add_prefix_space": True}),
    "llama without a prefix space": _family(_prepended, {**_LLAMA, "add_prefix_space": False}),
    "llama whose flag asks for more": _family(_prepended, _LLAMA, before=()),
    "llama whose flag asks for less": _family(_prepended, {**_LLAMA, "add_bos_token": False}),
    "llama with an end": _family(_prepended, {**_LLAMA, "add_eos_token": True}, after=("</s>",)),
    "llama with a named end alone": _family(_prepended, {**_LLAMA, "add_eos_token": True}),
    "llama without a class": _family(_prepended, {"legacy": False}),
    "llama of bytes": _family(_digits_apart, _class("LlamaTokenizerFast", legacy=True)),
    "mistral": _family(_prepended, {**_LLAMA, "add_prefix_space": True}, "mistral"),
    "mistral whose flag asks for more": _family(_prepended, _LLAMA, "mistral", before=()),
    "mistral without a class": _family(_prepended, {}, "mistral"),
    "phi 3": _family(_prepended, {**_LLAMA, "add_bos_token": False}, "phi3", before=()),
    "code llama": _family(_prepended, _class("CodeLlamaTokenizer", prefix_token=None, middle_token=None,
                                             suffix_token=None, eot_token=None, fill_token=None)),
    "gemma": _family(_replaced, _class("GemmaTokenizer", pad_token="<unk>"), "gemma2"),  # noqa: S106 - a token
    "gemma without a start": _family(_replaced, _class("GemmaTokenizer", pad_token="<unk>"), "gemma2",  # noqa: S106
                                     before=()),
    "gpt 2": _family(_as_it_is, _class("GPT2Tokenizer"), "gpt2", before=()),
    "gpt 2 with a prefix space": _family(_spaced, _class("GPT2Tokenizer", add_prefix_space=True), "gpt2"),
    "gpt 2 with a prefix space in the file": _family(_spaced, _class("GPT2Tokenizer"), "gpt2"),
    "neox with a prefix space in the file": _family(_spaced, _class("GPTNeoXTokenizerFast"), "gpt_neox", before=()),
    "neox whose flag asks for more": _family(_as_it_is, _class("GPTNeoXTokenizerFast", add_bos_token=True),
                                             "gpt_neox", before=()),
    "olmo 2": _family(_spaced, _class("GPT2Tokenizer"), "olmo2", before=()),
    "qwen 2": _family(_digits_apart, _class("Qwen2Tokenizer", bos_token=None, unk_token=None, pad_token="</s>"),  # noqa: S106
                      "qwen2", before=()),
    "cohere": _family(_digits_apart, _class("CohereTokenizerFast", pad_token="<unk>"), "cohere"),  # noqa: S106
    "fast": _family(_spaced, _class("PreTrainedTokenizerFast")),
}  # fmt: skip
