"""The 13B recipe's card beside the card of 2023 that this project began with, fact by fact.

FACTS quotes that card; white space apart, the preview of our recipe must say the same, unless DIFFERENCES says what
stands there today and why. MISTAKES quotes what was wrong in it.
"""

import re

import pytest

from packager.pipeline.preview import preview_card
from packager.recipe.file import RecipeFile
from tests.card_page import assert_well_formed, front_matter, headings, tables
from tests.test_card_choice import RECIPES

REPO, HUB = "TheBloke/Llama-2-13B-chat-GPTQ", "https://huggingface.co"
FIRST_TABLE = """
| main | 4 | 128 | False | 7.26 GB |
| gptq-4bit-32g-actorder_True | 4 | 32 | True | 8.00 GB |
| gptq-4bit-64g-actorder_True | 4 | 64 | True | 7.51 GB |
| gptq-4bit-128g-actorder_True | 4 | 128 | True | 7.26 GB |
"""
# In its order.
FIRST_SECTIONS = (
    "Repositories available", "Prompt template: Llama-2-Chat", "Provided files", "How to download from branches",
    "How to use this GPTQ model from Python code", "Compatibility", "Discord", "Thanks, and how to contribute.",
    "Original model card: Meta's Llama 2 13B-chat", "Llama 2", "Model Details", "Intended Use", "Hardware and Software",
    "Training Data", "Evaluation Results", "Ethical Considerations and Limitations", "Reporting Issues",
    "Llama Model Index",
)  # fmt: skip
FIRST_COLUMNS = (
    "Branch", "Bits", "Group Size", "Act Order (desc_act)", "File Size", "ExLlama Compatible?", "Made With",
    "Description",
)  # fmt: skip
FACTS = {
    "no inference widget": "inference: false",
    "language": "language: - en",
    "licence": "license: other",
    "type": "model_type: llama",
    "task": "pipeline_tag: text-generation",
    "tags": "- facebook - meta - pytorch - llama - llama-2",
    "name above the title": "TheBlokeAI",
    "chat above the title": "Chat & support: my new Discord server",
    "contributing above the title": "Want to contribute? TheBloke's Patreon page",
    "title": "# Meta's Llama 2 13B-chat GPTQ",
    "what it is": "These files are GPTQ model files for [Meta's Llama 2 13B-chat]"
    f"({HUB}/meta-llama/Llama-2-13b-chat-hf).",
    "several variants": "Multiple GPTQ parameter permutations are provided; see",
    "and what of them": "details of the options provided, their parameters, and the software used to create them.",
    "link to GPTQ": f"[GPTQ models for GPU inference, with multiple quantisation parameter options.]({HUB}/{REPO})",
    "link to GGML": "[2, 3, 4, 5, 6 and 8-bit GGML models for CPU+GPU inference]"
    f"({HUB}/TheBloke/Llama-2-13B-chat-GGML)",
    "link to the original": "[Original unquantised fp16 model in pytorch format, for GPU inference and for further "
    f"conversions]({HUB}/meta-llama/Llama-2-13B-chat-hf)",
    "system prompt": "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, "
    "while being safe. Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or "
    "illegal content. Please ensure that your responses are socially unbiased and positive in nature. If a question "
    "does not make any sense, or is not factually coherent, explain why instead of answering something not correct. "
    "If you don't know the answer to a question, please don't share false information.",
    "why several": "Multiple quantisation parameters are provided, to allow you to choose the best one for your "
    "hardware and requirements.",
    "where they are": "Each separate quant is in a different branch. See below for instructions on fetching from "
    "different branches.",
    "name of a branch in the web UI": f"`{REPO}:gptq-4bit-32g-actorder_True`",
    "clone": "git clone --branch gptq-4bit-32g-actorder_True",
    "revision": "In Python Transformers code, the branch is the `revision` parameter; see below.",
    "web UI": "How to easily download and use this model in [text-generation-webui]"
    "(https://github.com/oobabooga/text-generation-webui)",
    "web UI, first step": "1. Click the **Model tab**.",
    "web UI, what to enter": f"enter `{REPO}`.",
    "web UI, no parameters": "Note that you do not need to set GPTQ parameters any more.",
    "AutoGPTQ from": "https://github.com/PanQiWei/AutoGPTQ",
    "example prompt": "Tell me about AI",
    "pipeline": 'pipeline( "text-generation", model=model, tokenizer=tokenizer',
    "repetition penalty": "repetition_penalty=1.15",
    "who opens it": "The files provided will work with AutoGPTQ (CUDA and Triton modes), GPTQ-for-LLaMa",
    "support": "For further support, and discussions on these models and AI in general, join us at:",
    "server": "[TheBloke AI's Discord server](https://discord.gg/theblokeai)",
    "thanks": "Thanks to the [chirper.ai](https://chirper.ai) team!",
    "contributions": "Donaters will get priority support on any and all AI/LLM/model questions and requests, access to "
    "a private Discord room, plus other benefits.",
    "Patreon": "* Patreon: https://patreon.com/TheBlokeAI",
    "Ko-Fi": "* Ko-Fi: https://ko-fi.com/TheBlokeAI",
    "special thanks": "**Special thanks to**: Luke from CarbonQuill, Aemon Algiz.",
    "mentions, first": "**Patreon special mentions**: Space Cruiser, Nikolai Manek, Sam, Chris McCloskey,",
    "mentions, last": "Greatston Gnanesh, Junyu Yang.",
    "thank you": "Thank you to all my generous patrons and donaters!",
    "original: note": "*Note: Use of this model is governed by the Meta license.",
    "original: architecture": "Llama 2 is an auto-regressive language model that uses an optimized transformer "
    "architecture.",
    "original: rate": "3.0 x 10-4",
    "original: tags": "including the `INST` and `<>` tags",
    "original: emissions": "|Llama 2 13B|368640|400|62.44|",
    "original: benchmarks": "|Llama 2|13B|24.5|66.9|55.4|65.8|28.7|54.8|39.4|39.1|",
    "original: safety": "|Llama-2-Chat|13B|62.18|**0.00**|",
    "original: guide": "https://ai.meta.com/llama/responsible-use-guide",
    "original: index": f"{HUB}/llamaste/Llama-2-13b-chat",
}
# What stands there today, "" for nothing, and the reason.
DIFFERENCES = {
    "no inference widget": ("", "the Hub no longer reads it"),
    "licence": ("license: llama2", "a mistake: the Hub knows the licence by name"),
    "link to GPTQ": (
        f"[GPTQ models for GPU inference, with multiple quantization parameter options]({HUB}/{REPO})",
        "one spelling of quantization on the page, and the page links to itself once",
    ),
    "link to the original": (
        "[Original unquantized model, for inference at full precision and for further conversions]"
        f"({HUB}/meta-llama/Llama-2-13b-chat-hf)",
        "the repository's own spelling; what its files are is not for us to say",
    ),
    "why several": ("Multiple quantization parameters are provided, to allow you to choose", "spelling"),
    "clone": (
        "git clone --single-branch --branch gptq-4bit-32g-actorder_True",
        "without it git fetches the weights of every branch",
    ),
    "revision": ("In Transformers code, the branch is the `revision` parameter; see below.", "fewer words"),
    "web UI": ("How to download and use this model in [text-generation-webui]", "it is no longer easy"),
    "web UI, first step": ("1. Click the **Model** tab.", "the tab is called Model"),
    "web UI, no parameters": (
        "GPTQ parameters need not be set: they are read from `config.json`.",
        "the loader that is left reads config.json",
    ),
    "AutoGPTQ from": ("### AutoGPTQ No example.", "it is shown where it was proven, and not before a build"),
    "pipeline": (
        'pipeline("text-generation", model=model, tokenizer=tokenizer)',
        "settings go to the call, where they are read",
    ),
    "who opens it": ("### Proven on these files", "what opened the files is measured, what should is marked as such"),
    "Patreon": ("* Patreon: <https://patreon.com/TheBlokeAI>", "a link on every page that renders Markdown"),
    "Ko-Fi": ("* Ko-Fi: <https://ko-fi.com/TheBlokeAI>", "likewise"),
    "original: rate": ("3.0 x 10<sup>-4</sup>", "the exponent was lost"),
    "original: tags": ("including the `INST` and `<<SYS>>` tags", "the tag was lost"),
    "original: index": (f"{HUB}/meta-llama/Llama-2-13b-chat", "the organisation llamaste is not there"),
}
COLUMN_DIFFERENCES = {
    "ExLlama Compatible?": ("Proven in", "a column nobody tested: proven is what ran"),
    "Description": ("", "a list below the table, because the table must fit a page"),
}
_META, _LLAMA = "https://ai.meta.com", "meta-llama/Llama-2"
FIRST_LINKS = (
    f"{HUB}/{_LLAMA}-13b-chat-hf", f"{HUB}/{REPO}", f"{HUB}/TheBloke/Llama-2-13B-chat-GGML",
    f"{HUB}/{_LLAMA}-13B-chat-hf", "https://github.com/oobabooga/text-generation-webui",
    "https://github.com/PanQiWei/AutoGPTQ", "https://discord.gg/theblokeai", "https://chirper.ai",
    "https://patreon.com/TheBlokeAI", "https://ko-fi.com/TheBlokeAI",
    f"{_META}/resources/models-and-libraries/llama-downloads/", f"{_META}/llama/responsible-use-guide/",
    "https://github.com/facebookresearch/llama/blob/main/llama/generation.py#L212",
    f"{_META}/llama/responsible-use-guide", "http://github.com/facebookresearch/llama",
    "http://developers.facebook.com/llama_output_feedback", "http://facebook.com/whitehat/info",
    *(f"{HUB}/llamaste/Llama-2-{name}" for name in (
        "7b", "7b-hf", "7b-chat", "7b-chat-hf", "13b", "13b-hf", "13b-chat", "70b", "70b-hf", "70b-chat",
    )),
)  # fmt: skip
# Where a link leads today, "" for nowhere, and the reason.
LINK_DIFFERENCES = {
    f"{HUB}/{_LLAMA}-13B-chat-hf": (f"{HUB}/{_LLAMA}-13b-chat-hf", "the repository's own spelling"),
    "https://github.com/PanQiWei/AutoGPTQ": ("", "no example before AutoGPTQ is proven; it moved since"),
    "http://github.com/facebookresearch/llama": ("https://github.com/facebookresearch/llama", "over TLS"),
    **{
        link: (link.replace("llamaste", "meta-llama"), "the organisation llamaste is not there")
        for link in FIRST_LINKS if "/llamaste/" in link
    },
}  # fmt: skip
# What was wrong, as it stood there, and what a page says that does it right.
MISTAKES = {
    "a missing comma": ("model_basename=model_basename use_safetensors", "AutoTokenizer.from_pretrained(model_id,"),
    "a stray backtick": (f"{HUB}/{REPO}`", f"actorder_True {HUB}/{REPO} ```"),
    "a name of the weights that only main has": ('model_basename = "gptq_model-4bit-128g"', "revision=branch"),
    "another prompt than the model's": ("System: You are a helpful", "[INST] <<SYS>> You are a helpful"),
    "a licence without a name": ("license: other", "license: llama2"),
    "no base model": ("--- inference: false language", "base_model: meta-llama/Llama-2-13b-chat-hf"),
    "no word on calibration": ("| Made With | Description |", "Calibrated on [wikitext-2-raw-v1]"),
    "a temperature that is not used": ("temperature=0.7, max_new_tokens=512", "do_sample=True, temperature=0.7"),
    "code of strangers": ("trust_remote_code", "AutoModelForCausalLM.from_pretrained(model_id, revision=branch"),
    "a variable of CI": ("GITHUB_ACTIONS=true", "pip install --upgrade transformers accelerate optimum gptqmodel"),
    "compatibility that nobody tested": ("| ExLlama Compatible? |", "### Expected, not run"),
    "a GPU that must be there": (".input_ids.cuda()", 'device = "auto" if torch.cuda.is_available() else "cpu"'),
    "loaders that are gone": (
        "These are set automatically from the file `quantize_config.json`",
        "The AutoGPTQ, ExLlama and ExLlamaV2 loaders of 2023 are no longer part of it.",
    ),
    "addresses that are gone": (f"{HUB}/llamaste/", f"{HUB}/meta-llama/Llama-2-70b"),
}


@pytest.fixture(scope="module")
def preview() -> str:
    return preview_card(RecipeFile.load(RECIPES / "llama-2-13b-chat.yaml"), "main")


def on_one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def test_the_page_says_what_the_first_card_said_but_for_differences_with_a_reason(preview: str) -> None:
    page = on_one_line(preview)
    lacking = {name for name, words in FACTS.items() if on_one_line(words) not in page}
    assert lacking == set(DIFFERENCES), "a difference without a reason, or a reason without a difference"
    assert [name for name, (words, reason) in DIFFERENCES.items() if words not in page or not reason] == []


def test_the_sections_are_there_in_their_order(preview: str) -> None:
    found = [heading for heading in headings(preview) if heading in FIRST_SECTIONS]
    # What a reader chooses by comes first: decision 24.
    moved = ("Repositories available", "Prompt template: Llama-2-Chat")
    assert [each for each in found if each not in moved] == [each for each in FIRST_SECTIONS if each not in moved]
    place = {heading: index for index, heading in enumerate(headings(preview))}
    assert place["Provided files"] < place["Repositories available"] < place["How to download from branches"]


def test_the_links_lead_where_they_led_but_for_differences_with_a_reason(preview: str) -> None:
    links = {link.rstrip(".,") for link in re.findall(r"https?://[^\s)\]<>\"|`]+", preview)}
    assert set(FIRST_LINKS) - links == set(LINK_DIFFERENCES), "a difference without a reason, or the reverse"
    assert [link for link, (now, reason) in LINK_DIFFERENCES.items() if (now and now not in links) or not reason] == []
    listed = preview[preview.index("## Repositories available") : preview.index("## Prompt template")]
    assert len(re.findall(r"\]\((.+?)\)", listed)) == len(set(re.findall(r"\]\((.+?)\)", listed))), "a link twice"


def test_the_branches_have_the_parameters_and_the_sizes_of_the_first_card(preview: str) -> None:
    (rows,) = [table for table in tables(preview) if "File Size" in table[0]]
    lacking = {column for column in FIRST_COLUMNS if column not in rows[0]}
    assert lacking == set(COLUMN_DIFFERENCES)
    page = on_one_line(preview)
    assert all(words in page and reason for words, reason in COLUMN_DIFFERENCES.values())
    ours = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    theirs = [[cell.strip() for cell in line.strip("|").split("|")] for line in FIRST_TABLE.split("\n") if line]
    assert len(ours) == len(theirs)
    for row, (branch, bits, group, act_order, size) in zip(ours, theirs, strict=True):
        assert (row["Branch"].strip("`"), row["Bits"], row["Group Size"]) == (branch, bits, group)
        # `main` has the parameters of then in its configs, and weights in static order, which are nearer to the model.
        assert row["Act Order (desc_act)"] == (f"{act_order} (static)" if branch == "main" else act_order)
        # Another program wrote those files: in one of them a hundredth of a GB more.
        assert float(row["File Size"].split()[0]) == pytest.approx(float(size.split()[0]), abs=0.0101)


def test_there_are_fourteen_known_mistakes_and_none_of_them_is_back(preview: str) -> None:
    page = on_one_line(preview)
    assert len(MISTAKES) == 14
    assert [name for name, (wrong, _) in MISTAKES.items() if wrong in page] == []
    assert [name for name, (_, right) in MISTAKES.items() if on_one_line(right) not in page] == []
    assert_well_formed(preview)


def test_the_front_matter_names_everything_that_the_hub_files_by(preview: str) -> None:
    front = front_matter(preview)
    assert front["base_model"] == "meta-llama/Llama-2-13b-chat-hf"
    assert front["base_model_relation"] == "quantized"
    assert front["tags"] == ["gptq", "4-bit", "facebook", "meta", "pytorch", "llama", "llama-2"]
    assert "datasets" not in front, "calibration text is not training data"
