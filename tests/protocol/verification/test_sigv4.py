"""Kind `sigv4`, with signatures that AWS published or botocore made."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any, ClassVar
from urllib.parse import quote

import botocore.auth
import pytest
import time_machine
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from hypothesis import example, given
from hypothesis import strategies as st

from receiver.errors import Unverified
from receiver.protocol import verification
from receiver.protocol.message import Head, Inbound, Method, Verified
from receiver.protocol.registry import Credential, Destination
from receiver.protocol.verification.sigv4 import SigV4Credential
from receiver.protocol.verification.sigv4_request import MAX_HEADER
from tests.protocol.made_up import BODY, NOW, TOKENS, Which, destination, token
from tests.protocol.verification.cases import Headers, VerificationCases, refusal, verify

_HOST = "receiver.example"
_KEYS: Mapping[Which, tuple[str, str]] = {
    "first": ("AKIDMADEUPFIRST", "first-made-up-secret-key/+0123456789ab"),
    "second": ("AKIDMADEUPSECOND", "second-made-up-secret-key/+0123456789a"),
}


def _row(which: Which = "first", **changes: Any) -> SigV4Credential:
    name, secret = _KEYS[which]
    return SigV4Credential(
        **{
            "id": 1,
            "access_key": name,
            "secret": secret.encode(),
            "region": "us-east-1",
            "service": "execute-api",
            **changes,
        }
    )


def _signed(
    which: Which = "first",
    *,
    headers: Mapping[str, str] | None = None,
    body: bytes = BODY,
    query: str = "",
    target: str = "/redox/main",
    region: str = "us-east-1",
    service: str = "execute-api",
    at: datetime = NOW,
    session: str | None = None,
    signer: type[botocore.auth.SigV4Auth] = botocore.auth.SigV4Auth,
    method: Method = "POST",
    **context: Any,
) -> dict[str, str]:
    """Return the headers of a request that botocore signed, as a server receives them."""
    name, secret = _KEYS[which]
    request = AWSRequest(
        method=method,
        url=f"https://{_HOST}{target}{'?' if query else ''}{query}",
        data=body,
        headers={"Content-Type": "application/json", **(headers or {})},
    )
    request.context.update(context)
    with time_machine.travel(at, tick=False):
        signer(Credentials(name, secret, session), service, region).add_auth(request)
    return {"host": _HOST, **{name.lower(): value for name, value in request.headers.items()}}


_RIGHT: Mapping[Which, Headers] = {"first": _signed("first"), "second": _signed("second")}


def _changed(name: str, value: str | None, headers: Headers = _RIGHT["first"]) -> Headers:
    """Return the right headers with one changed or removed."""
    return {each: text for each, text in {**headers, name: value}.items() if text is not None}


def _edited(old: str, new: str) -> Headers:
    value = _RIGHT["first"]["authorization"]
    assert old in value
    return _changed("authorization", value.replace(old, new))


_SIGNATURE = _RIGHT["first"]["authorization"].rpartition("=")[2]


class TestSigV4(VerificationCases):
    """A signature over the request."""

    kind = "sigv4"
    by_head = False
    claims_unrequired = False
    right: ClassVar[Mapping[Which, Headers]] = _RIGHT
    # `_signature_wrong` is not known before the body is read, and is tested below.
    bad: ClassVar[Mapping[str, tuple[Headers, str]]] = {
        "another key": (_edited("AKIDMADEUPFIRST", "AKIDMADEUPTHIRD"), "sigv4_credential_missing"),
        "the second key": (_RIGHT["second"], "sigv4_credential_missing"),
        "another region": (_signed(region="eu-west-1"), "sigv4_scope_wrong"),
        "another service": (_signed(service="s3"), "sigv4_scope_wrong"),
        "another day in the scope": (_edited("/20260101/", "/20251231/"), "sigv4_scope_wrong"),
        "another end of the scope": (_edited("aws4_request", "aws5_request"), "sigv4_scope_wrong"),
        "no scope": (_edited("/20260101/us-east-1/execute-api/aws4_request", ""), "sigv4_scope_wrong"),
        "another algorithm": (_edited("AWS4-HMAC-SHA256", "AWS4-HMAC-SHA512"), "sigv4_malformed"),
        "asymmetric": (_edited("AWS4-HMAC-SHA256", "AWS4-ECDSA-P256-SHA256"), "sigv4_malformed"),
        "only the algorithm": (_changed("authorization", "AWS4-HMAC-SHA256"), "sigv4_malformed"),
        "no signature": (_edited(f", Signature={_SIGNATURE}", ""), "sigv4_malformed"),
        "empty signature": (_edited(_SIGNATURE, ""), "sigv4_malformed"),
        "short signature": (_edited(_SIGNATURE, _SIGNATURE[:-1]), "sigv4_malformed"),
        "signature in capitals": (_edited(_SIGNATURE, _SIGNATURE.upper()), "sigv4_malformed"),
        "signature in base64": (_edited(_SIGNATURE, "A" * 43 + "="), "sigv4_malformed"),
        "twice": (_edited(_SIGNATURE, f"{_SIGNATURE},{_RIGHT['first']['authorization']}"), "sigv4_malformed"),
        "two signatures": (_edited(_SIGNATURE, f"{_SIGNATURE}, Signature={_SIGNATURE}"), "sigv4_malformed"),
        "a field more": (_edited(", SignedHeaders", ", More=x, SignedHeaders"), "sigv4_malformed"),
        "1 MB": (_edited(_SIGNATURE, "a" * 1_000_000), "sigv4_malformed"),
        "long": (_edited("AKIDMADEUPFIRST", "A" * MAX_HEADER), "sigv4_malformed"),
        "10,000 headers": (_edited("host;", "".join(f"h{n:05};" for n in range(600)) + "host;"), "sigv4_malformed"),
        "host not signed": (_edited("host;", ""), "sigv4_host_unsigned"),
        "headers out of order": (
            _edited("content-type;host;x-amz-date", "host;content-type;x-amz-date"),
            "sigv4_malformed",
        ),
        "a header twice": (_edited("host;", "host;host;"), "sigv4_malformed"),
        "a header in capitals": (_edited("host;", "Host;"), "sigv4_malformed"),
        "no headers": (_edited("content-type;host;x-amz-date", ""), "sigv4_host_unsigned"),
        "a header that is not there": (_changed("content-type", None), "sigv4_header_missing"),
        "no host": (_changed("host", None), "sigv4_header_missing"),
        "no date": (_changed("x-amz-date", None), "sigv4_header_missing"),
        "date in words": (_changed("x-amz-date", "now"), "sigv4_malformed"),
        "date of no day": (_changed("x-amz-date", "20260231T000030Z"), "sigv4_malformed"),
        "date of 30 digits": (_changed("x-amz-date", "2" * 30), "sigv4_malformed"),
        "date twice": (_changed("x-amz-date", "20260101T000030Z,20260101T000030Z"), "sigv4_malformed"),
        "year 0": (_changed("x-amz-date", "00000101T000030Z"), "sigv4_malformed"),
        "six minutes old": (_signed(at=NOW - timedelta(minutes=6)), "sigv4_stale"),
        "six minutes ahead": (_signed(at=NOW + timedelta(minutes=6)), "sigv4_stale"),
        "of 9999": (_changed("x-amz-date", "99991231T235959Z"), "sigv4_stale"),
        "a session that nobody knows": (_signed(session="made-up-session"), "sigv4_session_token_wrong"),
        "body left out": (_signed(payload_signing_enabled=False), "sigv4_payload_unsigned"),
        "body in chunks": (_changed("x-amz-content-sha256", "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"), "sigv4_malformed"),
        "another body's digest": (_changed("x-amz-content-sha256", "0" * 64), "sigv4_signature_wrong"),
        "non-ASCII": (_edited("AKIDMADEUPFIRST", "AKID\xef"), "sigv4_credential_missing"),
    }
    expired = "sigv4_credential_expired"
    revoked = "sigv4_credential_expired"
    unknown = "sigv4_credential_missing"
    companion: ClassVar[tuple[str, Credential, Headers]] = (
        "token",
        token(id=9),
        {"verification-token": TOKENS["first"]},
    )

    def credential(
        self,
        which: Which = "first",
        *,
        id: int = 1,  # noqa: A002
        expires_at: datetime | None = None,
        revoked: bool = False,
    ) -> Credential:
        """The credential of an access key."""
        return _row(which, id=id, expires_at=expires_at, revoked=revoked)

    def presenting(self, value: str) -> Headers:
        """In Authorization, after AWS's scheme."""
        return _changed("authorization", f"AWS4-HMAC-SHA256 {value}")

    def secrets(self) -> list[str]:
        """The secret keys."""
        return [secret for _, secret in _KEYS.values()]


def _door(*credentials: SigV4Credential) -> Destination:
    return destination(*(credentials or (_row(),)), require=("sigv4",))


def _verify(
    headers: Headers,
    at: Destination,
    *,
    body: bytes = BODY,
    target: str = "/redox/main",
    query: str = "",
    method: Method = "POST",
    now: datetime = NOW,
) -> Verified:
    made = Head(
        destination="main",
        method=method,
        headers=headers,
        target=target,
        query=query,
        peer="192.0.2.1",
        received_at=now,
    )
    return verification.check_head(made, at, now).complete(Inbound(head=made, body=body), at, now)


def _wrong(headers: Headers, at: Destination, **request: Any) -> str:
    with pytest.raises(Unverified) as refused:
        _verify(headers, at, **request)
    return refused.value.reason


class TestSignedBytes:
    """The signed parts of a request."""

    @pytest.mark.parametrize(
        "request_",
        [
            {"body": BODY + b" "},
            {"body": BODY[:-1]},
            {"body": b""},
            {"target": "/redox/other"},
            {"target": "/redox/main/"},
            {"query": "a=b"},
            {"target": "/redox/MAIN"},
            {"method": "GET"},
        ],
    )
    def test_any_change_is_refused(self, request_: dict[str, Any]) -> None:
        """With another body, path, query or method the signature does not verify."""
        assert _wrong(_RIGHT["first"], _door(), **request_) == "sigv4_signature_wrong"

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("host", "other.example"),
            ("host", f"{_HOST}:443"),
            ("content-type", "application/fhir+json"),
            ("content-type", "application/json,application/json"),
            ("x-amz-date", "20260101T000031Z"),
        ],
    )
    def test_a_signed_header_that_differs(self, name: str, value: str) -> None:
        """A signed header with another value, or sent twice, is refused."""
        assert _wrong(_changed(name, value), _door()) == "sigv4_signature_wrong"

    def test_an_unsigned_header_may_differ(self) -> None:
        """Headers that a proxy adds are not signed."""
        headers = {**_RIGHT["first"], "x-forwarded-for": "192.0.2.9", "x-amz-cf-id": "x"}
        assert _verify(headers, _door()).credentials == (1,)

    def test_one_bit_of_the_signature(self) -> None:
        """A changed bit of the signature is refused."""
        other = "0" if _SIGNATURE[0] != "0" else "1"
        assert _wrong(_edited(_SIGNATURE, other + _SIGNATURE[1:]), _door()) == "sigv4_signature_wrong"

    def test_another_secret(self) -> None:
        """The right access key with another secret is refused."""
        assert _wrong(_RIGHT["first"], _door(_row(secret=b"another secret"))) == "sigv4_signature_wrong"

    def test_two_secrets_of_one_access_key(self) -> None:
        """During a rotation under one access key, both secrets are accepted, and the proof names the credential."""
        at = _door(_row(id=1, secret=b"the new one, made up"), _row(id=2))
        assert _verify(_RIGHT["first"], at).credentials == (2,)

    @pytest.mark.parametrize(("seconds", "good"), [(0, True), (300, True), (-300, True), (301, False), (-301, False)])
    def test_the_window(self, seconds: int, good: bool) -> None:
        """The timestamp may differ by five minutes, in either direction."""
        now = NOW + timedelta(seconds=seconds)
        if good:
            assert _verify(_RIGHT["first"], _door(), now=now).credentials == (1,)
        else:
            assert _wrong(_RIGHT["first"], _door(), now=now) == "sigv4_stale"

    def test_the_signature_is_valid_once(self) -> None:
        """The proof has a nonce until the signature's window ends: the same for the same request, with any other
        headers.
        """
        (once,) = _verify(_RIGHT["first"], _door()).nonces
        assert once.until > NOW + timedelta(seconds=300)
        assert _wrong(_RIGHT["first"], _door(), now=once.until) == "sigv4_stale"
        assert _verify({**_RIGHT["first"], "x-more": "1"}, _door(), now=NOW + timedelta(seconds=9)).nonces == (once,)
        assert _verify(_signed(at=NOW + timedelta(seconds=1)), _door()).nonces != (once,)
        assert len(once.key) == 32


class TestSettings:
    """Session token and unsigned bodies."""

    def test_session_token(self) -> None:
        """A request must have the credential's session token, or none if the credential has none."""
        at = _door(_row(session_token=b"made-up-session"))
        assert _verify(_signed(session="made-up-session"), at).credentials == (1,)
        assert _wrong(_RIGHT["first"], at) == "sigv4_session_token_wrong"
        assert _wrong(_signed(session="another-session"), at) == "sigv4_session_token_wrong"

    def test_an_unsigned_body(self) -> None:
        """If allowed, the signature verifies with any body; otherwise the head is refused."""
        headers = _signed(payload_signing_enabled=False)
        assert headers["x-amz-content-sha256"] == "UNSIGNED-PAYLOAD"
        for body in (BODY, b"", b"anything"):
            assert _verify(headers, _door(_row(unsigned_payload=True)), body=body).credentials == (1,)
        assert _wrong(headers, _door()) == "sigv4_payload_unsigned"
        # UNSIGNED-PAYLOAD cannot be added after signing.
        assert (
            _wrong(_changed("x-amz-content-sha256", "UNSIGNED-PAYLOAD"), _door(_row(unsigned_payload=True)))
            == "sigv4_signature_wrong"
        )

    def test_the_host(self) -> None:
        """A credential with hosts refuses a request that was signed for another host."""
        for host in ("receiver.example", "RECEIVER.example"):
            at = _door(_row(hosts=("other.example", host.lower())))
            assert _verify(_RIGHT["first"], at).credentials == (1,)
        elsewhere = _door(_row(hosts=("other.example", "receiver.example:8443")))
        assert _wrong(_RIGHT["first"], elsewhere) == "sigv4_host_wrong"
        # A Host that is corrected after signing is not the signed one.
        assert _wrong(_changed("host", "other.example"), elsewhere) == "sigv4_signature_wrong"

    def test_a_digest_in_the_head(self) -> None:
        """If the head has the body's digest, the head is enough for the signature, and the body is compared with the
        digest.
        """
        headers = _signed(headers={"X-Amz-Content-SHA256": sha256(BODY).hexdigest()})
        assert _verify(headers, _door()).credentials == (1,)
        assert _wrong(headers, _door(), body=b"{}") == "sigv4_payload_differs"


# Every byte that may be raw in a query (RFC 3986 3.4), escapes in both cases, and separators of parameters.
_QUERY = st.lists(
    st.sampled_from(
        [
            "a",
            "Z",
            "0",
            "-",
            ".",
            "_",
            "~",
            "*",
            "+",
            "!",
            "'",
            "(",
            ")",
            ":",
            "@",
            ",",
            "$",
            "/",
            "?",
            ";",
            "&",
            "=",
            "%2f",
            "%2F",
            "%c3%a9",
            "%C3%A9",
            "%20",
            "%41",
        ]
    ),
    max_size=8,
).map("".join)


@given(
    st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="/?#%"), min_size=1, max_size=12),
    _QUERY,
    st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20),
    st.binary(max_size=50),
)
@example("x", "&", "x", b"")
@example("x", ";", "x", b"")
@example("x", "b=*&a=%2f", "x", b"")
def test_any_request_that_botocore_signs(segment: str, query: str, value: str, body: bytes) -> None:
    """A request that botocore signs is accepted, with any path, query, header value and body; with one more byte it is
    not.

    It signs a query as it stands in the URL; a client that gives it parameters apart has them encoded first.
    """
    target = f"/redox/{segment}"
    headers = _signed(target=target, query=query, body=body, headers={"X-Made-Up": value})
    assert _verify(headers, _door(), target=target, query=query, body=body).credentials == (1,)
    assert _wrong(headers, _door(), target=target, query=query, body=body + b"x") == "sigv4_signature_wrong"
    assert _wrong(headers, _door(), target=target, query=query + "&x", body=body) == "sigv4_signature_wrong"


@given(
    st.lists(
        st.tuples(
            st.text("aZ0-._~*+!'(): @,/;&=%\u00e9", min_size=1, max_size=3),
            st.text("aZ0-._~*+!'(): @,/;&=%\u00e9", max_size=3),
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from(["-_.~", "-_.~*!'():@,/", ""]),
)
def test_parameters_that_are_encoded_again(pairs: list[tuple[str, str]], safe: str) -> None:
    """A signature over parameters in AWS's documented encoding verifies, with any of their characters sent raw."""
    name, secret = _KEYS["first"]
    request = AWSRequest(method="POST", url=f"https://{_HOST}/redox/main", params=pairs, data=BODY)
    with time_machine.travel(NOW, tick=False):
        botocore.auth.SigV4Auth(Credentials(name, secret), "execute-api", "us-east-1").add_auth(request)
    headers = {"host": _HOST, **{each.lower(): value for each, value in request.headers.items()}}
    query = "&".join(f"{quote(each, safe=safe)}={quote(value, safe=safe)}" for each, value in pairs)
    assert _verify(headers, _door(), query=query).credentials == (1,)


_SUITE = datetime(2015, 8, 30, 12, 36, tzinfo=UTC)
_UNRESERVED = "-._~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_UTF8 = "\u1234".encode().decode("latin-1")  # as WSGI gives the UTF-8 bytes on the wire
# AWS's published Signature Version 4 test suite: request → signature. Header lines of one name are joined by commas, as
# a server hands them over.
_PUBLISHED: Mapping[str, tuple[dict[str, Any], Headers, str]] = {
    "get-vanilla": ({}, {}, "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"),
    "post-vanilla": ({"method": "POST"}, {}, "5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b"),
    "get-utf8": ({"target": f"/{_UTF8}"}, {}, "8318018e0b0f223aa2bbf98705b62bb787dc9c0e678f255a891fd03141be5d85"),
    "get-unreserved": (
        {"target": f"/{_UNRESERVED}"},
        {},
        "07ef7494c76fa4850883e2b006601f940f8a34d404d0cfa977f52a65bbf5f24f",
    ),
    "get-space": (
        {"target": "/example space/"},
        {},
        "652487583200325589f1fba4c7e578f72c47cb61beeca81406b39ddec1366741",
    ),
    "get-slashes": ({"target": "//example//"}, {}, "9a624bd73a37c9a373b5312afbebe7a714a789de108f0bdfe846570885f57e84"),
    "get-slash-pointless-dot": (
        {"target": "/./example"},
        {},
        "ef75d96142cf21edca26f06005da7988e4f8dc83a165a80865db7089db637ec5",
    ),
    "get-relative-relative": (
        {"target": "/example1/example2/../.."},
        {},
        "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31",
    ),
    "get-vanilla-empty-query-key": (
        {"query": "Param1=value1"},
        {},
        "a67d582fa61cc504c4bae71f336f98b97f1ea3c7a6bfe1b6e45aec72011b9aeb",
    ),
    "get-vanilla-query-order-key-case": (
        {"query": "Param2=value2&Param1=value1"},
        {},
        "b97d918cfa904a5beff61c982a1b6f458b799221646efd99d3219ec94cdf2500",
    ),
    "get-vanilla-query-order-encoded": (
        {"query": "Param-3=Value3&Param=Value2&%E1%88%B4=Value1"},
        {},
        "371d3713e185cc334048618a97f809c9ffe339c62934c032af5a0e595648fcac",
    ),
    "get-vanilla-query-unreserved": (
        {"query": f"{_UNRESERVED}={_UNRESERVED}"},
        {},
        "9c3e54bfcdf0b19771a7f523ee5669cdf59bc7cc0884027167c21bb143a40197",
    ),
    "get-vanilla-utf8-query": (
        {"query": f"{_UTF8}=bar"},
        {},
        "2cdec8eed098649ff3a119c94853b13c643bcf08f8b0a1d91e12c9027818dd04",
    ),
    "get-header-key-duplicate": (
        {},
        {"my-header1": "value2,value2,value1"},
        "c9d5ea9f3f72853aea855b47ea873832890dbdd183b4468f858259531a5138ea",
    ),
    "get-header-value-order": (
        {},
        {"my-header1": "value4,value1,value3,value2"},
        "08c7e5a9acfcfeb3ab6b2185e75ce8b1deb5e634ec47601a50643f830c755c01",
    ),
    "get-header-value-trim": (
        {},
        {"my-header1": " value1", "my-header2": ' "a   b   c"'},
        "acc3ed3afb60bb290fc8d2dd0098b9911fcaa05412b367055dee359757a9c736",
    ),
    "get-vanilla-with-session-token": (
        {},
        {"x-amz-security-token": "6e86291e8372ff2a2260956d9b8aae1d763fbf315fa00fa31553b73ebf194267"},
        "07ec1639c89043aa0e3e2de82b96708f198cceab042d4a97044c66dd9f74e7f8",
    ),
    "post-x-www-form-urlencoded": (
        {"method": "POST", "body": b"Param1=value1"},
        {
            "content-type": "application/x-www-form-urlencoded",
            "content-length": "13",
            "x-amz-content-sha256": "9095672bbd1f56dfc5b65f3e153adc8731a4a654192329106275f4c7b24d0b6e",
        },
        "d3875051da38690788ef43de4db0d8f280229d82040bfac253562e56c3f20e0b",
    ),
}


@pytest.mark.parametrize("case", _PUBLISHED)
def test_published(case: str) -> None:
    """Each request of the suite is accepted with its published signature, and refused with another digit."""
    request, more, signature = _PUBLISHED[case]
    signed = ";".join(sorted({"host", "x-amz-date", *more}))
    headers = {
        "host": "example.amazonaws.com",
        "x-amz-date": "20150830T123600Z",
        **more,
        "authorization": (
            "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, "
            f"SignedHeaders={signed}, Signature={signature}"
        ),
    }
    session = more.get("x-amz-security-token")
    at = _door(
        SigV4Credential(
            id=1,
            access_key="AKIDEXAMPLE",
            secret=b"wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY",
            region="us-east-1",
            service="service",
            session_token=None if session is None else session.encode(),
        )
    )
    request = {"method": "GET", "target": "/", "body": b"", "now": _SUITE, **request}
    assert _verify(headers, at, **request).credentials == (1,)
    wrong = {**headers, "authorization": headers["authorization"][:-1] + ("1" if signature[-1] == "0" else "0")}
    assert _wrong(wrong, at, **request) == "sigv4_signature_wrong"


def test_a_repeated_header() -> None:
    """A header that was signed once and arrives twice is refused."""
    headers = _signed(headers={"X-Made-Up": "one"})
    assert verify(headers, _door()).credentials == (1,)
    assert refusal({**headers, "x-made-up": "one,two"}, _door()) == "sigv4_signature_wrong"
