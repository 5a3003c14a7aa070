"""Queries and after_handling: handlers that run within a request, in real handler processes."""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import text

from receiver.worker import discovery
from tests.support.server import ROOT, Answer, Server
from tests.support.site import Site, message, sent
from tests.support.waiting import until
from tests.web import answering


def query(model: str, event: str = "Query") -> bytes:
    return message(DataModel=model, EventType=event)


@pytest.fixture(scope="module", autouse=True)
def enabled(site: Site) -> None:
    """All of the plugin at `lab`, its handler at `inline`."""
    site.add("inline")
    site.add("other")
    for each in discovery.load_handlers([], [answering.__name__]).loaded.values():
        for name in ("lab", "other") if each.declaration.role == "responder" else ("inline",):
            site.registration.enable_handler(name, each.spec, datetime.now(UTC))
    site.environment |= {"RECEIVER_HANDLERS": answering.__name__, "PYTHONPATH": str(ROOT), "RECEIVER_THREADS": "8"}


def answered(site: Site, before: datetime) -> tuple[str, dict[str, Any]]:
    # Of the last query. The row of a query without an answer is written later: no request waits for it.
    [(uuid,)] = site.rows("SELECT uuid FROM messages ORDER BY id DESC LIMIT 1")
    row = site.audit(before, action="query.answer", message_uuid=uuid)
    return row.outcome, json.loads(row.detail)


def test_answered(site: Site, server: Server) -> None:
    """A query gets its responder's answer, after the audit row of the answer is committed."""
    before = site.now()
    answer = server.ask(sent(site, query("PatientSearch")))
    rows = site.rows("SELECT * FROM audit_events WHERE at > :before AND action = 'query.answer'", before=before)
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    [(uuid, kind)] = site.rows("SELECT uuid, kind FROM messages ORDER BY id DESC LIMIT 1")
    assert json.loads(answer.body)["Patient"] == {"Asked": str(uuid)}
    assert kind == "PatientSearch.Query"
    [row] = rows
    detail = json.loads(row.detail)
    assert (row.outcome, row.message_uuid, row.destination, row.peer) == ("answered", uuid, "lab", "127.0.0.1")
    assert (detail["status"], detail["responder"], detail["length"]) == (200, "found", len(answer.body))
    assert len(detail["digest"]) == 64


def test_an_answer_that_cannot_be_recorded(site: Site, server: Server) -> None:
    """An answer that cannot be recorded is not sent."""
    with site.engine.begin() as connection:
        connection.execute(
            text("""
            CREATE FUNCTION no_answers() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                IF NEW.action = 'query.answer' THEN RAISE EXCEPTION 'no' USING ERRCODE = '22000'; END IF;
                RETURN NEW; END $$""")
        )
        connection.execute(
            text("CREATE TRIGGER no_answers BEFORE INSERT ON audit_events FOR EACH ROW EXECUTE FUNCTION no_answers()")
        )
    try:
        answer = server.ask(sent(site, query("PatientSearch")))
        assert server.ask(sent(site, query("Referral"))).status == 501
    finally:
        with site.engine.begin() as connection:
            connection.execute(text("DROP TRIGGER no_answers ON audit_events"))
            connection.execute(text("DROP FUNCTION no_answers"))
    assert answer.status == 503
    assert "Asked" not in answer.body.decode()
    assert json.loads(answer.body)["Meta"]["Errors"]


@pytest.mark.parametrize(
    ("model", "status", "responder"),
    [("Results", 500, "raises"), ("Media", 500, "ends"), ("Order", 504, "endless"), ("Referral", 501, None)],
)
def test_not_answered(site: Site, server: Server, model: str, status: int, responder: str | None) -> None:
    """Each failure to answer has its status and Redox's form, quotes nothing, and is in the audit."""
    before = site.now()
    answer = server.ask(sent(site, query(model)))
    assert answer.status == status
    meta = json.loads(answer.body)["Meta"]
    assert (meta["DataModel"], meta["EventType"]) == (model, "QueryResponse")
    assert meta["Errors"][0]["Text"]
    assert answered(site, before) == ("failed", {"status": status, "responder": responder})
    assert "CANARY" not in server.text() + answer.raw.decode()
    assert server.ask(sent(site, query("PatientSearch"))).status == 200


def test_concurrent_responders_are_limited(site: Site, server: Server) -> None:
    """Slow responders take at most half of the request threads, and one destination half of those: feeds continue."""
    answers: list[Answer] = []
    askers = [threading.Thread(target=lambda: answers.append(server.ask(sent(site, query("Notes"))))) for _ in range(8)]
    for asker in askers:
        asker.start()
    until(lambda: len(answers) >= 6)  # these are refused at once, while two wait
    assert [answer.status for answer in answers] == 6 * [503]
    assert answers[0].headers["retry-after"] == "5"
    assert json.loads(answers[0].body)["Meta"]["Errors"]
    with server.wire(timeout=3) as wire:
        assert wire.send(sent(site)).answer().status == 200
    for asker in askers:
        asker.join()
    assert sorted(answer.status for answer in answers)[:2] == [200, 200]


def test_handled_within_the_request(site: Site, server: Server) -> None:
    """after_handling: 200 once the handler has succeeded, and the success is recorded."""
    assert server.ask(sent(site, to="inline")).status == 200
    [(state, attempts)] = site.rows("SELECT state, attempts FROM deliveries ORDER BY id DESC LIMIT 1")
    assert (state, attempts) == ("succeeded", 1)


def test_handled_at_last(site: Site, server: Server) -> None:
    """after_handling: a failure is 503; the same message sent again runs the handler again, until it succeeds."""
    body = message(FacilityCode="fails once")
    assert server.ask(sent(site, body, to="inline")).status == 503
    until(lambda: server.ask(sent(site, body, to="inline")).status == 200)
    [(state, attempts)] = site.rows("SELECT state, attempts FROM deliveries ORDER BY id DESC LIMIT 1")
    assert (state, attempts) == ("succeeded", 2)
    assert "CANARY" not in server.text()
