"""Ed25519 keys: the private key that signs a release, and the public keys that a reader trusts.

`cryptography` is imported where it is used: the extra `sign` brings it. The private key stays in the memory of this
process: no child process, log line, error or file gets it.
"""

import hashlib
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from packager.errors import MachineError, PublishError
from packager.publish.statements import StatementError, envelope, pre_authentication_encoding, read_envelope
from packager.system.posix import open_flags

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

_MAX_KEY_BYTES = 65_536
_SIGNATURE_BYTES = 64
_MAKE_KEY = "make one with: openssl genpkey -algorithm ed25519 -aes256 -out sign.key"


@dataclass(frozen=True, kw_only=True)
class TrustedKeys:
    """The public keys that a reader trusts, by id: the sha256 of a key's DER form (SubjectPublicKeyInfo)."""

    keys: "dict[str, Ed25519PublicKey]" = field(default_factory=dict)

    def opened(self, data: bytes) -> tuple[bytes, str]:
        """Return the statement of an envelope, and the id of the trusted key that signed it.

        Raises:
            StatementError: it is no envelope, or no trusted key signed it.
        """
        from cryptography.exceptions import InvalidSignature

        payload, signatures = read_envelope(data)
        signed = pre_authentication_encoding(payload)
        damaged = False
        for keyid, signature in signatures:
            if keyid not in self.keys:
                continue
            try:
                self.keys[keyid].verify(signature, signed)
            except InvalidSignature:
                damaged = True
            else:
                return payload, keyid
        if damaged:
            raise StatementError("the signature does not fit the statement: one of them was changed")
        names = ", ".join(keyid[:16] for keyid, _ in signatures)
        raise StatementError(f"none of the trusted keys signed it: it names {names}")

    def with_keys(self, other: "TrustedKeys") -> "TrustedKeys":
        """Return the keys of both."""
        return TrustedKeys(keys={**self.keys, **other.keys})


class Signer:
    """Signs statements with a private key, which its `repr` does not show."""

    def __init__(self, key: "Ed25519PrivateKey") -> None:
        self._key = key
        self.public = _by_id(key.public_key())
        (self.keyid,) = self.public.keys

    def sign(self, statement: bytes, present: bytes = b"") -> bytes:  # noqa: ARG002 - a plan needs it
        """Return the envelope of a statement; Ed25519 gives the same bytes each time."""
        return envelope(statement, [(self.keyid, self._key.sign(pre_authentication_encoding(statement)))])


class PlanningSigner:
    """Stands for a private key in a plan: it has the public key only, and its envelopes have an empty signature."""

    def __init__(self, public: TrustedKeys) -> None:
        self.public = public
        (self.keyid,) = public.keys

    def sign(self, statement: bytes, present: bytes = b"") -> bytes:
        """Return `present` if the private key would sign `statement` with the same bytes, else an unsigned envelope."""
        try:
            if self.public.opened(present)[0] == statement and len(read_envelope(present)[1]) == 1:
                return present
        except StatementError:
            pass  # another statement, or another signer: it is replaced
        return envelope(statement, [(self.keyid, bytes(_SIGNATURE_BYTES))])


def read_planning_key(path: Path, passphrase: Callable[[], bytes]) -> "Signer | PlanningSigner":
    """Read the key of a plan: a public key is enough, a private key works too.

    Raises:
        PublishError: there is no such key, or it is no Ed25519 key in PEM form.
        MachineError: the extra `sign` is not installed.
    """
    if b"PUBLIC KEY-----" in _read(path, private=False):
        return PlanningSigner(read_trusted_keys([path]))
    return read_signing_key(path, passphrase)


def read_signing_key(path: Path, passphrase: Callable[[], bytes]) -> Signer:
    """Read a private key.

    Args:
        path: an Ed25519 key in PEM form (PKCS #8), which only its owner may read.
        passphrase: called if the key is encrypted.

    Raises:
        PublishError: there is no such key, others may read the file, or the passphrase is wrong.
        MachineError: the extra `sign` is not installed.
    """
    _require_extra()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    data = _read(path, private=True)
    try:
        try:
            key = load_pem_private_key(data, None)
        except TypeError:  # the key is encrypted
            key = load_pem_private_key(data, passphrase())
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # The library's message is left out, and the cause too: it may quote the file.
        raise PublishError(
            "the signing key cannot be read",
            where=str(path),
            why="it is no private key in PEM form, or the passphrase is wrong",
            hint=f"PACKAGER_SIGN_PASSPHRASE has the passphrase; {_MAKE_KEY}",
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise PublishError("the signing key is no Ed25519 key", where=str(path), hint=_MAKE_KEY)
    return Signer(key)


def read_trusted_keys(paths: Sequence[Path]) -> TrustedKeys:
    """Read public keys, one of each file.

    Raises:
        PublishError: a file does not hold an Ed25519 public key in PEM form.
        MachineError: the extra `sign` is not installed.
    """
    if not paths:
        return TrustedKeys()
    _require_extra()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    found = TrustedKeys()
    for path in paths:
        try:
            key = load_pem_public_key(_read(path, private=False))
        except (ValueError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, Ed25519PublicKey):
            raise PublishError(
                "the trusted key is no Ed25519 public key in PEM form",
                where=str(path),
                hint="write it with: openssl pkey -in sign.key -pubout -out sign.pub",
            )
        found = found.with_keys(_by_id(key))
    return found


def _by_id(key: "Ed25519PublicKey") -> TrustedKeys:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return TrustedKeys(keys={hashlib.sha256(der).hexdigest(): key})


def _read(path: Path, *, private: bool) -> bytes:
    """Read a small ordinary file; one with a private key must be readable by its owner only."""
    what = "the signing key cannot be used" if private else "the trusted key cannot be used"
    try:
        descriptor = os.open(path, open_flags("O_RDONLY", "O_NONBLOCK", "O_CLOEXEC"))
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", "") or str(error)
        raise PublishError(what, where=str(path), why=why) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_KEY_BYTES:
            raise PublishError(what, where=str(path), why="it is not a small ordinary file")
        if private and os.name == "posix" and status.st_mode & 0o077:  # Windows has no such modes
            raise PublishError(what, where=str(path), why="other users may read it", hint=f"chmod 600 {path}")
        return os.read(descriptor, _MAX_KEY_BYTES)
    finally:
        os.close(descriptor)


def _require_extra() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise MachineError(
            "signatures need the package cryptography",
            why=str(error),
            hint='install it: pip install "gptq-packager[sign]"',
        ) from error
