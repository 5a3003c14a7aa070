"""Every credential kind, against a running receiver."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any
from urllib.parse import urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from sqlalchemy import text

from receiver.errors import ConfigurationError
from receiver.simulator.client_auth import (
    AccessTokenAuthenticator,
    Authenticator,
    CertificateAuthenticator,
    HmacAuthenticator,
    OutgoingRequest,
    SignedTokenAuthenticator,
    SigV4Authenticator,
)
from receiver.simulator.fake_redox import FakeRedox
from receiver.simulator.http_connection import HttpConnection, HttpReply
from receiver.simulator.signer import Signer
from receiver.storage.registry.handler_changes import HandlerSpec
from tests.protocol.verification.issuers import P256, P384, RSA_FIRST, Issuer, PrivateKey, jwk, pem
from tests.support.scripted_endpoint import ScriptedEndpoint, answer
from tests.support.server import Server, Wire, post, serving
from tests.support.site import SOURCE, Site
from tests.support.waiting import until

SECRET = "a made-up secret of some length"
ISSUER = "https://issuer.example"
ACCOUNT = "redox@project.iam.example"
_SEEDS = count(100)  # the same seed would make a duplicate


@pytest.fixture(scope="module")
def server_mode() -> str:
    """One mode: the verdict does not depend on it. tests/web/test_asgi_request.py compares the heads."""
    return "flask"


@pytest.fixture(scope="module")
def server(site: Site, server_mode: str) -> Iterator[Server]:
    """A receiver that trusts a proxy on this machine."""
    trusting = {"RECEIVER_TRUSTED_PROXIES": "127.0.0.1", "RECEIVER_SERVER_MODE": server_mode}
    with serving(site.directory, site.environment | trusting) as server:
        yield server


def private(key: PrivateKey) -> str:
    """PEM of a private key."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def certificate(name: str) -> x509.Certificate:
    """A self-signed client certificate: the proxy checks it, not the receiver."""
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(P256.public_key())
        .serial_number(7)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(P256, SHA256())
    )


class Place:
    """A destination that requires one kind, and a fake Redox with credentials of that kind."""

    def __init__(self, site: Site, server: Server, kind: str, *, secret: str | None = None, **settings: Any) -> None:
        self.site, self.kind = site, kind
        self.name = f"{kind}-{site.count('destinations')}"
        self.url = f"http://127.0.0.1:{server.port}"
        self.token = site.add(self.name, require=[kind])
        self.credential = self.add(secret, **settings)

    def add(self, secret: str | None = None, *, fetched: bytes | None = None, **settings: Any) -> int:
        """Add another credential of the kind; return its id."""
        return self.site.registration.add_credential(
            self.name,
            datetime.now(UTC),
            self.kind,
            settings,
            None if secret is None else secret.encode(),
            label=None,
            expires_at=None,
            fetched=fetched,
        )

    def revoke(self) -> None:
        """End the credential."""
        self.site.registration.revoke_credential(self.credential, datetime.now(UTC))

    def redox(self, *presenters: Authenticator) -> FakeRedox:
        """A fake Redox with these authenticators."""
        return FakeRedox(self.url, self.name, self.token, source_id=SOURCE, authenticators=presenters)

    def send(
        self, *presenters: Authenticator, seed: int = 0, kind: str = "PatientAdmin.Arrival", **more: Any
    ) -> HttpReply:
        """Send a sample message."""
        redox = self.redox(*presenters)
        return redox.send(redox.body(kind, seed=seed), **more)

    @property
    def token_url(self) -> str:
        """The token endpoint."""
        return f"{self.url}/oauth/{self.name}/token"

    def accepted(self, *presenters: Authenticator) -> None:
        """A message with these is accepted once the receiver has loaded the registry, and its row names the credential.
        In a trailer, after the body, the same header fields prove nothing.
        """
        until(lambda: self.send(*presenters, seed=next(_SEEDS)).status == 200)
        self.refused_in_a_trailer(*presenters)
        rows = self.site.rows(
            "SELECT m.credential_ids FROM messages m JOIN destinations d ON d.id = m.destination_id "
            "WHERE d.name = :name ORDER BY m.id DESC LIMIT 1",
            name=self.name,
        )
        assert self.credential in rows[0][0]

    def refused_in_a_trailer(self, *presenters: Authenticator) -> None:
        """The same proof after the body is refused as if it were absent."""
        redox = self.redox(*presenters)
        body = redox.body("PatientAdmin.Arrival", seed=next(_SEEDS))
        proof = {
            name: value
            for name, value in redox._headers(body, {}).items()
            if name not in ("host", "content-type", "content-length")
        }
        assert proof
        trailers = "".join(f"{name}: {value}\r\n" for name, value in proof.items()).encode("latin-1")
        head = post(f"/redox/{self.name}", b"", content_length=None, transfer_encoding="chunked")
        after = self.site.now()
        with Wire(urlsplit(self.url).port or 0) as wire:
            wire.send(head + b"%x\r\n%b\r\n0\r\n%b\r\n" % (len(body), body, trailers))
            assert wire.answer().status == 401
        assert self.site.audit(after, destination=self.name, action="message.refuse").reason == "credential_missing"

    def refused(self, *presenters: Authenticator, reason: str, **more: Any) -> None:
        """A message with these is refused, with this reason in the audit."""
        after = self.site.now()
        assert self.send(*presenters, seed=5, **more).status == 401
        assert self.site.audit(after, destination=self.name, action="message.refuse").reason == reason

    def ends(self, *presenters: Authenticator, reason: str) -> None:
        """After revocation the same is refused within seconds."""
        self.revoke()
        until(lambda: self.send(*presenters).status == 401, seconds=10)
        self.refused(*presenters, reason=reason)


def _rsa_keys() -> str:
    return json.dumps({"keys": [jwk(RSA_FIRST, kid="a"), jwk(P384, kid="e")]})


def test_jwt(site: Site, server: Server) -> None:
    """A signed token in each request is accepted, until the credential ends; nothing less is."""
    at = Place(site, server, "jwt", issuers=[ISSUER], audiences=["us"], keys=_rsa_keys())
    right = SignedTokenAuthenticator(key=private(RSA_FIRST), algorithm="RS256", kid="a", issuer=ISSUER, audience="us")
    at.accepted(right)
    at.accepted(SignedTokenAuthenticator(key=private(P384), algorithm="ES384", kid="e", issuer=ISSUER, audience="us"))
    at.refused(reason="credential_insufficient")  # the verification token alone
    at.refused(
        SignedTokenAuthenticator(key=private(RSA_FIRST), algorithm="RS256", kid="x", issuer=ISSUER, audience="us"),
        reason="jwt_key_unknown",
    )
    at.refused(
        SignedTokenAuthenticator(key=private(RSA_FIRST), algorithm="RS256", kid="a", issuer=ISSUER, audience="them"),
        reason="jwt_audience_wrong",
    )
    at.ends(right, reason="jwt_credential_expired")


def test_keys_that_are_stale(site: Site, server: Server) -> None:
    """If the keys of a URL could not be fetched for 72 hours, the reply is 503, not 401: Redox keeps its messages."""
    at = Place(
        site,
        server,
        "jwt",
        issuers=[ISSUER],
        audiences=["us"],
        jwks_url="https://keys.example/",
        fetched=_rsa_keys().encode(),
    )
    right = SignedTokenAuthenticator(key=private(RSA_FIRST), algorithm="RS256", kid="a", issuer=ISSUER, audience="us")
    at.accepted(right)
    with site.engine.begin() as connection:
        connection.execute(text("UPDATE key_sets SET fetched_at = now() - interval '73 hours'"))
    site.registration.set_destination(at.name, datetime.now(UTC), {"test_messages": "accept"})
    until(lambda: at.send(right, seed=next(_SEEDS)).status == 503)
    at.site.registration.keys_fetched("https://keys.example/", _rsa_keys().encode(), datetime.now(UTC))
    at.accepted(right)


def test_google(site: Site, server: Server) -> None:
    """A token that Google has signed for one account is accepted."""
    at = Place(site, server, "google", audiences=["us"], email=ACCOUNT, keys=pem(RSA_FIRST).decode())
    right = SignedTokenAuthenticator(
        key=private(RSA_FIRST), algorithm="RS256", issuer="https://accounts.google.com", audience="us", email=ACCOUNT
    )
    at.accepted(right)
    at.refused(
        SignedTokenAuthenticator(
            key=private(RSA_FIRST),
            algorithm="RS256",
            issuer="https://accounts.google.com",
            audience="us",
            email="stranger@example.com",
        ),
        reason="jwt_email_wrong",
    )
    at.ends(right, reason="jwt_credential_expired")


@pytest.mark.parametrize("send", ["basic", "form", "json"])
def test_oauth(site: Site, server: Server, send: Any) -> None:
    """A client with a secret gets a token, which is accepted until the credential ends; the audit has each token."""
    at = Place(site, server, "oauth", client_id="redox", secret=SECRET, scopes=["write"])
    after = site.now()
    right = AccessTokenAuthenticator(at.token_url, "redox", secret=SECRET, send=send)
    until(lambda: _granted(right))
    at.accepted(right)
    issued = site.audit(after, action="token.issue", destination=at.name)
    assert issued.subject == f"credentials:{at.credential}"
    at.refused(reason="credential_insufficient")
    at.ends(right, reason="jwt_credential_expired")


def _granted(presenter: AccessTokenAuthenticator) -> bool:
    try:
        return bool(presenter.ask(now=datetime.now(UTC).timestamp()))
    except ConfigurationError:
        return False


def test_oauth_under_other_names(site: Site, server: Server) -> None:
    """The parameters may have the names that are entered in Redox's dashboard."""
    names = {"grant_type": "grantType", "client_id": "clientId", "client_secret": "clientSecret"}
    at = Place(site, server, "oauth", client_id="redox", secret=SECRET, names=names, audience="us")
    right = AccessTokenAuthenticator(at.token_url, "redox", secret=SECRET, send="json", names=names, audience="us")
    until(lambda: _granted(right))
    at.accepted(right)
    assert not _granted(AccessTokenAuthenticator(at.token_url, "redox", secret=SECRET, send="json", audience="us"))


def test_a_secret_is_changed_without_a_refused_message(site: Site, server: Server) -> None:
    """The new secret works before the old one ends, and tokens of both are accepted."""
    at = Place(site, server, "oauth", client_id="redox", secret=SECRET)
    old = AccessTokenAuthenticator(at.token_url, "redox", secret=SECRET)
    until(lambda: _granted(old))
    at.accepted(old)
    number = at.add(SECRET[::-1], client_id="redox")
    new = AccessTokenAuthenticator(at.token_url, "redox", secret=SECRET[::-1])
    until(lambda: _granted(new))
    assert {at.send(old).status, at.send(new).status} == {200}
    at.revoke()
    until(lambda: at.send(old).status == 401, seconds=10)
    at.credential = number
    at.accepted(new)


def test_smart(site: Site, server: Server) -> None:
    """A client with a key gets a token; its assertion works once on all hosts together."""
    name = f"smart-{site.count('destinations')}"
    url = f"http://127.0.0.1:{server.port}/oauth/{name}/token"
    at = Place(site, server, "smart", client_id="engine", audiences=[url], keys=_rsa_keys())
    assert at.token_url == url
    assertion = SignedTokenAuthenticator(
        key=private(P384), algorithm="ES384", kid="e", issuer="engine", subject="engine", audience=url
    )
    right = AccessTokenAuthenticator(url, "engine", assertion=assertion)
    until(lambda: _granted(right))
    at.accepted(right)
    form = {
        "grant_type": "client_credentials",
        "client_assertion": assertion.token(now=datetime.now(UTC).timestamp()),
        "client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
    }
    after = site.now()
    assert _ask(at, json.dumps(form).encode(), "application/json").status == 200
    with serving(site.directory, site.environment) as other:
        again = _ask(at, json.dumps(form).encode(), "application/json", port=other.port)
    assert again.status == 401
    assert again.json() == {"error": "invalid_client"}
    assert site.audit(after, action="token.refuse", reason="token_assertion_replayed").destination == at.name
    at.ends(right, reason="jwt_credential_expired")


def _ask(
    at: Place,
    body: bytes,
    media: str = "application/x-www-form-urlencoded",
    *,
    port: int | None = None,
    method: str = "POST",
    peer: str = "192.0.2.1",
) -> HttpReply:
    base = at.url if port is None else f"http://127.0.0.1:{port}"
    with HttpConnection(base, timeout=20) as line:
        return line.request(
            method, urlsplit(at.token_url).path, body=body, headers={"content-type": media, "x-forwarded-for": peer}
        )


def test_the_endpoint_speaks_rfc_6749(site: Site, server: Server) -> None:
    """Replies follow RFC 6749 sections 5.1 and 5.2: JSON that forbids caching."""
    at = Place(site, server, "oauth", client_id="redox", secret=SECRET)
    until(lambda: _granted(AccessTokenAuthenticator(at.token_url, "redox", secret=SECRET)))
    good = b"grant_type=client_credentials&client_id=redox&client_secret=" + SECRET.replace(" ", "+").encode()
    for body, status, error in (
        (good, 200, None),
        (good + b"x", 401, "invalid_client"),
        (b"", 401, "invalid_client"),
        (good.replace(b"client_credentials", b"password"), 400, "unsupported_grant_type"),
        (good + b"&scope=x", 400, "invalid_scope"),
        (good + b"&scope=", 200, None),
        (good + b"&client_id=redox", 400, "invalid_request"),
        (b"a=" + b"x" * 20_000, 400, "invalid_request"),
    ):
        answer = _ask(at, body)
        assert answer.status == status
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["pragma"] == "no-cache"
        assert answer.headers["content-type"] == "application/json"
        assert answer.json().get("error") == error
        assert ("www-authenticate" in answer.headers) is (status == 401)
        if status == 401:
            assert answer.headers["www-authenticate"].startswith("Basic ")
    assert _ask(at, b"", method="GET").status == 405
    assert _ask(at, b"", method="PUT").status == 405


def test_wrong_secrets_are_slowed_and_the_right_one_is_not(site: Site, server: Server) -> None:
    """Many wrong secrets from one address get 429; the right one from the same address gets its token."""
    at = Place(site, server, "oauth", client_id="redox", secret=SECRET)
    right = AccessTokenAuthenticator(at.token_url, "redox", secret=SECRET)
    until(lambda: _granted(right))
    wrong = {
        _ask(at, b"grant_type=client_credentials&client_id=redox&client_secret=guess%d" % n, peer="198.51.100.7").status
        for n in range(30)
    }
    assert wrong == {401, 429}
    answer = _ask(at, b"", peer="198.51.100.7")
    assert answer.status == 429
    assert int(answer.headers["retry-after"]) > 0
    good = b"grant_type=client_credentials&client_id=redox&client_secret=" + SECRET.replace(" ", "+").encode()
    assert _ask(at, good, peer="198.51.100.7").status == 200
    assert _ask(at, b"", peer="203.0.113.9").status == 401


def test_an_unknown_destination_has_no_token_endpoint(site: Site, server: Server) -> None:
    """An unknown destination has the same reply as a wrong secret."""
    at = Place(site, server, "oauth", client_id="redox", secret=SECRET)
    name, at.name = at.name, "nobody"
    unknown = _ask(at, b"grant_type=client_credentials", peer="192.0.2.2")
    at.name = name
    until(lambda: _granted(AccessTokenAuthenticator(at.token_url, "redox", secret=SECRET)))
    wrong = _ask(at, b"grant_type=client_credentials", peer="192.0.2.2")
    assert (unknown.status, unknown.body) == (wrong.status, wrong.body)


def test_sigv4(site: Site, server: Server) -> None:
    """A signature over the request is accepted."""
    at = Place(site, server, "sigv4", secret=SECRET, access_key="AKID", region="us-east-1", service="execute-api")
    right = SigV4Authenticator(access_key="AKID", secret=SECRET, region="us-east-1", service="execute-api")
    at.accepted(right)
    at.refused(
        SigV4Authenticator(access_key="AKID", secret=SECRET + "x", region="us-east-1", service="execute-api"),
        reason="sigv4_signature_wrong",
    )
    at.refused(
        SigV4Authenticator(
            access_key="AKID", secret=SECRET, region="us-east-1", service="execute-api", unsigned_payload=True
        ),
        reason="sigv4_payload_unsigned",
    )
    at.refused(right, reason="sigv4_signature_wrong", headers={"content-type": "application/fhir+json"})
    at.ends(right, reason="sigv4_credential_expired")


@pytest.mark.parametrize("proxy", ["nginx", "envoy", "aws-alb"])
def test_mtls(site: Site, server: Server, proxy: Any) -> None:
    """A certificate that a trusted proxy reports with its secret is accepted."""
    known = certificate("client.redox.example")
    at = Place(
        site,
        server,
        "mtls",
        secret=SECRET,
        proxy=proxy,
        san="client.redox.example",
        fingerprint=known.fingerprint(SHA256()).hex(),
    )
    text = known.public_bytes(Encoding.PEM).decode()
    right = CertificateAuthenticator(proxy=proxy, pem=text, secret=SECRET)
    at.accepted(right)
    at.refused(CertificateAuthenticator(proxy=proxy, pem=text, secret=SECRET + "x"), reason="mtls_proxy_secret_wrong")
    other = certificate("client.redox.example").public_bytes(Encoding.PEM).decode()
    at.refused(CertificateAuthenticator(proxy=proxy, pem=other, secret=SECRET), reason="mtls_pin_differs")
    with serving(site.directory, site.environment) as trusting_nobody:
        redox = FakeRedox(
            f"http://127.0.0.1:{trusting_nobody.port}", at.name, at.token, source_id=SOURCE, authenticators=[right]
        )
        after = site.now()
        assert redox.send(redox.body("PatientAdmin.Arrival")).status == 401
        assert site.audit(after, destination=at.name).reason == "mtls_not_from_proxy"
    at.ends(right, reason="mtls_credential_expired")


class Recorded:
    """Sends the header fields of its first request with every request, as an eavesdropper can."""

    def __init__(self, presenter: Authenticator) -> None:
        self._presenter = presenter
        self._headers: dict[str, str] | None = None

    def headers(self, request: OutgoingRequest, *, now: float) -> dict[str, str]:
        """The first request's headers."""
        if self._headers is None:
            self._headers = self._presenter.headers(request, now=now)
        return self._headers


def _replayable(kind: str) -> tuple[dict[str, Any], Authenticator]:
    if kind == "sigv4":
        return (
            {"access_key": "AKID", "region": "us-east-1", "service": "execute-api"},
            SigV4Authenticator(access_key="AKID", secret=SECRET, region="us-east-1", service="execute-api"),
        )
    return (
        {"timestamp_header": "x-time"},
        HmacAuthenticator(signer=Signer(secret=SECRET.encode(), timestamp_header="x-time")),
    )


@pytest.mark.parametrize("kind", ["sigv4", "hmac"])
def test_a_signed_query_is_answered_once(site: Site, server: Server, kind: str) -> None:
    """A repeated signature of a query is refused on every host; of a notification it is a duplicate."""
    settings, presenter = _replayable(kind)
    at = Place(site, server, kind, secret=SECRET, **settings)
    at.accepted(presenter)
    site.registration.enable_handler(
        at.name,
        HandlerSpec(
            handler="nobody-answers",
            role="handler",
            patterns=("*",),
            ordering="source",
            patient_key=None,
            acknowledge="after_commit",
            on_failure="dead",
            max_attempts=1,
            timeout=5.0,
        ),
        datetime.now(UTC),
    )
    listened = Recorded(presenter)
    assert at.send(listened, kind="PatientSearch.Query").status == 501
    after = site.now()
    assert at.send(listened, kind="PatientSearch.Query").status == 401
    assert site.audit(after, destination=at.name, action="message.refuse").reason == "signature_replayed"
    with serving(site.directory, site.environment) as other:
        redox = FakeRedox(
            f"http://127.0.0.1:{other.port}", at.name, at.token, source_id=SOURCE, authenticators=[listened]
        )
        host = {"host": urlsplit(at.url).netloc}
        assert redox.send(redox.body("PatientSearch.Query"), headers=host).status == 401
    assert at.send(presenter, kind="PatientSearch.Query", seed=8).status == 501
    notified = Recorded(presenter)
    assert [at.send(notified, seed=9).status for _ in range(2)] == [200, 200]


def test_no_request_causes_a_fetch(site: Site, server: Server) -> None:
    """A token with an unknown key, or with a URL of its key, is refused without a fetch."""
    with ScriptedEndpoint(answer(200, _rsa_keys().encode())) as keys:
        url = f"{keys.url}/keys"
        at = Place(site, server, "jwt", issuers=[ISSUER], audiences=["us"], keys=_rsa_keys())
        site.registration.add_credential(
            at.name,
            datetime.now(UTC),
            "jwt",
            {"issuers": ["https://other.example"], "audiences": ["us"], "jwks_url": url},
            None,
            label=None,
            expires_at=None,
            fetched=_rsa_keys().encode(),
        )
        at.accepted(
            SignedTokenAuthenticator(key=private(RSA_FIRST), algorithm="RS256", kid="a", issuer=ISSUER, audience="us")
        )
        unknown = SignedTokenAuthenticator(
            key=private(RSA_FIRST), algorithm="RS256", kid="x", issuer="https://other.example", audience="us"
        )
        at.refused(unknown, reason="jwt_key_unknown")
        for where in ("jku", "x5u"):
            header = {where: url, "kid": "a"}
            pointed = Issuer(key=P384, algorithm="ES384").token(
                {"iss": ISSUER, "aud": "us", "iat": 0, "exp": 1}, header
            )
            at.refused(reason="jwt_header_refused", headers={"authorization": f"Bearer {pointed}"})
        assert keys.received == []
