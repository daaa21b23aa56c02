"""What the Hub and the licences themselves demand of a repository: names, files, a sentence."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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

LLAMA2_NOTICE = (
    "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights Reserved."
)
_FILLERS = re.compile(r"\b(the|version|licen[cs]e)\b|(?<![a-z])v(?=\d)")
_CLOSE = 0.88  # `gpl v3` is close to gpl-3.0; llama5, which may be a new licence, is not close to llama2


@dataclass(frozen=True, kw_only=True)
class LicenseFiles:
    """The files that a licence demands: the prefixes of their names, and the sentence of the Notice file."""

    prefixes: Sequence[str]
    notice: str

    def missing(self, names: Sequence[str]) -> list[str]:
        """Return the prefixes that no name begins with, in capitals."""
        return [
            prefix.upper() for prefix in self.prefixes if not any(name.lower().startswith(prefix) for name in names)
        ]

    def has_notice(self, text: str) -> bool:
        """Return whether a Notice file holds the sentence."""
        return self.notice in " ".join(text.split())


FILES_BY_LICENSE: Mapping[str, LicenseFiles] = {
    "llama2": LicenseFiles(prefixes=("license", "use_policy", "notice"), notice=LLAMA2_NOTICE),
}


def hub_license(license_id: str) -> str:
    """Return the Hub's own spelling of a recipe's licence id, "" when the Hub does not list it."""
    identifier = license_id.strip().lower()
    return identifier if identifier in HUB_LICENSES else ""


def license_name(license_id: str) -> str:
    """Return the name of a licence that the Hub does not list; "" for `other` and for an id without letters."""
    name = re.sub(r"[^a-z0-9.-]+", "-", license_id.strip().lower()).strip("-.")
    return "" if name == "other" else name


def meant_license(license_id: str) -> str:
    """Return the id of the Hub that a licence id misspells, e.g. `apache-2.0` for `Apache License 2`, or ""."""
    letters = {_letters(name): name for name in sorted(HUB_LICENSES)}
    close = difflib.get_close_matches(_letters(license_id), letters, n=1, cutoff=_CLOSE)
    return letters[close[0]] if close else ""


def _letters(name: str) -> str:
    words = _FILLERS.sub("", name.lower()[:80].replace("_", " "))
    return re.sub(r"[^a-z0-9+]", "", words)
