"""What people calibrate on: local files."""

import json

from tests.awkward.scene import Case, trouble
from tests.tiny_recipe import sentences

_LINES = sentences(60, seed=1).splitlines()


def _chats() -> list[dict[str, object]]:
    return [
        {"messages": [{"role": "user", "content": line}, {"role": "assistant", "content": line[::-1]}]}
        for line in _LINES
    ]


@trouble("builds", never=("\ufeff",))
def text_with_a_byte_order_mark(case: Case) -> None:
    """https://github.com/langchain-ai/langchain-community/pull/138: saved by a Windows editor."""
    case.text(b"\xef\xbb\xbf" + "\n".join(_LINES).encode())


@trouble("either", "calibration.jsonl", never=("\ufeff",))
def lines_with_a_byte_order_mark(case: Case) -> None:
    """https://github.com/microsoft/promptflow/pull/4172: a table that was exported."""
    data = b"\xef\xbb\xbf" + b"".join(json.dumps({"text": line}).encode() + b"\n" for line in _LINES)
    case.text(data, name="calibration.jsonl")


@trouble("builds")
def text_with_windows_lines(case: Case) -> None:
    """https://github.com/bozdemir/claude-usage-widget/pull/3: lines that end with two characters."""
    case.text("\r\n".join(_LINES))


@trouble("builds")
def lines_that_are_empty(case: Case) -> None:
    """https://github.com/vllm-project/llm-compressor/issues/142: wikitext's every second row is empty."""
    case.lines({"text": text} for line in _LINES for text in ("", line, "   "))


@trouble("either", "calibration.jsonl", "text", never=("None", "null"))
def lines_that_are_null(case: Case) -> None:
    """https://github.com/AutoGPTQ/AutoGPTQ/issues/146: rows without a text."""
    case.lines({"text": None if number % 3 else line} for number, line in enumerate(_LINES * 2))


@trouble("either", "calibration.jsonl", "text_field", never=("'role'", "[{"))
def lines_of_chats(case: Case) -> None:
    """https://github.com/vllm-project/llm-compressor/issues/142: messages, rendered by hand before."""
    case.lines(_chats())
    case.recipe["calibration"]["text_field"] = "messages"


@trouble("refused", "calibration.jsonl", "text_field")
def lines_of_instructions(case: Case) -> None:
    """https://github.com/hiyouga/LlamaFactory/issues/5235: instruction, input and output, and no text."""
    case.lines({"instruction": line, "input": "", "output": line} for line in _LINES)


@trouble("refused", "calibration.jsonl", "text")
def lines_of_numbers(case: Case) -> None:
    """https://github.com/turboderp-org/exllamav2/issues/29: ids in the place of a text."""
    case.lines({"text": list(range(3, 40))} for _ in _LINES)


@trouble("refused", "calibration.txt", "tokens")
def text_that_is_too_short(case: Case) -> None:
    """https://github.com/turboderp-org/exllamav2/issues/29: fewer tokens than the rows need."""
    case.text("old bird sings.\n")


@trouble("refused", "calibration.txt", "text")
def text_that_is_empty(case: Case) -> None:
    """https://github.com/vllm-project/llm-compressor/issues/1589: no text at all."""
    case.text("")


@trouble("refused", "calibration.txt")
def text_of_another_encoding(case: Case) -> None:
    """https://github.com/prancer-io/cloud-validation-framework/issues/237: Latin-1."""
    case.text("\n".join(line + " caf\xe9" for line in _LINES).encode("latin-1"))


@trouble("either", "calibration.txt", "overlap", "evaluation", "special")
def text_with_special_tokens(case: Case) -> None:
    """https://github.com/hiyouga/LlamaFactory/issues/4876: chats that were rendered before."""
    case.text("".join(f"<s>[INST] {line} [/INST] {line}</s>" for line in _LINES))


@trouble("builds")
def text_without_spaces(case: Case) -> None:
    """https://github.com/huggingface/tokenizers/issues/1609: one word of thousands of letters."""
    case.text("".join(line.replace(" ", "") for line in _LINES))


@trouble("refused", "evaluation", "calibration")
def text_that_is_measured_too(case: Case) -> None:
    """https://github.com/ModelCloud/GPTQModel/issues/1483: "whether it can be the same as"."""
    case.text((case.folder / "evaluation.txt").read_bytes())


@trouble("builds")
def text_with_control_characters(case: Case) -> None:
    """https://github.com/ModelCloud/GPTQModel/issues/1042: what a conversion of documents leaves."""
    case.text("\n".join(f"{line}\x0c\x0b\x07\t" for line in _LINES))


@trouble("refused", "calibration.jsonl")
def lines_that_are_one_list(case: Case) -> None:
    """https://github.com/InternLM/lmdeploy/pull/4256: a JSON file under the name of lines."""
    case.text(json.dumps([{"text": line} for line in _LINES], indent=1), name="calibration.jsonl")


@trouble("either", "calibration.jsonl", "surrogate")
def half_a_character(case: Case) -> None:
    """https://github.com/langchain-ai/langchain-community/pull/138: half of an emoji, cut by a length."""
    case.text("".join('{"text": "' + line + ' \\ud83d"}\n' for line in _LINES), name="calibration.jsonl")


@trouble("builds")
def text_of_other_scripts(case: Case) -> None:
    """https://github.com/hiyouga/LlamaFactory/issues/4876: characters that the tokenizer never saw."""
    case.text("\n".join(f"{line} 量化 \U0001f99c" for line in _LINES))


@trouble("refused", "calibration")
def a_table_as_text(case: Case) -> None:
    """https://github.com/turboderp-org/exllamav2/issues/29: a Parquet file."""
    case.text(b"PAR1\x15\x04\x15\x0c\x00\x00PAR1", name="calibration.parquet")


@trouble("refused", "calibration.txt")
def text_that_is_not_there(case: Case) -> None:
    """https://github.com/vllm-project/llm-compressor/issues/1510: the calibration data is forgotten."""
    (case.folder / "calibration.txt").unlink(missing_ok=True)
    case.recipe["calibration"] = {"path": "calibration.txt", "num_samples": 8, "seq_len": 32}


@trouble("builds")
def lines_with_more_columns(case: Case) -> None:
    """https://github.com/hiyouga/LlamaFactory/issues/5235: the text is one of several values."""
    case.lines({"id": number, "meta": {"a": [1]}, "text": line} for number, line in enumerate(_LINES))


@trouble("builds")
def lines_with_odd_separators(case: Case) -> None:
    """https://github.com/netheril96/StaticJSON/issues/13: U+2028 inside a string ends no line."""
    case.text("".join(json.dumps({"text": f"{line}\u2028{line}"}, ensure_ascii=False) + "\n" for line in _LINES),
              name="calibration.jsonl")  # fmt: skip


@trouble("builds")
def measured_lines_that_are_empty(case: Case) -> None:
    """https://github.com/ModelCloud/GPTQModel/issues/1469: wikitext's empty rows, measured."""
    lines = sentences(40, seed=2).splitlines()
    case.text("".join(json.dumps({"text": text}) + "\n" for line in lines for text in ("", line)),
              name="evaluation.jsonl", part="evaluation")  # fmt: skip
