"""Compare the perplexity that a build states of a base model with that of transformers and the usual sliding window.

    python benchmarks/real_models.py smollm2-135m-instruct FOLDER
    python benchmarks/sliding_perplexity.py FOLDER --seq-len 256 --tokens 8192

One plain text is tokenized once. The script that people use (transformers' page "Perplexity of fixed-length models")
moves a window of `seq_len` tokens over it by `stride` tokens; a token that an earlier window predicted is only context,
and the first token of a window predicts nothing. With a stride of `seq_len` it computes what a build does on rows of
`seq_len` tokens; a smaller stride gives every token more context, so its perplexity is lower. A start token is added
where the tokenizer adds one to a text (SmolLM2's and other ChatML tokenizers add none), at the beginning of the text
in the script, and at the beginning of each row in a build.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from packager.inputs.base_model import open_source
from packager.inputs.rows import TokenRows
from packager.inputs.texts import TextSets
from packager.prove.evaluate import quality_of, run_base
from packager.receipt import TextRecord
from packager.recipe.file import RecipeFile


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what real_models.py wrote")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=8192, help="of the text, at most")
    given = parser.parse_args()
    ids, start = tokens_of(given.folder, given.seq_len, given.tokens)
    print(f"{ids.shape[1]} tokens, start token: {start}")
    print(f"a build:           {stated(given.folder, ids.reshape(-1, given.seq_len)):.6f}")
    for name, found in usual(given.folder / "model", ids, given.seq_len).items():
        print(f"{name + ':':<18} {found:.6f}")
    return 0


def tokens_of(folder: Path, seq_len: int, tokens: int) -> tuple[Tensor, str]:
    """Return the token ids [1, tokens] of the held-out text, whole rows, and whether the tokenizer began with one."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "model")
    lines = (folder / "evaluation.jsonl").read_text(encoding="utf-8").splitlines()
    ids = tokenizer("\n\n".join(json.loads(line)["text"] for line in lines))["input_ids"]
    start = "at the beginning" if ids[0] == tokenizer.bos_token_id else "none"
    return torch.tensor([ids[: min(len(ids), tokens) // seq_len * seq_len]]), start


def stated(folder: Path, rows: Tensor) -> float:
    """Return the perplexity that a build states of the base model on rows [rows, seq_len]."""
    source = open_source(RecipeFile.load(folder / "recipe.yaml"), print)
    record = TextRecord(
        source="evaluation.jsonl", revision=None, config=None, split=None, num_samples=rows.shape[0],
        seq_len=rows.shape[1], seed=None, text_sha256="", digest="",
    )  # fmt: skip
    held_out = TokenRows(ids=rows, record=record)
    texts = TextSets(calibration=held_out, evaluation=held_out, questions=(), prompts=())
    base = run_base(source, texts, torch.device("cpu"))
    return quality_of(base, base, texts).base_perplexity


def usual(model_folder: Path, ids: Tensor, seq_len: int) -> dict[str, float]:
    """Return the perplexity of token ids [1, tokens] by the usual script, without and with overlapping windows."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    return {f"stride {stride}": window(model, ids, seq_len, stride) for stride in (seq_len, seq_len // 2)}


@torch.no_grad()
def window(model: Any, ids: Tensor, seq_len: int, stride: int) -> float:
    """Return the perplexity of a sliding window."""
    losses, count, end = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        last, end = end, min(begin + seq_len, ids.shape[1])
        part = ids[:, begin:end]
        labels = part.clone()
        labels[:, : -(end - last)] = -100
        loss = model(part, labels=labels).loss
        predicted = int((labels[:, 1:] != -100).sum())
        losses += float(loss) * predicted
        count += predicted
        if end == ids.shape[1]:
            break
    return float(torch.tensor(losses / count).exp())


if __name__ == "__main__":
    sys.exit(main())
