"""Every bad input, to gunicorn alone and behind nginx over TLS: the reply, the audit rows, and what is stored.

All of them are sent once to one receiver, and checked one by one afterwards. Those that `asgi` mode could treat in
another way are also sent to a receiver in that mode.
"""

from __future__ import annotations

import re
import socket
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import psutil
import pytest

from receiver.storage.registry.credentials import new_token
from tests.support.server import Answer, Server, Wire, serving
from tests.support.site import Site, sent
from tests.web.bad_inputs import Case, Exchange, Front, Stand, bodies, framing, signatures, tokens
from tests.web.nginx import ADDRESS, Nginx, proxying

CASES: Final = {case.name: case for chapter in (framing, tokens, signatures, bodies) for case in chapter.CASES}
FRONTS: Final[Mapping[Front, Sequence[str]]] = {
    "alone": list(CASES),
    "nginx": list(CASES),
    "asgi": [case.name for case in (*framing.CASES, *tokens.CASES)],
}
_Key = tuple[Front, str]
KEYS: Final[Sequence[_Key]] = [(front, name) for front, names in FRONTS.items() for name in names]
# Cases that are sent at once.
_AT_ONCE: Final = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The outcome of a case: the replies, whether the connection closed, the audit rows, the message rows."""

    exchange: Exchange
    answers: Sequence[Answer]
    ended: bool
    records: Sequence[Any]
    messages: Sequence[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Aftermath:
    """The outcome of all cases. `survivors`: the serving processes, before and after."""

    outcomes: Mapping[_Key, Outcome]
    survivors: tuple[Sequence[psutil.Process], Sequence[psutil.Process]]
    afterwards: Mapping[Front, Answer]
    fetched: bool
    servers: Sequence[Server]
    nginx: Nginx


def _destinations(site: Site, front: Front) -> None:
    now = datetime.now(UTC)
    site.add(f"lab-{front}")
    site.add(f"rotating-{front}")
    for name, expires, revoked in (
        ("next", timedelta(hours=1), False),
        ("expired", timedelta(0), False),
        ("revoked", None, True),
    ):
        site.tokens[f"{name}-{front}"] = new_token()
        number = site.registration.add_credential(
            f"rotating-{front}",
            now,
            "token",
            {},
            site.tokens[f"{name}-{front}"].encode(),
            expires_at=None if expires is None else now + expires,
        )
        if revoked:
            site.registration.revoke_credential(number, now)
    bearing = {"issuers": [signatures.ISSUER], "audiences": [signatures.AUDIENCE], "keys": signatures.KEYS}
    for name, kind, settings, secret in (
        ("timed", "hmac", dict(signatures.HMAC), signatures.SECRET.encode()),
        ("signed", "hmac", {}, signatures.SECRET.encode()),
        ("bearing", "jwt", bearing, None),
    ):
        site.add(f"{name}-{front}", require=[f"{kind}+token" if kind == "jwt" else kind])
        site.registration.add_credential(f"{name}-{front}", now, kind, settings, secret, label=None, expires_at=None)


def _carried_out(connect: Callable[[bool], Wire], exchange: Exchange, *, closes: bool) -> tuple[list[Answer], bool]:
    answers: list[Answer] = []
    with connect(exchange.plain) as wire:
        try:
            wire.send(exchange.data)
            if exchange.finish:
                wire.finish()
            answers.extend(wire.answer() for _ in range(exchange.answers))
        except TimeoutError:
            raise  # a timeout is not a reply
        except (EOFError, OSError):
            return answers, True
        return answers, closes and wire.ended()


@pytest.fixture(scope="module")
def aftermath(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Aftermath]:
    """Send all cases."""
    for front in FRONTS:
        _destinations(site, front)
    environment = site.environment | {"RECEIVER_TRUSTED_PROXIES": ADDRESS}
    with (
        socket.create_server(("127.0.0.1", 0), backlog=64) as trap,
        serving(site.directory, environment) as server,
        serving(site.directory, environment | {"RECEIVER_SERVER_MODE": "asgi"}) as asgi,
        proxying(tmp_path_factory.mktemp("nginx"), server.port) as nginx,
    ):
        url = f"http://127.0.0.1:{trap.getsockname()[1]}/keys"
        before = [*server.workers(), *asgi.workers(), *nginx.workers()]
        addresses = {
            (front, name): f"127.{10 + number}.{index // 250}.{index % 250 + 1}"
            for number, (front, names) in enumerate(FRONTS.items())
            for index, name in enumerate(names)
        }

        def one(front: Front, case: Case) -> tuple[Exchange, tuple[list[Answer], bool]]:
            address = addresses[front, case.name]
            fronts: dict[Front, Callable[[bool], Wire]] = {
                "alone": lambda _: Wire(server.port, timeout=60, source=address),
                "asgi": lambda _: Wire(asgi.port, timeout=60, source=address),
                "nginx": lambda plain: Wire(nginx.port, timeout=60, source=address, tls=None if plain else nginx.tls),
            }
            exchange = case.make(Stand(site=site, front=front, trap=url))
            return exchange, _carried_out(fronts[front], exchange, closes=case.expected_from(front).closes)

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            done = {(front, name): pool.submit(one, front, CASES[name]) for front, name in KEYS}
        afterwards: dict[Front, Answer] = {
            "alone": server.ask(sent(site)),
            "nginx": nginx.ask(sent(site)),
            "asgi": asgi.ask(sent(site)),
        }
        # Audit rows are written in the order of their events: after this one there is none of a case.
        for each in (server, asgi):
            before_it = site.now()
            each.ask(sent(site, verification_token="wrong" * 8))
            site.audit(before_it, destination="lab", action="message.refuse")
        trap.setblocking(False)
        yield Aftermath(
            outcomes=_outcomes(site, addresses, {key: future.result() for key, future in done.items()}),
            survivors=(before, [*server.workers(), *asgi.workers(), *nginx.workers()]),
            afterwards=afterwards,
            fetched=_called(trap),
            servers=(server, asgi),
            nginx=nginx,
        )


def _called(trap: socket.socket) -> bool:
    try:
        trap.accept()[0].close()
    except BlockingIOError:
        return False
    return True


def _outcomes(
    site: Site, addresses: Mapping[_Key, str], done: Mapping[_Key, tuple[Exchange, tuple[list[Answer], bool]]]
) -> dict[_Key, Outcome]:
    records = defaultdict(list)
    for row in site.rows("SELECT * FROM audit_events WHERE peer IS NOT NULL ORDER BY id"):
        records[row.peer].append(row)
    messages = {row.uuid: row for row in site.rows("SELECT * FROM messages")}
    return {
        key: Outcome(
            exchange=exchange,
            answers=answers,
            ended=ended,
            records=records[addresses[key]],
            messages=[messages[row.message_uuid] for row in records[addresses[key]] if row.message_uuid is not None],
        )
        for key, (exchange, (answers, ended)) in done.items()
    }


@pytest.mark.parametrize(("front", "name"), KEYS)
def test_bad_input(site: Site, aftermath: Aftermath, name: str, front: Front) -> None:
    """Each case has the expected reply, audit rows and stored bytes, and no others."""
    case, outcome = CASES[name], aftermath.outcomes[front, name]
    expected = case.expected_from(front)
    statuses = tuple(answer.status for answer in outcome.answers)
    if expected.statuses is None:
        assert all(status >= 400 for status in statuses)
    else:
        assert statuses == expected.statuses
    assert [(row.outcome, row.reason) for row in outcome.records] == list(expected.records)
    assert outcome.ended or not expected.closes
    kept = {site.digest(body) for body in outcome.exchange.kept}
    assert {bytes(row.digest) for row in outcome.messages} <= kept
    for column, value in case.columns.items():
        assert [getattr(row, column) for row in outcome.messages] == [value]
    if outcome.exchange.never is not None:
        assert not any(outcome.exchange.never in answer.raw for answer in outcome.answers)


@pytest.mark.parametrize("front", FRONTS)
def test_valid_messages_are_served_afterwards(aftermath: Aftermath, front: Front) -> None:
    """After all cases, valid messages are accepted."""
    assert aftermath.afterwards[front].status == 200


def test_no_process_died(aftermath: Aftermath) -> None:
    """The same processes served the first case and the last, in bounded memory."""
    before, after = aftermath.survivors
    assert before == after
    peaks = [
        int(peak)
        for server in aftermath.servers
        for each in server.workers()
        for peak in re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{each.pid}/status").read_text())
    ]
    assert max(peaks) < 1024 * 1024


def test_no_url_was_fetched(aftermath: Aftermath) -> None:
    """The receiver connected to no address from a token or a payload."""
    assert not aftermath.fetched


def test_no_error_in_the_logs(site: Site, aftermath: Aftermath) -> None:
    """No traceback, no line above a warning, and no log quotes a body, a header, a query or a token."""
    for server in aftermath.servers:
        assert [line for line in server.lines() if line["level"] in ("error", "critical")] == []
    for text in (*(server.text() for server in aftermath.servers), aftermath.nginx.text()):
        assert "Traceback" not in text
        assert "CANARY" not in text
        assert "\x1b" not in text
        assert not any(token in text for token in site.tokens.values())
    assert not re.search(r"\[(error|crit|alert|emerg)\]", aftermath.nginx.text())


def test_replies_are_ours(aftermath: Aftermath) -> None:
    """Only statuses of the contract: no 500. Replies forbid caching and type sniffing."""
    for outcome in aftermath.outcomes.values():
        for answer in outcome.answers:
            assert answer.status not in (500, 503)
            if answer.headers.get("server") == "redox-receiver":
                assert answer.headers["x-content-type-options"] == "nosniff"
                assert answer.headers["cache-control"] == "no-store"


def test_nothing_else_is_kept(site: Site, aftermath: Aftermath) -> None:
    """The payload tables hold what was accepted or quarantined, and nothing of a refused request."""
    accepted: set[bytes] = set()
    for (front, name), outcome in aftermath.outcomes.items():
        if any(outcome in ("unhandled", "quarantined") for outcome, _ in CASES[name].expected_from(front).records):
            accepted |= {site.digest(body) for body in outcome.exchange.kept}
    rows = site.rows(
        "SELECT m.digest FROM messages m JOIN destinations d ON d.id = m.destination_id WHERE d.name <> 'lab'"
    )
    assert {bytes(row.digest) for row in rows} == accepted
    assert site.count("payloads") == site.count("messages")
    assert site.count("deliveries") == 0
