"""FakeRedox: headers, signatures and handshakes as Redox sends them."""

from __future__ import annotations

import hmac
import json
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, urlsplit

from receiver.protocol.reading import read
from receiver.samples.people import person
from receiver.simulator.fake_redox import FakeRedox
from receiver.simulator.signer import Signer
from tests.simulator import SOURCE
from tests.support.scripted_endpoint import EndpointRequest, ScriptedEndpoint, answer

TOKEN = "a-token-of-sufficient-length"


def echo(handler: BaseHTTPRequestHandler, received: EndpointRequest) -> None:
    """A destination that does the handshake right."""
    if received.method == "GET":
        challenge = parse_qs(urlsplit(received.target).query)["challenge"][0]
    else:
        challenge = json.loads(received.body)["challenge"]
    answer(200, challenge.encode())(handler, received)


def test_a_message_bears_the_token_in_both_headers() -> None:
    """The token is in both headers, as Redox has sent it since about 2021."""
    with ScriptedEndpoint() as endpoint:
        redox = FakeRedox(endpoint.url, "main", TOKEN, source_id=SOURCE)
        assert redox.send(redox.body("PatientAdmin.Arrival")).accepted
    got = endpoint.received[0]
    assert (got.method, got.target) == ("POST", "/redox/main")
    assert got.headers["verification-token"] == TOKEN
    assert got.headers["authorization"] == f"Bearer {TOKEN}"
    assert got.headers["content-type"] == "application/json"
    assert (read(got.body).kind, read(got.body).source_id) == ("PatientAdmin.Arrival", SOURCE)


def test_the_older_form_bears_it_in_one() -> None:
    """In the older form the token is only in `verification-token`."""
    with ScriptedEndpoint() as endpoint:
        FakeRedox(endpoint.url, "main", TOKEN, source_id=SOURCE, bearer=False).send(b"{}")
    assert endpoint.received[0].headers["verification-token"] == TOKEN
    assert "authorization" not in endpoint.received[0].headers


def test_headers_can_be_replaced_and_removed() -> None:
    """A test can replace or remove the headers of a credential."""
    with ScriptedEndpoint() as endpoint:
        redox = FakeRedox(endpoint.url, "main", TOKEN, source_id=SOURCE)
        redox.send({"a": 1}, headers={"authorization": "Bearer other", "verification-token": None})
    assert endpoint.received[0].headers["authorization"] == "Bearer other"
    assert "verification-token" not in endpoint.received[0].headers
    assert endpoint.received[0].body == b'{"a":1}'


def test_a_signing_secret_signs_exactly_what_is_sent() -> None:
    """The signature is over the raw body."""
    with ScriptedEndpoint() as endpoint:
        redox = FakeRedox(
            endpoint.url,
            "main",
            TOKEN,
            source_id=SOURCE,
            signer=Signer(secret=b"secret", header="X-Redox-Signature", encoding="hex", prefix="sha256="),
        )
        redox.send(redox.body("Device.New"))
        redox.send(redox.body("Device.New"), headers={"X-Redox-Signature": "sha256=00"})
    got, forged = endpoint.received
    assert forged.headers["x-redox-signature"] == "sha256=00"
    assert got.headers["x-redox-signature"] == f"sha256={hmac.digest(b'secret', got.body, 'sha256').hex()}"


def test_the_path_before_the_destination_is_kept() -> None:
    """A receiver with a path prefix can be reached."""
    with ScriptedEndpoint() as endpoint:
        FakeRedox(f"{endpoint.url}/hooks/", "main", TOKEN, source_id=SOURCE).send(b"{}")
    assert endpoint.received[0].target == "/hooks/redox/main"


def test_the_patient_can_be_chosen() -> None:
    """A given patient is in the body that is sent."""
    redox = FakeRedox("http://127.0.0.1:9", "main", TOKEN, source_id=SOURCE)
    assert b"Zzcanary" in redox.body("Order.New", patient=person(1, family="Zzcanary"))


def test_the_handshake_by_post() -> None:
    """The token is in the body, not in a header, and the User-Agent names the application."""
    with ScriptedEndpoint(echo) as endpoint:
        handshake = FakeRedox(endpoint.url, "main", TOKEN, source_id=SOURCE).handshake_post()
    got = endpoint.received[0]
    assert json.loads(got.body) == {"verification-token": TOKEN, "challenge": handshake.challenge}
    assert got.headers["application-name"] == "RedoxEngine"
    assert "verification-token" not in got.headers
    assert handshake.passed
    assert handshake.passed_as_before


def test_the_handshake_by_get() -> None:
    """Token and challenge are in the query string, or the token is in its header."""
    with ScriptedEndpoint(echo, echo) as endpoint:
        redox = FakeRedox(endpoint.url, "main", TOKEN, source_id=SOURCE)
        assert redox.handshake_get().passed
        assert redox.handshake_get(token_in_header=True).passed
    first, second = endpoint.received
    assert parse_qs(urlsplit(first.target).query)["verification-token"] == [TOKEN]
    assert TOKEN not in second.target
    assert second.headers["verification-token"] == TOKEN


def test_a_handshake_that_fails() -> None:
    """A wrong challenge, or the right one with a wrong status, does not pass."""

    def right_but_401(handler: BaseHTTPRequestHandler, received: EndpointRequest) -> None:
        answer(401, json.loads(received.body)["challenge"].encode())(handler, received)

    with ScriptedEndpoint(answer(200, b"another challenge"), right_but_401) as endpoint:
        redox = FakeRedox(endpoint.url, "main", TOKEN, source_id=SOURCE)
        assert not redox.handshake_post().passed
        assert not redox.handshake_post().passed


def test_the_older_dashboard() -> None:
    """A challenge inside JSON passes today's dashboard, but not the older one."""

    def wrapped(handler: BaseHTTPRequestHandler, received: EndpointRequest) -> None:
        body = json.dumps({"challenge": json.loads(received.body)["challenge"]}).encode()
        answer(200, body, "application/json")(handler, received)

    with ScriptedEndpoint(wrapped) as endpoint:
        handshake = FakeRedox(endpoint.url, "main", TOKEN, source_id=SOURCE).handshake_post()
    assert handshake.passed
    assert not handshake.passed_as_before
