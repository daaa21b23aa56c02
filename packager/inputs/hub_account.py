"""The account on the Hub whose token is set, and what the token is for. The token itself is never returned."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from packager.errors import SourceError
from packager.inputs.hub_models import hub_errors
from packager.recipe.fields import REPO_ID


@dataclass(frozen=True, kw_only=True)
class HubAccount:
    """An account.

    Attributes:
        name: of the account.
        role: of the token: "read", "write" or "fineGrained"; "unknown" where the Hub does not say.
    """

    name: str
    role: str


def has_token() -> bool:
    """Return whether a token for the Hub is set."""
    import huggingface_hub

    return huggingface_hub.get_token() is not None


def hub_account() -> HubAccount:
    """Ask the Hub whose token is set.

    Raises:
        SourceError: it does not know the token, or does not answer as a Hub does.
    """
    import huggingface_hub

    with hub_errors("the account of the Hub's token"):
        answer = huggingface_hub.HfApi().whoami()
    name = answer.get("name") if isinstance(answer, Mapping) else None
    if not isinstance(name, str) or not re.match(REPO_ID, f"{name}/x"):
        raise SourceError("the Hub names no account", why="its answer has no name that an account can have")
    return HubAccount(name=name, role=_role(answer))


def _role(account: Mapping[str, object]) -> str:
    value: object = account
    for key in ("auth", "accessToken", "role"):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, str) else "unknown"
