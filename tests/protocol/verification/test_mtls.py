"""Kind `mtls`: a client certificate that a TLS proxy reports."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, Final
from urllib.parse import quote

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from receiver.errors import ConfigurationError, Unverified
from receiver.protocol import verification
from receiver.protocol.registry import Credential, Destination
from receiver.protocol.verification.mtls import MtlsCredential, normalize_subject
from tests.protocol.made_up import NOW, TOKENS, Which, destination, head, token
from tests.protocol.verification.cases import Headers, VerificationCases, refusal, verify
from tests.protocol.verification.issuers import P256

_SECRET = "a made-up secret of the proxy's"
_PROXY = {"x-proxy-secret": _SECRET}


def _certificate(
    name: str,
    *,
    ends: datetime = NOW + timedelta(days=1),
    sans: tuple[x509.GeneralName, ...] = (),
    email: str | None = None,
) -> x509.Certificate:
    names = [
        x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "Made, Up"),
        x509.NameAttribute(x509.NameOID.COMMON_NAME, name),
    ]
    if email is not None:
        names.append(x509.NameAttribute(x509.NameOID.EMAIL_ADDRESS, email))
    subject = x509.Name(names)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(P256.public_key())
        .serial_number(7)
        .not_valid_before(NOW - timedelta(days=1))
        .not_valid_after(ends)
    )
    if sans:
        builder = builder.add_extension(x509.SubjectAlternativeName(sans), critical=False)
    return builder.sign(P256, SHA256())


def _pem(certificate: x509.Certificate) -> str:
    return quote(certificate.public_bytes(Encoding.PEM), safe="")


_CERTIFICATES: Final[Mapping[Which, x509.Certificate]] = {
    "first": _certificate(
        "redox.example",
        sans=(
            x509.DNSName("Client.redox.example"),
            x509.UniformResourceIdentifier("spiffe://redox.example/engine"),
            x509.RFC822Name("engine@redox.example"),
        ),
    ),
    "second": _certificate("stranger.example"),
}
_FIRST, _SECOND = _pem(_CERTIFICATES["first"]), _pem(_CERTIFICATES["second"])
_FINGERPRINTS = {which: each.fingerprint(SHA256()) for which, each in _CERTIFICATES.items()}


def _nginx(pem: str, verify: str = "SUCCESS", secret: str = _SECRET) -> Headers:
    return {"ssl-client-verify": verify, "ssl-client-cert": pem, "x-proxy-secret": secret}


def _envoy(pem: str) -> str:
    return f'By=spiffe://receiver.example;Hash={"0" * 64};Cert="{pem}";Subject="CN=a\\"b,O=c";URI=;DNS=x'


class _MtlsCases(VerificationCases):
    """The cases of every proxy."""

    kind = "mtls"
    claims_unrequired = False
    expired = "mtls_credential_expired"
    revoked = "mtls_credential_expired"
    unknown = "credential_insufficient"
    companion: ClassVar[tuple[str, Credential, Headers]] = (
        "token",
        token(id=9),
        {"verification-token": TOKENS["first"]},
    )
    proxy: ClassVar[Any]

    def credential(
        self,
        which: Which = "first",
        *,
        id: int = 1,  # noqa: A002
        expires_at: datetime | None = None,
        revoked: bool = False,
    ) -> Credential:
        """The credential of a pinned certificate."""
        return MtlsCredential(
            id=id,
            proxy=self.proxy,
            secret=_SECRET.encode(),
            fingerprint=_FINGERPRINTS[which],
            expires_at=expires_at,
            revoked=revoked,
        )

    def secrets(self) -> list[str]:
        """The proxy's secret."""
        return [_SECRET]


class TestNginx(_MtlsCases):
    """`$ssl_client_verify` and `$ssl_client_escaped_cert`."""

    proxy = "nginx"
    right: ClassVar[Mapping[Which, Headers]] = {"first": _nginx(_FIRST), "second": _nginx(_SECOND)}
    bad: ClassVar[Mapping[str, tuple[Headers, str]]] = {
        "another certificate": (_nginx(_SECOND), "mtls_pin_differs"),
        "not verified": (_nginx(_FIRST, "FAILED:unable to verify the first certificate"), "mtls_not_verified"),
        "verified, it says in another case": (_nginx(_FIRST, "success"), "mtls_not_verified"),
        "verified twice": (_nginx(_FIRST, "SUCCESS,FAILED"), "mtls_not_verified"),
        "verified, no certificate": (_nginx(""), "mtls_malformed"),
        "none, but a certificate": (_nginx(_FIRST, "NONE"), "mtls_not_verified"),
        "a certificate alone": ({"ssl-client-cert": _FIRST, **_PROXY}, "mtls_not_verified"),
        "no secret": (
            {name: text for name, text in _nginx(_FIRST).items() if name != "x-proxy-secret"},
            "mtls_proxy_secret_wrong",
        ),
        "empty secret": (_nginx(_FIRST, secret=""), "mtls_proxy_secret_wrong"),
        "wrong secret": (_nginx(_FIRST, secret=f"{_SECRET}x"), "mtls_proxy_secret_wrong"),
        "secret twice": (_nginx(_FIRST, secret=f"x,{_SECRET}"), "mtls_proxy_secret_wrong"),
        "non-ASCII secret": (_nginx(_FIRST, secret="\xe9"), "mtls_proxy_secret_wrong"),
        "two headers": (_nginx(f"{_FIRST},{_SECOND}"), "mtls_malformed"),
        "two certificates": (_nginx(_FIRST + _SECOND), "mtls_malformed"),
        "a chain": (_nginx(_FIRST + quote("\n") + _SECOND), "mtls_malformed"),
        "cut": (_nginx(_FIRST[:-60]), "mtls_malformed"),
        "no certificate": (_nginx("garbage"), "mtls_malformed"),
        "rubbish in PEM": (
            _nginx(quote("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")),
            "mtls_malformed",
        ),
        "1 MB": (_nginx("A" * 1_000_000), "mtls_malformed"),
    }

    def presenting(self, value: str) -> Headers:
        """As the certificate."""
        return _nginx(value)

    def test_no_certificate(self) -> None:
        """nginx sends NONE if there was no certificate: nothing is presented."""
        at = self.at(self.credential())
        assert refusal({"ssl-client-verify": "NONE", **_PROXY}, at) == "credential_missing"


class TestEnvoy(_MtlsCases):
    """X-Forwarded-Client-Cert with the certificate in it."""

    proxy = "envoy"
    right: ClassVar[Mapping[Which, Headers]] = {
        "first": {"x-forwarded-client-cert": _envoy(_FIRST), **_PROXY},
        "second": {"x-forwarded-client-cert": _envoy(_SECOND), **_PROXY},
    }
    bad: ClassVar[Mapping[str, tuple[Headers, str]]] = {
        name: ({"x-forwarded-client-cert": value, **_PROXY}, reason)
        for name, (value, reason) in {
            "another certificate": (_envoy(_SECOND), "mtls_pin_differs"),
            "two elements": (f"{_envoy(_SECOND)},{_envoy(_FIRST)}", "mtls_malformed"),
            "the right one first": (f"{_envoy(_FIRST)},{_envoy(_SECOND)}", "mtls_malformed"),
            "two certificates": (f'Cert="{_SECOND}";Cert="{_FIRST}"', "mtls_malformed"),
            "a digest alone": (f"Hash={_FINGERPRINTS['first'].hex()}", "mtls_malformed"),
            "no certificate": ('Cert=""', "mtls_malformed"),
            "no end": (f'Cert="{_FIRST}', "mtls_malformed"),
            "garbage behind": (f'Cert="{_FIRST}"x', "mtls_malformed"),
            "no pair": ("garbage", "mtls_malformed"),
            "quotes": ('"' * 500, "mtls_malformed"),
            "backslashes": ('Cert="' + "\\" * 5_001, "mtls_malformed"),
        }.items()
    }

    def presenting(self, value: str) -> Headers:
        """As the whole header."""
        return {"x-forwarded-client-cert": value, **_PROXY}


class TestAlb(_MtlsCases):
    """AWS's load balancer in verify mode."""

    proxy = "aws-alb"
    right: ClassVar[Mapping[Which, Headers]] = {
        "first": {"x-amzn-mtls-clientcert-leaf": _FIRST, **_PROXY},
        "second": {
            "x-amzn-mtls-clientcert-leaf": quote(_CERTIFICATES["second"].public_bytes(Encoding.PEM), safe="+=/"),
            **_PROXY,
        },
    }
    bad: ClassVar[Mapping[str, tuple[Headers, str]]] = {
        "another certificate": ({"x-amzn-mtls-clientcert-leaf": _SECOND, **_PROXY}, "mtls_pin_differs"),
        "passthrough": ({"x-amzn-mtls-clientcert": _FIRST, **_PROXY}, "mtls_passthrough"),
        "passthrough too": ({"x-amzn-mtls-clientcert": "", **right["first"]}, "mtls_passthrough"),
        "garbage": ({"x-amzn-mtls-clientcert-leaf": "garbage", **_PROXY}, "mtls_malformed"),
    }

    def presenting(self, value: str) -> Headers:
        """As the leaf certificate."""
        return {"x-amzn-mtls-clientcert-leaf": value, **_PROXY}


def _pinned(**pins: Any) -> Destination:
    return destination(
        MtlsCredential(**{"id": 1, "proxy": "nginx", "secret": _SECRET.encode(), **pins}), require=("mtls",)
    )


def test_only_from_a_trusted_proxy() -> None:
    """Headers from an untrusted address are refused, with or without the right secret."""
    at = _pinned(fingerprint=_FINGERPRINTS["first"])
    stranger = head(_nginx(_FIRST), proxied=False)
    with pytest.raises(Unverified, match="mtls_not_from_proxy"):
        verification.check_head(stranger, at, NOW)
    assert verification.check_head(head(_nginx(_FIRST)), at, NOW).authenticated


@pytest.mark.parametrize(
    "pins",
    [
        {"subject": normalize_subject(r"CN=redox.example,O=Made\, Up")},
        {"san": "client.REDOX.example"},
        {"san": "spiffe://redox.example/engine"},
        {"fingerprint": _FINGERPRINTS["first"]},
        {
            "subject": r"CN=redox.example,O=Made\, Up",
            "san": "client.redox.example",
            "fingerprint": _FINGERPRINTS["first"],
        },
    ],
)
def test_pins(pins: dict[str, Any]) -> None:
    """Subject, a SAN, fingerprint: each alone, or all together."""
    at = _pinned(**pins)
    assert verify(_nginx(_FIRST), at).credentials == (1,)
    assert refusal(_nginx(_SECOND), at) == "mtls_pin_differs"
    one_wrong = _pinned(**{**pins, **({"san": "other.example"} if "san" not in pins else {"fingerprint": b"x" * 32})})
    assert refusal(_nginx(_FIRST), one_wrong) == "mtls_pin_differs"


@pytest.mark.parametrize("san", ["redox.example", "*.redox.example", "engine@redox.example", "", "example"])
def test_a_value_that_is_not_a_san(san: str) -> None:
    """A SAN is compared whole: a common name, a wildcard and a mailbox do not match."""
    assert refusal(_nginx(_FIRST), _pinned(san=san)) == "mtls_pin_differs"


def test_an_expired_certificate() -> None:
    """The receiver checks the certificate's own validity too."""
    old = _certificate("redox.example", ends=NOW - timedelta(seconds=1))
    at = _pinned(fingerprint=old.fingerprint(SHA256()))
    assert refusal(_nginx(_pem(old)), at) == "mtls_certificate_expired"
    assert verify(_nginx(_pem(old)), at, now=NOW - timedelta(seconds=2)).credentials == (1,)
    early = datetime(2020, 1, 1, tzinfo=UTC)
    assert refusal(_nginx(_FIRST), _pinned(san="client.redox.example"), now=early) == "mtls_certificate_expired"


def test_subjects_as_openssl_writes_them() -> None:
    """`emailAddress`, for which RFC 4514 has no name, may be pinned as openssl prints it."""
    certificate = _certificate("redox.example", email="engine@redox.example")
    subject = normalize_subject(r"emailAddress=engine@redox.example,CN=redox.example,O=Made\, Up")
    assert verify(_nginx(_pem(certificate)), _pinned(subject=subject)).credentials == (1,)


@pytest.mark.parametrize("text", ["redox.example", "CN", "CN=a,,", "/CN=redox.example", "nonsense=1"])
def test_an_invalid_subject(text: str) -> None:
    """An invalid subject is refused; the error has the command that prints one."""
    with pytest.raises(ConfigurationError, match="openssl x509"):
        normalize_subject(text)


def test_a_pin_is_required() -> None:
    """A credential without a pin would accept every certificate of the authority: it is refused."""
    with pytest.raises(ConfigurationError, match="fingerprint"):
        _pinned()


def test_each_proxy_has_its_headers() -> None:
    """Headers of a proxy that no credential names are ignored: anybody may have sent them."""
    at = destination(
        MtlsCredential(id=1, proxy="envoy", secret=_SECRET.encode(), san="client.redox.example"), require=("mtls",)
    )
    assert refusal(_nginx(_FIRST), at) == "credential_missing"


def test_an_unreadable_name() -> None:
    """A certificate is parsed in parts, on demand. One with unreadable names is refused."""
    whole = _CERTIFICATES["first"].public_bytes(Encoding.DER)
    damaged = whole.replace(b"Client.redox.example", b"Client.redox.\xff" + b"xample")
    assert damaged != whole
    pinned = MtlsCredential(id=1, proxy="nginx", secret=_SECRET.encode(), san="client.redox.example")
    text = f"-----BEGIN CERTIFICATE-----\n{b64encode(damaged).decode()}\n-----END CERTIFICATE-----\n"
    assert refusal(_nginx(quote(text)), destination(pinned, require=("mtls",))) == "mtls_malformed"
