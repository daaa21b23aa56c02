"""What people's tokenizer files and chat templates hold."""

import json

from tests.awkward.scene import PRIVATE, Case, ClashError, trouble

_PLAIN = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<s>[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
_PROMPT = "<s>[INST] {prompt} [/INST]"
_TOOLS = "{% for m in messages %}TOOL {{ m['content'] }}{% endfor %}"
_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _added(content: str, number: int, *, special: bool = True) -> dict[str, object]:
    return {
        "id": number, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": False, "special": special,
    }  # fmt: skip


def _document(case: Case) -> dict[str, object]:
    content = case.json("tokenizer.json")
    if not content:
        raise ClashError("tokenizer.json")
    return content


@trouble("builds")
def tokenizer_paths_of_a_trainer(case: Case) -> None:
    """https://github.com/modelscope/ms-swift/issues/8186: transformers 5 saves where it read the files."""
    case.tokenizer(name_or_path=f"{PRIVATE}/base", is_local=True, local_files_only=False, tokenizer_file=None)


@trouble("builds")
def tokenizer_with_an_auto_map(case: Case) -> None:
    """https://github.com/huggingface/huggingface.js/pull/467: the class is known, and code of its own is named."""
    case.tokenizer(auto_map={"AutoTokenizer": ["tokenization_mine.MineTokenizer", None]})


@trouble("builds")
def tokenizer_class_of_release_five(case: Case) -> None:
    """https://github.com/unslothai/unsloth/issues/8444: an internal name came into the file."""
    case.tokenizer(tokenizer_class="TokenizersBackend", backend="tokenizers")


@trouble("builds")
def tokenizer_class_of_release_four(case: Case) -> None:
    """https://github.com/huggingface/transformers/issues/47553: the name before it."""
    case.tokenizer("backend", tokenizer_class="PreTrainedTokenizerFast")


@trouble("either", "tokenizer")
def tokenizer_class_that_nobody_knows(case: Case) -> None:
    """https://github.com/huggingface/transformers/pull/44179: a class of somebody's own."""
    case.tokenizer("backend", tokenizer_class="MineTokenizer")


@trouble("either", "tokenizer")
def tokenizer_class_of_the_family(case: Case) -> None:
    """https://github.com/huggingface/transformers/issues/26714: LlamaTokenizer rebuilds a byte-level tokenizer."""
    case.tokenizer("backend", tokenizer_class="LlamaTokenizer")


@trouble("builds")
def special_tokens_as_a_list(case: Case) -> None:
    """https://github.com/huggingface/transformers/pull/45566: the spelling of release 5."""
    case.tokenizer(extra_special_tokens=["<|endoftext|>"])


@trouble("builds")
def special_tokens_under_two_names(case: Case) -> None:
    """https://github.com/huggingface/transformers/issues/47838: with both, a release takes neither."""
    case.tokenizer(extra_special_tokens=["<|endoftext|>"], additional_special_tokens=["<unk>"])


@trouble("builds")
def truncation_of_the_training(case: Case) -> None:
    """https://github.com/daulet/tokenizers/issues/30: tokenizer.json cuts every text."""
    case.backend(truncation={"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0})


@trouble("builds")
def padding_of_the_training(case: Case) -> None:
    """https://github.com/deepjavalibrary/djl/pull/2741: tokenizer.json pads every text."""
    padding = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"}
    case.backend(padding={"strategy": {"Fixed": 4096}, **padding})


@trouble("builds")
def a_start_before_each_text(case: Case) -> None:
    """https://github.com/vllm-project/vllm/pull/27515: the tokenizer adds what the template writes too."""
    case.backend(
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        }
    )


@trouble("builds")
def an_end_after_each_text(case: Case) -> None:
    """https://github.com/abetlen/llama-cpp-python/pull/1439: "many base models add EOS at the end"."""
    case.backend(
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]}},
        }
    )


@trouble("builds")
def a_start_that_must_be_asked_for(case: Case) -> None:
    """https://github.com/EleutherAI/lm-evaluation-harness/pull/2781: add_bos_token of tokenizer_config.json."""
    case.tokenizer(add_bos_token=True, add_eos_token=False)


@trouble("refused", "tokenizer", "vocabulary")
def a_token_beyond_the_embedding(case: Case) -> None:
    """https://github.com/huggingface/transformers/issues/26714: 32,004 tokens for 32,000 rows."""
    document = _document(case)
    tokens = document["added_tokens"]
    assert isinstance(tokens, list)
    tokens.append(_added("<|pad|>", 128))
    case.write("tokenizer.json", json.dumps(document))


@trouble("either", "added_tokens.json")
def added_tokens_beyond_the_embedding(case: Case) -> None:
    """https://github.com/turboderp/exllama/issues/314: a file that a merge left."""
    case.write("added_tokens.json", json.dumps({"<|im_end|>": 128, "<|im_start|>": 129}))


@trouble("either", "tokenizer_config.json")
def a_decoder_of_tokens_beyond_the_embedding(case: Case) -> None:
    """https://github.com/PaddlePaddle/PaddleNLP/pull/8997: added_tokens_decoder names ids without a row."""
    token = {key: value for key, value in _added("<|pad|>", 0).items() if key != "id"}
    case.tokenizer(added_tokens_decoder={"128": token})


@trouble("builds")
def a_vocabulary_smaller_than_the_embedding(case: Case) -> None:
    """https://github.com/QwenLM/Qwen3/issues/29: rows that no token uses."""
    import torch

    def padded(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in tensors:
                rows = tensors[name]
                tensors[name] = torch.cat([rows, torch.zeros(32, rows.shape[1], dtype=rows.dtype)])

    case.tensors(padded)
    case.config(vocab_size=160)


@trouble("builds")
def no_padding_token(case: Case) -> None:
    """https://github.com/lm-sys/FastChat/issues/3036: LLaMA has none."""
    case.tokenizer("pad_token")


@trouble("builds")
def padding_with_the_end(case: Case) -> None:
    """https://github.com/axolotl-ai-cloud/axolotl/pull/374: the end pads."""
    case.tokenizer(pad_token="</s>", padding_side="left")  # noqa: S106 - a token


@trouble("builds")
def a_short_model_max_length(case: Case) -> None:
    """https://github.com/huggingface/transformers/issues/5444: 16 tokens, from a training."""
    case.tokenizer(model_max_length=16)


@trouble("builds")
def an_endless_model_max_length(case: Case) -> None:
    """https://github.com/Modalities/modalities/pull/152: the number that stands for none."""
    case.tokenizer(model_max_length=1000000000000000019884624838656)


@trouble("builds")
def a_special_tokens_map_beside(case: Case) -> None:
    """https://github.com/huggingface/transformers/issues/2669: a file of release 4, with tokens as objects."""
    token = {"content": "</s>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    case.write("special_tokens_map.json", json.dumps({"eos_token": token, "bos_token": "<s>", "unk_token": "<unk>"}))


@trouble("either", "special_tokens_map.json", "prompt template", "prompt_template")
def a_special_tokens_map_that_disagrees(case: Case) -> None:
    """https://github.com/OpenRLHF/OpenRLHF/issues/1069: special tokens that a training changed."""
    case.write("special_tokens_map.json", json.dumps({"eos_token": "<|endoftext|>", "bos_token": "<unk>"}))


@trouble("refused", "tokenizer_config.json")
def no_tokenizer_config(case: Case) -> None:
    """https://github.com/huggingface/tokenizers/issues/1468: "I don't have it, it looks not that important"."""
    (case.model / "tokenizer_config.json").unlink(missing_ok=True)


@trouble("refused", "tokenizer")
def no_tokenizer_at_all(case: Case) -> None:
    """https://github.com/huggingface/transformers.js/issues/93: config.json and weights alone."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (case.model / name).unlink(missing_ok=True)


@trouble("refused", "tokenizer.json")
def half_a_tokenizer(case: Case) -> None:
    """https://github.com/debpalash/VoiceStudio/pull/1056: a download that was cut."""
    data = (case.model / "tokenizer.json").read_bytes()
    case.write("tokenizer.json", data[: len(data) // 2])


@trouble("either", "tokenizer.json")
def vocabulary_and_merges_alone(case: Case) -> None:
    """https://github.com/huggingface/transformers.js/issues/93: the files of a slow tokenizer."""
    document = _document(case)
    model = document["model"]
    assert isinstance(model, dict)
    case.write("vocab.json", json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    case.write("merges.txt", "#version: 0.2\n" + "\n".join(merges) + "\n")
    (case.model / "tokenizer.json").unlink()


def _without_tokenizer_json(case: Case, name: str, content: str | bytes) -> None:
    _document(case)
    (case.model / "tokenizer.json").unlink()
    case.write(name, content)


@trouble("refused", "tokenizer.model")
def sentencepiece_alone(case: Case) -> None:
    """https://github.com/huggingface/transformers/issues/24233: OpenLLaMA; what makes a fast tokenizer of it errs."""
    _without_tokenizer_json(case, "tokenizer.model", b"\x0a\x05\x0a\x03abc")


@trouble("refused", "vocab.txt")
def word_pieces_alone(case: Case) -> None:
    """https://github.com/Morizeyao/GPT2-Chinese/issues/152: GPT-2 of Chinese characters, with BERT's tokenizer."""
    _without_tokenizer_json(case, "vocab.txt", "[UNK]\n[CLS]\nold\n##er\n")


@trouble("refused", "tekken.json")
def tekken_alone(case: Case) -> None:
    """https://github.com/unslothai/unsloth/issues/2652: Mistral's own format, without the one of transformers."""
    _without_tokenizer_json(case, "tekken.json", json.dumps({"config": {"pattern": "x"}, "vocab": []}))


@trouble("refused", "tiktoken")
def tiktoken_alone(case: Case) -> None:
    """https://github.com/openai/tiktoken/issues/283: Qwen's first models bring code and ranks."""
    _without_tokenizer_json(case, "qwen.tiktoken", "IQ== 0\nIg== 1\n")


@trouble("builds")
def flags_of_another_release(case: Case) -> None:
    """https://github.com/huggingface/transformers/issues/29625: add_prefix_space makes release 4 read another file."""
    case.tokenizer("backend", tokenizer_class="LlamaTokenizerFast", add_bos_token=True, add_prefix_space=True)


@trouble("builds")
def a_prefix_space_in_the_file_alone(case: Case) -> None:
    """https://github.com/huggingface/transformers/pull/35593: a class writes its own default over the file's."""
    case.backend(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True})
    case.tokenizer("backend", tokenizer_class="GPT2TokenizerFast")


@trouble("builds")
def no_tokenizer_class(case: Case) -> None:
    """https://github.com/huggingface/transformers/issues/13906: then each release takes the one of the family."""
    case.tokenizer("backend", "tokenizer_class")


@trouble("builds")
def cleaned_spaces(case: Case) -> None:
    """https://github.com/huggingface/text-generation-inference/pull/1594: decoding changes spaces."""
    case.tokenizer(clean_up_tokenization_spaces=True, spaces_between_special_tokens=False)


@trouble("builds")
def a_word_of_its_own(case: Case) -> None:
    """https://github.com/huggingface/transformers/pull/23909: an added token that is no special one."""
    document = _document(case)
    tokens, model = document["added_tokens"], document["model"]
    assert isinstance(tokens, list)
    assert isinstance(model, dict)
    word = max((word for word in model["vocab"] if word.isalpha() and word.isascii()), key=len)
    tokens.append(_added(word, model["vocab"][word], special=False))
    case.write("tokenizer.json", json.dumps(document))


@trouble("builds")
def named_templates(case: Case) -> None:
    """https://github.com/huggingface/transformers/pull/31429: default and tool_use."""
    (case.model / "chat_template.jinja").unlink(missing_ok=True)
    named = [{"name": "default", "template": _PLAIN}, {"name": "tool_use", "template": _TOOLS}]
    case.tokenizer(chat_template=named)


@trouble("either", "template")
def named_templates_without_a_default(case: Case) -> None:
    """https://github.com/huggingface/transformers/issues/37469: names only, such as rag."""
    (case.model / "chat_template.jinja").unlink(missing_ok=True)
    case.tokenizer(chat_template=[{"name": "rag", "template": _PLAIN}, {"name": "tool_use", "template": _TOOLS}])


@trouble("builds")
def template_inside_the_config(case: Case) -> None:
    """https://github.com/EleutherAI/lm-evaluation-harness/pull/1578: as release 4 saved it."""
    (case.model / "chat_template.jinja").unlink(missing_ok=True)
    case.tokenizer(chat_template=_PLAIN)


@trouble("builds")
def templates_in_two_places(case: Case) -> None:
    """https://github.com/OpenRLHF/OpenRLHF/issues/1069: the file counts, the older one stays in the config."""
    case.tokenizer(chat_template="{{ messages[0]['content'] }}")
    case.template(_PLAIN, _PROMPT)


@trouble("builds")
def templates_beside(case: Case) -> None:
    """https://github.com/huggingface/transformers/issues/37469: release 5 saves others in a folder."""
    case.write("additional_chat_templates/tool_use.jinja", _TOOLS)


@trouble("either", "template")
def templates_beside_without_a_default(case: Case) -> None:
    """https://github.com/huggingface/transformers/issues/37469: the folder hides the template of the config."""
    (case.model / "chat_template.jinja").unlink(missing_ok=True)
    case.tokenizer(chat_template=_PLAIN)
    case.write("additional_chat_templates/rag.jinja", _TOOLS)


@trouble("builds")
def template_with_a_date(case: Case) -> None:
    """https://github.com/vllm-project/vllm/issues/14344: Llama 3.1's writes one that is given, or its own."""
    date = "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}"
    case.template(f"{date}Today: {{{{ date_string }}}} {_PLAIN}", f"Today: 26 Jul 2024 {_PROMPT}")


@trouble("builds")
def template_with_todays_date(case: Case) -> None:
    """https://github.com/huggingface/text-generation-inference/issues/2987: Mistral Small's asks the clock."""
    case.template(f"Today: {{{{ strftime_now('%Y-%m-%d') }}}} {_PLAIN}", f"Today: {{date}} {_PROMPT}")


@trouble("builds")
def no_template(case: Case) -> None:
    """https://github.com/unslothai/unsloth/pull/10312: a base model."""
    case.without_template()
    case.recipe["card"]["prompt_template"] = {"name": "none", "template": "{prompt}"}


@trouble("refused", "template")
def no_template_for_prompts(case: Case) -> None:
    """https://github.com/baserun-ai/baserun-py/pull/101: a base model is asked as if it were one for chats."""
    case.without_template()
    case.recipe["loaders"]["prompts"] = ["old bird"]


@trouble("builds")
def template_that_wants_a_user_first(case: Case) -> None:
    """https://github.com/EricLBuehler/mistral.rs/issues/506: Gemma 2's raises for a system's message."""
    raised = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    case.template(raised + _PLAIN, _PROMPT)


@trouble("builds")
def template_that_wants_turns(case: Case) -> None:
    """https://github.com/unslothai/unsloth/issues/334: "Conversation roles must alternate"."""
    raised = (
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% endfor %}"
    )
    case.template(raised + _PLAIN, _PROMPT)


@trouble("refused", "template")
def template_that_always_raises(case: Case) -> None:
    """https://github.com/SillyTavern/SillyTavern/issues/4349: one that cannot be rendered."""
    case.template("{{ raise_exception('not for you') }}")


@trouble("refused", "template")
def template_with_a_mistake(case: Case) -> None:
    """https://github.com/nextai-translator/raycast-openai-translator/issues/34: one that jinja2 does not read."""
    case.template("{% for m in messages %}{{ m['content'] ")


@trouble("builds")
def template_of_tools(case: Case) -> None:
    """https://github.com/huggingface/text-generation-inference/issues/3198: macros, tools and namespaces."""
    head = "{%- macro name(m) -%}{{ m['role'] | upper }}{%- endmacro -%}{%- set ns = namespace(first=true) -%}"
    body = (
        "{%- for m in messages -%}{% if ns.first %}{{ bos_token }}{% set ns.first = false %}{% endif %}"
        "{{ name(m) }}: {{ m['content'] | trim }}{{ eos_token if m['role'] == 'assistant' }} {%- endfor -%}"
    )
    tools = "{%- if tools is not none and tools -%}{{ tools | tojson(indent=2) }}{%- endif -%}"
    case.template(head + tools + body, "<s>USER: {prompt}")


@trouble("builds")
def template_that_marks_for_training(case: Case) -> None:
    """https://github.com/modelscope/ms-swift/issues/6862: {% generation %}, which jinja2 alone does not know."""
    marked = _PLAIN.replace(" {{ m['content'] }}</s>", "{% generation %} {{ m['content'] }}</s>{% endgeneration %}")
    case.template(marked, _PROMPT)


@trouble("builds")
def chatml(case: Case) -> None:
    """https://github.com/Blaizzy/mlx-vlm/pull/2112: turns end with another token than texts."""
    case.template(_CHATML, "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n")


@trouble("refused", "template")
def a_card_with_another_template(case: Case) -> None:
    """https://github.com/lmstudio-ai/lmstudio-bug-tracker/issues/465: the format of another model."""
    case.recipe["card"]["prompt_template"] = {"name": "Alpaca", "template": "### Instruction: {prompt}"}


@trouble("either", "template")
def an_empty_template(case: Case) -> None:
    """https://github.com/lmstudio-ai/lmstudio-bug-tracker/issues/1744: taken away by emptying it."""
    case.write("chat_template.jinja", "")


@trouble("builds")
def template_with_windows_lines(case: Case) -> None:
    """https://github.com/wwwpf/QzoneExporter/issues/32: saved by a Windows editor."""
    case.template(_PLAIN.replace("%}{%", "%}\r\n{%"))
    case.recipe["card"]["prompt_template"] = {"name": "plain", "template": _PROMPT}
