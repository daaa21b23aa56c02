"""The address of the Hub that HF_ENDPOINT names; huggingface_hub ends with a traceback if it is malformed."""

from collections.abc import Mapping
from urllib.parse import urlsplit

from packager.errors import MachineError

_VARIABLE = "HF_ENDPOINT"


def require_endpoint(environ: Mapping[str, str]) -> None:
    """Check the address before huggingface_hub is imported. The error does not show it: it may hold a password.

    Raises:
        MachineError: it is set, and is not http(s)://host, perhaps with user:password@, a port and a path.
    """
    if _VARIABLE not in environ:
        return
    address = environ[_VARIABLE]
    try:
        parts = urlsplit(address)
        port, host = parts.port, parts.hostname or ""
    except ValueError:
        port, host, parts = None, "", urlsplit("")
    odd = any(character.isspace() or not character.isprintable() for character in address)
    if parts.scheme not in ("http", "https") or not host or odd or port == 0 or parts.query or parts.fragment:
        why = "it is empty" if not address else "it is not http(s)://HOST[:PORT][/PATH]"
        raise MachineError(
            f"{_VARIABLE} is not the address of a Hub",
            why=why,
            hint=f"unset {_VARIABLE} for https://huggingface.co; in a user's name or a password write / as %2F, "
            "@ as %40, # as %23, ? as %3F",
        )
