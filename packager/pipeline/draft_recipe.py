"""The keys and values of a model's first recipe: what the model says of itself, and what usually fits such a model."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from packager.errors import RecipeError
from packager.inputs.named_model import NamedModel
from packager.model.architecture import Architecture
from packager.model.checkpoint import fit_problems
from packager.model.compatibility import verdicts
from packager.model.devices import LARGEST_ON_CPU
from packager.model.lock import LockedPrompt
from packager.model.runtimes import RUNTIMES
from packager.pipeline.draft_texts import rows_of_text, text_fields
from packager.pipeline.durations import CORRECTED_WORK
from packager.recipe import Defaults, Loaders, Recipe, VariantEntry, expand
from packager.recipe.fields import REPO_ID, URL
from packager.recipe.licenses import hub_license, license_name
from packager.system.text import quoted
from packager.variant import MAIN

VariantSet = Literal["classic", "modern", "wide"]

_GROUP_SIZES: Final = (128, 64, 32)
_PROMPTS: Final = ("What is the capital of France?", "Name three rivers of Europe.")
# The usual names of formats, by what only they contain. A format without a name here is called after its model.
_FORMATS: Final[Mapping[str, str]] = {
    "<|im_start|>": "ChatML",
    "<start_of_turn>": "Gemma",
    "<|start_header_id|>": "Llama-3-Chat",
}
# The texts that most GPTQ repositories of the Hub were made with.
_WIKITEXT: Final[Mapping[str, str]] = {
    "dataset": "Salesforce/wikitext",
    "config": "wikitext-2-raw-v1",
    "revision": "b08601e04326c79dfdd32d625aee71d232d685c3",
}
# Conversations, for models that have a chat template: one file of 81 MB, 23,110 chats (MIT). Its split train_sft has
# 208,000 in three files of 244 MB, of which a calibration would draw as few.
_CHATS: Final[Mapping[str, str]] = {
    "dataset": "HuggingFaceH4/ultrachat_200k",
    "revision": "8049631c405ae6576f93f445c6b8166f76f5505a",
    "split": "test_sft",
    "messages_field": "messages",
}
_SEQ_LENS: Final = (2048, 1024, 512, 256, 128, 64)
_NUM_SAMPLES: Final = 128
_NUM_TOKENS: Final = 131_072
# It takes 29 to 48 % of a small real model's KL divergence, less on little text, and changes nothing of the demo's:
# docs/explanation/measurements.md, "Target correction". More takes more at 3 and 4 bits, and less at 2.
_TARGET_CORRECTION: Final = 0.5


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What a person decides about a recipe.

    Attributes:
        path: the file to write.
        owner: the namespace of the repository, and who quantizes.
        variant_set: classic has full act order, modern has group-aware order, wide is classic with other bits.
        target: of the repository.
        model_id: ORG/NAME of a model in a folder, "" if it is known.
        license_id: "" for the one on the model's card.
        calibration: a local text, None for conversations, or for wikitext where the model has no chat template.
        evaluation: a local text, None for wikitext.
        extends: the name of a file in the recipe's folder, "" for none.
    """

    path: Path
    owner: str
    variant_set: VariantSet
    target: Literal["local", "hub"]
    model_id: str
    license_id: str
    calibration: Path | None
    evaluation: Path | None
    extends: str = ""


def draft_recipe(
    model: NamedModel, wishes: Wishes, architecture: Architecture | None = None, prompt: LockedPrompt | None = None
) -> dict[str, Any]:
    """Return a recipe.

    Args:
        model: the base model.
        wishes: what it leaves open.
        architecture: its shapes; without them the recipe has one variant and no loader, and serves to describe them.
        prompt: what its chat template renders, None if it has none.

    Raises:
        RecipeError: only a person knows the model's name or licence, or a text cannot be used.
    """
    model_id = wishes.model_id or model.id
    if model_id is None:
        raise RecipeError(
            "the name of the model is not known", hint="give it as on the Hub: --id ORG/NAME; the card links to it"
        )
    if not re.fullmatch(REPO_ID, model_id):
        raise RecipeError(f"{quoted(model_id)} is no name of a model", hint="give it as on the Hub: --id ORG/NAME")
    name = model_id.partition("/")[2]
    seq_len = (architecture and architecture.max_position_embeddings) or _SEQ_LENS[0]
    calibration = _calibration(wishes, seq_len, chats=prompt is not None)
    evaluation = _evaluation(wishes, seq_len)
    if architecture is not None and prompt is None:
        _refuse_conversations(calibration, evaluation)
    return {
        "schema_version": 1,
        "repository": {"id": f"{wishes.owner}/{name}-GPTQ", "target": wishes.target},
        "base_model": {"id": model_id, **_place(model, wishes.path.parent)},
        "calibration": calibration,
        "evaluation": evaluation,
        **_defaults(architecture),
        "variants": variants_of(wishes.variant_set, architecture),
        "loaders": _loaders(wishes.variant_set, architecture, chats=prompt is not None),
        "card": {
            "title": name.replace("-", " ").replace("_", " "),
            "creator": model_id.partition("/")[0],
            "creator_url": f"https://huggingface.co/{model_id.partition('/')[0]}",
            "quantized_by": wishes.owner,
            "license": _license(model, wishes.license_id),
            "language": list(model.languages or ("en",)),
            "prompt_template": _prompt_template(name, prompt),
            "related_repositories": [
                {"title": f"The model before quantization: {model_id}", "url": f"https://huggingface.co/{model_id}"}
            ],
        },
    }


def _place(model: NamedModel, folder: Path) -> dict[str, str]:
    """Return where the model is: a revision on the Hub, or a folder."""
    if model.commit is not None:
        return {"revision": model.commit if model.complete else model.requested or model.commit}
    path, home = model.folder.resolve(), Path.home()
    if path.is_relative_to(folder.resolve()):
        return {"path": path.relative_to(folder.resolve()).as_posix()}
    if path.is_relative_to(home):
        return {"path": f"~/{path.relative_to(home).as_posix()}"}
    return {"path": path.as_posix()}


def _calibration(wishes: Wishes, seq_len: int, *, chats: bool) -> dict[str, Any]:
    if wishes.calibration is None:
        rows, length = _NUM_SAMPLES, min(seq_len, _SEQ_LENS[0])
        text = _CHATS if chats else {**_WIKITEXT, "split": "train"}
        return {**text, "num_samples": rows, "seq_len": length, "seed": 0}
    fields = text_fields(wishes.calibration, wishes.path.parent)
    rows, length = rows_of_text(wishes.calibration, fields, _SEQ_LENS, most_tokens=seq_len, wanted=_NUM_SAMPLES)
    return {**fields, "num_samples": rows, "seq_len": length, "seed": 0}


def _evaluation(wishes: Wishes, seq_len: int) -> dict[str, Any]:
    if wishes.evaluation is None:
        return {**_WIKITEXT, "split": "test", "num_tokens": _NUM_TOKENS, "seq_len": min(seq_len, _SEQ_LENS[0])}
    fields, wanted = text_fields(wishes.evaluation, wishes.path.parent), _NUM_TOKENS // _SEQ_LENS[0]
    rows, length = rows_of_text(wishes.evaluation, fields, _SEQ_LENS, most_tokens=seq_len, wanted=wanted)
    return {**fields, "num_tokens": min(_NUM_TOKENS, rows * length), "seq_len": length}


def _refuse_conversations(*texts: Mapping[str, Any]) -> None:
    """Raise RecipeError for conversations, which only a chat template makes a text."""
    for text in texts:
        if "messages_field" in text:
            raise RecipeError(
                f"the text {quoted(text['path'])} holds conversations, and the model has no chat template for them",
                hint="give a file of plain text, or of JSON lines with a column of text",
            )


def _defaults(architecture: Architecture | None) -> dict[str, Any]:
    """Return the parameters of all variants: a target correction, but for a model with experts.

    What it gains there, where the linears of experts are not corrected, was not measured.
    """
    groups = architecture.group_sizes if architecture else ()
    if not groups or any(group.experts for group in groups):
        return {}
    return {"defaults": {"target_correction": _TARGET_CORRECTION}}


def variants_of(variant_set: VariantSet, architecture: Architecture | None) -> list[dict[str, Any]]:
    """Return the variants of a set, without those whose groups or words the model's shapes do not fill."""
    if architecture is None:
        return [{"branch": MAIN}]
    sizes = [size for size in _GROUP_SIZES if not any(fit_problems(architecture, bits=4, group_size=size))] or [-1]
    if variant_set == "modern":
        ordered = [{"group_size": size, "act_order": "group"} for size in sizes]
        return [{"branch": MAIN, **ordered[0]}, *ordered[1:]]
    main = {"branch": MAIN, "group_size": sizes[0], "act_order": "static"}
    ordered = [{"group_size": size, "act_order": "full"} for size in sorted(sizes)]
    if variant_set == "classic":
        return [main, *ordered]
    others = [
        {"bits": bits, "group_size": sizes[0], "act_order": act_order}
        for bits, act_order in ((8, "static"), (8, "full"), (3, "full"))
        if not any(fit_problems(architecture, bits=bits))
    ]
    return [main, *ordered, *others]


def _loaders(variant_set: VariantSet, architecture: Architecture | None, *, chats: bool) -> dict[str, Any]:
    """Return the runtimes that open all variants: those that every machine can run are required.

    Of a model that a CPU is too slow for, without the runtimes that compute on nothing else; `notes_on` names them.
    """
    if architecture is None:
        return {}
    variants = [expand(VariantEntry(**entry), Defaults()) for entry in variants_of(variant_set, architecture)]
    found = [verdict for variant in variants for verdict in verdicts(variant, architecture)]
    refused = {verdict.loader for verdict in found if not verdict.can_load}
    probes = {name: runtime.probe for name, runtime in RUNTIMES.items() if runtime.probe and name not in refused}
    if "transformers" in probes:  # the same package computes
        probes.pop("gptqmodel", None)
    probes = {name: probe for name, probe in probes.items() if name not in _too_slow(architecture)}
    required = [name for name, probe in probes.items() if "cpu" in probe.devices and not probe.on_request]
    positions, usual = architecture.max_position_embeddings, Loaders.model_fields["seq_len"].default
    tried = [name for name in probes if name not in required]
    return {
        "required": required,
        **({"if_available": tried} if tried else {}),
        **({"seq_len": positions} if positions and positions < usual else {}),
        **({"prompts": list(_PROMPTS)} if chats else {}),
    }


def _too_slow(architecture: Architecture) -> list[str]:
    """Return the runtimes that compute on a CPU alone, of a model that is too large for one."""
    if architecture.num_parameters <= LARGEST_ON_CPU:
        return []
    return [name for name, runtime in RUNTIMES.items() if runtime.probe and runtime.probe.devices == {"cpu"}]


def _license(model: NamedModel, given: str) -> dict[str, Any]:
    """Return the licence: the Hub's id or its own name, its files, and its address."""
    stated = given or model.text("license")
    if stated.lower() == "other":
        stated = model.text("license_name")
    name = hub_license(stated) or license_name(stated)
    if not name:
        why = f" ({model.card_problem})" if model.card_problem else ""
        raise RecipeError(
            f"the licence of the model is not known{why}",
            hint="give the one on its page: --license apache-2.0, for example; quantized files keep the licence",
        )
    link = model.text("license_link")
    fields: dict[str, Any] = {"id": name}
    if re.match(URL, link) and not given:
        fields["link"] = link
    if model.license_files:
        fields["base_files"] = list(model.license_files)
    return fields


def _prompt_template(name: str, prompt: LockedPrompt | None) -> dict[str, str]:
    if prompt is None:
        return {"name": "none, the text is continued", "template": "{prompt}"}
    known = next((title for mark, title in _FORMATS.items() if mark in prompt.text), f"of {name}")
    return {"name": known, "template": prompt.text.removeprefix(prompt.added)}


def notes_on(
    model: NamedModel,
    recipe: Recipe,
    architecture: Architecture,
    prompt: LockedPrompt | None,
) -> list[str]:
    """Return a sentence for each choice that a person should know of."""
    sizes = {variant.group_size for variant in recipe.expanded_variants()}
    notes = []
    if _GROUP_SIZES[0] not in sizes:
        notes.append(f"groups of {_GROUP_SIZES[0]} do not divide the model's linears: {_sizes(sizes)}")
    if prompt is not None and recipe.calibration.dataset == _CHATS["dataset"]:
        notes.append(
            "the model has a chat template, so it is calibrated on conversations of UltraChat; chats as its users have "
            "them are better: --calibration chats.jsonl with a column of messages"
        )
    if prompt is None:
        notes.append("the model has no chat template, so the card says that it continues text")
    if recipe.defaults.target_correction:
        gpu, cpu = (f"{CORRECTED_WORK[computer]:.1f} times" for computer in ("cuda", "cpu"))
        notes.append(
            f"with target_correction quantizing takes {gpu} as long on a GPU, {cpu} on a CPU, and the small model that "
            "was measured came out 1.4 to 1.9 times as near to its base model: 0 is the fast way"
        )
    if not recipe.loaders.required:
        notes.append("no loader that runs on every machine opens this model: nothing but the audit proves its variants")
    if slow := _too_slow(architecture):
        notes.append(
            f"on a CPU alone, too slowly for this model, compute {', '.join(slow)}: loaders names none of them"
        )
    if model.empty:
        notes.append(f"empty, so no licence file of a branch: {', '.join(sorted(model.empty))}")
    if not model.languages:
        notes.append("the model's card names no language: the recipe says en")
    return notes


def _sizes(sizes: set[int]) -> str:
    return f"the variants have {', '.join(str(size) for size in sorted(sizes))}"
