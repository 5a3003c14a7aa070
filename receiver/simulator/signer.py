"""Signs bodies with a webhook signing secret.

Written from RFC 2104 and 4648, independent of the receiver's verifier, so that each side tests the other. Must not
import the verifier.
"""

from __future__ import annotations

import hashlib
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal

_ENCODINGS: Final[dict[str, Callable[[bytes], str]]] = {
    "hex": bytes.hex,
    "base64": lambda mac: b64encode(mac).decode(),
    "base64url": lambda mac: urlsafe_b64encode(mac).decode(),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Signer:
    """A signing secret and its settings. Redox does not publish the wire format, so every part of it is a setting.

    `timestamp_header`: this header contains the time in whole seconds, and the signature covers the time, a period and
    the body. Without it, the signature covers only the body.
    """

    secret: bytes = field(repr=False)
    header: str = "Redox-Signature"
    hash: Literal["sha256", "sha384", "sha512"] = "sha256"
    encoding: Literal["hex", "base64", "base64url"] = "base64"
    prefix: str = ""
    timestamp_header: str | None = None

    def headers(self, body: bytes, *, now: float) -> dict[str, str]:
        """Return the headers for `body` at `now` (seconds since 1970)."""
        if self.timestamp_header is None:
            return {self.header: self._sign(body)}
        stamp = str(int(now))
        return {self.header: self._sign(stamp.encode() + b"." + body), self.timestamp_header: stamp}

    def _sign(self, message: bytes) -> str:
        """RFC 2104: H(K ⊕ opad, H(K ⊕ ipad, message))."""
        block = hashlib.new(self.hash).block_size
        key = self.secret if len(self.secret) <= block else hashlib.new(self.hash, self.secret).digest()
        key = key.ljust(block, b"\0")
        inner = hashlib.new(self.hash, bytes(byte ^ 0x36 for byte in key) + message).digest()
        mac = hashlib.new(self.hash, bytes(byte ^ 0x5C for byte in key) + inner).digest()
        return self.prefix + _ENCODINGS[self.encoding](mac)
