"""Invented recipes and receipts for the card's tests: FIXTURES, their figures were never measured on anything."""

import hashlib
import math
import random
import statistics
from pathlib import Path
from typing import Any

from packager.card.choice import CachedContext
from packager.model.architecture import architecture_of
from packager.model.compatibility import Verdict, verdicts
from packager.receipt import (
    FileRecord,
    LinearRecord,
    LoaderRecord,
    Provenance,
    QualityErrors,
    QualityRecord,
    RowQuality,
    SourceRecord,
    TextRecord,
    standard_error,
)
from packager.recipe import Recipe
from packager.variant import Variant
from tests.locks import read_lock_of

LLAMA_PROMPT = (
    "[INST] <<SYS>>\nYou are a helpful, respectful and honest assistant. If you don't know the answer to a question, "
    "please don't share false information.\n<</SYS>>\n\n{prompt} [/INST]"
)
FIXTURE_HEADER = """<!-- fixture header -->
<p align="center"><a href="https://example.org/chat">Chat &amp; support: the fixture's server</a></p>
<hr>
"""
FIXTURE_FOOTER = """## Community

For further support, join [the fixture's server](https://example.org/chat).

## Thanks, and how to contribute

Thanks to all fixtures.
"""
FIXTURE_ORIGINAL_CARD = """---
license: llama2
language:
- en
---
# **Llama 2**

Llama 2 is a collection of pretrained and fine-tuned generative text models.

||Training Data|Params|
|---|---|---|
|Llama 2|*A new mix of publicly available online data*|13B|

## Intended Use

**Intended Use Cases** Llama 2 is intended for commercial and research use in English.

```python
print("from the original card")
```
"""

_FIXTURE_ROWS = 64
# branch: weights bytes, perplexity, KL divergence, top-1 agreement, questions answered, linears with raised damping
_FIXTURE_FIGURES = {
    "main": (7_255_101_440, 5.1234, 0.02341, 0.9312, 171, 0),
    "gptq-4bit-32g-actorder_True": (7_998_012_416, 5.0387, 0.01302, 0.9561, 178, 2),
    "gptq-4bit-64g-actorder_True": (7_503_401_984, 5.0521, 0.01517, 0.9498, 177, 0),
    "gptq-4bit-128g-actorder_True": (7_255_101_440, 5.0689, 0.01833, 0.9437, 175, 0),
}


def fixture_sha256(text: str) -> str:
    """Return an invented digest."""
    return hashlib.sha256(f"fixture {text}".encode()).hexdigest()


def llama_recipe(**card: object) -> Recipe:
    """Return a recipe shaped like a Llama 2 13B release with four variants; `card` replaces fields of its card."""
    return Recipe.model_validate(
        {
            "schema_version": 1,
            "repository": {"id": "TheBloke/Llama-2-13B-chat-GPTQ"},
            "base_model": {
                "id": "meta-llama/Llama-2-13b-chat-hf",
                "revision": "a2cb7a712bb6e5e736ca7f8cd98167f81a0b5bd8",
            },
            "calibration": _wikitext("train"),
            "evaluation": _wikitext("test"),
            "variants": (
                {"branch": "main"},
                {"group_size": 32, "desc_act": True},
                {"group_size": 64, "desc_act": True},
                {"desc_act": True, "description": "The fixture maintainer's own description."},
            ),
            "loaders": {"required": ("autogptq", "transformers"), "if_available": ("exllamav2", "onnxruntime")},
            "card": {
                "title": "Meta's Llama 2 13B-chat",
                "creator": "Meta",
                "creator_url": "https://huggingface.co/meta-llama",
                "quantized_by": "TheBloke",
                "license": {
                    "id": "llama2",
                    "link": "https://ai.meta.com/resources/models-and-libraries/llama-downloads/",
                    "files": ("assets/llama-2/Notice",),
                    "base_files": ("LICENSE.txt", "USE_POLICY.md"),
                },
                "tags": ("facebook", "meta", "pytorch", "llama", "llama-2"),
                "prompt_template": {"name": "Llama-2-Chat", "template": LLAMA_PROMPT},
                "system_prompt": "You are a helpful, respectful and honest assistant. If you don't know the answer "
                "to a question, please don't share false information.",
                "related_repositories": (
                    {
                        "title": "2, 3, 4, 5, 6 and 8-bit GGUF models for CPU+GPU inference",
                        "url": "https://huggingface.co/TheBloke/Llama-2-13B-chat-GGUF",
                    },
                ),
                **card,
            },
        }
    )


def minimal_recipe(**card: object) -> Recipe:
    """Return a recipe with one variant of a local model and nothing optional; `card` replaces fields of its card."""
    return Recipe.model_validate(
        {
            "schema_version": 1,
            "repository": {"id": "fixture/tiny-GPTQ"},
            "base_model": {"id": "fixture/tiny", "path": "assets/tiny"},
            "calibration": {"path": "assets/calibration.txt", "num_samples": 8, "seq_len": 64},
            "evaluation": {"path": "assets/held-out.txt", "num_tokens": 1024, "seq_len": 64},
            "variants": ({"branch": "main", "group_size": -1},),
            "card": {
                "title": "Tiny",
                "creator": "Fixture",
                "quantized_by": "fixture",
                "license": {"id": "apache-2.0"},
                "prompt_template": {"name": "Plain", "template": "{prompt}"},
                **card,
            },
        }
    )


def two_engines_recipe() -> Recipe:
    """Return `minimal_recipe` with the same permutation twice, once by each engine."""
    recipe = minimal_recipe().model_dump()
    entry = {"group_size": 128}
    recipe["variants"] = ({"branch": "main", **entry}, {**entry, "engine": "auto-gptq"})
    return Recipe.model_validate(recipe)


def two_engines_receipts(recipe: Recipe) -> tuple[Provenance, ...]:
    """Return invented receipts of `two_engines_recipe`, made on the same GPU."""
    (common,) = minimal_receipts(minimal_recipe())
    receipts = [
        common.model_copy(update={**_common(recipe, variant), "device": "NVIDIA H100 80GB HBM3 (fixture)"})
        for variant in recipe.expanded_variants()
    ]
    versions = {"auto-gptq": "0.7.1", "gptq-packager": "0.1.0", "transformers": "4.40.2", "torch": "2.11.0+cu130"}
    receipts[0] = receipts[0].model_copy(update={"versions": {"torch": "2.11.0+cu130", "transformers": "5.23.0"}})
    receipts[1] = receipts[1].model_copy(update={"made_with": "AutoGPTQ 0.7.1", "versions": versions})
    return tuple(receipts)


def llama_receipts(recipe: Recipe) -> tuple[Provenance, ...]:
    """Return invented receipts of `llama_recipe`: two loaders passed, one was not run."""
    return tuple(_llama_receipt(recipe, variant) for variant in recipe.expanded_variants())


def fixture_quality(
    seed: int, *, perplexity: float, base_perplexity: float, kl_divergence: float, top1_agreement: float, **counts: int
) -> QualityRecord:
    """Return an invented record of 64 rows with these figures: what is hard in a row is hard for every branch."""
    dice = random.Random(seed)
    own = [dice.gauss(0, 1) for _ in range(_FIXTURE_ROWS)]

    def rows(mean: float, spread: float, noise: float) -> tuple[float, ...]:
        found = [spread * math.sin(row) + noise * each for row, each in enumerate(own)]
        return tuple(mean + each - statistics.fmean(found) for each in found)

    loss, base_loss = (math.log(value) for value in (perplexity, base_perplexity))
    kept = RowQuality(
        loss=rows(loss, 0.1, 0.002),
        base_loss=rows(base_loss, 0.1, 0),
        kl_divergence=rows(kl_divergence, kl_divergence / 4, kl_divergence / 20),
        top1_agreement=rows(top1_agreement, 0.004, 0.001),
    )
    change = [after - before for after, before in zip(kept.loss, kept.base_loss, strict=True)]
    return QualityRecord(
        num_tokens=131072,
        perplexity=perplexity,
        base_perplexity=base_perplexity,
        kl_divergence=kl_divergence,
        top1_agreement=top1_agreement,
        kl_median=kl_divergence / 90,
        kl_p99=kl_divergence * 11,
        errors=QualityErrors(
            perplexity=perplexity * standard_error(kept.loss),
            base_perplexity=base_perplexity * standard_error(kept.base_loss),
            perplexity_change=perplexity / base_perplexity * standard_error(change),
            kl_divergence=standard_error(kept.kl_divergence),
            kl_median=kl_divergence / 2000,
            kl_p99=kl_divergence / 3,
            top1_agreement=standard_error(kept.top1_agreement),
        ),
        rows=kept,
        **counts,
    )


LLAMA_CONTEXTS = (CachedContext(tokens=4096, cache_bytes=3_355_443_200),)


def llama_expectations(recipe: Recipe) -> dict[str, tuple[Verdict, ...]]:
    """Return the predictions for the variants of `llama_recipe`, from the config of the model that it names."""
    lock = read_lock_of(Path(__file__).resolve().parents[1] / "recipes" / "llama-2-13b-chat.yaml")
    architecture = architecture_of(lock.model, "lock")
    return {variant.branch: verdicts(variant, architecture) for variant in recipe.expanded_variants()}


def minimal_receipts(recipe: Recipe) -> tuple[Provenance, ...]:
    """Return an invented receipt of `minimal_recipe`: no quality, no loader."""
    (variant,) = recipe.expanded_variants()
    return (
        Provenance(
            **_common(recipe, variant),
            base_model=_source(recipe, num_parameters=3_412_224),
            calibration=_local_text("calibration.txt", seq_len=64),
            evaluation=_local_text("held-out.txt", seq_len=64),
            versions={},
            device="CPU, 2 cores (fixture)",
            linears=(LinearRecord(name="model.layers.0.mlp.up_proj", loss=0.1, damp_percent=0.01),),
            weights_bytes=2_310_144,
        ),
    )


def _llama_receipt(recipe: Recipe, variant: Variant) -> Provenance:
    weights_bytes, perplexity, kl_divergence, top1_agreement, answered, raised = _FIXTURE_FIGURES[variant.branch]
    return Provenance(
        **_common(recipe, variant),
        base_model=_source(recipe, num_parameters=13_015_864_320),
        calibration=_hub_text("train", num_samples=128, seed=0),
        evaluation=_hub_text("test", num_samples=64, seed=None),
        versions={"torch": "2.11.0+cu130", "transformers": "5.23.0", "triton": "3.6.0"},
        device="NVIDIA H100 80GB HBM3 (fixture)",
        linears=tuple(
            LinearRecord(
                name=f"model.layers.{index}.mlp.down_proj", loss=0.5, damp_percent=0.02 if index < raised else 0.01
            )
            for index in range(280)
        ),
        quality=fixture_quality(
            weights_bytes,
            perplexity=perplexity,
            base_perplexity=4.9812,
            kl_divergence=kl_divergence,
            top1_agreement=top1_agreement,
            questions=200,
            answered=answered,
            base_answered=181,
        ),
        loaders=_llama_loaders(kl_divergence),
        weights_bytes=weights_bytes,
    )


def _llama_loaders(spread: float) -> tuple[LoaderRecord, ...]:
    return (
        LoaderRecord(
            loader="autogptq",
            required=True,
            status="passed",
            device="NVIDIA H100 80GB HBM3 (fixture)",
            dtype="float16",
            kernel="QuantLinear (cuda_old)",
            versions={"auto_gptq": "0.7.1", "transformers": "4.40.2", "accelerate": "0.30.1", "torch": "2.11.0+cu130"},
            relative_error=0.0011 + spread / 100,
            top1_agreement=1.0,
            tokens_generated=64,
            tokens_equal=64,
        ),
        LoaderRecord(
            loader="transformers",
            required=True,
            status="passed",
            device="NVIDIA H100 80GB HBM3 (fixture)",
            dtype="float16",
            kernel="MarlinLinear",
            versions={"transformers": "5.23.0", "gptqmodel": "7.7.0", "optimum": "2.3.0", "torch": "2.11.0+cu130"},
            relative_error=0.0023 + spread / 100,
            top1_agreement=0.9961,
            tokens_generated=64,
            tokens_equal=61,
        ),
        LoaderRecord(
            loader="exllamav2",
            required=False,
            status="not run",
            reason="the extension could not be built: no nvcc on this machine",
        ),
        LoaderRecord(
            loader="onnxruntime",
            required=False,
            status="passed",
            device="cpu",
            dtype="float32",
            kernel="com.microsoft.MatMulNBits (CPUExecutionProvider)",
            confinement="bubblewrap",
            versions={"onnxruntime": "1.32.0", "onnxruntime-genai": "0.18.0", "transformers": "5.23.0"},
            relative_error=0.000002,
            top1_agreement=1.0,
            tokens_generated=64,
            tokens_equal=64,
        ),
    )


def _common(recipe: Recipe, variant: Variant) -> dict[str, Any]:
    parameters = variant.parameters()
    weights_name = f"{recipe.checkpoint.weights_name}.safetensors"
    return {
        "repository": recipe.repository.id,
        "branch": variant.branch,
        "made_with": "gptq-packager 0.1.0",
        "recipe_digest": fixture_sha256("recipe"),
        "variant_digest": fixture_sha256(variant.branch),
        "parameters": parameters,
        "effective": parameters,
        "files": {
            "config.json": FileRecord(size_bytes=1100, sha256=fixture_sha256(f"config {variant.branch}")),
            weights_name: FileRecord(size_bytes=2310, sha256=fixture_sha256(f"weights {variant.branch}")),
        },
    }


def _source(recipe: Recipe, num_parameters: int) -> SourceRecord:
    return SourceRecord(
        id=recipe.base_model.id,
        revision=recipe.base_model.revision,
        digest=fixture_sha256("base model"),
        files={},
        dtype="float16",
        num_parameters=num_parameters,
    )


def _wikitext(split: str) -> dict[str, object]:
    return {
        "dataset": "Salesforce/wikitext",
        "config": "wikitext-2-raw-v1",
        "revision": "b08601e04326c79dfdd32d625aee71d232d685c3",
        "split": split,
    }


def _hub_text(split: str, num_samples: int, seed: int | None) -> TextRecord:
    return TextRecord(
        source="Salesforce/wikitext",
        revision="b08601e04326c79dfdd32d625aee71d232d685c3",
        config="wikitext-2-raw-v1",
        split=split,
        num_samples=num_samples,
        seq_len=2048,
        seed=seed,
        text_sha256=fixture_sha256(f"text {split}"),
        digest=fixture_sha256(f"ids {split}"),
    )


def _local_text(name: str, seq_len: int) -> TextRecord:
    return TextRecord(
        source=name,
        revision=None,
        config=None,
        split=None,
        num_samples=8,
        seq_len=seq_len,
        seed=0,
        text_sha256=fixture_sha256(f"text {name}"),
        digest=fixture_sha256(f"ids {name}"),
    )
