"""Print what a folder's tokenizer makes of some texts and a chat: runs in any environment with transformers.

Usage: python same_tokens.py <folder> ...
"""

import json
import sys
from pathlib import Path
from typing import Any

TEXTS = (
    "",
    " ",
    "a river",
    "  two  spaces ",
    "\n\n\nold\n\n bird",
    "\ttab",
    "<s>seven</s> <unk>",
    "<|endoftext|>",
    "r\u00e9sum\u00e9 \u4e16\u754c \U0001f426",
    "<extra> green<extra>",
)
CHAT = ({"role": "user", "content": "old bird"}, {"role": "assistant", "content": "sings"})


def tokens_of(folder: Path) -> dict[str, Any]:
    """Return the ids, the inputs' names, the texts again, and a rendered chat."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    encoded = [tokenizer(text) for text in TEXTS]
    ids = [entry["input_ids"] for entry in encoded]
    return {
        "ids": ids,
        "inputs": sorted(encoded[0].keys()),
        "texts": [tokenizer.decode(entry) for entry in ids],
        "plain texts": [tokenizer.decode(entry, skip_special_tokens=True) for entry in ids],
        "without special tokens": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS],
        "chat": tokenizer.apply_chat_template(list(CHAT), tokenize=False) if tokenizer.chat_template else None,
        "special ids": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
    }


if __name__ == "__main__":
    print(json.dumps([tokens_of(Path(folder)) for folder in sys.argv[1:]]))
