"""Troubles that still end wrong, each with the reason."""

from collections.abc import Mapping

KNOWN: Mapping[str, str] = {
    "templates_beside": "templates in a folder are not copied",
}
