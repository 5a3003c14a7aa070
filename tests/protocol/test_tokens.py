"""The token endpoint: grants and errors."""

from __future__ import annotations

import hmac
import json
from base64 import b64encode
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Final
from urllib.parse import quote_plus, urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver.errors import ConfigurationError, Unavailable
from receiver.protocol.jose import Rules, VerifyingKey, read_keys
from receiver.protocol.message import Head, Inbound
from receiver.protocol.registry import Destination
from receiver.protocol.tokens import ASSERTION_TYPE, DENIAL_REASONS, MAX_REQUEST, Denied, Granted, decide
from receiver.protocol.verification.oauth import Client, OAuthCredential
from receiver.protocol.verification.public_keys import TOKEN_REASONS
from receiver.protocol.verification.smart import ASSERTION_ALGORITHMS, SmartCredential
from tests.protocol.made_up import NOW, destination, signing
from tests.protocol.verification.cases import verify
from tests.protocol.verification.issuers import P384, RSA_FIRST, RSA_SECOND, Issuer, b64, jwks, pem

_SECRET: Final = "a made-up client secret, + % and all"
_KEY: Final = b"a made-up key for digests, 32 b."
_TOKEN_KEYS: Final = (VerifyingKey(kid="token-1", algorithms=frozenset({"HS256"}), key=b"k" * 32),)
_URL: Final = "https://receiver.example/oauth/main/token"
_AT: Final = int(NOW.timestamp())


def _client(**values: Any) -> Client:
    return Client(**{"client_id": "redox", **values})


def _oauth(
    secret: str = _SECRET,
    *,
    id: int = 1,  # noqa: A002
    client: Client | None = None,
    **values: Any,
) -> OAuthCredential:
    return OAuthCredential(
        id=id,
        client=client or _client(),
        key=_KEY,
        token_keys=_TOKEN_KEYS,
        digest=hmac.digest(_KEY, secret.encode(), "sha256"),
        **values,
    )


def _smart(
    *,
    id: int = 2,  # noqa: A002
    client: Client | None = None,
    lifetime: int = 300,
    keys: tuple[VerifyingKey, ...] | None = None,
    audiences: tuple[str, ...] = (_URL,),
    other_audiences: bool = False,
    stale: bool = False,
    **values: Any,
) -> SmartCredential:
    client = client or _client(client_id="engine")
    rules = Rules(
        issuers=(client.client_id,),
        audiences=audiences,
        algorithms=frozenset(ASSERTION_ALGORITHMS),
        keys=keys or jwks(r=RSA_FIRST, e=P384),
        lifetime=lifetime,
        other_audiences=other_audiences,
        stale=stale,
    )
    return SmartCredential(id=id, client=client, rules=rules, token_keys=_TOKEN_KEYS, **values)


def _at(*credentials: OAuthCredential | SmartCredential) -> Destination:
    return destination(*(credentials or (_oauth(), _smart())), signing(id=9), require=("oauth", "smart"))


def _ask(
    parameters: Mapping[str, Any] | bytes,
    *,
    at: Destination | None = None,
    basic: str | bytes | None = None,
    media: str = "application/x-www-form-urlencoded",
    now: Any = NOW,
) -> Granted | Denied:
    headers = {"content-type": media}
    if basic is not None:
        raw = basic if isinstance(basic, bytes) else basic.encode()
        headers["authorization"] = f"Basic {b64encode(raw).decode()}"
    if isinstance(parameters, bytes):
        body = parameters
    else:
        body = (json.dumps(parameters) if media == "application/json" else urlencode(parameters)).encode()
    head = Head(
        destination="main",
        method="POST",
        headers=headers,
        target="/oauth/main/token",
        query="",
        peer="192.0.2.1",
        received_at=now,
    )
    return decide(Inbound(head=head, body=body), at or _at(), now, jti="made-up-jti")


def _granted(*arguments: Any, **values: Any) -> Granted:
    answer = _ask(*arguments, **values)
    assert isinstance(answer, Granted), answer
    return answer


def _denied(*arguments: Any, **values: Any) -> tuple[str, str]:
    answer = _ask(*arguments, **values)
    assert isinstance(answer, Denied)
    assert answer.status == (401 if answer.error == "invalid_client" else 400)
    assert answer.guess == (answer.error == "invalid_client")
    assert answer.reason in {*DENIAL_REASONS, *TOKEN_REASONS}
    return answer.error, answer.reason


_GRANT: Final = {"grant_type": "client_credentials"}
_RIGHT: Final = {**_GRANT, "client_id": "redox", "client_secret": _SECRET}


class TestSecret:
    """A client with a secret."""

    @pytest.mark.parametrize(
        "media", ["application/x-www-form-urlencoded", "application/json", "Application/JSON; charset=utf-8"]
    )
    def test_in_the_body(self, media: str) -> None:
        """In a form or JSON: the answer has the form of RFC 6749 5.1, and the destination accepts the token."""
        at = _at()
        body = json.dumps(_RIGHT).encode() if "json" in media.lower() else urlencode(_RIGHT).encode()
        granted = _granted(body, at=at, media=media)
        assert granted.body() == {"access_token": granted.access_token, "token_type": "Bearer", "expires_in": 300}
        assert granted.once is None
        verified = verify({"authorization": f"Bearer {granted.access_token}"}, at)
        assert verified.credentials == (1,)
        assert verified.kinds == {"oauth"}

    @pytest.mark.parametrize("text", [f"redox:{_SECRET}", f"redox:{quote_plus(_SECRET)}"])
    def test_by_basic(self, text: str) -> None:
        """Encoded according to RFC 6749 2.3.1, or not."""
        assert _granted(_GRANT, basic=text).credential == 1
        assert _granted({**_GRANT, "client_id": "redox"}, basic=text).credential == 1

    @pytest.mark.parametrize(
        ("parameters", "basic"),
        [
            ({**_RIGHT, "client_secret": _SECRET + "x"}, None),
            ({**_RIGHT, "client_secret": _SECRET[:-1]}, None),
            ({**_RIGHT, "client_secret": _SECRET.upper()}, None),
            ({**_RIGHT, "client_id": "redo"}, None),
            ({**_RIGHT, "client_id": "engine"}, None),
            ({**_RIGHT, "client_id": "é"}, None),
            ({**_RIGHT, "client_secret": "\u20ac"}, None),
            ({**_GRANT, "client_secret": _SECRET}, None),
            (_GRANT, "redox:wrong"),
            (_GRANT, f"other:{_SECRET}"),
            (_GRANT, "redox:"),
            (_GRANT, f":{_SECRET}"),
            ({**_GRANT, "client_id": "other"}, f"redox:{_SECRET}"),
        ],
    )
    def test_wrong(self, parameters: Mapping[str, str], basic: str | None) -> None:
        """Every wrong id or secret gets the same answer."""
        assert _denied(parameters, basic=basic) == ("invalid_client", "token_secret_wrong")

    @pytest.mark.parametrize(
        "parameters", [_GRANT, {**_GRANT, "client_id": "redox"}, {**_RIGHT, "client_secret": ""}, {}]
    )
    def test_no_secret(self, parameters: Mapping[str, str]) -> None:
        """A client id without a secret is refused; an empty parameter counts as missing (RFC 6749 3.2)."""
        assert _denied(parameters) == ("invalid_client", "token_client_unproved")

    @pytest.mark.parametrize("basic", [b"\xff\xfe:x", b"nocolon", b"redox:%ff"])
    def test_malformed_basic(self, basic: bytes) -> None:
        """Malformed values are refused, and raise no other error."""
        assert _denied(_GRANT, basic=basic) == ("invalid_client", "token_basic_malformed")

    @pytest.mark.parametrize("value", ["Basic", "Basic ", "Basic !!!!", "Basic AA", "basic \xe9", "Digest x"])
    def test_other_headers(self, value: str) -> None:
        """Other values of Authorization are ignored."""
        head = Head(
            destination="main",
            method="POST",
            target="",
            query="",
            peer="",
            received_at=NOW,
            headers={"authorization": value, "content-type": "application/x-www-form-urlencoded"},
        )
        answer = decide(Inbound(head=head, body=urlencode(_GRANT).encode()), _at(), NOW, jti="x")
        assert isinstance(answer, Denied)
        assert answer.error == "invalid_client"

    def test_two_methods(self) -> None:
        """RFC 6749 2.3: at most one authentication method in a request."""
        assert _denied(_RIGHT, basic=f"redox:{_SECRET}") == ("invalid_request", "token_two_methods")
        both = {**_RIGHT, "client_assertion_type": ASSERTION_TYPE, "client_assertion": "x"}
        assert _denied(both) == ("invalid_request", "token_two_methods")

    def test_not_live(self) -> None:
        """An expired or revoked secret gets no token; a live one of the same client does, in any order."""
        dead, gone = _oauth(expires_at=NOW), _oauth(id=3, revoked=True)
        assert _denied(_RIGHT, at=_at(dead, gone)) == ("invalid_client", "token_credential_expired")
        assert _granted(_RIGHT, at=_at(dead), now=NOW - timedelta(seconds=1)).credential == 1
        for order in ((dead, _oauth(id=4), gone), (gone, dead, _oauth(id=4)), (_oauth(id=4), gone)):
            assert _granted(_RIGHT, at=_at(*order)).credential == 4

    def test_two_secrets_of_one_client(self) -> None:
        """During a rotation both secrets are accepted, and each token belongs to the credential that requested it."""
        at = _at(_oauth(), _oauth("the next secret, made up", id=5))
        assert _granted(_RIGHT, at=at).credential == 1
        assert _granted({**_RIGHT, "client_secret": "the next secret, made up"}, at=at).credential == 5

    def test_no_clients(self) -> None:
        """A destination without clients grants no token."""
        assert _denied(_RIGHT, at=destination(signing())) == ("invalid_client", "token_client_unproved")


class TestSettings:
    """The fields of Redox's dashboard."""

    def test_renamed_parameters(self) -> None:
        """Parameters with other names are accepted only under those names."""
        client = _client(
            names={
                "grant_type": "grantType",
                "client_id": "clientId",
                "client_secret": "clientSecret",
                "scope": "scopes",
            },
            scopes=("read",),
        )
        at = _at(_oauth(client=client))
        renamed = {"grantType": "client_credentials", "clientId": "redox", "clientSecret": _SECRET, "scopes": "read"}
        assert _granted(renamed, at=at, media="application/json").scope == "read"
        assert _denied(_RIGHT, at=at)[0] == "invalid_client"

    def test_grant_type(self) -> None:
        """Only client_credentials, or the configured grant type, is accepted; a missing one is not."""
        for grant in ("password", "", "Client_Credentials"):
            assert _denied({**_RIGHT, "grant_type": grant}) == ("unsupported_grant_type", "token_grant_type_wrong")
        at = _at(_oauth(client=_client(grant_type="custom")))
        assert _granted({**_RIGHT, "grant_type": "custom"}, at=at).credential == 1
        assert _denied(_RIGHT, at=at)[0] == "unsupported_grant_type"

    def test_audience(self) -> None:
        """A requested audience must be the credential's, if it has one; without a requested audience the token is
        granted.
        """
        at = _at(_oauth(client=_client(audience="https://receiver.example")))
        for right in ({}, {"audience": ""}, {"audience": "https://receiver.example"}):
            assert _granted({**_RIGHT, **right}, at=at).credential == 1
        other = {"audience": "https://other.example"}
        assert _denied({**_RIGHT, **other}, at=at) == ("invalid_target", "token_audience_wrong")
        assert _granted({**_RIGHT, "audience": "anything"}).credential == 1

    def test_scopes(self) -> None:
        """A client may request some or all of its scopes, gets all if it requests none, and no others."""
        at = _at(_oauth(client=_client(scopes=("a", "b"))))
        assert _granted(_RIGHT, at=at).body()["scope"] == "a b"
        assert _granted({**_RIGHT, "scope": "b"}, at=at).scope == "b"
        for wrong in ("c", "a c", "a  b", " a", "A"):
            assert _denied({**_RIGHT, "scope": wrong}, at=at) == ("invalid_scope", "token_scope_wrong")
        assert _denied({**_RIGHT, "scope": "a"}) == ("invalid_scope", "token_scope_wrong")

    def test_lifetime(self) -> None:
        """A token has the credential's lifetime, at most an hour."""
        assert _granted(_RIGHT, at=_at(_oauth(client=_client(lifetime=60)))).expires_in == 60
        for lifetime in (0, 3601, -1):
            with pytest.raises(ConfigurationError):
                _client(lifetime=lifetime)

    def test_a_client_needs_an_id(self) -> None:
        """A client without an id is refused: an empty id would match it."""
        with pytest.raises(ConfigurationError):
            _client(client_id="")


class TestRequest:
    """Invalid token requests."""

    @pytest.mark.parametrize(
        ("body", "media", "reason"),
        [
            (urlencode(_RIGHT).encode(), "text/plain", "token_media_type_wrong"),
            (urlencode(_RIGHT).encode(), "", "token_media_type_wrong"),
            (b"{}", "application/fhir+json", "token_media_type_wrong"),
            (b"grant_type=a&grant_type=a", "application/x-www-form-urlencoded", "token_parameter_twice"),
            (b"a=%ff", "application/x-www-form-urlencoded", "token_request_malformed"),
            (b"a=\xff", "application/x-www-form-urlencoded", "token_request_malformed"),
            (
                b"&".join(b"p%d=1" % n for n in range(51)),
                "application/x-www-form-urlencoded",
                "token_request_malformed",
            ),
            (b"a=" + b"x" * MAX_REQUEST, "application/x-www-form-urlencoded", "token_request_too_large"),
            (b'{"grant_type":"a","grant_type":"a"}', "application/json", "token_request_malformed"),
            (b'{"grant_type":"a","grant_\\u0074ype":"a"}', "application/json", "token_request_malformed"),
            (b"[]", "application/json", "token_request_malformed"),
            (b"7", "application/json", "token_request_malformed"),
            (b"", "application/json", "token_request_malformed"),
            (b"{", "application/json", "token_request_malformed"),
            (b'{"a":"\xff"}', "application/json", "token_request_malformed"),
            (b'{"a":' + b"[" * 5_000 + b"]" * 5_000 + b"}", "application/json", "token_request_malformed"),
            (json.dumps(_RIGHT).encode("utf-16"), "application/json", "token_request_malformed"),
        ],
    )
    def test_malformed(self, body: bytes, media: str, reason: str) -> None:
        """They get invalid_request, and raise no other error."""
        assert _denied(body, media=media) == ("invalid_request", reason)

    @pytest.mark.parametrize("value", [None, 7, True, [_SECRET], {"a": _SECRET}])
    def test_a_member_that_is_not_a_string(self, value: Any) -> None:
        """A JSON member that is not a string counts as missing."""
        assert _denied({**_RIGHT, "client_secret": value}, media="application/json") == (
            "invalid_client",
            "token_client_unproved",
        )

    @given(
        st.binary(max_size=200),
        st.sampled_from(["application/json", "application/x-www-form-urlencoded"]),
        st.none() | st.binary(max_size=60),
    )
    def test_anything(self, body: bytes, media: str, basic: bytes | None) -> None:
        """Any bytes are denied."""
        assert isinstance(_ask(body, media=media, basic=basic), Denied)


_RS384, _ES384 = Issuer(key=RSA_FIRST, algorithm="RS384", kid="r"), Issuer(key=P384, algorithm="ES384", kid="e")


def _assertion(issuer: Issuer = _RS384, header: Mapping[str, Any] | None = None, **changes: Any) -> dict[str, str]:
    claims = {"iss": "engine", "sub": "engine", "aud": _URL, "iat": _AT, "exp": _AT + 300, "jti": "1", **changes}
    token = issuer.token({name: value for name, value in claims.items() if value is not None}, header)
    return {**_GRANT, "client_assertion_type": ASSERTION_TYPE, "client_assertion": token}


class TestAssertion:
    """A client with a signed assertion (RFC 7523)."""

    @pytest.mark.parametrize("issuer", [_RS384, _ES384])
    def test_right(self, issuer: Issuer) -> None:
        """With either algorithm, with or without a client id, it gets a token, and the grant has a nonce."""
        at = _at()
        granted = _granted(_assertion(issuer), at=at)
        assert granted.credential == 2
        assert granted.once is not None
        assert granted.once.until > NOW + timedelta(seconds=300)
        assert _granted({**_assertion(issuer), "client_id": "engine"}, at=at).credential == 2
        assert verify({"authorization": f"Bearer {granted.access_token}"}, at).kinds == {"smart"}

    def test_stale_keys(self) -> None:
        """An assertion is neither accepted nor refused for good; a credential with fresh keys accepts it."""
        old = _smart(stale=True)
        with pytest.raises(Unavailable, match="key_set_stale"):
            _ask(_assertion(), at=_at(old))
        for clients in ((old, _smart(id=3)), (_smart(id=3), old)):
            assert _granted(_assertion(), at=_at(*clients)).credential == 3

    def test_the_nonce(self) -> None:
        """The same jti of the same client has the same nonce, whatever else differs; another jti has another."""
        (first, again, other) = (
            _granted(_assertion(**changes)).once for changes in ({}, {"iat": _AT - 5, "exp": _AT + 200}, {"jti": "2"})
        )
        assert first is not None
        assert again is not None
        assert other is not None
        assert first.key == again.key != other.key
        elsewhere = _smart(client=_client(client_id="another"))
        third = _granted(_assertion(iss="another", sub="another"), at=_at(elsewhere)).once
        assert third is not None
        assert third.key != first.key
        # It is kept until an assertion with that expiry cannot be valid any more.
        assert _denied(_assertion(), now=first.until) == ("invalid_client", "jwt_expired")

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"iss": "other"}, "jwt_issuer_wrong"),
            ({"sub": "other"}, "token_client_differs"),
            ({"sub": None}, "token_client_differs"),
            ({"aud": "https://receiver.example/redox/main"}, "jwt_audience_wrong"),
            ({"aud": None}, "jwt_claim_missing"),
            ({"jti": None}, "token_jti_missing"),
            ({"jti": ""}, "token_jti_missing"),
            ({"jti": 7}, "jwt_malformed"),
            ({"exp": None}, "jwt_claim_missing"),
            ({"iat": None}, "jwt_claim_missing"),
            ({"exp": _AT + 301}, "jwt_lives_too_long"),
            ({"exp": 10**30}, "jwt_malformed"),
            ({"iat": _AT - 400, "exp": _AT - 100}, "jwt_expired"),
            ({"nbf": _AT + 60}, "jwt_not_yet_valid"),
            ({"header": {"kid": "unknown"}}, "jwt_key_unknown"),
            ({"header": {"jku": "http://127.0.0.1:1"}}, "jwt_header_refused"),
            ({"header": {"crit": ["x"]}}, "jwt_header_refused"),
            ({"issuer": Issuer(key=RSA_SECOND, algorithm="RS384", kid="r")}, "jwt_signature_wrong"),
            ({"issuer": Issuer(key=RSA_FIRST, algorithm="RS256", kid="r")}, "jwt_algorithm_wrong"),
        ],
    )
    def test_wrong(self, changes: dict[str, Any], reason: str) -> None:
        """Every claim is checked."""
        assert _denied(_assertion(**changes)) == ("invalid_client", reason)

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"client_id": "redox"}, "token_client_differs"),
            ({"client_assertion_type": "x"}, "token_assertion_type_wrong"),
            ({"client_assertion_type": ""}, "token_assertion_type_wrong"),
            ({"client_assertion": "x"}, "jwt_malformed"),
            ({"client_assertion": "\xe9\u20ac"}, "jwt_malformed"),
        ],
    )
    def test_wrong_parameters(self, changes: dict[str, str], reason: str) -> None:
        """Every parameter is checked."""
        assert _denied({**_assertion(), **changes}) == ("invalid_client", reason)

    def test_only_for_this_endpoint(self) -> None:
        """An assertion that names another audience too is refused, unless the credential allows it.

        RFC 7523 3 allows it, but the other audience could present the assertion here.
        """
        for aud in (_URL, [_URL], [_URL, _URL]):
            assert _granted(_assertion(aud=aud)).credential == 2
        both = ["https://other.example/token", _URL]
        assert _denied(_assertion(aud=both)) == ("invalid_client", "jwt_audience_not_alone")
        assert _granted(_assertion(aud=both), at=_at(_smart(audiences=(*both,)))).credential == 2
        reply = _at(_smart(other_audiences=True))
        assert _granted(_assertion(aud=both), at=reply).credential == 2
        nobody: list[Any] = [[], both[:1], [7], [[_URL]], {}]
        for wrong in nobody:
            for at in (_at(), reply):
                assert _denied(_assertion(aud=wrong), at=at) == ("invalid_client", "jwt_audience_wrong")

    def test_by_the_client_s_secret_or_public_key(self) -> None:
        """HS256 (client_secret_jwt), with a secret or the public key as its key, is refused."""
        claims = json.dumps({"iss": "engine", "sub": "engine", "aud": _URL, "iat": _AT, "exp": _AT + 9, "jti": "1"})
        for key in (_SECRET.encode(), pem(RSA_FIRST), b""):
            signed = f"{b64(json.dumps({'alg': 'HS256'}).encode())}.{b64(claims.encode())}"
            token = f"{signed}.{b64(hmac.digest(key, signed.encode(), 'sha256'))}"
            assert _denied({**_assertion(), "client_assertion": token}) == ("invalid_client", "jwt_algorithm_wrong")

    def test_not_live(self) -> None:
        """A revoked client gets no token; during a rotation either credential's key is accepted."""
        assert _denied(_assertion(), at=_at(_smart(revoked=True))) == ("invalid_client", "token_credential_expired")
        at = _at(_smart(id=7, keys=read_keys(pem(RSA_SECOND))), _smart(id=8))
        assert _granted(_assertion(), at=at).credential == 8

    def test_an_access_token_is_not_an_assertion(self) -> None:
        """Nor is an assertion an access token."""
        granted = _granted(_assertion())
        assert _denied({**_assertion(), "client_assertion": granted.access_token}) == (
            "invalid_client",
            "jwt_algorithm_wrong",
        )

    def test_no_client_with_a_key(self) -> None:
        """A destination whose clients have secrets refuses assertions."""
        assert _denied(_assertion(), at=_at(_oauth())) == ("invalid_client", "token_client_unknown")


def test_secrets_are_not_shown() -> None:
    """No repr shows a token, a secret or a digest."""
    granted = _granted(_RIGHT)
    shown = repr((granted, _denied(_RIGHT, at=_at(_oauth(revoked=True))), _oauth(), _smart()))
    assert granted.access_token not in shown
    assert _SECRET not in shown
    assert _KEY.decode() not in shown
