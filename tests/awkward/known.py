"""Troubles that still end wrong, each with the reason."""

from collections.abc import Mapping

KNOWN: Mapping[str, str] = {}
