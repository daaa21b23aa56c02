"""What people calibrate on: datasets of the Hub, in the cache, as a machine without a network has them."""

import json

from tests.awkward.scene import Case, trouble
from tests.tiny_recipe import sentences

_LINES = sentences(60, seed=1).splitlines()


@trouble("builds")
def rows_of_text(case: Case) -> None:
    """https://github.com/turboderp-org/exllamav2/issues/29: "text" is the only column."""
    case.dataset({"text": _LINES})


@trouble("builds")
def rows_that_are_empty(case: Case) -> None:
    """https://github.com/ModelCloud/GPTQModel/issues/1469: wikitext's every second row."""
    case.dataset({"text": [text for line in _LINES for text in ("", line, " ")]})


@trouble("either", "null", "text", never=("None",))
def rows_that_are_null(case: Case) -> None:
    """https://github.com/AutoGPTQ/AutoGPTQ/issues/146: a column with nulls."""
    case.dataset({"text": [None if number % 3 else line for number, line in enumerate(_LINES * 2)]})


@trouble("either", "messages", "text_field", never=("'role'", "[{", "'content'"))
def rows_of_chats(case: Case) -> None:
    """https://github.com/vllm-project/llm-compressor/issues/142: ultrachat's messages."""
    chats = [[{"role": "user", "content": line}, {"role": "assistant", "content": line[::-1]}] for line in _LINES]
    case.dataset({"messages": chats}, text_field="messages")


@trouble("either", "conversations", "text_field", never=("'from'", "'value'", "[{"))
def rows_of_shared_chats(case: Case) -> None:
    """https://github.com/InternLM/lmdeploy/pull/4256: from and value instead of role and content."""
    chats = [[{"from": "human", "value": line}, {"from": "gpt", "value": line[::-1]}] for line in _LINES]
    case.dataset({"conversations": chats}, text_field="conversations")


@trouble("refused", "row", "text", never=("['",))
def rows_of_words(case: Case) -> None:
    """https://github.com/hiyouga/LlamaFactory/issues/4876: lists of words."""
    case.dataset({"text": [line.split() for line in _LINES]})


@trouble("refused", "row", "text")
def rows_of_numbers(case: Case) -> None:
    """https://github.com/QwenLM/Qwen3-VL/issues/531: labels."""
    case.dataset({"text": list(range(len(_LINES)))})


@trouble("refused", "text_field", "column")
def rows_of_instructions(case: Case) -> None:
    """https://github.com/hiyouga/LlamaFactory/issues/5235: instruction, input and output."""
    case.dataset({"instruction": _LINES, "output": _LINES})


@trouble("refused", "tokens", "text")
def few_rows(case: Case) -> None:
    """https://github.com/AutoGPTQ/AutoGPTQ/issues/708: "Not enough calibration data"."""
    case.dataset({"text": _LINES[:2]})


@trouble("refused", "tester/rows")
def no_rows(case: Case) -> None:
    """https://github.com/vllm-project/llm-compressor/issues/1589: an empty split."""
    case.dataset({"text": []})


@trouble("refused", "tester/rows")
def a_configuration_that_is_not_there(case: Case) -> None:
    """https://github.com/InternLM/lmdeploy/pull/4256: BuilderConfig not found."""
    front = "---\nconfigs:\n- config_name: default\n  data_files: data/*\n---\n"
    case.dataset({"text": _LINES}, files={"README.md": front.encode()}, config="v1")


@trouble("refused", "tester/rows")
def a_dataset_of_a_script(case: Case) -> None:
    """https://github.com/IST-DASLab/gptq/pull/58: a loading script, which is not run."""
    case.dataset({}, files={"rows.py": b"import datasets", "README.md": b"# Rows"})


@trouble("refused", "tester/rows")
def a_dataset_that_is_damaged(case: Case) -> None:
    """https://github.com/IST-DASLab/gptq/pull/58: a file that was cut."""
    case.dataset({}, files={"data/train-00000-of-00001.parquet": b"PAR1\x15\x04"})


@trouble("refused", "tester/rows")
def a_shard_that_is_missing(case: Case) -> None:
    """https://github.com/huggingface/huggingface_hub/issues/2284: a download that was interrupted."""
    case.dataset({"text": _LINES}, shards=2)


@trouble("refused", "split", "tester/rows")
def a_split_that_is_not_there(case: Case) -> None:
    """https://github.com/vllm-project/llm-compressor/issues/142: ultrachat's is called train_sft."""
    case.dataset({"text": _LINES}, split="train_sft")


@trouble("builds")
def a_folder_of_the_same_name(case: Case) -> None:
    """https://github.com/chroblert/WindowsVulnScan/issues/2: a folder beside has the dataset's name."""
    case.dataset({"text": _LINES})
    for folder in (case.folder, case.model):
        case.write("tester/rows/train.jsonl", '{"text": "payroll"}\n', into=folder)


@trouble("builds")
def rows_in_packed_lines(case: Case) -> None:
    """https://github.com/turboderp-org/exllamav2/issues/29: JSON lines, packed."""
    import gzip

    data = "".join(json.dumps({"text": line}) + "\n" for line in _LINES)
    case.dataset({}, files={"train.jsonl.gz": gzip.compress(data.encode())})
