"""Attack cases: requests that a destination must reject or quarantine, sent as Redox or as an attacker.

Must not depend on how the receiver works: only on requests, and on the statuses that its documentation promises.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import quote, urlsplit
from uuid import uuid4

from receiver.simulator.client_auth import Authenticator
from receiver.simulator.fake_redox import FakeRedox, HandshakeResult
from receiver.simulator.http_connection import HttpConnection, HttpReply
from receiver.simulator.signer import Signer

_KIND: Final = "PatientAdmin.Arrival"


@dataclass(frozen=True, kw_only=True, slots=True)
class AttackTarget:
    """A destination and its valid credentials, as FakeRedox takes them."""

    base_url: str
    destination: str
    token: str = field(repr=False)
    source_id: str
    signer: Signer | None = None
    authenticators: tuple[Authenticator, ...] = ()

    def redox(
        self, *, destination: str | None = None, token: str | None = None, source_id: str | None = None
    ) -> FakeRedox:
        """Return Redox, or a sender that differs from it in the given values."""
        return FakeRedox(
            self.base_url,
            destination or self.destination,
            token or self.token,
            source_id=source_id or self.source_id,
            signer=self.signer,
            authenticators=self.authenticators,
        )

    def stranger(self) -> FakeRedox:
        """Return a sender that has only the token."""
        return FakeRedox(self.base_url, self.destination, self.token, source_id=self.source_id)

    def body(self, seed: int) -> bytes:
        """Return a valid message."""
        return self.redox().body(_KIND, seed=seed)


@dataclass(frozen=True, kw_only=True, slots=True)
class AttackCase:
    """One request, and the correct statuses for it."""

    name: str
    statuses: frozenset[int]
    send: Callable[[AttackTarget, int], HttpReply]

    def check(self, answer: HttpReply) -> str | None:
        """Return None if the response is correct, else the error."""
        if answer.status in self.statuses:
            return None
        wanted = " or ".join(map(str, sorted(self.statuses)))
        return f"responded {answer.status or answer.error}, expected {wanted}"


def attack_cases(*, unknown_source: int = 403) -> tuple[AttackCase, ...]:
    """Return all attack cases. `send` takes a seed, so that each run sends new messages.

    `unknown_source`: use 200 for a destination whose policy accepts or quarantines unknown sources.
    """
    return (*_wrong_credentials(), *_unknown_sources(unknown_source), *_unreadable())


def _wrong_credentials() -> list[AttackCase]:
    wrong = "wrong-token-of-a-stranger-000000"

    def headers(**values: str | None) -> Callable[[AttackTarget, int], HttpReply]:
        changes = {name.replace("_", "-"): value for name, value in values.items()}
        return lambda at, seed: at.stranger().send(at.body(seed), headers=changes)

    def put(at: AttackTarget, seed: int) -> HttpReply:
        path = f"{urlsplit(at.base_url).path.rstrip('/')}/redox/{quote(at.destination)}"
        with HttpConnection(at.base_url, timeout=30.0) as line:
            return line.request(
                "PUT",
                path,
                body=at.body(seed),
                headers={"verification-token": at.token, "content-type": "application/json"},
            )

    refused: dict[str, Callable[[AttackTarget, int], HttpReply]] = {
        "wrong token": lambda at, seed: at.redox(token=wrong).send(at.body(seed)),
        "no token": headers(verification_token=None, authorization=None),
        "empty token": headers(verification_token="", authorization=None),
        "token in other case": lambda at, seed: at.redox(token=at.token.swapcase()).send(at.body(seed)),
        "right and wrong token": lambda at, seed: at.redox().send(
            at.body(seed), headers={"verification-token": f"{at.token},{wrong}"}
        ),
        "non-ASCII token": headers(verification_token="tökén" * 6, authorization=None),
        "right token, wrong Bearer": headers(authorization=f"Bearer {wrong}"),
        "unknown destination": lambda at, seed: at.redox(destination="nobody-registered-this").send(at.body(seed)),
        "handshake, wrong token": lambda at, _: _not_echoed(at.redox(token=wrong).handshake_post()),
        "handshake by GET, wrong token": lambda at, _: _not_echoed(at.redox(token=wrong).handshake_get()),
    }
    return [
        *(AttackCase(name=name, statuses=frozenset({401}), send=send) for name, send in refused.items()),
        AttackCase(name="PUT", statuses=frozenset({405}), send=put),
    ]


def _not_echoed(handshake: HandshakeResult) -> HttpReply:
    """Return the response. If it contains the challenge, it is not a rejection, whatever its status."""
    answer = handshake.answer
    if handshake.challenge.encode() not in answer.body:
        return answer
    return HttpReply(
        status=None, error="with the challenge in the body", sent_at=answer.sent_at, seconds=answer.seconds
    )


def _unknown_sources(status: int) -> list[AttackCase]:
    def none(at: AttackTarget, seed: int) -> HttpReply:
        body = json.loads(at.body(seed))
        del body["Meta"]["Source"]
        return at.redox().send(body)

    def unknown(at: AttackTarget, seed: int) -> HttpReply:
        redox = at.redox(source_id=str(uuid4()))
        return redox.send(redox.body(_KIND, seed=seed))

    return [
        AttackCase(name=name, statuses=frozenset({status}), send=send)
        for name, send in (("unknown source", unknown), ("no source named", none))
    ]


def _unreadable() -> list[AttackCase]:
    """Authentic, but not a valid message: quarantined and answered with 200, because a 4xx would pause the feed
    forever.
    """

    def meta(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
        return lambda body: json.dumps(json.loads(body) | {"Meta": change(json.loads(body)["Meta"])}).encode()

    bodies: dict[str, Callable[[bytes], bytes]] = {
        "HTML": lambda _: b"<html><body>502 Bad Gateway</body></html>",
        "JSON cut short": lambda body: body[: len(body) // 2],
        "two documents": lambda body: body + body,
        "a list": lambda body: b"[" + body + b"]",
        "no Meta": lambda _: b'{"Patient":{}}',
        "Meta is a list": meta(lambda _: []),
        "DataModel is a number": meta(lambda found: found | {"DataModel": 7}),
        "Meta twice": lambda body: body[:-1] + b',"Meta":{}}',
        "bad UTF-8": lambda body: body[:-1] + b',"X":"\xff"}',
        "UTF-16": lambda body: body.decode().encode("utf-16"),
        "NaN": lambda body: body[:-1] + b',"X":NaN}',
        "100,000 nested arrays": lambda body: body[:-1] + b',"X":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "gzip": gzip.compress,
    }

    def sending(change: Callable[[bytes], bytes]) -> Callable[[AttackTarget, int], HttpReply]:
        return lambda at, seed: at.redox().send(change(at.body(seed)))

    return [AttackCase(name=name, statuses=frozenset({200}), send=sending(change)) for name, change in bodies.items()]
