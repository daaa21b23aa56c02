"""The options that name keys, and the keys that are read from them."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from packager.publish.published.signatures import Trust
    from packager.publish.sign_release import SigningKeys

_PASSPHRASE = "PACKAGER_SIGN_PASSPHRASE"  # noqa: S105 - the name of a variable

SignKeyOption = Annotated[
    Path | None,
    typer.Option(
        "--sign-key",
        metavar="FILE",
        envvar="PACKAGER_SIGN_KEY",
        help="Sign with this Ed25519 key (PEM); PACKAGER_SIGN_PASSPHRASE or a prompt gives its passphrase. "
        "For a dry run the public key is enough.",
    ),
]
TrustedKeyOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--trusted-key", metavar="FILE", help="A public key (PEM) that may have signed; may be given several times."
    ),
]
UnsignedOption = Annotated[
    bool, typer.Option("--unsigned", help="Change a signed repository without a key: its signatures no longer fit.")
]
MinReleaseOption = Annotated[
    int,
    typer.Option(
        "--min-release", metavar="N", min=1, help="The latest release that you know: an earlier one is an error."
    ),
]


def signing_keys(
    key: Path | None,
    trusted: list[Path] | None = None,
    *,
    unsigned: bool = False,
    dry_run: bool = False,
    ask: bool = True,
) -> "SigningKeys":
    """Read the keys of a command; in a dry run, `key` may be a public key.

    Unless it may `ask`, the passphrase comes from PACKAGER_SIGN_PASSPHRASE alone: other processes sign, later.
    The passphrase is removed from the environment: no child process gets it.

    Raises:
        PublishError: a key cannot be read.
        MachineError: the extra `sign` is not installed.
    """
    from packager.publish.sign_release import SigningKeys
    from packager.publish.signing_keys import read_planning_key, read_signing_key, read_trusted_keys

    read_key = read_planning_key if dry_run else read_signing_key
    secret = os.environ.pop(_PASSPHRASE, "")
    if key and unsigned:
        raise typer.BadParameter("--sign-key and --unsigned contradict each other")

    def passphrase() -> bytes:
        text = secret
        if not text and ask and sys.stdin.isatty():
            text = typer.prompt(f"Passphrase of {key}", hide_input=True, err=True)
        return text.encode()

    return SigningKeys(
        signer=read_key(key, passphrase) if key else None,
        trusted=read_trusted_keys(trusted or ()),
        unsigned=unsigned,
    )


def trust_of(trusted: list[Path] | None, min_release: int) -> "Trust | None":
    """Return the reader's keys, None if no key is given.

    Raises:
        PublishError: a key cannot be read.
        MachineError: the extra `sign` is not installed.
    """
    from packager.publish.published.signatures import Trust
    from packager.publish.signing_keys import read_trusted_keys

    if not trusted:
        if min_release > 1:
            raise typer.BadParameter("--min-release needs --trusted-key: anybody can write a number")
        return None
    return Trust(keys=read_trusted_keys(trusted), min_release=min_release)
