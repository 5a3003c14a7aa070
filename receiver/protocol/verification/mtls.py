"""Kind `mtls`: a client certificate that a TLS proxy verifies and reports in headers.

Redox offers mutual TLS on request. nginx, Envoy and AWS's load balancer use different headers. All of them are
configured to report the certificate itself, and the receiver compares its pins with it. Anybody can write such headers:
they are accepted from a trusted proxy with the proxy's secret, and the proxy must overwrite them
(deploy/authentication.md).

Must not accept a report without a check, from a proxy that passes certificates through unverified.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import ClassVar, Final, Literal, get_args
from urllib.parse import unquote_to_bytes

import msgspec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509 import (
    Certificate,
    DNSName,
    ExtensionNotFound,
    Name,
    ObjectIdentifier,
    SubjectAlternativeName,
    UniformResourceIdentifier,
    load_pem_x509_certificate,
)
from cryptography.x509.oid import NameOID

from receiver.errors import ConfigurationError, Unverified
from receiver.protocol.message import Head
from receiver.protocol.registry import Credential, Destination, live
from receiver.protocol.verification.headers import header_name
from receiver.protocol.verification.kind import (
    CredentialOption,
    CredentialSettings,
    HeadKind,
    OptionUse,
    OtherCredential,
    SecretStorage,
    StoredCredential,
)
from receiver.protocol.verification.public_keys import SUBJECT

Proxy = Literal["nginx", "envoy", "aws-alb"]
SECRET_HEADER: Final = "x-proxy-secret"  # noqa: S105 - a header's name

# A certificate in PEM has about 2 KB; gunicorn accepts headers of 8.
MAX_HEADER: Final = 8 * 1024

# Proxy → the header with the certificate.
_HEADER: Final = {
    "nginx": "ssl-client-cert",
    "envoy": "x-forwarded-client-cert",
    "aws-alb": "x-amzn-mtls-clientcert-leaf",
}
_FINGERPRINT: Final = re.compile(r"[0-9a-f]{64}")
_NGINX_VERIFY: Final = "ssl-client-verify"
# AWS's load balancer sends it in passthrough mode, in which it verifies nothing.
_PASSTHROUGH: Final = "x-amzn-mtls-clientcert"
# In an element of X-Forwarded-Client-Cert: `Key=value` or `Key="value"`, separated by semicolons.
_XFCC: Final = re.compile(rb'([A-Za-z]+)=("(?:[^"\\]|\\.)*"|[^;,="]*)(?:;|$)')


@dataclass(frozen=True, kw_only=True, slots=True)
class MtlsCredential(Credential):
    """A client certificate, as a proxy reports it. Every pin that is not None must match.

    `proxy`: the proxy whose headers are read. `secret`: the proxy's, in `secret_header` (lower case). `fingerprint`:
    SHA-256 of the certificate, 32 bytes. `subject`: RFC 4514. `san`: one name, DNS or URI.
    """

    proxy: Proxy
    secret: bytes = field(repr=False)
    secret_header: str = SECRET_HEADER
    subject: str | None = None
    san: str | None = None
    fingerprint: bytes | None = None

    def __post_init__(self) -> None:
        if self.subject is None and self.san is None and self.fingerprint is None:
            raise ConfigurationError(
                "kind mtls needs a subject, a SAN or a fingerprint: the authority that signed Redox's certificate has "
                "signed others"
            )


class MtlsSettings(CredentialSettings, kw_only=True):
    """The settings of MtlsCredential, with the fingerprint in hexadecimal."""

    proxy: Proxy
    secret_header: str = SECRET_HEADER
    subject: str | None = None
    san: str | None = None
    fingerprint: str | None = None


class MtlsKind(HeadKind[MtlsSettings, MtlsCredential]):
    """A certificate that a proxy reports."""

    name = "mtls"
    text = "a client certificate that your TLS proxy reports"
    settings = MtlsSettings
    credential = MtlsCredential
    secret = SecretStorage.SEALED
    generated_secret = "proxy_secret"  # noqa: S105 - a field's name
    compares_others = True
    options = (
        OptionUse(
            option=CredentialOption(
                name="proxy", help="proxy that verifies the certificates.", choices=get_args(Proxy)
            ),
            required=True,
        ),
        OptionUse(
            option=CredentialOption(
                name="secret_header", help="header with the proxy's secret.  [default: x-proxy-secret]"
            )
        ),
        OptionUse(option=SUBJECT),
        OptionUse(option=CredentialOption(name="san", help="required DNS name or URI of the certificate.")),
        OptionUse(
            option=CredentialOption(
                name="fingerprint", help="required SHA-256 fingerprint of the certificate, in hexadecimal."
            )
        ),
    )
    reasons: ClassVar = {
        "mtls_not_from_proxy": "the report does not come from a trusted proxy (RECEIVER_TRUSTED_PROXIES)",
        "mtls_proxy_secret_wrong": "the proxy's secret is missing or wrong",
        "mtls_passthrough": "the load balancer passes certificates through unverified: set it to verify mode",
        "mtls_not_verified": "the proxy reports a certificate that it did not verify",
        "mtls_malformed": "the proxy's report is not one certificate",
        "mtls_certificate_expired": "the certificate has expired, or is not valid yet",
        "mtls_pin_differs": "the certificate does not match the credential's pins",
        "mtls_credential_expired": "the credential has expired or was revoked: add another",
    }

    def normalize(self, settings: MtlsSettings) -> MtlsSettings:
        """Convert subject, fingerprint and header to the form that is compared."""
        fingerprint = None if settings.fingerprint is None else settings.fingerprint.replace(":", "").lower()
        if fingerprint is not None and not _FINGERPRINT.fullmatch(fingerprint):
            raise ConfigurationError(
                "a fingerprint is SHA-256: 64 hexadecimal digits, as `openssl x509 -fingerprint -sha256` prints them"
            )
        return msgspec.structs.replace(
            settings,
            secret_header=header_name(settings.secret_header),
            fingerprint=fingerprint,
            subject=None if settings.subject is None else normalize_subject(settings.subject),
        )

    def check_others(self, settings: MtlsSettings, secret: bytes, others: Iterable[OtherCredential]) -> None:
        """Each proxy overwrites only its own headers: with one secret for two, either could forge the other's."""
        for each in others:
            if each.settings["proxy"] != settings.proxy and each.secret == secret:
                raise ConfigurationError(
                    f"credential {each.id} uses this secret for another kind of proxy: give each proxy its own secret"
                )

    def make(self, settings: MtlsSettings, stored: StoredCredential) -> MtlsCredential:
        """Return the pins and the proxy's secret."""
        fingerprint = None if settings.fingerprint is None else bytes.fromhex(settings.fingerprint)
        return MtlsCredential(
            proxy=settings.proxy,
            secret=stored.secret,
            secret_header=settings.secret_header,
            subject=settings.subject,
            san=settings.san,
            fingerprint=fingerprint,
            **stored.common,
        )

    def claims(self, head: Head, destination: Destination, now: datetime) -> bool:  # noqa: ARG002 - the interface
        """A header with a certificate, of a proxy of the destination's credentials, if it requires the kind."""
        return self.name in destination.kinds and any(_reported(head, each.proxy) for each in self.held(destination))

    def match(self, head: Head, destination: Destination, now: datetime) -> int:
        """Return the id of the credential whose pins match."""
        usable = [each for each in self.held(destination) if live(each, now) and _reported(head, each.proxy)]
        if not usable:
            raise Unverified("mtls_credential_expired")
        if not head.proxied:
            raise Unverified("mtls_not_from_proxy")
        usable = [each for each in usable if hmac.compare_digest(head.header(each.secret_header) or b"", each.secret)]
        if not usable:
            raise Unverified("mtls_proxy_secret_wrong")
        for each in usable:
            if _matches(_certificate(head, each.proxy, now), each):
                return each.id
        raise Unverified("mtls_pin_differs")


def normalize_subject(text: str) -> str:
    """Return the form in which subjects are compared: RFC 4514, as `openssl x509 -subject -nameopt RFC2253` prints it.

    Raises ConfigurationError.
    """
    try:
        return _subject(Name.from_rfc4514_string(text, {name: oid for oid, name in _ATTRIBUTES.items()}))
    except ValueError:
        raise ConfigurationError(
            f"{text!r} is not a valid subject: write it as `openssl x509 -in CERTIFICATE -noout -subject -nameopt "
            "RFC2253` prints it"
        ) from None


# RFC 4514 has no name for it, but openssl has.
_ATTRIBUTES: Final[Mapping[ObjectIdentifier, str]] = {NameOID.EMAIL_ADDRESS: "emailAddress"}


def _subject(name: Name) -> str:
    return name.rfc4514_string(dict(_ATTRIBUTES))


def _reported(head: Head, proxy: str) -> bool:
    """Return whether the head has this proxy's report of a certificate. nginx sends NONE if there was none."""
    if proxy == "nginx" and head.header(_NGINX_VERIFY) not in (None, b"", b"NONE"):
        return True
    return bool(head.header(_HEADER[proxy])) or (proxy == "aws-alb" and _PASSTHROUGH in head.headers)


def _certificate(head: Head, proxy: str, now: datetime) -> Certificate:
    """Return the certificate that the proxy verified. Raises Unverified."""
    if proxy == "aws-alb" and _PASSTHROUGH in head.headers:
        raise Unverified("mtls_passthrough")
    if proxy == "nginx" and head.header(_NGINX_VERIFY) != b"SUCCESS":
        raise Unverified("mtls_not_verified")
    value = head.header(_HEADER[proxy]) or b""
    pem = unquote_to_bytes(_element(value) if proxy == "envoy" else value)
    # A comma: the header came twice, and one of them may be from the client. A second certificate: a chain, or an
    # attack.
    if len(value) > MAX_HEADER or b"," in pem or pem.count(b"-----BEGIN") != 1:
        raise Unverified("mtls_malformed")
    try:
        certificate = load_pem_x509_certificate(pem)
        begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    except Exception:  # noqa: BLE001 - the parsers raise several types
        raise Unverified("mtls_malformed") from None
    if not begins <= now <= ends:
        raise Unverified("mtls_certificate_expired")
    return certificate


def _element(value: bytes) -> bytes:
    """Return `Cert` of the one element of X-Forwarded-Client-Cert. Raises Unverified for more elements, or none."""
    found, end = [], 0
    while (pair := _XFCC.match(value, end)) is not None and end < len(value):
        end = pair.end()
        if pair[1].lower() == b"cert":
            found.append(pair[2].strip(b'"'))
    if end != len(value) or len(found) != 1:
        raise Unverified("mtls_malformed")
    return found[0]


def _matches(certificate: Certificate, credential: MtlsCredential) -> bool:
    try:
        return (
            (credential.fingerprint is None or certificate.fingerprint(SHA256()) == credential.fingerprint)
            and (credential.subject is None or _subject(certificate.subject) == credential.subject)
            and (credential.san is None or credential.san.lower() in _names(certificate))
        )
    except Exception:  # noqa: BLE001 - subject and extensions are parsed only now, and raise several types
        raise Unverified("mtls_malformed") from None


def _names(certificate: Certificate) -> set[str]:
    try:
        names = certificate.extensions.get_extension_for_class(SubjectAlternativeName).value
    except ExtensionNotFound:
        return set()
    return {name.lower() for kind in (DNSName, UniformResourceIdentifier) for name in names.get_values_for_type(kind)}
