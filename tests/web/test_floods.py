"""Floods against a running receiver: every request is counted in the audit, and the audit stays small."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from uuid import uuid4

import pytest

from receiver import logs
from receiver.storage.evidence.flood_control import REPEATS, ROWS_EACH
from receiver.storage.operations import queries
from tests.support.server import Server, Wire, post
from tests.support.site import Site, message, sent
from tests.support.waiting import until

# Requests of each flood. It takes less than a minute, so it touches two windows at most.
MANY = 300
MINUTES = 2


@pytest.fixture(scope="module")
def server_mode() -> str:
    """One mode: the ledger limits floods in both."""
    return "flask"


@pytest.fixture(scope="module", autouse=True)
def _destinations(site: Site) -> None:
    """A destination for each flood, made before the receiver starts, which would call later ones unknown."""
    for name in ("wrong", "handshake", "repeats", "made-up", "queries", "guesses"):
        site.add(name)


def flood(server: Server, requests: Iterator[bytes]) -> set[int]:
    """Send the requests on one connection while it lasts; return the statuses."""
    statuses = set()
    wire: Wire | None = None
    for request in requests:
        wire = server.wire() if wire is None else wire
        answer = wire.send(request).answer()
        statuses.add(answer.status)
        if answer.headers.get("connection") == "close":
            wire.socket.close()
            wire = None
    if wire is not None:
        wire.socket.close()
    return statuses


def handshake(site: Site) -> bytes:
    token = site.tokens["handshake"]
    return post("/redox/handshake", json.dumps({"verification-token": token, "challenge": str(uuid4())}).encode())


def made_up(site: Site) -> bytes:
    return sent(site, message(Source={"ID": str(uuid4())}), to="made-up")


def query(site: Site) -> bytes:
    return sent(site, message(DataModel="PatientSearch", EventType="Query"), to="queries")


def guess(_: Site) -> bytes:
    return post(
        "/oauth/guesses/token", b"grant_type=client_credentials", content_type="application/x-www-form-urlencoded"
    )


FLOODS: dict[str, tuple[Callable[[Site], bytes], set[int], str]] = {
    # Name → a request, its valid statuses, and the condition for its audit rows.
    "wrong": (lambda site: sent(site, b"{}", to="wrong", verification_token="wrong"), {401}, "reason = 'token_wrong'"),
    "handshake": (handshake, {200}, "action = 'destination.handshake'"),
    "unknown": (lambda _: post("/redox/nobody", b"{}"), {401}, "reason = 'destination_unknown'"),
    "made-up": (made_up, {403}, "reason = 'source_unknown'"),
    "queries": (query, {501}, "action = 'query.answer'"),
    "guesses": (guess, {401, 429}, "action = 'token.refuse'"),
}


def test_floods_are_counted(site: Site, server: Server) -> None:
    """A few audit rows a minute count each flood; a wrong method leaves none; meanwhile the feed is served."""
    same = message()
    until(lambda: server.ask(sent(site)).status == 200)  # it has loaded all of them
    assert server.ask(sent(site, same, to="repeats")).status == 200
    for name, (request, statuses, _) in FLOODS.items():
        assert flood(server, (request(site) for _ in range(MANY))) == statuses, name
        assert server.ask(sent(site)).status == 200
    assert flood(server, (sent(site, same, to="repeats") for _ in range(MANY))) == {200}
    before = site.now()
    assert flood(server, (sent(site).replace(b"POST", b"PUT", 1) for _ in range(MANY))) == {405}
    # One source returns among many that occur once.
    there = {"ID": "3d2a6f04-0000-4000-8000-00000000abcd"}
    for _ in range(3):
        assert server.ask(sent(site, message(Source=there), to="made-up")).status == 403
    assert not site.rows("SELECT FROM audit_events WHERE at > :at AND action LIKE 'method%'", at=before)
    server.process.terminate()  # the counts are written at the end
    assert server.process.wait(60) == 0
    for name, (_, _, rows) in FLOODS.items():
        found = site.rows(f"SELECT count FROM audit_events WHERE {rows}")
        assert sum(each.count for each in found) == MANY + (3 if name == "made-up" else 0), name
        assert len(found) <= MINUTES * (ROWS_EACH + 2), name
    repeats = site.rows("SELECT count FROM audit_events WHERE outcome = 'duplicate' AND destination = 'repeats'")
    assert sum(each.count for each in repeats) == MANY
    assert len(repeats) <= MINUTES * (REPEATS + ROWS_EACH + 1)
    with site.engine.connect() as connection:
        sources = queries.refused_sources(connection, destination="made-up", limit=3)
    # Of its three requests the first was not known yet.
    assert (sources[0]["source_id"], sources[0]["count"]) == (there["ID"], 2)
    assert server.lines("request.failed") == []
    lines = server.lines("query.not_answered")
    assert len(lines) <= MINUTES * (logs.LINES + 1)
    assert sum(line.get("more", 1) for line in lines) == MANY
