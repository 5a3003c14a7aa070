"""Encryption: seals bytes with AES-256-GCM under a key of the keyring, bound to their place (associated data).

Must not decide what is sealed. A sealed value is: 12 bytes nonce, ciphertext, 16 bytes tag (NIST SP 800-38D). A
separate column holds the id of its key.
"""

from __future__ import annotations

import os
from collections import deque
from typing import Final

import zstandard
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from receiver.errors import IntegrityError
from receiver.keyring import Keyring

_NONCE: Final = 12
_COMPRESSORS: Final = 4
_SMALL: Final = 256 * 1024
_MAX_BODY: Final = 1 << 30  # more than any body; an upper bound for the decompressor


class Sealer:
    """Seals and opens under one keyring. Thread-safe."""

    def __init__(self, keyring: Keyring) -> None:
        self._keyring = keyring
        self._ciphers: dict[str, AESGCM] = {}
        # Idle compressors: creating one costs as much as compressing a message. Each is used by one thread at a time.
        self._compressors: deque[zstandard.ZstdCompressor] = deque(maxlen=_COMPRESSORS)

    def seal(self, purpose: str, plain: bytes, bound_to: str) -> tuple[str, bytes]:
        """Return (key id, sealed bytes) of `plain`, which opens only with the same `bound_to`."""
        key = self._keyring.current(purpose)
        nonce = os.urandom(_NONCE)
        return key.id, nonce + self._cipher(key.id).encrypt(nonce, plain, bound_to.encode())

    def open(self, key_id: str, sealed: bytes, bound_to: str) -> bytes:
        """Return the plain bytes. Raises IntegrityError when they were changed, moved, or sealed with another key."""
        try:
            return self._cipher(key_id).decrypt(sealed[:_NONCE], sealed[_NONCE:], bound_to.encode())
        except (InvalidTag, ValueError) as exc:
            raise IntegrityError(
                f"the data sealed to {bound_to} under key {key_id} cannot be opened: it was changed or moved"
            ) from exc

    def seal_body(self, body: bytes, bound_to: str) -> tuple[str, bytes]:
        """Return (key id, sealed bytes) of a body, compressed first (zstd level 1: the cheapest that halves JSON)."""
        try:
            compressor = self._compressors.pop()
        except IndexError:
            compressor = zstandard.ZstdCompressor(level=1)
        compressed = compressor.compress(body)
        if len(body) <= _SMALL:  # after a large body it would keep that much memory
            self._compressors.append(compressor)
        return self.seal("payload", compressed, bound_to)

    def open_body(self, key_id: str, sealed: bytes, bound_to: str) -> bytes:
        """Return the exact bytes of a body. Raises IntegrityError."""
        compressed = self.open(key_id, sealed, bound_to)
        return zstandard.ZstdDecompressor().decompress(compressed, max_output_size=_MAX_BODY)

    def _cipher(self, key_id: str) -> AESGCM:
        cipher = self._ciphers.get(key_id)
        if cipher is None:
            cipher = self._ciphers[key_id] = AESGCM(self._keyring[key_id].derive("seal"))
        return cipher


def payload_binding(uuid: str) -> str:
    """Return the binding to which a message's payload is sealed."""
    return f"payload:{uuid}"
