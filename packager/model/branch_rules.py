"""The rules for a branch's configs: which values mean nothing in a branch or are misread, and what a branch gets.

No rule changes a value that transformers computes with. Each gives its reason, and the code that it was read in.
`branch_config` applies them. Decision 19. No torch here: `plan` must stay fast.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

from packager.model.architecture import Architecture
from packager.model.config_values import DTYPES, path_keys, text_part
from packager.model.contract_files import TOKENIZER_FILE_KEYS, names_other_file
from packager.model.rope import spelled_for_all
from packager.model.tokenizer_file import config_for_all, model_with_merges_as_lines
from packager.receipt import CONFIG, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG

# Raise it when a rule changes: branches that are built are packed again then, from their quantized blocks.
BRANCH_RULES_VERSION = 3
NORMALIZED_FILES = (CONFIG, GENERATION_CONFIG, TOKENIZER_CONFIG, TOKENIZER)
TOKEN_ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
_LOADED_FROM = re.compile(r".*name_or_path|_?is_local|_commit_hash")
_CODE_KEYS = ("auto_map", "custom_pipelines")
_OUTPUT_KEYS = ("output_hidden_states", "output_attentions", "output_router_logits")
_ATTENTION_KEYS = ("_attn_implementation", "attn_implementation", "_flash_attn_2_enabled")
DROPPED = object()  # the new value of a key that a branch does not have

Document = Mapping[str, object]
Templates = str | list[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What the rules know of a model besides the document.

    Attributes:
        vocab_size: rows of its embedding; None where config.json does not say.
        dtype: of most of its bytes, safetensors spelling; None where it is not known.
        unties: its files hold other values for a tensor that config.json calls tied.
        template: content of chat_template.jinja, or named templates of several files, spelled as in
            tokenizer_config.json; None where there are no such files.
    """

    vocab_size: int | None = None
    dtype: str | None = None
    unties: bool = False
    template: Templates | None = None

    @classmethod
    def of(
        cls, config: Document, architecture: Architecture | None = None, *, template: Templates | None = None
    ) -> Self:
        """Return what a config.json and, where they are known, a lock and the files of chat templates say."""
        if architecture is None:
            return cls(vocab_size=int_value(text_part(config).get("vocab_size")), template=template)
        vocab_size, unties = int_value(architecture.text_config.get("vocab_size")), bool(architecture.own)
        return cls(vocab_size=vocab_size, dtype=architecture.dtype, unties=unties, template=template)


@dataclass(frozen=True, kw_only=True)
class BranchRule:
    """A kind of value that a branch does not get as it is.

    Attributes:
        files: where it is looked for.
        keys: that it may change, for readers.
        changes: returns the keys of an object to change, with their new values.
        reason: why.
        source: the code that the rule was read in.
        everywhere: it holds for every object inside a config, not only for those that are configs.
    """

    files: tuple[str, ...]
    keys: tuple[str, ...]
    changes: Callable[[Document, ModelFacts], Document]
    reason: str
    source: str
    everywhere: bool = False


def int_value(value: object) -> int | None:
    """Return an integer, or None for any other value of a config (true is none)."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _loaded_from(document: Document, _: ModelFacts) -> Document:
    return dict.fromkeys((key for key in document if _LOADED_FROM.fullmatch(key)), DROPPED)


def _paths(document: Document, _: ModelFacts) -> Document:
    return dict.fromkeys(path_keys(document), DROPPED)


def _code(document: Document, _: ModelFacts) -> Document:
    return dict.fromkeys((key for key in _CODE_KEYS if key in document), DROPPED)


def _other_files(document: Document, _: ModelFacts) -> Document:
    return dict.fromkeys((key for key in TOKENIZER_FILE_KEYS if names_other_file(document.get(key))), DROPPED)


def _training_slices(document: Document, _: ModelFacts) -> Document:
    return {"pretraining_tp": DROPPED} if document.get("pretraining_tp", 1) not in (1, None) else {}


def _training_outputs(document: Document, _: ModelFacts) -> Document:
    asked = [key for key in _OUTPUT_KEYS if document.get(key) is True]
    return dict.fromkeys([*asked, *(["return_dict"] if document.get("return_dict") is False else [])], DROPPED)


def _attention(document: Document, _: ModelFacts) -> Document:
    return dict.fromkeys((key for key in _ATTENTION_KEYS if key in document), DROPPED)


def _unknown_ids(document: Document, facts: ModelFacts) -> Document:
    """Return the special token ids without those that are no token."""

    def is_unknown(value: object) -> bool:
        # Anything but a whole number is left for the audit to report.
        number = int_value(value)
        return number is not None and not 0 <= number < (facts.vocab_size or number + 1)

    changes: dict[str, object] = {}
    for key in TOKEN_ID_KEYS:
        value = document.get(key)
        if is_unknown(value):
            changes[key] = None
        elif isinstance(value, list) and any(map(is_unknown, value)):
            changes[key] = [item for item in value if not is_unknown(item)] or None
    return changes


def _greedy(document: Document, _: ModelFacts) -> Document:
    temperature = document.get("temperature")
    zero = isinstance(temperature, int | float) and not isinstance(temperature, bool) and temperature == 0
    return {"do_sample": False} if zero and document.get("do_sample") is True else {}


def _no_limit(document: Document, _: ModelFacts) -> Document:
    changes: dict[str, object] = {"top_k": 0} if int_value(document.get("top_k")) == -1 else {}
    tokens = int_value(document.get("max_new_tokens"))
    return changes if tokens is None or tokens > 0 else {**changes, "max_new_tokens": DROPPED}


def _dtype(document: Document, facts: ModelFacts) -> Document:
    name = next((name for name, stored in DTYPES.items() if stored == facts.dtype), None)
    stated = [key for key in ("torch_dtype", "dtype") if document.get(key) is not None]
    if name is None or not {"vocab_size", "text_config"} & document.keys():
        return {}  # of a tower that reads images, whose tensors may be of another dtype
    if stated and (facts.dtype == "F32" or "text_config" in document):
        return {}  # transformers converts float32 to what config.json says, on purpose
    return {key: name for key in stated or ["torch_dtype"] if document.get(key) != name}


def _own_head(document: Document, facts: ModelFacts) -> Document:
    # A config that does not say it leaves it to transformers, which ties the heads of some families then.
    holds_model = {"vocab_size", "text_config"} & document.keys()
    unties = facts.unties and holds_model and document.get("tie_word_embeddings") is not False
    return {"tie_word_embeddings": False} if unties else {}


def _more_special_tokens(document: Document, _: ModelFacts) -> Document:
    tokens = document.get("extra_special_tokens")
    if not isinstance(tokens, list):
        return {}
    # transformers 5 leaves out the other key where this one has tokens.
    return {"extra_special_tokens": DROPPED, **({"additional_special_tokens": tokens} if tokens else {})}


def _template(document: Document, facts: ModelFacts) -> Document:
    own = facts.template
    return {} if own is None or document.get("chat_template") == own else {"chat_template": own}


def _merges(document: Document, _: ModelFacts) -> Document:
    model = model_with_merges_as_lines(document)
    return {} if model is None else {"model": model}


_ALL, _MODEL, _GENERATION = (CONFIG, GENERATION_CONFIG, TOKENIZER_CONFIG), (CONFIG,), (GENERATION_CONFIG,)
BRANCH_RULES: tuple[BranchRule, ...] = (
    BranchRule(
        files=_ALL,
        keys=("_name_or_path", "name_or_path", "_model_name_or_path", "is_local", "_commit_hash"),
        changes=_loaded_from,
        reason="where somebody loaded the base model from means nothing in a branch",
        source="transformers 5.23 configuration_utils (to_dict) and tokenization_utils_base (save_pretrained)",
        everywhere=True,
    ),
    BranchRule(
        files=_ALL,
        keys=_CODE_KEYS,
        changes=_code,
        reason="the Python files that it names are not in a branch",
        source="transformers 5.23 dynamic_module_utils: get_class_from_dynamic_module looks for them there",
    ),
    BranchRule(
        files=(TOKENIZER_CONFIG,),
        keys=TOKENIZER_FILE_KEYS,
        changes=_other_files,
        reason="transformers 5 opens the file of the usual name; transformers 4 looks for this one",
        source="transformers 5.23 tokenization_utils_base (_from_pretrained)",
    ),
    BranchRule(
        files=_ALL,
        keys=("any whose value is a path",),
        changes=_paths,
        reason="a path of the machine that the base model was made on",
        source="no runtime reads one: transformers 5.23 opens the files of the folder by their names",
        everywhere=True,
    ),
    BranchRule(
        files=_MODEL,
        keys=("pretraining_tp",),
        changes=_training_slices,
        reason="transformers 5 computes without these slices, and transformers 4.40 cannot slice a quantized weight",
        source="transformers 4.40.2 models.llama.modeling_llama (LlamaMLP.forward); not read by 5.23",
    ),
    BranchRule(
        files=_MODEL,
        keys=(*_OUTPUT_KEYS, "return_dict"),
        changes=_training_outputs,
        reason="a training run asked for these outputs; users of a branch want logits",
        source="transformers 5.23 configuration_utils (PreTrainedConfig): defaults of every model's forward",
    ),
    BranchRule(
        files=_MODEL,
        keys=_ATTENTION_KEYS,
        changes=_attention,
        reason="a training run asked for this attention, which needs a package and a GPU that readers may not have",
        source="transformers 5.23 modeling_utils (_check_and_adjust_attn_implementation)",
    ),
    BranchRule(
        files=_MODEL,
        keys=("rope_theta", "rope_scaling"),
        changes=lambda document, _: spelled_for_all(document),
        reason="written so that runtimes before transformers 5 read it, too",
        source="transformers 4.40.2 models.llama.configuration_llama (_rope_scaling_validation)",
    ),
    BranchRule(
        files=(CONFIG, GENERATION_CONFIG),
        keys=TOKEN_ID_KEYS,
        changes=_unknown_ids,
        reason="no token has this id",
        source="torch.nn.Embedding refuses a padding_idx beyond its rows; generate of transformers 5.23 would write it",
    ),
    BranchRule(
        files=_GENERATION,
        keys=("do_sample",),
        changes=_greedy,
        reason="a temperature of 0 means greedy; transformers refuses to sample",
        source="transformers 5.23 generation.logits_process (TemperatureLogitsWarper)",
    ),
    BranchRule(
        files=_GENERATION,
        keys=("top_k", "max_new_tokens"),
        changes=_no_limit,
        reason="a number that means no limit, which transformers refuses",
        source="transformers 5.23 generation.logits_process (TopKLogitsWarper), configuration_utils (validate)",
    ),
    BranchRule(
        files=_MODEL,
        keys=("torch_dtype", "dtype"),
        changes=_dtype,
        reason="the dtype that most tensors of the base model have",
        source="transformers 5.23 modeling_utils (_get_dtype): what config.json says wins over the files",
    ),
    BranchRule(
        files=_MODEL,
        keys=("tie_word_embeddings",),
        changes=_own_head,
        reason="the weights hold a head of their own, which transformers 5 keeps",
        source="transformers 5.23 modeling_utils (tie_weights); 4.40 ties whenever config.json says so",
    ),
    BranchRule(
        files=(TOKENIZER_CONFIG,),
        keys=("tokenizer_class", "model_input_names", "clean_up_tokenization_spaces"),
        changes=lambda document, _: config_for_all(document),
        reason="a name that transformers 4 knows, too, and the defaults of 5, which are others in 4",
        source="models.auto.tokenization_auto and tokenization_utils_base of transformers 4.40.2 and 5.23",
    ),
    BranchRule(
        files=(TOKENIZER_CONFIG,),
        keys=("extra_special_tokens", "additional_special_tokens"),
        changes=_more_special_tokens,
        reason="the key that transformers 4 and 5 read; transformers 4.57 stops at a list of the other name",
        source="tokenization_utils_base (_from_pretrained) of transformers 5.23, which renames it when it reads it",
    ),
    BranchRule(
        files=(TOKENIZER_CONFIG,),
        keys=("chat_template",),
        changes=_template,
        reason="the templates of chat_template.jinja and additional_chat_templates, which older runtimes do not read",
        source="tokenization_utils_base (_from_pretrained) of transformers 4.40.2 and 5.23",
    ),
    BranchRule(
        files=(TOKENIZER,),
        keys=("model",),
        changes=_merges,
        reason="its merges are texts, which every release of tokenizers reads; before 0.20 none reads pairs",
        source="tokenizers 0.19.1 and 0.23 models/bpe/serialization.rs",
    ),
)
