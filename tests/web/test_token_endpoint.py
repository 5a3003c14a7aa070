"""The token endpoint: its limit for wrong secrets, and its replies when it cannot record."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import Future
from io import BytesIO
from urllib.parse import urlencode

import pytest
from msgspec import structs

from receiver.errors import BadTransfer, Unavailable
from receiver.protocol.message import Nonce, Reply
from receiver.protocol.registry import Registry
from receiver.storage.evidence.flood_control import network
from receiver.web.runtime import ThreadRuntime, drive
from receiver.web.token_endpoint import GUESSES, TokenEndpoint, TokenIssue, TokenRefusal
from tests.protocol.made_up import destination, head, registry
from tests.protocol.test_tokens import _RIGHT, _assertion, _oauth, _smart


class Records:
    """A storage that writes nothing. `away`: which of its calls fails."""

    def __init__(self, *, away: str = "") -> None:
        self.away = away
        self.refusals: list[TokenRefusal] = []

    def first(self, once: Sequence[Nonce]) -> bool:
        """Every nonce is new."""
        if self.away == "once":
            raise Unavailable("database_away")
        return bool(once)

    def issued(self, issue: TokenIssue) -> Future[None]:
        """Written, unless it is away."""
        future: Future[None] = Future()
        if self.away == "audit":
            future.set_exception(Unavailable("database_away"))
        elif self.away != "silent":
            future.set_result(None)
        return future

    def not_issued(self, refusal: TokenRefusal) -> None:
        """Keep it for the test."""
        self.refusals.append(refusal)


class Body:
    """A body that has arrived, whole or in part."""

    def __init__(self, content: bytes, *, length: int | None = None) -> None:
        self.length = len(content) if length is None else length
        self._rest = BytesIO(content)

    async def read(self, size: int, seconds: float) -> bytes:
        """The rest."""
        return self._rest.read(size)

    def mark_authenticated(self) -> None:
        """There is no server."""


class Broken(Body):
    """A body with malformed chunks."""

    async def read(self, size: int, seconds: float) -> bytes:
        """Raise BadTransfer."""
        raise BadTransfer("body_malformed")


def _endpoint(records: Records, known: Registry | None) -> TokenEndpoint:
    return TokenEndpoint(registry=lambda: known, records=records, network=network)


def _served(records: Records, known: Registry | None, body: Body) -> Reply:
    return drive(_endpoint(records, known).serve(_HEAD, body, ThreadRuntime()))


_KNOWN = registry(destination(_oauth(), _smart(), require=("oauth",)))
_HEAD = head({"content-type": "application/x-www-form-urlencoded"})
_GOOD = urlencode(_RIGHT).encode()


def test_granted() -> None:
    """A right secret gets a token."""
    reply = _served(Records(), _KNOWN, Body(_GOOD))
    assert (reply.status, reply.close) == (200, False)
    assert json.loads(reply.body)["token_type"] == "Bearer"


def test_guesses_are_counted_by_network() -> None:
    """After so many wrong secrets within a minute a network is answered 429, and no other network. The right secret
    still gets its token from there.
    """
    endpoint = _endpoint(Records(), _KNOWN)
    wrong = urlencode(_RIGHT | {"client_secret": "wrong"}).encode()

    def status(form: bytes, peer: str) -> int:
        return drive(endpoint.serve(structs.replace(_HEAD, peer=peer), Body(form), ThreadRuntime())).status

    assert [status(wrong, "192.0.2.1") for _ in range(GUESSES)] == [401] * GUESSES
    assert status(wrong, "192.0.2.1") == 429
    assert status(wrong, "192.0.2.2") == 401
    assert status(_GOOD, "192.0.2.1") == 200


@pytest.mark.parametrize(
    ("away", "form"), [("audit", _GOOD), ("silent", _GOOD), ("once", urlencode(_assertion()).encode())]
)
def test_a_token_that_cannot_be_recorded(away: str, form: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that cannot be recorded, or whose assertion cannot, is not issued: 503."""
    monkeypatch.setattr("receiver.web.runtime.LEDGER_TIMEOUT", 0.05)
    reply = _served(Records(away=away), _KNOWN, Body(form))
    assert (reply.status, reply.close) == (503, True)
    assert b"access_token" not in reply.body


def test_without_a_registry() -> None:
    """Without a registry the reply is 503, not a refusal."""
    assert _served(Records(), None, Body(_GOOD)).status == 503


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (Body(_GOOD, length=len(_GOOD) + 5), "body_incomplete"),
        (Broken(_GOOD), "body_malformed"),
        (Body(b"", length=10**9), "token_request_too_large"),
    ],
)
def test_a_body_that_does_not_arrive(body: Body, reason: str) -> None:
    """A request that is incomplete, malformed or too large gets 400, and the connection closes."""
    records = Records()
    reply = _served(records, _KNOWN, body)
    assert (reply.status, reply.close) == (400, True)
    assert json.loads(reply.body) == {"error": "invalid_request"}
    assert [each.denied.reason for each in records.refusals] == [reason]


@pytest.mark.parametrize(
    ("known", "reason"),
    [
        (registry(), "destination_unknown"),
        (registry(destination(_oauth(), require=("oauth",), enabled=False)), "destination_disabled"),
    ],
)
def test_no_such_destination(known: Registry, reason: str) -> None:
    """An unknown or disabled destination gets invalid_client, and the body is not read."""
    records = Records()
    body = Body(_GOOD)
    reply = _served(records, known, body)
    assert (reply.status, json.loads(reply.body)) == (401, {"error": "invalid_client"})
    assert [each.denied.reason for each in records.refusals] == [reason]
    assert drive(body.read(-1, 1.0)) == _GOOD
