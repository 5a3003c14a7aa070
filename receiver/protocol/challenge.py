"""The one-time handshake of "Verify & Save" in the dashboard (Redox: verification of a destination).

POST `{"verification-token": …, "challenge": …}`, or GET `?challenge=…&verification-token=…` with the token in the
query, in the header, or as the Bearer value. The answer is the challenge as text/plain, which satisfies Redox's old
rule (the whole body is the challenge) and the new one (the body contains it).

Must not verify the token: `verification.token` does.
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

# The largest body that is read before the request is verified. A handshake has about 100 bytes.
MAX_HANDSHAKE: Final = 8 * 1024

# A UUID in practice. Only printable ASCII without spaces and markup is echoed.
_CHALLENGE: Final = re.compile(r"[A-Za-z0-9._~:+/=-]{1,256}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Handshake:
    """A requested handshake, not verified.

    `challenge`: None if it is missing or not a string. `token`: None if only a header can have it.
    """

    challenge: str | None = field(repr=False)
    token: bytes | None = field(repr=False)

    def answer(self) -> str:
        """Return the challenge, safe to echo. Raises Refusal("challenge_malformed"), status 400."""
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
    """Return the handshake of a GET request: every GET is one."""
    try:
        fields = parse_qs(head.query, keep_blank_values=True, max_num_fields=20)
    except ValueError:
        fields = {}
    challenge, token = (fields.get(name, [None])[0] for name in ("challenge", "verification-token"))
    return Handshake(challenge=challenge, token=None if token is None else token.encode("utf-8", "surrogatepass"))


def from_body(body: bytes) -> Handshake | None:
    """Return the handshake in the body of a POST; None if the body is not one.

    A handshake is an object with a challenge or a token that is not a message. The body is not authenticated: this
    raises no error for any bytes.
    """
    # Most messages end here: a body that begins like a message is one, or is not JSON.
    if len(body) > MAX_HANDSHAKE or body.startswith(_MESSAGE):
        return None
    # Neither name is in the body, nor an escape sequence that could encode one.
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
