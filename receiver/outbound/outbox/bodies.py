"""Sealed bodies of a call: the request as it is sent, and the response.

Must not be used on data that other code has sealed, except to detect that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final
from uuid import UUID

import msgspec

from receiver.outbound.calls import Call
from receiver.outbound.errors import ErrorDetail
from receiver.storage.evidence.encryption import Sealer
from receiver.storage.queue.outbox import answer_binding, request_binding

_calls: Final = msgspec.msgpack.Decoder(Call)


class Bodies:
    """Seals and opens bodies. Safe in threads."""

    def __init__(self, seals: Sealer) -> None:
        self._seals = seals

    def seal_call(self, call: Call, uuid: UUID, api_key: str) -> tuple[str, bytes]:
        """Seal a call. Returns (key id, sealed)."""
        return self._seals.seal_body(msgspec.msgpack.encode(call), request_binding(uuid, api_key))

    def open_call(self, key_id: str, sealed: bytes, uuid: UUID, api_key: str) -> Call:
        """Open a call, byte for byte. Raises IntegrityError."""
        return read_call(self._seals.open_body(key_id, sealed, request_binding(uuid, api_key)))

    def seal_answer(self, body: bytes, uuid: UUID) -> tuple[str, bytes]:
        """Seal a response. Returns (key id, sealed)."""
        return self._seals.seal_body(body, answer_binding(uuid))

    def seal_errors(self, details: Sequence[ErrorDetail], uuid: UUID) -> tuple[str, bytes] | tuple[None, None]:
        """Seal the errors in Redox's response, whose text may name a patient. Returns (key id, sealed)."""
        if not details:
            return None, None
        return self.seal_answer(msgspec.json.encode({"Errors": details}), uuid)

    def open_answer(self, key_id: str, sealed: bytes, uuid: UUID) -> bytes:
        """Open a response. Raises IntegrityError."""
        return self._seals.open_body(key_id, sealed, answer_binding(uuid))


def read_call(opened: bytes) -> Call:
    """Decode the call from an opened body."""
    return _calls.decode(opened)
