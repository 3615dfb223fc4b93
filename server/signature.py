"""report.json.sig: the operator's Ed25519 signature over the very bytes of report.json, and the keys for it."""

import base64
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from privacy.refused import Refused

ALGORITHM = "Ed25519"
VARIABLE = "UMBEL_KEY"
_MOST = 1 << 16
_KEEP_IT = "give the PEM file of an Ed25519 key, as `umbel key new FILE` makes it"


class Signed(NamedTuple):
    """What report.json.sig says; nothing of it is proven before `verified`."""

    public: str
    """Base64 of the 32 bytes of the public key."""
    signature: bytes


def new_key(path: Path) -> str:
    """A new private key in `path` (PEM, PKCS8, mode 0600); returns the public half as PEM.

    Raises Refused where there is a file already, or none can be made.
    """
    key = Ed25519PrivateKey.generate()
    try:
        place = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise Refused(f"{path} is there already and is not overwritten: name another file") from None
    except OSError as error:
        raise Refused(f"{path} cannot be made ({error.strerror}): name another file") from None
    with os.fdopen(place, "wb") as file:
        file.write(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        file.flush()
        os.fsync(file.fileno())
    return (
        key.public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        .decode()
    )


def operator_key(named: str) -> Ed25519PrivateKey | None:
    """The key of `named` (--key or report.key), else of UMBEL_KEY, both files; None where neither is given.

    Raises Refused for a file that is no such key; the message never quotes it.
    """
    chosen = named or os.environ.get(VARIABLE, "")
    if not chosen:
        return None
    path = Path(chosen).expanduser()
    try:
        key = serialization.load_pem_private_key(_read(path), password=None)
    except TypeError:
        raise Refused(f"the key {path} is protected by a password, which is not supported: {_KEEP_IT}") from None
    except (ValueError, UnsupportedAlgorithm):
        raise Refused(f"{path} is no private key: {_KEEP_IT}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise Refused(f"{path} is a key of another kind than {ALGORITHM}: {_KEEP_IT}")
    return key


def public_key(path: Path) -> str:
    """The public key in a PEM file, as base64. Raises Refused for a file that is none."""
    try:
        key = serialization.load_pem_public_key(_read(path))
    except (ValueError, UnsupportedAlgorithm):
        raise Refused(f"{path} is no public key: give the PEM text that `umbel key new` printed") from None
    if not isinstance(key, Ed25519PublicKey):
        raise Refused(
            f"{path} is a key of another kind than {ALGORITHM}: give the PEM text that `umbel key new` printed"
        )
    return _text(key)


def public_half(key: Ed25519PrivateKey) -> str:
    """Base64 of the public key's 32 bytes."""
    return _text(key.public_key())


def beside(report: Path) -> Path:
    """Where the signature of `report` lies."""
    return report.with_name(report.name + ".sig")


def sign(content: bytes, key: Ed25519PrivateKey) -> bytes:
    """The bytes of a signature file for `content`."""
    found = {
        "algorithm": ALGORITHM,
        "public_key": public_half(key),
        "signature": base64.b64encode(key.sign(content)).decode(),
    }
    return (json.dumps(found, indent=2) + "\n").encode()


def read(path: Path) -> Signed | None:
    """What a signature file says; None where there is none. Raises Refused for one that is damaged."""
    if not path.exists():
        return None
    try:
        found = json.loads(_read(path))
        if not isinstance(found, Mapping) or found["algorithm"] != ALGORITHM:
            raise ValueError(ALGORITHM)
        return Signed(str(found["public_key"]), base64.b64decode(found["signature"], validate=True))
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Refused(
            f"{path} is no signature of this program: sign again with `umbel report RUN --key FILE`"
        ) from None


def verified(content: bytes, signed: Signed) -> bool:
    """Whether the key that `signed` names signed exactly `content`."""
    try:
        raw = base64.b64decode(signed.public, validate=True)
        Ed25519PublicKey.from_public_bytes(raw).verify(signed.signature, content)
    except (InvalidSignature, ValueError):
        return False
    return True


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_MOST)
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror}): {_KEEP_IT}") from None


def _text(key: Ed25519PublicKey) -> str:
    raw = key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return base64.b64encode(raw).decode()
