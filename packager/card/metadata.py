"""The card's front matter, which the Hub reads to file, search and link a repository.

https://huggingface.co/docs/hub/model-cards, read in November 2026. Calibration text is never listed under `datasets`:
there it would mean training data.
"""

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from packager.errors import CardError
from packager.receipt import Provenance
from packager.recipe import License, Recipe

# The Hub refuses a card whose `license` is not one of these (https://huggingface.co/docs/hub/repositories-licenses).
_HUB_LICENSES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
openmdw-1.0 openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
grok2-community gemma unknown
"""
HUB_LICENSES = frozenset(_HUB_LICENSES.split())


def metadata(recipe: Recipe, receipts: Sequence[Provenance], model_type: str) -> dict[str, str | list[str]]:
    """Return the front matter's fields in the order they are written.

    Raises:
        CardError: the licence has no name the Hub would accept.
    """
    card = recipe.card
    bits = dict.fromkeys(f"{provenance.parameters['bits']}-bit" for provenance in receipts)
    return {
        "base_model": recipe.base_model.id,
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "model_type": model_type,
        "language": list(card.language),
        **_license(card.license),
        "quantized_by": card.quantized_by,
        "tags": list(dict.fromkeys(["gptq", *bits, *card.tags])),
    }


def _license(license_: License) -> dict[str, str | list[str]]:
    identifier = license_.id.strip().lower()
    link: dict[str, str | list[str]] = {"license_link": license_.link} if license_.link else {}
    if identifier in HUB_LICENSES:
        return {"license": identifier, **link}
    name = re.sub(r"[^a-z0-9.-]+", "-", identifier).strip("-.")
    if not name or name == "other":
        raise CardError(
            "the licence has no name",
            where="card.license.id",
            why="a card with `license: other` must also name it",
            hint="write the licence's own name, e.g. coqui-public-model-license; the card adds `license: other`",
        )
    if not link:
        texts = {PurePosixPath(path).name for path in license_.files} & {"LICENSE", "LICENSE.md"}
        link = {"license_link": min(texts)} if texts else {}
    return {"license": "other", "license_name": name, **link}
