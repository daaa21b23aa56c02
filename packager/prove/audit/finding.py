"""The rules of the audit, one per code, and the collector that every check reports to.

A code is stable: scripts and CI filter on it. Its severity and its hint live here and nowhere else.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from packager.system.text import printable

_MOST_PLACES = 10_000
Severity = Literal["error", "warning"]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The severity of a code, and what to do about it."""

    severity: Severity
    hint: str


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong with a checkpoint folder.

    Attributes:
        code: stable kebab-case id, a key of `AUDIT_RULES`.
        severity: an error fails the audit, a warning does not.
        where: the file, `file:line`, `file: key` or tensor concerned.
        message: what is wrong there.
        hint: what to do.
        also: further locations with the same message, e.g. the other linears.
    """

    code: str
    severity: Severity
    where: str
    message: str
    hint: str
    also: tuple[str, ...] = ()


class Findings:
    """Collect findings in the order of the checks; equal messages become one finding with several locations.

    Of each code at most 10,000 locations are kept, and the rest is counted: a file can be made of nothing but secrets.
    """

    def __init__(self) -> None:
        self._places: dict[tuple[str, str], dict[str, None]] = {}
        self._counts: Counter[str] = Counter()

    def add(self, code: str, where: str, message: str) -> None:
        """Report `message` at `where` under `code`, which must be in `AUDIT_RULES`."""
        if code not in AUDIT_RULES:
            raise KeyError(code)
        self._counts[code] += 1
        if self._counts[code] > _MOST_PLACES:
            return
        self._places.setdefault((code, printable(message)), {})[printable(where)] = None

    def has(self, code: str) -> bool:
        """Return whether anything was reported under `code`."""
        return code in self._counts

    def take(self, findings: Iterable[Finding]) -> None:
        """Report findings of another audit."""
        for finding in findings:
            for where in (finding.where, *finding.also):
                self.add(finding.code, where, finding.message)

    def collected(self) -> tuple[Finding, ...]:
        """Return everything reported so far."""
        found = [_finding(code, message, tuple(places)) for (code, message), places in self._places.items()]
        for code, count in self._counts.items():
            if count > _MOST_PLACES:
                found.append(_finding(code, f"{count - _MOST_PLACES:,} more like this are not listed", (".",)))
        return tuple(found)


def _finding(code: str, message: str, places: tuple[str, ...]) -> Finding:
    rule = AUDIT_RULES[code]
    return Finding(
        code=code, severity=rule.severity, where=places[0], message=message, hint=rule.hint, also=places[1:]
    )  # fmt: skip


def _error(hint: str) -> Rule:
    return Rule(severity="error", hint=hint)


def _warning(hint: str) -> Rule:
    return Rule(severity="warning", hint=hint)


_PACK_AGAIN = "build this branch again; a tensor like this cannot be repaired by hand"
_COPY_AGAIN = "copy or download the file again"
_FROM_BASE = "copy it from the base model"

AUDIT_RULES: Mapping[str, Rule] = {
    # The folder
    "folder-missing": _error("give the folder that holds one branch"),
    "folder-not-a-model": _error("give the folder that holds config.json and the weights; nothing here was read"),
    "folder-overfull": _error("give the folder that holds one branch and nothing else"),
    "leftover-file": _error("delete it: a killed run left it behind"),
    "link-leaves-folder": _error("replace the link by the file itself; its content was not checked"),
    "not-a-regular-file": _error("delete it: only regular files can be published"),
    "file-name": _error("rename it: the name leads out of the folder, or does not survive a clone"),
    "file-unreadable": _error("make it readable, or copy it again"),
    "empty-file": _error(_COPY_AGAIN),
    "lfs-pointer": _error("install git-lfs (https://git-lfs.com) and run `git lfs install` and `git lfs pull` there"),
    "file-missing": _error("add the file: every branch has it"),
    "generation-config-missing": _warning("copy generation_config.json from the base model, if that has one"),
    "file-unhashed": _warning("run with --full, which reads everything; the repository states no sha256"),
    "json-damaged": _error("write it as UTF-8 JSON, or copy it again"),
    "text-damaged": _error("write it as UTF-8 text of a normal size, or copy it again"),
    # The weights set
    "weights-missing": _error("a branch holds model.safetensors, or shards with model.safetensors.index.json"),
    "weights-stray": _error("delete it: ExLlama and other runtimes load the first weights file that they find"),
    "weights-name": _warning("name it model.safetensors: transformers looks for nothing else"),
    "weights-name-disagrees": _error("AutoGPTQ opens exactly <model_file_base_name>.safetensors: make the two agree"),
    "index-missing": _error("write model.safetensors.index.json: loaders do not guess shards"),
    "index-damaged": _error('an index holds {"metadata": {...}, "weight_map": {tensor: file}}'),
    "index-shard-missing": _error("add the shard, or write the index again"),
    "index-disagrees": _error("write the index again from the shards' headers"),
    "index-total-size": _warning("metadata.total_size is the sum of the tensors' bytes"),
    "tensor-duplicate": _error("keep each tensor in one shard"),
    "safetensors-damaged": _error(_COPY_AGAIN),
    "header-too-large": _error("no model has such a header: " + _COPY_AGAIN),
    "weights-unread": _warning("run with --full, which downloads every file"),
    "safetensors-metadata": _error('write the file with metadata {"format": "pt"}: transformers refuses it without'),
    # config.json and quantize_config.json
    "config-value": _error("copy it from the base model's config.json"),
    "rope-spelling": _warning(
        "write rope_theta (and rope_scaling) beside rope_parameters, which older runtimes ignore"
    ),
    "code-missing": _warning("remove auto_map: with trust_remote_code=True the model does not open"),
    "quantization-config-missing": _error("without it transformers, vLLM and SGLang load the folder as an fp16 model"),
    "quantization-key-missing": _error("add the key: a loader guesses a missing value and does not report it"),
    "quantization-key-undeclared": _warning("declare it: readers see then how the weights were made"),
    "quantization-value": _error("write the value that the weights were made with"),
    "quantization-override": _error("remove it: most loaders ignore it and misread the weights"),
    "mixed-bits": _warning(
        "GPTQModel reads it; vLLM, SGLang and ONNX Runtime where its patterns fit their names; others do not"
    ),
    "checkpoint-format": _warning('store zero-1 and declare "gptq": AutoGPTQ and ExLlama read nothing else'),
    "quantize-config-missing": _warning(
        "write it from config.json, as packager fix does: AutoGPTQ opens no folder without"
    ),
    "quantize-config-key": _warning("move it to config.json: AutoGPTQ <= 0.4.2 raises TypeError on unknown keys"),
    "quantize-config-disagrees": _error("make the two files agree: loaders read one or the other"),
    "other-quantization": _warning("only what holds for every model was checked: the audit is of GPTQ checkpoints"),
    "model-name-or-path": _error("write the repository id (namespace/name)"),
    # Tensors: what there is, dtypes and shapes
    "architecture-unknown": _warning("only the checks that hold for every architecture were made"),
    "no-quantized-linear": _error("these are not GPTQ weights: no tensor is called *.qweight"),
    "block-missing": _error(_PACK_AGAIN),
    "block-unexpected": _error("num_hidden_layers and the weights belong to different models"),
    "linear-incomplete": _error("a quantized linear has qweight, qzeros, scales and g_idx"),
    "linear-missing": _error(_PACK_AGAIN),
    "linear-unquantized": _error("quantize all linears of a block: fused layers need one scheme"),
    "linear-dtype": _error("qweight, qzeros and g_idx are int32, scales and bias float16"),
    "linear-shape": _error(
        "the declared bits and group_size are not those of the weights, or the file was packed wrongly"
    ),
    "group-ragged": _warning("vLLM, SGLang and ExLlama refuse it: take a group_size that divides in_features"),
    "tensor-missing": _error(_FROM_BASE),
    "tensor-unexpected": _warning("leave it out: strict loaders refuse tensors that they do not know"),
    "tensor-shape": _error("config.json and the weights belong to different models"),
    "tensor-dtype": _error("what is not quantized keeps the base model's dtype"),
    "dtype-disagrees": _warning("declare the dtype that most tensors have: runtimes convert the others"),
    "lm-head-missing": _error("copy it from the base model, or declare tie_word_embeddings"),
    "lm-head-quantized": _error("keep lm_head in the base model's dtype and declare lm_head false"),
    "bias-unexpected": _error("the weights are those of another model: no runtime adds this bias"),
    "bias-needless": _warning("leave it out: AutoGPTQ writes biases of 0, and strict loaders refuse them"),
    "bias-missing": _error(_PACK_AGAIN),
    "bias-zero": _warning("AutoGPTQ 0.3/0.4 wrote zero biases everywhere: compare with the base model"),
    "bias-not-finite": _error(_PACK_AGAIN),
    # Tensors: values
    "zeros-format": _error("declare the checkpoint_format that the tensors hold: off by one, every weight is wrong"),
    "zeros-not-symmetric": _error("declare sym false, or build this branch again"),
    "zeros-range": _error("v1 stores zero-1 and cannot hold a zero of 0: loaders read this value in different ways"),
    "scale-not-finite": _error(_PACK_AGAIN),
    "scale-negative": _error(_PACK_AGAIN),
    "scale-overflow": _warning("runtimes that compute in float16 get infinity: compare with the base model"),
    "scale-zero": _warning("every weight of such a group is 0: correct only if the base model's weights are 0 too"),
    "g-idx-range": _error(_PACK_AGAIN),
    "g-idx-order": _error("declare desc_act true, or build this branch again"),
    "g-idx-groups": _error(_PACK_AGAIN),
    "g-idx-fused": _error("give linears with the same input the same column order: vLLM, SGLang and TGI fuse them"),
    # Tokenizer and generation
    "tokenizer-json-missing": _warning("add tokenizer.json; the vocabulary was not compared with vocab_size"),
    "tokenizer-damaged": _error(_FROM_BASE),
    "tokenizer-vocab": _error("a token without an embedding crashes every runtime: use the base model's tokenizer"),
    "token-id-range": _error("write null or a token's id: torch refuses it as the id of padding"),
    "token-id-unknown": _warning("write null, or leave it out of the list: no token has this id"),
    "chat-template-missing": _warning("add chat_template to tokenizer_config.json if the base model has one"),
    "chat-template-invalid": _error(_FROM_BASE),
    "generation-value": _error("correct the value: transformers refuses it"),
    "generation-sampling": _warning("set do_sample true or remove it: transformers warns and ignores it"),
    # What must not be published
    "local-path": _error("write a repository id or a relative name instead of a path of the building machine"),
    "host-name": _error("remove the name of a machine or user"),
    "secret": _error("remove it and revoke it now: it has been in a file"),
    # The card, the licence, provenance.json
    "card-front-matter": _error("begin README.md with '---', YAML, '---'"),
    "card-license": _error("write the Hub's licence id, e.g. license: llama2"),
    "card-license-name": _error("use the Hub's own id (llama2), or add license_name and license_link"),
    "card-base-model": _error("write base_model: the repository id of the model that was quantized"),
    "card-relation": _error("write base_model_relation: quantized"),
    "card-metadata": _warning("add it: the Hub files the model by it"),
    "card-datasets": _warning("remove it: datasets means training data, calibration text is not"),
    "card-unclosed": _error("close it: the rest of the page becomes part of it"),
    "card-python": _error("correct the example: readers paste it"),
    "card-command": _error("replace it by a command that works today"),
    "picture-damaged": _error("render the card again: packager card draws the four files of its picture"),
    "card-template": _error("render the card again: a template expression was left in it"),
    "license-file-missing": _error("copy it from the base model: its licence demands it"),
    "license-notice": _error("the licence demands this sentence in a file called Notice"),
    "provenance-invalid": _error("build this branch again"),
    "provenance-file-missing": _error("add the file, or build this branch again"),
    "provenance-file-unlisted": _error("delete the file, or build this branch again"),
    "provenance-file-changed": _error("restore the file, or build this branch again"),
    "provenance-disagrees": _error("build this branch again"),
}
