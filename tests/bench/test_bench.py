"""The benchmark works: its messages are accepted, counted and checked. No test checks a speed."""

from __future__ import annotations

import hmac
import json
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from hashlib import sha256
from http.client import HTTPConnection
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
import zstandard
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from receiver.simulator.signer import Signer
from tests.bench import load, report
from tests.bench.bodies import HOLE, SIZES, Ids, of_size, signatures
from tests.bench.measure import WRONG, Bench, Plan, Results, Sample
from tests.bench.targets import SAYS, Missing, Target, Workbench
from tests.support.machine import SOURCE
from tests.support.postgres import session_cluster

needs_wrk = pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not on this machine")


@pytest.fixture(scope="module")
def workbench() -> Iterator[Workbench]:
    with Workbench(session_cluster()) as made:
        yield made


@needs_wrk
def test_a_plan_is_run(workbench: Workbench) -> None:
    printed: list[str] = []
    plan = Plan(
        targets=["orm"],
        parts=["closed", "open"],
        cases=[("4 KB", 4)],
        rates=[50],
        rounds=1,
        seconds=1,
        messages=0,
        largest=(),
    )
    results = Bench(workbench, plan, printed.append).run()
    assert not results.faults
    closed, opened = results.samples
    assert (closed.part, closed.load, opened.part, opened.load) == ("closed", 4, "open", 50)
    assert all(each.rate > 0 and each.p50 > 0 and each.server_cpu > 0 for each in results.samples)
    target = workbench.of("orm")
    assert target.inbox is not None
    # The table was emptied before the open loop, which waits for every answer: a hundred, each with its own id.
    # Some of the four that were cut before may have arrived later.
    assert 100 <= target.inbox.value("SELECT count(DISTINCT log_id) FROM inbox") <= 104
    assert SAYS["orm"] in report.tables(results)
    assert json.dumps(results.as_json(), allow_nan=False)


@needs_wrk
def test_what_is_refused_is_not_counted_as_taken(workbench: Workbench) -> None:
    target = workbench.of("orm")
    assert isinstance(target, Target)
    target.empty()
    stranger = replace(target, headers=WRONG)
    closed = stranger.closed_loop(of_size("2 KB"), connections=2, seconds=1)
    opened = load.open_loop(stranger.url, of_size("2 KB"), stranger.headers, rate=20, seconds=0.5, connections=2)
    assert closed.wrong == closed.answered > 0
    assert opened.wrong == opened.answered == 10
    assert target.inbox is not None
    assert target.inbox.value("SELECT count(*) FROM inbox") == 0


def test_requests_to_nobody_are_broken() -> None:
    with pytest.raises(ConnectionRefusedError):
        load.open_loop("http://127.0.0.1:9/redox", of_size("2 KB"), {}, rate=20, seconds=0.1, connections=1)
    assert load.once("http://127.0.0.1:9/redox", of_size("2 KB"), {}) is None


@pytest.mark.parametrize("name", SIZES)
def test_each_body_is_a_message_with_its_id(name: str) -> None:
    body = of_size(name)
    message = json.loads(body.with_id("an-id"))
    assert message["Meta"]["Logs"][0]["ID"] == "an-id"
    size, unit = name.split()
    assert len(body.template) == pytest.approx(int(size) * (1_000_000 if unit == "MB" else 1_000), rel=0.15)


def test_signatures_are_of_the_ids_that_are_sent() -> None:
    ids = Ids()
    body = of_size("2 KB")
    _, second = signatures(body, b"secret", ids, 2)
    assert len(HOLE) == len(f"{ids.prefix}{2:012x}")
    headers = Signer(secret=b"secret").headers(body.with_id(f"{ids.prefix}{2:012x}"), now=0)
    assert list(headers.values()) == [second]


def sample(target: str, rate: float, *, part: str = "closed", load: int = 16, number: int = 1) -> Sample:
    return Sample(
        part=part,
        target=target,
        body="4 KB",
        load=load,
        round=number,
        rate=rate,
        p50=0.001,
        p99=0.003,
        server_cpu=0.0005,
        database_cpu=0.0001,
    )


def test_goals_are_judged_by_the_median_of_the_rounds() -> None:
    results = Results(
        samples=[
            *(sample("flask", 1_000, number=number) for number in (1, 2, 3)),
            *(sample("flask-mode", rate, number=number) for number, rate in ((1, 100), (2, 650), (3, 900))),
            *(sample("orm", 300, number=number) for number in (1, 2, 3)),
            sample("flask", 1_000, load=64),
            sample("asgi-mode", 2_000, load=64),
            sample("flask-mode", 300, part="open", load=300),
        ]
    )
    judged = {goal.says: (goal.reached and round(goal.reached, 2), goal.verdict) for goal in report.goals(results)}
    assert judged[f"Flask mode to {SAYS['flask']}, 4 KB, 16 connections"] == (0.65, "met")
    assert judged[f"Flask mode to {SAYS['orm']}, 4 KB, 16 connections"] == (2.17, "missed")
    assert judged[f"Flask mode to {SAYS['express']}, 4 KB, 16 connections"] == (None, "not measured")
    assert judged[f"CPU of asgi mode and PostgreSQL to that of {SAYS['flask']}, 4 KB, 64 connections"] == (1, "met")
    assert judged["300 a second, p99 over p50, Flask mode"] == (2.0, "met")
    shown = report.markdown(results, {"machine": "2 cores", "Python": "3"})
    assert "| **this receiver, Flask mode** | – | 650 | – |" in shown
    assert "3 rounds" in shown


@pytest.mark.parametrize("name", ["orm-work", "fastify-work"])
def test_those_that_do_the_same_work_do_it(workbench: Workbench, name: str) -> None:
    """They check token and source, find duplicates, seal the payload, create a delivery, and chain the audit."""
    try:
        target = workbench.of(name)
    except Missing as exc:
        pytest.skip(str(exc))
    assert isinstance(target, Target)
    assert target.inbox is not None
    body = of_size("4 KB").with_id("one")
    stranger = body.replace(SOURCE.encode(), str(uuid4()).encode())
    answers = [post(target, body, {}), post(target, stranger), post(target, body), post(target, body)]
    assert answers == [401, 403, 200, 200]
    with target.inbox.connected() as connection:
        messages = connection.execute(
            "SELECT uuid, log_id, sha256, sealed, lane FROM messages m "
            "JOIN payloads ON message_id = m.id JOIN deliveries d ON d.message_id = m.id "
            "WHERE log_id = 'one'"
        )
        ((uuid, log_id, digest, sealed, lane),) = messages.fetchall()
        events = connection.execute(
            "SELECT writer::text, n, floor(extract(epoch FROM at) * 1000)::bigint, action, "
            "outcome, message_uuid::text, mac FROM audit_events ORDER BY at"
        ).fetchall()
    assert (log_id, digest, lane) == ("one", sha256(body).digest(), f"idle/{SOURCE}")
    compressed = AESGCM(bytes.fromhex(target.server.environment["BENCH_PAYLOAD_KEY"])).decrypt(
        sealed[:12], sealed[12:], uuid.bytes
    )
    plain = zlib.decompress if name == "fastify-work" else zstandard.ZstdDecompressor().decompress
    assert plain(compressed) == body
    assert [event[4] for event in events[-2:]] == ["accepted", "duplicate"]
    assert {event[5] for event in events[-2:]} == {str(uuid)}
    previous: dict[str, bytes] = {}
    for *values, mac in events:
        assert values[1] == 1 or values[0] in previous
        previous[values[0]] = hmac.digest(
            bytes.fromhex(target.server.environment["BENCH_MAC_KEY"]),
            previous.get(values[0], b"") + json.dumps(values, separators=(",", ":")).encode(),
            "sha256",
        )
        assert previous[values[0]] == mac


def post(target: Target, body: bytes, headers: Mapping[str, str] | None = None) -> int:
    """Send the body, and return the status of the answer."""
    address = urlsplit(target.url)
    with closing(HTTPConnection(address.netloc, timeout=60)) as connection:
        connection.request(
            "POST",
            address.path,
            body,
            {"Content-Type": "application/json", **(target.headers if headers is None else headers)},
        )
        return connection.getresponse().status
