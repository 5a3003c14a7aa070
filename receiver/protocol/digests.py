"""Digests of short data, computed without releasing the interpreter's lock (GIL).

`hmac.digest` always releases it, `hashlib` from 2,048 bytes. In a busy process, acquiring it again takes more than ten
times as long as the digest of a short message. Long data is digested with the lock released, so that other threads run.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import sha256 as new_sha256
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from hashlib import _Hash

# hashlib releases the lock for more than this number of bytes at once.
_PIECE: Final = 2047
_BLOCK: Final = 64
# From this size on, the lock is released.
_LONG: Final = 32 * 1024


def sha256(*parts: bytes | memoryview) -> bytes:
    """Return the SHA-256 of the concatenated parts."""
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
    """Return the HMAC-SHA256 (RFC 2104). Copying two hashes is faster than copying an object of `hmac`."""
    begun, outer = _begun(key)
    inner, outer = begun.copy(), outer.copy()
    inner.update(data)
    outer.update(inner.digest())
    return outer.digest()


@lru_cache(256)
def _begun(key: bytes) -> tuple[_Hash, _Hash]:
    """Return the inner and the outer hash, each with its pad."""
    padded = (new_sha256(key).digest() if len(key) > _BLOCK else key).ljust(_BLOCK, b"\0")
    return new_sha256(bytes(byte ^ 0x36 for byte in padded)), new_sha256(bytes(byte ^ 0x5C for byte in padded))
