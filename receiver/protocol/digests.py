"""Digests of what a message brings, made without letting go of the interpreter's lock.

`hmac.digest` lets go of it whatever the length, `hashlib` from 2,048 bytes up: for a microsecond's work, after which a
busy process waits for it again, and that costs more than ten times the digest. Must not be used for what is long
without need: others wait meanwhile.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import sha256 as new_sha256
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from hashlib import _Hash

# hashlib lets go of the lock for more than this at once.
_PIECE: Final = 2047
_BLOCK: Final = 64
# From here on the work is worth letting others run.
_LONG: Final = 32 * 1024


def sha256(*parts: bytes | memoryview) -> bytes:
    """SHA-256 of the parts, one after another."""
    digest = new_sha256()
    for part in parts:
        if _PIECE < len(part) < _LONG:
            view = memoryview(part)
            for at in range(0, len(view), _PIECE):
                digest.update(view[at : at + _PIECE])
        else:
            digest.update(part)
    return digest.digest()


def hmac_sha256(key: bytes, data: bytes) -> bytes:
    """HMAC-SHA256 (RFC 2104), from two copied hashes: quicker than to copy an object of `hmac`."""
    begun, outer = _begun(key)
    inner, outer = begun.copy(), outer.copy()
    inner.update(data)
    outer.update(inner.digest())
    return outer.digest()


@lru_cache(256)
def _begun(key: bytes) -> tuple[_Hash, _Hash]:
    """The inner and the outer hash, each with its pad."""
    padded = (new_sha256(key).digest() if len(key) > _BLOCK else key).ljust(_BLOCK, b"\0")
    return new_sha256(bytes(byte ^ 0x36 for byte in padded)), new_sha256(bytes(byte ^ 0x5C for byte in padded))
