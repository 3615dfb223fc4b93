"""Key letters: what the key holder sends each client of a run, signed, its secrets sealed for that client alone.

The server carries them and can read the public key, but puts no other in its place: the Ed25519 signature is that of an
identity which clients know from elsewhere. The sealed part is HPKE (RFC 9180, X25519, HKDF-SHA256, ChaCha20-Poly1305)
with run, client, rounds and parameters in `info`.
"""

import struct
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from privacy.bfv import Parameters
from privacy.refused import Refused

SECRET = 32
KEY_ID = 16
_SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)
_CONTEXT = b"umbel key letter 1\0"
_SIGNATURE = 64
_MOST = 1 << 20


@dataclass(frozen=True, repr=False)
class ClientKeys:
    """What one client holds during a run. It has no repr, so that no log has its secrets."""

    run: str
    client: str
    rounds: int
    parameters: Parameters
    key_id: bytes
    key: bytes
    """SEAL's public key in `split`, its secret key in `shared`."""
    pad_secret: bytes
    """Shared with the key holder."""
    weight_secret: bytes
    """Shared with the key holder and all clients."""
    mac_key: bytes
    """Shared with the server, which names the offender by it, and the key holder, who made it."""


def write(keys: ClientKeys, recipient: X25519PublicKey, identity: Ed25519PrivateKey) -> bytes:
    """The letter to one client."""
    subject = _subject(keys.run, keys.client, keys.rounds, keys.parameters, keys.key_id)
    shared = keys.parameters.trust == "shared"
    secret = keys.pad_secret + keys.weight_secret + keys.mac_key + (keys.key if shared else b"")
    content = keys.key_id + _SUITE.encrypt(secret, recipient, info=_CONTEXT + subject)
    return identity.sign(_signed(subject, b"" if shared else keys.key, content)) + content


def read(
    letter: bytes,
    public: bytes,
    run: str,
    client: str,
    rounds: int,
    parameters: Parameters,
    holder: Ed25519PublicKey,
    private: X25519PrivateKey,
) -> ClientKeys:
    """The keys in a letter that came through the server, where it is the holder's for this run, client and settings.

    public: the run's public key, the same for all clients, which the letter's signature covers; empty in `shared`.
    parameters: made of the client's own settings, never taken from a message. Raises Refused for everything else.
    """
    if not _SIGNATURE + KEY_ID <= len(letter) <= _MOST or len(public) > _MOST:
        raise Refused(f"a key letter of {len(letter)} bytes: the server did not pass on what the key holder wrote")
    signature, content = letter[:_SIGNATURE], letter[_SIGNATURE:]
    key_id, sealed = content[:KEY_ID], content[KEY_ID:]
    subject = _subject(run, client, rounds, parameters, key_id)
    try:
        holder.verify(signature, _signed(subject, public, content))
    except InvalidSignature:
        raise Refused(
            f"the key letter for {client} in run {run} is not signed by the key holder that this client knows, or was "
            "made for another run, client or setting: compare protect.* and the key holder's identity on both sides"
        ) from None
    try:
        secret = _SUITE.decrypt(sealed, private, info=_CONTEXT + subject)
    except InvalidTag as error:
        raise Refused(
            f"the key letter for {client} was sealed for another key: register this client's again"
        ) from error
    pad, weight, mac, rest = (secret[i * SECRET : (i + 1) * SECRET if i < 3 else None] for i in range(4))
    return ClientKeys(run, client, rounds, parameters, key_id, public or rest, pad, weight, mac)


def _subject(run: str, client: str, rounds: int, parameters: Parameters, key_id: bytes) -> bytes:
    return _parts(run.encode(), client.encode(), struct.pack("<I", rounds), parameters.to_bytes(), key_id)


def _signed(subject: bytes, public: bytes, content: bytes) -> bytes:
    return _CONTEXT + _parts(subject, public, content)


def _parts(*parts: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(part)) + part for part in parts)
