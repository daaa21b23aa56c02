"""config.json and quantize_config.json: the GPTQ parameters they declare, and that they agree."""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from packager.model.checkpoint import PORTABLE_KEYS
from packager.prove.audit.files import JsonObject, Listing, as_object
from packager.prove.audit.finding import Findings
from packager.prove.audit.weights import DEFAULT_STEM, Weights
from packager.receipt import CONFIG, QUANTIZE_CONFIG, TOKENIZER_CONFIG
from packager.system.text import shown

_REPO_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*\Z")
_MAX_WHOLE = 1 << 31


@dataclass(frozen=True, kw_only=True)
class Declared:
    """The GPTQ parameters a folder declares; None where it declares nothing usable.

    `quantized` has the names of modules_in_block_to_quantize: the only linears of the blocks that are quantized.
    `has_mixed_bits`: single linears have other bits, by `dynamic` and by the shapes of their tensors.
    `is_gptq` is False for weights of another method, of which nothing else is declared.
    """

    bits: int | None = None
    group_size: int | None = None
    desc_act: bool | None = None
    sym: bool | None = None
    static_groups: bool = False
    checkpoint_format: str | None = None
    quantized: frozenset[str] | None = None
    has_mixed_bits: bool = False
    is_gptq: bool = True

    def leaves(self, linear: str) -> bool:
        """Return whether a linear is declared unquantized: no end of its name is one of `quantized`."""
        parts = linear.split(".")
        ends = (".".join(parts[first:]) for first in range(len(parts)))
        return self.quantized is not None and self.quantized.isdisjoint(ends)


@dataclass(frozen=True, kw_only=True)
class _Key:
    """The accepted values of a parameter; `is_guessed`: loaders guess a value where the key is missing."""

    accepts: Callable[[object], bool]
    expected: str
    is_guessed: bool


def plausible_int(value: object, *, least: int = 1) -> int | None:
    """Return an int of a plausible size, or None for anything else (a bool is not an int here)."""
    return value if isinstance(value, int) and not isinstance(value, bool) and least <= value < _MAX_WHOLE else None


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_fraction(value: object) -> bool:
    return isinstance(value, float) and 0 < value < 1


_KEYS: Mapping[str, _Key] = {
    "quant_method": _Key(accepts=lambda value: value == "gptq", expected='"gptq"', is_guessed=True),
    "bits": _Key(accepts=lambda value: plausible_int(value) in (2, 3, 4, 8), expected="2, 3, 4 or 8", is_guessed=True),
    "group_size": _Key(
        accepts=lambda value: plausible_int(value, least=-1) not in (None, 0),
        expected="-1 or a positive integer",
        is_guessed=True,
    ),
    "desc_act": _Key(accepts=_is_flag, expected="true or false", is_guessed=True),
    "sym": _Key(accepts=_is_flag, expected="true or false", is_guessed=True),
    "true_sequential": _Key(accepts=_is_flag, expected="true or false", is_guessed=False),
    "damp_percent": _Key(accepts=_is_fraction, expected="a fraction between 0 and 1", is_guessed=False),
    "static_groups": _Key(accepts=_is_flag, expected="true or false", is_guessed=False),
    "checkpoint_format": _Key(
        accepts=lambda value: value in ("gptq", "gptq_v2"), expected='"gptq" or "gptq_v2"', is_guessed=False
    ),
    "lm_head": _Key(accepts=_is_flag, expected="false", is_guessed=False),
}
_GUESSED_KEYS = frozenset(key for key, rule in _KEYS.items() if rule.is_guessed)


def missing_code(key: str) -> str:
    """Return the finding for a key of quantization_config that is missing."""
    return "quantization-key-missing" if _KEYS[key].is_guessed else "quantization-key-undeclared"


def check_declared(documents: Mapping[str, object], weights: Weights, findings: Findings) -> Declared:
    """Check both files' parameters and return them; config.json wins where they disagree."""
    config, portable = as_object(documents.get(CONFIG)), as_object(documents.get(QUANTIZE_CONFIG))
    inner: JsonObject = {}
    if config is not None:
        section = as_object(config.get("quantization_config"))
        if section is None:
            findings.add("quantization-config-missing", CONFIG, "there is no object called quantization_config")
        elif (method := _other_method(section, weights)) is not None:
            message = f"the weights are quantized by {shown(method)}, not by GPTQ"
            findings.add("other-quantization", f"{CONFIG}: quantization_config.quant_method", message)
            return Declared(is_gptq=False)
        else:
            inner = section
            _check_section(section, weights, findings)
    if portable is not None:
        _check_portable(portable, inner, weights, findings)
    declared = _declared({**(portable or {}), **inner})
    return replace(declared, has_mixed_bits=_gives_other_bits(inner.get("dynamic")) and len(widths_of(weights)) > 1)


def widths_of(weights: Weights) -> Mapping[int, int]:
    """Return how many quantized linears have how many bits, by the shapes of their tensors, rising.

    The patterns of `dynamic` are regular expressions of whoever made the checkpoint: they are not run.
    """
    found = Counter(filter(None, map(partial(bits_of, weights), sorted(weights.tensors))))
    return dict(sorted(found.items()))


def bits_of(weights: Weights, name: str) -> int | None:
    """Return the bits of the linear whose qweight has this name, None for another tensor and for odd shapes."""
    module, _, part = name.rpartition(".")
    g_idx = weights.tensors.get(f"{module}.g_idx")
    shapes = (
        (weights.tensors[name].info.shape, g_idx.info.shape) if part == "qweight" and g_idx is not None else ((), ())
    )
    if len(shapes[0]) != 2 or len(shapes[1]) != 1 or not shapes[1][0]:
        return None
    bits, rest = divmod(shapes[0][0] * 32, shapes[1][0])
    return bits if bits in (2, 3, 4, 8) and not rest else None


def _other_method(section: JsonObject, weights: Weights) -> str | None:
    """Return the method that is declared, if it is another one and the tensors are not GPTQ's."""
    method = section.get("quant_method")
    if not isinstance(method, str) or method == "gptq" or not weights.is_all_read:
        return None
    return None if any(name.endswith(".g_idx") for name in weights.tensors) else method


def _check_section(section: JsonObject, weights: Weights, findings: Findings) -> None:
    place = f"{CONFIG}: quantization_config."
    for key in _KEYS:
        if key not in section:
            findings.add(missing_code(key), f"{place}{key}", f"{key} is missing")
    _check_values(section, place, findings)
    dynamic = section.get("dynamic")
    if _gives_other_bits(dynamic) and len(widths := widths_of(weights)) > 1:
        counted = ", ".join(f"{count} linears of {bits} bits" for bits, count in widths.items())
        findings.add("mixed-bits", f"{place}dynamic", counted)
    elif overrides(dynamic):
        findings.add("quantization-override", f"{place}dynamic", "parameters of single linears are overridden")
    if section.get("pack_dtype", "int32") != "int32":
        message = f"words are {shown(section['pack_dtype'])}, not int32"
        findings.add("quantization-override", f"{place}pack_dtype", message)
    if section.get("lm_head") is True:
        findings.add("lm-head-quantized", f"{place}lm_head", "lm_head is declared quantized")
    if section.get("checkpoint_format") == "gptq_v2":
        findings.add("checkpoint-format", f"{place}checkpoint_format", "gptq_v2 is declared")


def overrides(dynamic: object) -> bool:
    """Return whether `dynamic` gives single linears other parameters; leaving some unquantized ("-:") is fine."""
    if not dynamic:
        return False
    return not isinstance(dynamic, dict) or any(not key.startswith("-:") or value for key, value in dynamic.items())


def _gives_other_bits(dynamic: object) -> bool:
    """Return whether `dynamic` gives single linears other bits, and nothing else."""
    if not overrides(dynamic) or not isinstance(dynamic, dict):
        return False
    given = [value for key, value in dynamic.items() if not key.startswith("-:") or value]
    return all(isinstance(value, dict) and value.keys() == {"bits"} for value in given)


def _check_portable(portable: JsonObject, inner: JsonObject, weights: Weights, findings: Findings) -> None:
    place = f"{QUANTIZE_CONFIG}: "
    # GPTQModel reads this file first, so it must say what is left; AutoGPTQ opens no such model anyway.
    left = inner.get("dynamic")
    is_mixed = _gives_other_bits(left) and len(widths_of(weights)) > 1
    if left and portable.get("dynamic") != left and (is_mixed or not overrides(left)):
        message = "it is not config.json's, which says what is not quantized, or has other bits"
        findings.add("quantize-config-disagrees", f"{place}dynamic", message)
    foreign = sorted(portable.keys() - {*PORTABLE_KEYS, *(["dynamic"] if left else [])})
    if foreign:
        findings.add("quantize-config-key", QUANTIZE_CONFIG, f"keys that are not portable: {', '.join(foreign)}")
    for key in PORTABLE_KEYS:
        if key in _GUESSED_KEYS and key not in portable:
            findings.add("quantization-key-missing", f"{place}{key}", f"{key} is missing")
    shared = {key: portable[key] for key in PORTABLE_KEYS if key in portable}
    _check_values(shared, place, findings)
    for key, value in shared.items():
        if key in inner and value != inner[key]:
            message = f"{shown(value)}, but config.json has {shown(inner[key])}"
            findings.add("quantize-config-disagrees", f"{place}{key}", message)
    if weights.stem and (problem := _stem_problem(portable, weights.stem)):
        findings.add("weights-name-disagrees", f"{place}model_file_base_name", problem)


def _stem_problem(portable: JsonObject, stem: str) -> str:
    """Return why AutoGPTQ does not find weights called `stem`, or ""."""
    given = portable.get("model_file_base_name")
    if given is not None:
        return f"it is {shown(given)}, the weights are called {stem}" if given != stem else ""
    # The names that AutoGPTQ tries then.
    guesses = (DEFAULT_STEM, f"gptq_model-{shown(portable.get('bits'))}bit-{shown(portable.get('group_size'))}g")
    return "" if stem in guesses else f"it is missing, and AutoGPTQ does not guess {stem}"


def _check_values(section: JsonObject, place: str, findings: Findings) -> None:
    for key, rule in _KEYS.items():
        if key in section and not rule.accepts(section[key]):
            message = f"{key} is {shown(section[key])}, expected {rule.expected}"
            findings.add("quantization-value", f"{place}{key}", message)
    name = section.get("model_name_or_path")
    # An absolute path is reported as a local path.
    if name not in (None, "") and not (isinstance(name, str) and (_REPO_ID.match(name) or name.startswith("/"))):
        findings.add("model-name-or-path", f"{place}model_name_or_path", f"it is {shown(name)}, not a repository id")


def _declared(section: JsonObject) -> Declared:
    values = {key: section[key] for key in _KEYS if key in section and _KEYS[key].accepts(section[key])}
    checkpoint_format = values.get("checkpoint_format")
    return Declared(
        bits=plausible_int(values.get("bits")),
        group_size=plausible_int(values.get("group_size"), least=-1),
        desc_act=_flag(values.get("desc_act")),
        sym=_flag(values.get("sym")),
        static_groups=values.get("static_groups") is True,
        checkpoint_format=checkpoint_format if isinstance(checkpoint_format, str) else None,
        quantized=_names(section.get("modules_in_block_to_quantize")),
    )


def _names(groups: object) -> frozenset[str] | None:
    """Return all names of a list of lists of names, None for anything else."""
    if not isinstance(groups, list) or not all(isinstance(group, list) for group in groups):
        return None
    names = [name for group in groups for name in group]
    return frozenset(names) if names and all(isinstance(name, str) for name in names) else None


def _flag(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def check_code(listing: Listing, documents: Mapping[str, object], findings: Findings) -> None:
    """Report Python files that an auto_map names and the folder does not hold; others may be in another repository."""
    for name in (CONFIG, TOKENIZER_CONFIG):
        found = (as_object(documents.get(name)) or {}).get("auto_map")
        named = found.values() if isinstance(found, dict) else [found]
        for entry in (item for value in named for item in (value if isinstance(value, list) else [value])):
            if isinstance(entry, str) and "--" not in entry and not listing.has(f"{entry.rpartition('.')[0]}.py"):
                message = f"{shown(entry)} is not among the files"
                findings.add("code-missing", f"{name}: auto_map", message)
