"""Facts about the fake Redox API, found with a bare httpx2 client: it refuses what Redox refuses, in Redox's words."""

from __future__ import annotations

import json
import socket
import ssl
import threading
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx2
import jwt
import pytest
import trustme
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from receiver.simulator.api import FakeRedoxApi, Fault, SimulatedApiAnswer

KEY = rsa.generate_private_key(65537, 2048)
EC_KEY = ec.generate_private_key(ec.SECP384R1())
JWKS = {
    "keys": [
        {**jwt.algorithms.RSAAlgorithm.to_jwk(KEY.public_key(), as_dict=True), "kid": "rsa"},
        {**jwt.algorithms.ECAlgorithm.to_jwk(EC_KEY.public_key(), as_dict=True), "kid": "ec"},
    ]
}
GRANT = {
    "grant_type": "client_credentials",
    "client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
}
MESSAGE = {"Meta": {"DataModel": "PatientAdmin", "EventType": "Arrival", "Destinations": [{"ID": "d"}]}}


@pytest.fixture
def api() -> Iterator[FakeRedoxApi]:
    with FakeRedoxApi() as running:
        running.register_oauth("client", JWKS)
        running.register_legacy("key", "secret")
        yield running


@pytest.fixture
def http(api: FakeRedoxApi) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=api.base_url, trust_env=False, timeout=30) as client:
        yield client


def claims(api: FakeRedoxApi, **changed: Any) -> dict[str, Any]:
    now = int(datetime.now(UTC).timestamp())
    whole = {
        "iss": "client",
        "sub": "client",
        "aud": f"{api.base_url}/v2/auth/token",
        "iat": now,
        "exp": now + 300,
        "jti": str(uuid.uuid4()),
        **changed,
    }
    return {name: value for name, value in whole.items() if value is not None}


def assertion(api: FakeRedoxApi, *, kid: str | None = "rsa", **changed: Any) -> str:
    return jwt.encode(claims(api, **changed), KEY, algorithm="RS384", headers={"kid": kid} if kid else {})


def ask(http: httpx2.Client, signed: str) -> httpx2.Response:
    return http.post("/v2/auth/token", data={**GRANT, "client_assertion": signed})


def bearer(http: httpx2.Client, api: FakeRedoxApi) -> dict[str, str]:
    return {"Authorization": f"Bearer {ask(http, assertion(api)).json()['access_token']}"}


def legacy(http: httpx2.Client) -> dict[str, Any]:
    reply: dict[str, Any] = http.post("/auth/authenticate", json={"apiKey": "key", "secret": "secret"}).json()
    return reply


def test_a_good_assertion_gets_a_token(api: FakeRedoxApi, http: httpx2.Client) -> None:
    """The reply has the documented members; the scope that was asked for comes back."""
    reply = ask(http, assertion(api)).json()
    assert reply.keys() == {"access_token", "token_type", "expires_in"}
    assert (reply["token_type"], reply["expires_in"]) == ("Bearer", 300)

    scoped = http.post("/v2/auth/token", data={**GRANT, "client_assertion": assertion(api), "scope": "x"})
    assert scoped.json()["scope"] == "x"


def test_es384_is_taken(api: FakeRedoxApi, http: httpx2.Client) -> None:
    """An assertion that a P-384 key signed is as good."""
    assert ask(http, jwt.encode(claims(api), EC_KEY, algorithm="ES384", headers={"kid": "ec"})).status_code == 200


def test_the_documented_denials(api: FakeRedoxApi, http: httpx2.Client) -> None:
    """Each mistake that Redox documents is answered with Redox's words for it."""
    whole = {**GRANT, "client_assertion": assertion(api)}
    denials = {
        "x-www-form-urlencoded content-type required": http.post("/v2/auth/token", json=whole),
        "Missing grant_type parameter": http.post("/v2/auth/token", data={**whole, "grant_type": ""}),
        "Missing client assertion": http.post("/v2/auth/token", data=GRANT),
        "JWT header kid property is required": ask(http, assertion(api, kid=None)),
        "Public key not found, check client_id, kid and Redox dashboard settings": ask(http, assertion(api, kid="no")),
    }
    for words, response in denials.items():
        body = response.json()
        assert response.status_code == 400
        assert (body["error"], body["error_description"]) == ("invalid_request", words)
        assert body["error_uri"].startswith("https://")
    other = http.post("/v2/auth/token", data={**whole, "grant_type": "password"}).json()
    assert other["error"] == "unsupported_grant_type"
    unknown = ask(http, assertion(api, iss="nobody", sub="nobody")).json()
    assert unknown["error_description"].startswith("Public key not found")


BAD_CLAIMS: dict[str, dict[str, Any]] = {
    "aud of another": {"aud": "https://api.redoxengine.com/v2/auth/token"},
    "no aud": {"aud": None},
    "sub of another": {"sub": "other"},
    "no sub": {"sub": None},
    "no iat": {"iat": None},
    "no exp": {"exp": None},
    "no jti": {"jti": None},
    "iat no number": {"iat": "now"},
}


@pytest.mark.parametrize("which", BAD_CLAIMS)
def test_a_claim_that_does_not_hold(api: FakeRedoxApi, http: httpx2.Client, which: str) -> None:
    """Every claim is required and checked."""
    response = ask(http, assertion(api, **BAD_CLAIMS[which]))
    assert (response.status_code, response.json()["error"]) == (401, "invalid_client")


@pytest.mark.parametrize(
    ("age", "life", "good"),
    [
        (0, 300, True),
        (290, 300, True),
        (305, 310, False),
        (400, 300, False),
        (-5, 300, True),
        (-60, 300, False),
        (0, 301, False),
        (0, -60, False),
        (200, 100, False),
    ],
)
def test_times_are_held_to_the_documents(
    api: FakeRedoxApi, http: httpx2.Client, age: int, life: int, good: bool
) -> None:
    """`iat` lies in the last 5 minutes give or take 10 s, and `exp` at most 300 s after it and not in the past."""
    now = int(datetime.now(UTC).timestamp())
    response = ask(http, assertion(api, iat=now - age, exp=now - age + life))
    assert response.status_code == (200 if good else 401)


def test_an_assertion_serves_once(api: FakeRedoxApi, http: httpx2.Client) -> None:
    """A `jti` that was used is refused."""
    signed = assertion(api)
    assert ask(http, signed).status_code == 200
    assert ask(http, signed).json()["error_description"] == "jti was already used"


def test_a_forged_assertion_is_refused(api: FakeRedoxApi, http: httpx2.Client) -> None:
    """Another key, another algorithm, no algorithm, or no JWT at all: no token."""
    other = rsa.generate_private_key(65537, 2048)
    forged = [
        jwt.encode(claims(api), other, algorithm="RS384", headers={"kid": "rsa"}),
        jwt.encode(claims(api), KEY, algorithm="RS256", headers={"kid": "rsa"}),
        jwt.encode(claims(api), "k" * 48, algorithm="HS384", headers={"kid": "rsa"}),
        jwt.encode(claims(api), "", algorithm="none", headers={"kid": "rsa"}),
        "x.y.z",
    ]
    assert [ask(http, one).status_code for one in forged] == [401] * len(forged)


def test_keys_are_looked_up_each_time(api: FakeRedoxApi, http: httpx2.Client) -> None:
    """As with a JWKS URL: a key that is no longer published is no longer taken."""
    published = [JWKS]
    api.register_oauth("client", lambda: published[0])
    assert ask(http, assertion(api)).status_code == 200
    published[0] = {"keys": []}
    assert ask(http, assertion(api)).status_code == 400


def test_a_legacy_key_authenticates_and_refreshes(api: FakeRedoxApi, http: httpx2.Client) -> None:
    """The reply has the documented members, and a refresh token serves once."""
    first = legacy(http)
    assert first.keys() == {"accessToken", "expires", "refreshToken"}
    assert timedelta(minutes=4) < datetime.fromisoformat(first["expires"]) - datetime.now(UTC) <= timedelta(minutes=5)

    asked = {"apiKey": "key", "refreshToken": first["refreshToken"]}
    again = http.post("/auth/refreshToken", json=asked)
    assert again.json().keys() == first.keys()
    used = http.post("/auth/refreshToken", json=asked)
    assert (used.status_code, used.headers["content-type"]) == (401, "text/plain; charset=utf-8")


@pytest.mark.parametrize(
    "body",
    [{}, [], {"apiKey": "key"}, {"apiKey": "key", "secret": "wrong"}, {"apiKey": "other", "secret": "secret"}],
    ids=str,
)
def test_a_wrong_legacy_key_gets_plain_text(http: httpx2.Client, body: object) -> None:
    """A refused legacy key is a 401 in plain text."""
    response = http.post("/auth/authenticate", json=body)
    assert response.status_code == 401
    assert response.headers["content-type"].startswith("text/plain")


def test_only_a_live_token_opens_the_door(api: FakeRedoxApi, http: httpx2.Client) -> None:
    """No token, a made-up one, an ended one and one refused early are all a 401."""
    clock = [datetime.now(UTC)]
    api.now = lambda: clock[0]
    ended, live = bearer(http, api), None
    clock[0] += timedelta(seconds=300)
    assert http.post("/endpoint", json=MESSAGE, headers=ended).status_code == 401
    clock[0] -= timedelta(seconds=299)
    live = bearer(http, api)
    assert http.post("/endpoint", json=MESSAGE, headers=live).status_code == 200
    api.refuse_tokens()
    for headers in (live, {}, {"Authorization": "Bearer made-up"}, {"Authorization": "Basic made-up"}):
        assert http.post("/endpoint", json=MESSAGE, headers=headers).status_code == 401
    assert len(api.processed) == 1


def test_a_message_is_accepted_and_echoed(api: FakeRedoxApi, http: httpx2.Client) -> None:
    """The answer echoes Meta with the ids of the log, and the message is remembered."""
    meta = http.post("/endpoint", json=MESSAGE, headers=bearer(http, api)).json()["Meta"]

    assert {name: meta[name] for name in MESSAGE["Meta"]} == MESSAGE["Meta"]
    assert [str(uuid.UUID(meta["Logs"][0][name])) for name in ("ID", "AttemptID")] == [*meta["Logs"][0].values()]
    assert api.processed == [MESSAGE]


@pytest.mark.parametrize(
    "meta",
    [
        None,
        {},
        {"DataModel": "PatientAdmin"},
        {"DataModel": "PatientAdmin", "EventType": "Arrival"},
        {"DataModel": "PatientAdmin", "EventType": "Arrival", "Destinations": [{}]},
        {"DataModel": "PatientSearch", "EventType": "Query", "Destinations": [{"ID": "a"}, {"ID": "b"}]},
    ],
    ids=str,
)
def test_a_message_that_can_not_be_routed(api: FakeRedoxApi, http: httpx2.Client, meta: object) -> None:
    """What lacks model, event or destination, or asks two at once, is refused with Meta.Errors."""
    headers = bearer(http, api)
    for body in (json.dumps({"Meta": meta}), json.dumps([meta]), "{"):
        response = http.post("/endpoint", content=body, headers=headers)
        assert response.status_code == 400
        assert response.json()["Meta"]["Errors"][0]["Text"]
    assert api.processed == []


def test_two_keys_make_the_source_required(api: FakeRedoxApi, http: httpx2.Client) -> None:
    """With several OAuth keys a message names its source, in Meta or in the header."""
    api.register_oauth("second", JWKS)
    headers = bearer(http, api)
    named = {"Meta": {**MESSAGE["Meta"], "Source": {"ID": "s"}}}

    assert http.post("/endpoint", json=MESSAGE, headers=headers).status_code == 400
    assert http.post("/endpoint", json=named, headers=headers).status_code == 200
    assert http.post("/endpoint", json=MESSAGE, headers={**headers, "Redox-Source-Id": "s"}).status_code == 200


def test_errors_can_come_with_200(api: FakeRedoxApi, http: httpx2.Client) -> None:
    """Told to, it answers 200 with Meta.Errors once, and takes nothing."""
    api.refuse_next({"ID": 1, "Text": "no"})
    headers = bearer(http, api)
    refused = http.post("/endpoint", json=MESSAGE, headers=headers)

    assert (refused.status_code, refused.json()["Meta"]["Errors"]) == (200, [{"ID": 1, "Text": "no"}])
    assert api.processed == []
    assert "Errors" not in http.post("/endpoint", json=MESSAGE, headers=headers).json()["Meta"]


@pytest.mark.parametrize("path", ["/endpoint", "/query"])
def test_a_query_is_answered(api: FakeRedoxApi, http: httpx2.Client, path: str) -> None:
    """A query gets what its responder says, under the event type of the response."""
    asked = {"Meta": {"DataModel": "Clinical Summary", "EventType": "PatientQuery", "Destinations": [{"ID": "d"}]}}
    api.respond("ClinicalSummary.PatientQuery", lambda message: {"Heard": message["Meta"]["DataModel"]})
    body = http.post(path, json=asked, headers=bearer(http, api)).json()

    assert (body["Meta"]["EventType"], body["Heard"]) == ("PatientQueryResponse", "Clinical Summary")


def test_fhir(api: FakeRedoxApi, http: httpx2.Client) -> None:
    """Read, search by POST and operations answer in FHIR; anything else is an OperationOutcome."""
    patient = {"resourceType": "Patient", "id": "p"}
    api.resources["Patient", "p"] = patient
    headers = bearer(http, api)
    base = "/fhir/R4/slug/Staging"

    assert http.get(f"{base}/Patient/p", headers=headers).json() == patient
    found = http.post(f"{base}/Patient/_search", data={"family": "x"}, headers=headers).json()
    assert (found["type"], found["entry"]) == ("searchset", [{"resource": patient}])
    fhir = {**headers, "Content-Type": "application/fhir+json"}
    bundle = json.dumps({"resourceType": "Bundle", "type": "message"})
    assert http.post(f"{base}/Patient/$patient-update", content=bundle, headers=fhir).json()["type"] == "message"
    for response in (
        http.get(f"{base}/Patient/q", headers=headers),
        http.get("/fhir/R4/slug/Moon/Patient/p", headers=headers),
        http.post(f"{base}/Patient/_search", json={}, headers=headers),
        http.post(f"{base}/Patient/$patient-update", json={}, headers=headers),
        http.post(f"{base}/Patient/$patient-update", content="{}", headers=fhir),
        http.post(f"{base}/Patient/update", content=bundle, headers=fhir),
    ):
        assert response.status_code >= 400
        assert response.json()["resourceType"] == "OperationOutcome"
        assert response.headers["content-type"] == "application/fhir+json"


def test_a_legacy_token_is_for_the_data_model(http: httpx2.Client) -> None:
    """A legacy key sends messages, and reads no FHIR."""
    headers = {"Authorization": f"Bearer {legacy(http)['accessToken']}"}

    assert http.post("/endpoint", json=MESSAGE, headers=headers).status_code == 200
    assert http.get("/fhir/R4/slug/Staging/Patient/p", headers=headers).status_code == 403


def test_uploads(api: FakeRedoxApi, http: httpx2.Client) -> None:
    """A multipart file is kept under the URI that is answered; another field, another type or 30 MB more is refused."""
    headers = bearer(http, api)
    uri = http.post("/uploads", files={"file": b"\0\r\n--x"}, headers=headers).json()["URI"]

    assert api.uploads == {uri: b"\0\r\n--x"}
    assert http.post("/uploads", files={"other": b"x"}, headers=headers).status_code == 400
    assert http.post("/uploads", content=b"x", headers=headers).status_code == 400
    cut = {**headers, "Content-Type": "multipart/form-data; boundary=x"}
    assert http.post("/uploads", content=b"--x\r\nContent-Disposition: form-data", headers=cut).status_code == 400
    assert http.post("/uploads", files={"file": bytes(30 * 1024 * 1024 + 1)}, headers=headers).status_code == 413


def test_what_is_not_there(api: FakeRedoxApi, http: httpx2.Client) -> None:
    """An unknown path is a 404, and a body without a length, or over 40 MB, is not read."""
    headers = bearer(http, api)

    assert http.get("/nothing", headers=headers).status_code == 404
    assert http.post("/endpoint", content=iter([b"x"]), headers=headers).status_code == 411
    with pytest.raises(httpx2.HTTPError):
        http.post("/endpoint", content=bytes(40 * 1024 * 1024 + 1), headers=headers).raise_for_status()


def test_what_came_in_is_remembered(api: FakeRedoxApi, http: httpx2.Client) -> None:
    """Requests are kept in order with their headers and bodies, and none of that is in a repr."""
    http.post("/endpoint?x=1", content=b"canary", headers={"X-Canary": "canary"})
    (received,) = api.received("/endpoint")

    assert (received.method, received.path, received.body) == ("POST", "/endpoint?x=1", b"canary")
    assert received.headers["x-canary"] == "canary"
    assert "canary" not in repr(received)


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        (Fault.SERVER_ERROR, 500),
        (Fault.BAD_GATEWAY, 502),
        (Fault.UNAVAILABLE, 503),
        (Fault.GATEWAY_TIMEOUT, 504),
        (Fault.RATE_LIMITED, 429),
        (Fault.UNAUTHORIZED, 401),
        (Fault.REDIRECT, 307),
    ],
)
def test_a_status_on_demand(api: FakeRedoxApi, http: httpx2.Client, fault: Fault, status: int) -> None:
    """A fault strikes as often as it was ordered, at its path alone, and processes nothing."""
    headers = bearer(http, api)
    api.fail("/endpoint", fault, times=2)

    assert http.get("/elsewhere", headers=headers).status_code == 404
    for _ in range(2):
        response = http.post("/endpoint", json=MESSAGE, headers=headers)
        assert response.status_code == status
        assert ("x-ratelimit-limit" in response.headers) == (fault is Fault.RATE_LIMITED)
        assert "retry-after" not in response.headers
        assert response.headers.get("location") == (api.redirect_to if fault is Fault.REDIRECT else None)
    assert api.processed == []
    assert http.post("/endpoint", json=MESSAGE, headers=headers).status_code == 200


def test_answers_on_demand(api: FakeRedoxApi, http: httpx2.Client) -> None:
    """Garbage, ten megabytes, a bomb of 100, or any answer one likes."""
    api.fail("/", Fault.GARBAGE)
    api.fail("/", Fault.HUGE)
    api.fail("/", Fault.GZIP_BOMB)
    api.fail("/", SimulatedApiAnswer(status=418, body={"a": 1}, headers={"X-B": "c"}))

    assert http.get("/").text.startswith("<html>")
    assert len(http.get("/").content) == 10 * 1024 * 1024
    with http.stream("GET", "/") as bomb:
        assert bomb.headers["content-encoding"] == "gzip"
        assert sum(len(chunk) for chunk in bomb.iter_bytes()) == 100 * 1024 * 1024
    any_answer = http.get("/")
    assert (any_answer.status_code, any_answer.json(), any_answer.headers["x-b"]) == (418, {"a": 1}, "c")


@pytest.mark.parametrize(
    ("fault", "error", "processed"),
    [
        (Fault.NOT_HTTP, httpx2.RemoteProtocolError, 0),
        (Fault.DROP_BEFORE, httpx2.RemoteProtocolError, 0),
        (Fault.DROP_AFTER, httpx2.RemoteProtocolError, 1),
        (Fault.CUT_SHORT, httpx2.RemoteProtocolError, 1),
        (Fault.SILENCE, httpx2.ReadTimeout, 0),
    ],
)
def test_a_connection_broken_on_demand(
    api: FakeRedoxApi, http: httpx2.Client, fault: Fault, error: type[Exception], processed: int
) -> None:
    """The answer is lost before or after the message was processed, as ordered."""
    headers = bearer(http, api)
    api.fail("/endpoint", fault)

    with pytest.raises(error):
        http.post("/endpoint", json=MESSAGE, headers=headers, timeout=0.5 if fault is Fault.SILENCE else 30)
    assert len(api.processed) == processed


def test_a_drip_on_demand(api: FakeRedoxApi) -> None:
    """A drip goes on for as long as one listens, so no time-out over single reads ends it."""
    api.fail("/", Fault.DRIP)
    with socket.create_connection(("127.0.0.1", int(api.base_url.rpartition(":")[2])), timeout=30) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        heard = b""
        while heard.count(b"x") < 5:
            heard += connection.recv(100)
    assert heard.startswith(b"HTTP/1.1 200 OK\r\nX-Slow: ")


def test_tls(tmp_path_factory: pytest.TempPathFactory) -> None:
    """With a context it speaks TLS, survives a client that refuses its certificate, and serves the next."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    with FakeRedoxApi(ssl_context=context, host="localhost") as api:
        assert api.base_url.startswith("https://localhost:")
        with pytest.raises(httpx2.ConnectError), httpx2.Client(trust_env=False) as http:
            http.get(api.base_url)
        with httpx2.Client(verify=trusting, trust_env=False) as http:
            assert http.get(api.base_url).status_code == 401


def test_half_a_request_is_none(api: FakeRedoxApi) -> None:
    """A body that ends before its length is not taken for a request."""
    with socket.create_connection(("127.0.0.1", int(api.base_url.rpartition(":")[2])), timeout=30) as connection:
        connection.sendall(b"POST /endpoint HTTP/1.1\r\nContent-Length: 10\r\n\r\nhalf")
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(100) == b""
    assert api.requests == []


def test_it_stops_whoever_is_connected() -> None:
    """Leaving ends every connection and thread, also those that wait for an answer that never comes."""
    before = threading.active_count()
    with httpx2.Client(trust_env=False) as http:
        with FakeRedoxApi() as api:
            api.fail("/", Fault.SILENCE)
            with pytest.raises(httpx2.ReadTimeout):
                http.get(api.base_url, timeout=0.1)
            http.get(api.base_url)
        assert threading.active_count() == before
