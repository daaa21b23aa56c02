"""What transformers makes of a base model's folder, and of a branch, whose weights code of this file unpacks."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

TEXTS = (
    "old bird sings over the stone.", "<s>old</s> zq <|im_start|>user <|pad|>", "  a \n\n tab\t.",
    "caf\xe9 量 \U0001f99c",
    " walks don't ,stop .", "",
)  # fmt: skip
_USER, _ANSWER = {"role": "user", "content": "old bird"}, {"role": "assistant", "content": " sings "}
_CHATS = ([_USER], [{"role": "system", "content": "be green"}, _USER], [_USER, _ANSWER, _USER], [_USER, _ANSWER])
_TEMPLATES = (None, "tool_use", "rag")
_SAMPLING = ("temperature", "top_p", "top_k")


class MadeUpError(Exception):
    """transformers would fill tensors with random numbers."""


@dataclass(frozen=True, kw_only=True)
class View:
    """A model as its readers get it.

    Attributes:
        logits: of the rows, float32.
        tokens: of some texts.
        chats: some conversations rendered, or the class of the error.
        ends: the ids that end a text, without those that no row of the embedding has.
        sampling: the values that generating uses, where it samples.
        generates: whether it generates.
        tokenizer: the tokenizer.
    """

    logits: Tensor
    tokens: object
    chats: object
    ends: frozenset[int]
    sampling: object
    generates: bool
    tokenizer: Any


def view_of_base(folder: Path, rows: Tensor) -> View:
    """Open a base model as people do; raises whatever transformers does."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False, attn_implementation="eager", output_loading_info=True
    )
    model, info = loaded
    if info["missing_keys"] or info["mismatched_keys"]:
        raise MadeUpError(str(info))
    return _view(folder, model, model.generation_config, rows)


def view_of_branch(folder: Path, rows: Tensor) -> View:
    """Open a branch of which the weights are unpacked into a folder beside; the rest is the branch's."""
    unpacked = folder.with_name("unpacked")
    shutil.copytree(folder, unpacked, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(_unpacked(folder), unpacked / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_bytes())
    del config["quantization_config"]
    (unpacked / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return view_of_base(unpacked, rows)


def _view(folder: Path, model: Any, generation: Any, rows: Tensor) -> View:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=rows, use_cache=False).logits.float()
    vocabulary = model.config.get_text_config().vocab_size
    ends = generation.eos_token_id
    listed = ends if isinstance(ends, list) else [ends]
    sampled = bool(generation.do_sample) and generation.temperature != 0  # which transformers refuses to sample at
    return View(
        logits=logits,
        tokens=[_tokens(tokenizer, text) for text in TEXTS],
        chats=[_chat(tokenizer, chat, name) for chat in _CHATS for name in _TEMPLATES],
        ends=frozenset(number for number in listed if isinstance(number, int) and 0 <= number < vocabulary),
        sampling={name: getattr(generation, name, None) for name in _SAMPLING} if sampled else "greedy",
        generates=_generates(model, generation, rows),
        tokenizer=tokenizer,
    )


def _tokens(tokenizer: Any, text: str) -> object:
    ids = tokenizer(text)["input_ids"]
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids, plain, tokenizer.decode(plain, skip_special_tokens=True)


def _chat(tokenizer: Any, chat: Sequence[Mapping[str, str]], name: str | None) -> object:
    template = tokenizer.chat_template
    if name is not None:
        if not isinstance(template, dict) or name not in template:
            return "no such template"
        template = template[name]
    try:
        return [
            tokenizer.apply_chat_template(chat, chat_template=name and template, tokenize=False, **more)
            for more in ({}, {"add_generation_prompt": True})
        ]
    except Exception as error:  # noqa: BLE001 - a template raises what it likes
        return type(error).__name__


def _generates(model: Any, generation: Any, rows: Tensor) -> bool:
    model.generation_config = generation
    try:
        model.generate(input_ids=rows[:1, :8], attention_mask=torch.ones(1, 8, dtype=torch.int64), do_sample=False,
                       max_new_tokens=2, max_length=None, pad_token_id=0)  # fmt: skip
    except Exception:  # noqa: BLE001 - whatever a value makes it raise
        return False
    return True


def _unpacked(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a branch of 8 bits in the format gptq, its linears as they were: float32, [out, in]."""
    stored: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        stored |= load_file(path)
    bits = json.loads((folder / "config.json").read_bytes())["quantization_config"]["bits"]
    linears = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
    parts = ("qweight", "qzeros", "scales", "g_idx")
    found = {name: tensor.float() for name, tensor in stored.items() if name.rpartition(".")[2] not in parts}
    for linear in linears:
        qweight, qzeros, scales, g_idx = (stored[f"{linear}.{part}"].numpy() for part in parts)
        codes = _words(qweight.T, bits).T
        zeros = _words(qzeros, bits) + 1
        weight = scales.astype(np.float32)[g_idx] * (codes - zeros[g_idx]).astype(np.float32)
        found[f"{linear}.weight"] = torch.from_numpy(weight.T.copy())
    return found


def _words(words: Any, bits: int) -> Any:
    """Return the values in rows of 32-bit words, the lowest bits first."""
    values = [(words.astype(np.int64) >> shift) & (2**bits - 1) for shift in range(0, 32, bits)]
    return np.stack(values, axis=-1).reshape(len(words), -1)


def perplexity(logits: Tensor, rows: Tensor) -> float:
    """Return the perplexity of the next tokens."""
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    return float(losses.exp())


def opened(make: Callable[[], View]) -> View | str:
    """Return what a view is, or the error as text."""
    try:
        return make()
    except Exception as error:  # noqa: BLE001 - transformers raises anything
        return f"{type(error).__name__}: {error}"[:300]
