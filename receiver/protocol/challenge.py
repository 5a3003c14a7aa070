"""The one-time handshake of the dashboard's "Verify & Save" (Redox: verification of a destination).

POST `{"verification-token": …, "challenge": …}`, or GET `?challenge=…&verification-token=…` with the token in the
query, in the header, or as the Bearer value. It is answered with the bare challenge as text/plain, which satisfies the
old rule (the whole body) and the new one (anywhere in the body).

Must not verify: the token is judged by `verification.token` alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import parse_qs

import msgspec

from receiver.errors import Refusal, Unreadable
from receiver.protocol.json_limits import check_depth
from receiver.protocol.message import Head

# The largest body that is read before anything proves where it comes from; a handshake has about 100 bytes.
MAX_HANDSHAKE: Final = 8 * 1024

# A UUID in practice. Printable ASCII without spaces or markup is all that is ever echoed.
_CHALLENGE: Final = re.compile(r"[A-Za-z0-9._~:+/=-]{1,256}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Handshake:
    """A handshake that was asked for, as its sender claims it.

    `challenge` is None when it is missing or no text; `token` is None when only the header can hold it.
    """

    challenge: str | None = field(repr=False)
    token: bytes | None = field(repr=False)

    def answer(self) -> str:
        """The challenge, safe to echo. Raises Refusal("challenge_malformed"), status 400."""
        if self.challenge is None or not _CHALLENGE.fullmatch(self.challenge):
            raise Refusal("challenge_malformed")
        return self.challenge


class _HandshakeBody(msgspec.Struct):
    challenge: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    token: msgspec.Raw | msgspec.UnsetType = msgspec.field(name="verification-token", default=msgspec.UNSET)
    Meta: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    resourceType: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET  # noqa: N815 - FHIR's name


_decode: Final = msgspec.json.Decoder(_HandshakeBody).decode
_MESSAGE: Final = (b'{"Meta":', b'{"resourceType":')
_decode_text: Final = msgspec.json.Decoder(str).decode


def from_query(head: Head) -> Handshake:
    """What a GET asks: it can be nothing but a handshake."""
    try:
        fields = parse_qs(head.query, keep_blank_values=True, max_num_fields=20)
    except ValueError:
        fields = {}
    challenge, token = (fields.get(name, [None])[0] for name in ("challenge", "verification-token"))
    return Handshake(challenge=challenge, token=None if token is None else token.encode("utf-8", "surrogatepass"))


def from_body(body: bytes) -> Handshake | None:
    """The handshake that a POST's body is: an object that names a challenge or a token, and is not a message.

    None: the body is not a handshake. It reads bodies that are not authenticated: it raises nothing, whatever the
    bytes.
    """
    # Most messages end here: what begins like one is a message, or no JSON.
    if len(body) > MAX_HANDSHAKE or body.startswith(_MESSAGE):
        return None
    # Neither name stands in them, nor an escape that could spell one.
    if b"challenge" not in body and b"verification-token" not in body and b"\\u" not in body:
        return None
    try:
        check_depth(body)
        found = _decode(body)
    except (Unreadable, msgspec.DecodeError):
        return None
    if found.Meta is not msgspec.UNSET or found.resourceType is not msgspec.UNSET:
        return None
    if found.challenge is msgspec.UNSET and found.token is msgspec.UNSET:
        return None
    token = _text(found.token)
    return Handshake(challenge=_text(found.challenge), token=None if token is None else token.encode())


def _text(raw: msgspec.Raw | msgspec.UnsetType) -> str | None:
    if isinstance(raw, msgspec.UnsetType):
        return None
    try:
        return _decode_text(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
