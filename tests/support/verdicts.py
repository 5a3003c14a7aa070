"""Verdicts of the pipeline on made-up requests."""

from __future__ import annotations

import json
from collections.abc import Mapping

from receiver.pipeline import UNPROVED_BODY, Admitted, Challenged, HeadAccepted, Refused, Verdict, check_head, judge
from receiver.protocol.message import Inbound
from receiver.protocol.registry import Destination
from tests.protocol.made_up import NOW, SIGNATURES, SOURCE, TOKENS, destination, head, registry, token

Headers = Mapping[str, str]

FIRST, SECOND = TOKENS["first"], TOKENS["second"]
TOKEN: Headers = {"verification-token": TOKENS["first"]}
SIGNED: Headers = {"redox-signature": SIGNATURES["first"]}
UUID = "34b8d6a5-7d0e-4b0c-9d5f-0a1b2c3d4e5f"
MAIN = destination(token())
META = b'"Meta":{"DataModel":"PatientAdmin","EventType":"Arrival","Source":{"ID":"%b"}}' % SOURCE.encode()


def receive(request: Inbound, at: Destination = MAIN) -> Verdict:
    """The verdict as an endpoint gets it: check the head, limit a body without a credential, judge."""
    accepted = check_head(request.head, registry(at), NOW)
    if isinstance(accepted, Refused):
        return accepted
    if not accepted.whole and len(request.body) > UNPROVED_BODY:
        return accepted.missing()
    return judge(accepted, request.body, NOW)


def accepted(headers: Headers, at: Destination) -> HeadAccepted:
    """A head that is accepted."""
    found = check_head(head(headers), registry(at), NOW)
    assert isinstance(found, HeadAccepted)
    return found


def handshake(challenge: object = UUID, given_token: object = TOKENS["first"]) -> bytes:
    """The body of a POST handshake; None omits a member."""
    values = {"verification-token": given_token, "challenge": challenge}
    return json.dumps({name: value for name, value in values.items() if value is not None}).encode()


def described(verdict: Verdict) -> str:
    """A verdict as a short text."""
    match verdict:
        case Refused():
            return f"refused {verdict.status} {verdict.reason}"
        case Challenged():
            return f"challenged {verdict.challenge}"
        case Admitted(quarantine=None):
            return "admitted"
        case Admitted():
            return f"quarantined {verdict.quarantine}"
