"""The endpoint's table of events and replies, row by row, from the socket to PostgreSQL; tokens and media types."""

from __future__ import annotations

import gzip
import json
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest

from receiver.storage.registry.credentials import new_token
from receiver.storage.registry.handler_changes import HandlerSpec
from tests.support.server import Server, post
from tests.support.site import SOURCE, Site, message, sent
from tests.support.waiting import until

NEVER = "4f0f6e3c-0000-4000-8000-000000000000"
FIXED = b"unauthorized\n"


def query(**meta: Any) -> bytes:
    """A query for a patient."""
    return message(DataModel="PatientSearch", EventType="Query", **meta)


def handshake(token: str | None, challenge: object = "9a7e1c1e-7b0e-4d0c-8a42-0f6a3a2a7f11") -> bytes:
    body = {"verification-token": token, "challenge": challenge}
    return json.dumps({name: value for name, value in body.items() if value is not None}).encode()


def get(query: str, **headers: str) -> bytes:
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"GET /redox/lab?{query} HTTP/1.1\r\nHost: x\r\n{lines}\r\n".encode()


@pytest.fixture(scope="module", autouse=True)
def destinations(site: Site) -> None:
    """A destination for each policy, made before the receiver starts."""
    now = datetime.now(UTC)
    site.add("closed")
    site.registration.set_destination("closed", now, {"enabled": False})
    site.add("keeping", on_unknown_source="quarantine")
    site.add("real", environment="production", test_messages="quarantine")
    site.add("strict", environment="production", test_messages="reject")
    site.add("signed", require=["hmac"])
    site.add("rotating")
    site.tokens["next"] = new_token()
    site.registration.add_credential(
        "rotating", now, "token", {}, site.tokens["next"].encode(), expires_at=now + timedelta(hours=1)
    )
    site.tokens["expired"] = new_token()
    site.registration.add_credential("rotating", now, "token", {}, site.tokens["expired"].encode(), expires_at=now)
    site.tokens["revoked"] = new_token()
    site.registration.revoke_credential(
        site.registration.add_credential("rotating", now, "token", {}, site.tokens["revoked"].encode()), now
    )
    site.add("inline")
    site.registration.enable_handler(
        "inline",
        HandlerSpec(
            handler="never-loaded",
            role="handler",
            patterns=("*",),
            ordering="source",
            patient_key=None,
            acknowledge="after_handling",
            on_failure="dead",
            max_attempts=1,
            timeout=1.0,
        ),
        now,
    )
    site.add("subscribed")
    site.registration.enable_handler(
        "subscribed",
        HandlerSpec(
            handler="some",
            role="handler",
            patterns=("PatientAdmin.*",),
            ordering="source",
            patient_key=None,
            acknowledge="after_commit",
            on_failure="dead",
            max_attempts=1,
            timeout=1.0,
        ),
        now,
    )


# --- handshake


def test_handshake(site: Site, server: Server) -> None:
    """With the right token the reply is the challenge as plain text. An audit row is written, and nothing else."""
    before, messages = site.now(), site.count("messages")
    answer = server.ask(post("/redox/lab", handshake(site.tokens["lab"], "a-challenge")))
    assert (answer.status, answer.body) == (200, b"a-challenge")
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    row = site.audit(before, action="destination.handshake")
    assert (row.outcome, row.destination) == ("answered", "lab")
    assert site.count("messages") == messages


def test_handshake_by_get(site: Site, server: Server) -> None:
    """The token may be in the query or in the header."""
    token = site.tokens["lab"]
    assert server.ask(get(f"challenge=abc&verification-token={token}")).body == b"abc"
    assert server.ask(get("challenge=abc", verification_token=token)).body == b"abc"
    assert token not in server.text()


@pytest.mark.parametrize(
    "request_",
    [
        post("/redox/lab", handshake("wrong" * 8, "CANARY")),
        post("/redox/lab", handshake(None, "CANARY")),
        get("challenge=CANARY&verification-token=" + "wrong" * 8),
        get("challenge=CANARY"),
    ],
)
def test_handshake_with_a_wrong_token(site: Site, server: Server, request_: bytes) -> None:
    """A wrong token is 401, and its challenge is not echoed."""
    answer = server.ask(request_)
    assert (answer.status, answer.body) == (401, FIXED)
    assert b"CANARY" not in answer.raw


@pytest.mark.parametrize("challenge", ["<script>", "a\r\nSet-Cookie: x=y", 1000 * "x", ["a"], {}, 7, "", None])
def test_handshake_with_a_strange_challenge(site: Site, server: Server, challenge: object) -> None:
    """A challenge that is unsafe to echo is not echoed, even with the right token."""
    answer = server.ask(post("/redox/lab", handshake(site.tokens["lab"], challenge)))
    assert answer.status in (400, 401)
    assert answer.body in (b"bad request\n", FIXED)


# --- 401


@pytest.mark.parametrize(
    ("to", "headers"),
    [
        ("nowhere", {}),
        ("closed", {}),
        ("lab", {"verification_token": None}),
        ("lab", {"verification_token": ""}),
        ("lab", {"verification_token": "wrong" * 8}),
        ("lab", {"verification_token": "t\xf6ken" * 8}),
        ("signed", {}),
        ("LAB", {}),
        ("lab%00", {}),
        ("%ff%fe", {}),
        ("..", {}),
        (300 * "x", {}),
    ],
)
def test_unauthorized(site: Site, server: Server, to: str, headers: dict[str, str | None]) -> None:
    """Every fault of the credential or the destination has the same reply, and nothing is stored."""
    messages = site.count("messages")
    given: dict[str, str | None] = {"verification_token": site.tokens.get(to, site.tokens["lab"])}
    answer = server.ask(post(f"/redox/{to}", message(), **given | headers))
    assert (answer.status, answer.body) == (401, FIXED)
    assert answer.headers["www-authenticate"] == "Bearer"
    assert site.count("messages") == messages


def test_a_refusal_in_the_audit(site: Site, server: Server) -> None:
    """The audit has a refusal's reason and peer, and the length and digest of a body that was read; not its bytes."""
    before = site.now()
    server.ask(sent(site, b'{"patient": "CANARY"}', to="keeping", verification_token=None))
    row = site.audit(before, destination="keeping")
    assert (row.action, row.outcome, row.reason, row.peer) == (
        "message.refuse",
        "refused",
        "credential_missing",
        "127.0.0.1",
    )
    detail = json.loads(row.detail)
    assert detail["status"] == 401
    assert detail["length"] == 21
    assert len(detail["digest"]) == 64


def twisted(token: str) -> dict[str, dict[str, str | None]]:
    return {
        "in the other case": {"verification_token": token.swapcase()},
        "a prefix": {"verification_token": token[:-1]},
        "and more": {"verification_token": f"{token}x"},
        "in quotes": {"verification_token": f'"{token}"'},
        "another bearer": {"authorization": "Bearer " + "wrong" * 8},
        "another bearer alone": {"verification_token": None, "authorization": "Bearer " + "wrong" * 8},
        "as basic": {"verification_token": None, "authorization": f"Basic {token}"},
        "under another name": {"verification_token": None, "x_verification_token": token},
    }


@pytest.mark.parametrize("name", twisted("x"))
def test_twisted_tokens(site: Site, server: Server, name: str) -> None:
    """A similar or misplaced token is refused."""
    answer = server.ask(sent(site, None, twisted(site.tokens["lab"])[name]))
    assert (answer.status, answer.body) == (401, FIXED)


def test_token_twice(site: Site, server: Server) -> None:
    """Two tokens are refused, in either order."""
    right = f"verification-token: {site.tokens['lab']}\r\n".encode()
    wrong = f"verification-token: {'wrong' * 8}\r\n".encode()
    for both in (right + wrong, wrong + right, right + right):
        assert server.ask(sent(site).replace(right, both)).status == 401


def test_token_with_an_underscore(site: Site, server: Server) -> None:
    """A header with an underscore, which looks the same in a WSGI environment, does not count as the token."""
    raw = sent(site).replace(b"verification-token", b"verification_token")
    assert server.ask(raw).status in (400, 401)


def test_token_in_the_query_of_a_post(site: Site, server: Server) -> None:
    """A token in the query of a POST proves nothing, and is not logged."""
    raw = sent(site, verification_token=None).replace(
        b"/redox/lab", f"/redox/lab?verification-token={site.tokens['lab']}".encode(), 1
    )
    assert server.ask(raw).status == 401
    assert site.tokens["lab"] not in server.text()


def test_padded_token(site: Site, server: Server) -> None:
    """Whitespace around a header value is not part of it (RFC 9110 section 5.5)."""
    assert server.ask(sent(site, verification_token=f"  {site.tokens['lab']}\t ")).status == 200


def test_bearer(site: Site, server: Server) -> None:
    """The token is accepted as a Bearer value, alone or in addition to its header."""
    bearer = f"Bearer {site.tokens['lab']}"
    assert server.ask(sent(site, authorization=bearer)).status == 200
    assert server.ask(sent(site, authorization=bearer, verification_token=None)).status == 200


def test_rotation(site: Site, server: Server) -> None:
    """While a token is replaced both are accepted, and the audit names the used one; expired and revoked ones are
    not.
    """
    used = []
    for name in ("rotating", "next"):
        before = site.now()
        assert server.ask(sent(site, to="rotating", verification_token=site.tokens[name])).status == 200
        used.append(json.loads(site.audit(before, action="message.receive").detail)["credentials"])
    assert used[0] != used[1]
    for name, reason in (("expired", "token_expired"), ("revoked", "token_revoked")):
        before = site.now()
        answer = server.ask(sent(site, to="rotating", verification_token=site.tokens[name]))
        assert (answer.status, answer.body) == (401, FIXED)
        assert site.audit(before, reason=reason).destination == "rotating"


def test_forged_peer(site: Site, server: Server) -> None:
    """X-Forwarded-For of a peer that is not a trusted proxy is ignored."""
    before = site.now()
    server.ask(
        sent(
            site,
            to="real",
            verification_token=None,
            x_forwarded_for="203.0.113.9",
            forwarded="for=203.0.113.9",
            x_real_ip="203.0.113.9",
        )
    )
    assert site.audit(before, destination="real").peer == "127.0.0.1"


def test_forged_environment(site: Site, server: Server) -> None:
    """Header fields by which proxies set gunicorn's environment are ignored from every peer."""
    raw = sent(site, verification_token=None).replace(
        b"host: ", b"SCRIPT_NAME: /redox\r\nPATH_INFO: /livez\r\nx-forwarded-proto: https\r\nhost: "
    )
    assert server.ask(raw).status == 401


# --- 403 and policies


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ({"ID": NEVER}, "source_unknown"),
        ({"ID": None}, "source_missing"),
        ({}, "source_missing"),
        (None, "source_missing"),
    ],
)
def test_unknown_source(site: Site, server: Server, source: object, reason: str) -> None:
    """A message from an unregistered source, or without one, gets 403; nothing of it is stored."""
    before, messages = site.now(), site.count("messages")
    answer = server.ask(sent(site, message(Source=source)))
    assert (answer.status, answer.body) == (403, b"forbidden\n")
    assert site.audit(before, reason=reason).actor == "redox"
    assert site.count("messages") == messages


def test_unknown_source_in_the_audit(site: Site, server: Server) -> None:
    """The audit has the claimed source if it has the form of an id, else its digest."""
    before = site.now()
    server.ask(sent(site, message(Source={"ID": NEVER}), to="strict"))
    assert json.loads(site.audit(before, reason="source_unknown").detail)["source"] == NEVER
    before = site.now()
    server.ask(sent(site, message(Source={"ID": "Jane Doe, born 1980"}), to="strict"))
    detail = site.audit(before, reason="source_unknown").detail
    assert "Jane" not in detail
    assert json.loads(detail)["source_digest"]


def test_unknown_source_kept(site: Site, server: Server) -> None:
    """With the policy `quarantine` it gets 200, and is stored and not dispatched."""
    before = site.now()
    assert server.ask(sent(site, message(Source={"ID": NEVER}), to="keeping")).status == 200
    row = site.audit(before, action="message.receive")
    assert (row.outcome, row.reason) == ("quarantined", "source_unknown")


@pytest.mark.parametrize(
    ("to", "status", "outcome"), [("lab", 200, "unhandled"), ("real", 200, "quarantined"), ("strict", 403, "refused")]
)
def test_test_messages(site: Site, server: Server, to: str, status: int, outcome: str) -> None:
    """A test message is dispatched, quarantined or refused, by the policy of the destination."""
    before = site.now()
    assert server.ask(sent(site, message(Test=True), to=to)).status == status
    assert site.audit(before, destination=to).outcome == outcome


# --- 200


def test_accepted(site: Site, server: Server) -> None:
    """A message gets an empty 200 after its message, payload, delivery and audit rows are committed."""
    before, payloads, deliveries = site.now(), site.count("payloads"), site.count("deliveries")
    answer = server.ask(sent(site, to="subscribed"))
    assert (answer.status, answer.body) == (200, b"")
    [row] = site.rows("SELECT * FROM messages ORDER BY id DESC LIMIT 1")
    assert (row.kind, row.source_id, row.state) == ("PatientAdmin.Arrival", SOURCE, "accepted")
    assert (site.count("payloads"), site.count("deliveries")) == (payloads + 1, deliveries + 1)
    assert site.audit(before, action="message.receive").message_uuid == row.uuid


def test_seen_before(site: Site, server: Server) -> None:
    """A repeat gets 200 and is the same message, whatever its attempt; each arrival is in the audit."""
    logs = [{"ID": str(uuid4()), "AttemptID": "1"}]
    assert server.ask(sent(site, message(Logs=logs), to="subscribed")).status == 200
    before, messages, deliveries = site.now(), site.count("messages"), site.count("deliveries")
    logs[0]["AttemptID"] = "2"
    assert server.ask(sent(site, message(Logs=logs), to="subscribed")).status == 200
    row = site.audit(before, action="message.receive")
    assert (row.outcome, json.loads(row.detail)["attempt"]) == ("duplicate", "2")
    assert (site.count("messages"), site.count("deliveries")) == (messages, deliveries)


def test_same_key_other_content(site: Site, server: Server) -> None:
    """The same key with other content outside Meta is another message, and is flagged."""
    body = message()
    assert server.ask(sent(site, body, to="subscribed")).status == 200
    other = body.replace(b'"Identifiers": []', b'"Identifiers": [1]')
    assert server.ask(sent(site, other, to="subscribed")).status == 200
    assert site.rows("SELECT id_conflict, state FROM messages ORDER BY id DESC LIMIT 2") == [
        (True, "accepted"),
        (False, "accepted"),
    ]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "empty"),
        (b"<html>", "not_json"),
        (b"{", "not_json"),
        (b"[]", "top_not_object"),
        (b"{}", "no_meta"),
        (b"\xff\xfe{\x00}\x00", "not_utf8"),
        (b"[" * 100_000, "too_deep"),
        (message() * 2, "not_json"),
        (b'{"Meta": [], "Meta": {}}', "top_duplicate_key"),
        (message(EventType=None), "kind_missing"),
    ],
)
def test_unreadable(site: Site, server: Server, body: bytes, reason: str) -> None:
    """An authentic body that cannot be parsed gets 200, and is quarantined with its reason."""
    before = site.now()
    assert server.ask(sent(site, body)).status == 200
    row = site.audit(before, action="message.receive")
    assert (row.outcome, row.reason) in (("quarantined", reason), ("duplicate", reason))


def test_no_subscription(site: Site, server: Server) -> None:
    """A message that matches no subscription gets 200 and is `unhandled`."""
    assert server.ask(sent(site, message(DataModel="Brand New", EventType="Thing"))).status == 200
    assert site.rows("SELECT kind, state FROM messages ORDER BY id DESC LIMIT 1") == [("BrandNew.Thing", "unhandled")]


# --- media


@pytest.mark.parametrize(
    "media",
    [
        "application/json",
        "application/fhir+json",
        "text/xml",
        "text/plain",
        None,
        "x" * 500,
        "multipart/form-data; boundary=x",
        "application/x-www-form-urlencoded",
    ],
)
def test_media_types(site: Site, server: Server, media: str | None) -> None:
    """A message is accepted with any media type."""
    assert server.ask(sent(site, content_type=media)).status == 200
    [(kind, state)] = site.rows("SELECT kind, state FROM messages ORDER BY id DESC LIMIT 1")
    assert (kind, state) == ("PatientAdmin.Arrival", "unhandled")


def test_compressed(site: Site, server: Server) -> None:
    """A compressed body is not decompressed: it is quarantined as it arrived."""
    bomb = gzip.compress(uuid4().bytes + bytes(100 * 1024 * 1024), mtime=0)
    for body in (gzip.compress(message(), mtime=0), bomb):
        assert server.ask(sent(site, body, content_encoding="gzip")).status == 200
        [row] = site.rows("SELECT state, size FROM messages ORDER BY id DESC LIMIT 1")
        assert (row.state, row.size) == ("quarantined", len(body))


@pytest.mark.parametrize("media", ["application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
def test_forms(site: Site, server: Server, server_mode: str, media: str) -> None:
    """A form of a million keys is not parsed as a form."""
    form = b"&".join(b"a%d=b" % n for n in range(1_000_000))
    assert server.ask(sent(site, form + f"{media} {server_mode}".encode(), content_type=media)).status == 200
    assert site.rows("SELECT state FROM messages ORDER BY id DESC LIMIT 1") == [("quarantined",)]


# --- queries


def test_query_without_a_responder(site: Site, server: Server) -> None:
    """A query without a responder is recorded and gets 501 in Redox's form; the audit has its outcome."""
    before = site.now()
    answer = server.ask(sent(site, query()))
    assert (answer.status, answer.headers["content-type"]) == (501, "application/json")
    meta = json.loads(answer.body)["Meta"]
    assert (meta["DataModel"], meta["EventType"], len(meta["Errors"])) == ("PatientSearch", "Response", 1)
    [(uuid,)] = site.rows("SELECT uuid FROM messages ORDER BY id DESC LIMIT 1")
    row = site.audit(before, action="query.answer", message_uuid=uuid)
    assert (row.outcome, json.loads(row.detail)["status"]) == ("failed", 501)


def test_query_is_never_a_duplicate(site: Site, server: Server) -> None:
    """The same query twice is two messages: each gets an answer."""
    body, before = query(), site.count("messages")
    assert [server.ask(sent(site, body)).status for _ in range(2)] == [501, 501]
    assert site.count("messages") == before + 2


def test_query_from_an_unknown_source(site: Site, server: Server) -> None:
    """A query from an unknown source gets 403 in Redox's form."""
    answer = server.ask(sent(site, query(Source={"ID": NEVER})))
    assert answer.status == 403
    assert json.loads(answer.body)["Meta"]["Errors"]


def test_unreadable_query(site: Site, server: Server) -> None:
    """A query that cannot be parsed is quarantined, and gets 400 in Redox's form."""
    before = site.now()
    answer = server.ask(sent(site, query().replace(b'"Meta": {', b'"Meta": {}, "Meta": {')))
    assert answer.status == 400
    assert json.loads(answer.body)["Meta"]["Errors"]
    assert site.audit(before, action="message.receive").outcome == "quarantined"


# --- after_handling


def test_not_handled_in_the_request(site: Site, server: Server) -> None:
    """after_handling: until it is handled a message gets 503, so that Redox keeps it; repeats are recorded once."""
    body, messages = message(), site.count("messages")
    for _ in range(2):
        answer = server.ask(sent(site, body, to="inline"))
        assert (answer.status, answer.headers["retry-after"]) == (503, "5")
    assert site.count("messages") == messages + 1
    assert server.lines("request.unavailable")[-1]["reason"] in ("not_handled_yet", "responders_busy")


# --- changes


def test_changes_are_followed(site: Site, server: Server, server_mode: str) -> None:
    """A running receiver follows a change of the registry within seconds."""
    name = f"later-{server_mode}"
    token = site.add(name)
    until(lambda: server.ask(sent(site, to=name)).status == 200)
    site.registration.set_destination(name, datetime.now(UTC), {"enabled": False})
    until(lambda: server.ask(sent(site, to=name)).status == 401)
    assert token not in server.text()
