"""Signed checkpoints: a tree's size and root as a text that anybody with the public key can check.

The formats are C2SP's: the text is a tlog-checkpoint (c2sp.org/tlog-checkpoint), signed as a signed note
(c2sp.org/signed-note) with Ed25519; a public key is written as a note verifier key, `NAME+HASH+KEY`.

Must not know what the tree's leaves are.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from receiver.errors import ProofInvalid
from receiver.transparency.merkle import HASH_BYTES

# c2sp.org/signed-note: the byte that says Ed25519 in a verifier key and in a key's hash.
_ED25519: Final = b"\x01"
_DASH: Final = "\N{EM DASH} "
_NAME: Final = re.compile(r"[^\s+]+")
_SIZE: Final = re.compile(r"0|[1-9][0-9]{0,18}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """What a checkpoint says. `root`: 32 bytes; `extensions`: further lines, none of them empty.

    Raises ProofInvalid when made of something that the format does not hold.
    """

    origin: str
    size: int
    root: bytes
    extensions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.origin or any(not line or "\n" in line for line in (self.origin, *self.extensions)):
            raise ProofInvalid("a checkpoint's origin and extension lines are single lines that are not empty")
        if self.size < 0 or len(self.root) != HASH_BYTES:
            raise ProofInvalid(f"a checkpoint has a size and a root of {HASH_BYTES} bytes")

    def text(self) -> str:
        """The text that is signed, its last line ended too."""
        return "\n".join((self.origin, str(self.size), base64.b64encode(self.root).decode(), *self.extensions, ""))


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifierKey:
    """A public key and the name that it signs under. `public`: 32 bytes (RFC 8032)."""

    name: str
    public: bytes

    @property
    def key_hash(self) -> bytes:
        """The four bytes by which a signature line names its key."""
        return sha256(self.name.encode() + b"\n" + _ED25519 + self.public).digest()[:4]

    def __str__(self) -> str:
        return f"{self.name}+{self.key_hash.hex()}+{base64.b64encode(_ED25519 + self.public).decode()}"

    @classmethod
    def parse(cls, text: str) -> VerifierKey:
        """Read `NAME+HASH+KEY`. Raises ProofInvalid."""
        name, _, rest = text.strip().partition("+")
        key_hash, _, encoded = rest.partition("+")
        raw = _base64(encoded)
        if not _NAME.fullmatch(name) or raw[:1] != _ED25519 or len(raw) != 1 + HASH_BYTES:
            raise ProofInvalid("not a verifier key: use NAME+HASH+KEY with an Ed25519 key")
        key = cls(name=name, public=raw[1:])
        if key_hash != key.key_hash.hex():
            raise ProofInvalid("the verifier key is damaged: its hash is not that of its name and key")
        return key


def verifier_key(name: str, private_key: Ed25519PrivateKey) -> VerifierKey:
    """The public half of `private_key`, under that name. Raises ProofInvalid: the name holds a space or a plus sign."""
    if not _NAME.fullmatch(name):
        raise ProofInvalid(f"{name!r} is not a valid key name: it must not hold white space or `+`")
    return VerifierKey(name=name, public=private_key.public_key().public_bytes_raw())


def sign(checkpoint: Checkpoint, private_key: Ed25519PrivateKey) -> str:
    """The checkpoint as a signed note; the key's name is the checkpoint's origin. Raises ProofInvalid."""
    key = verifier_key(checkpoint.origin, private_key)
    text = checkpoint.text()
    signature = base64.b64encode(key.key_hash + private_key.sign(text.encode())).decode()
    return f"{text}\n{_DASH}{key.name} {signature}\n"


def verify(note: str, key: VerifierKey) -> Checkpoint:
    """What a signed note says, once its signature by `key` holds. Other signatures are ignored. Raises ProofInvalid."""
    text, separator, signatures = note.rpartition("\n\n")
    if not separator or not signatures.endswith("\n"):
        raise ProofInvalid("not a signed note: a text, an empty line, and signature lines")
    text += "\n"
    if not any(_signed(line, text, key) for line in signatures.splitlines()):
        raise ProofInvalid(f"the note has no valid signature of {key.name}")
    lines = text.split("\n")[:-1]
    if len(lines) < 3 or not _SIZE.fullmatch(lines[1]):
        raise ProofInvalid("the signed note is not a checkpoint: it begins with an origin, a tree size and a root")
    return Checkpoint(origin=lines[0], size=int(lines[1]), root=_base64(lines[2]), extensions=tuple(lines[3:]))


def _signed(line: str, text: str, key: VerifierKey) -> bool:
    if not line.startswith(_DASH):
        raise ProofInvalid("not a signed note: a signature line begins with an em dash")
    name, _, encoded = line.removeprefix(_DASH).partition(" ")
    signature = _base64(encoded)
    if name != key.name or signature[:4] != key.key_hash:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(key.public).verify(signature[4:], text.encode())
    except InvalidSignature:
        raise ProofInvalid(f"the signature of {key.name} does not hold: the note was changed") from None
    return True


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ProofInvalid("not valid base64") from None
