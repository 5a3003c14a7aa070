"""Kind `mtls`: a client certificate that a proxy in front has checked, and reports in headers.

Redox offers mutual TLS on request. nginx, Envoy and AWS's load balancer each have headers of their own; all of them are
made to report the certificate itself, so that what is pinned is read from it by us. Anybody can write such headers:
they count where the connection comes from a trusted proxy and bears the proxy's secret, and the proxy must overwrite
them (see the deployment guide).

Must not accept a report without a check, from a proxy that passes certificates through unverified.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Final
from urllib.parse import unquote_to_bytes

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
from receiver.protocol.message import Head, Inbound, Verified
from receiver.protocol.registry import Destination, MtlsCredential, live

# A certificate in PEM has some 2 KB, and gunicorn takes headers of 8.
MAX_HEADER: Final = 8 * 1024

# Proxy → the header with the certificate.
_HEADER: Final = {
    "nginx": "ssl-client-cert",
    "envoy": "x-forwarded-client-cert",
    "aws-alb": "x-amzn-mtls-clientcert-leaf",
}
_NGINX_VERIFY: Final = "ssl-client-verify"
# What AWS's load balancer sends in passthrough mode, where it verifies nothing.
_PASSTHROUGH: Final = "x-amzn-mtls-clientcert"
# Of an element of X-Forwarded-Client-Cert: `Key=value` or `Key="value"`, separated by semicolons.
_XFCC: Final = re.compile(rb'([A-Za-z]+)=("(?:[^"\\]|\\.)*"|[^;,="]*)(?:;|$)')


class MtlsKind:
    """The verifier of `mtls`."""

    name = "mtls"
    by_head = True
    credential = MtlsCredential

    def claims(self, head: Head, destination: Destination, now: datetime) -> bool:  # noqa: ARG002 - Kind's
        """A certificate's header of a proxy that the destination's credentials name, where it requires one."""
        return self.name in destination.kinds and any(_reported(head, each.proxy) for each in _credentials(destination))

    def verify(self, inbound: Inbound, destination: Destination, now: datetime) -> Verified:
        """The one credential whose pins hold.

        Raises Unverified: `mtls_not_from_proxy`, `_proxy_secret_wrong`, `_passthrough`, `_not_verified`, `_malformed`,
        `_certificate_expired`, `_pin_differs`, `_credential_expired`.
        """
        return Verified(credentials=(self._judge(inbound.head, destination, now),), kinds=frozenset({self.name}))

    def _judge(self, head: Head, destination: Destination, now: datetime) -> int:
        usable = [each for each in _credentials(destination) if live(each, now) and _reported(head, each.proxy)]
        if not usable:
            raise Unverified("mtls_credential_expired")
        if not head.proxied:
            raise Unverified("mtls_not_from_proxy")
        usable = [each for each in usable if hmac.compare_digest(head.header(each.secret_header) or b"", each.secret)]
        if not usable:
            raise Unverified("mtls_proxy_secret_wrong")
        for each in usable:
            if _holds(_certificate(head, each.proxy, now), each):
                return each.id
        raise Unverified("mtls_pin_differs")


def normalise_subject(text: str) -> str:
    """A subject as it is compared: RFC 4514, as `openssl x509 -subject -nameopt RFC2253` prints it.

    Raises ConfigurationError.
    """
    try:
        return _subject(Name.from_rfc4514_string(text, {name: oid for oid, name in _ATTRIBUTES.items()}))
    except ValueError:
        raise ConfigurationError(
            "the subject is not a valid one: write it as `openssl x509 -in CERTIFICATE -noout -subject -nameopt RFC2253` prints it"
        ) from None


# RFC 4514 has no name for it, and openssl has.
_ATTRIBUTES: Final[Mapping[ObjectIdentifier, str]] = {NameOID.EMAIL_ADDRESS: "emailAddress"}


def _subject(name: Name) -> str:
    return name.rfc4514_string(dict(_ATTRIBUTES))


def _credentials(destination: Destination) -> list[MtlsCredential]:
    return [each for each in destination.credentials if isinstance(each, MtlsCredential)]


def _reported(head: Head, proxy: str) -> bool:
    """Whether the head holds what this proxy says of a certificate. nginx says NONE where there was none."""
    if proxy == "nginx" and head.header(_NGINX_VERIFY) not in (None, b"", b"NONE"):
        return True
    return bool(head.header(_HEADER[proxy])) or (proxy == "aws-alb" and _PASSTHROUGH in head.headers)


def _certificate(head: Head, proxy: str, now: datetime) -> Certificate:
    """The certificate that the proxy has checked. Raises Unverified."""
    if proxy == "aws-alb" and _PASSTHROUGH in head.headers:
        raise Unverified("mtls_passthrough")
    if proxy == "nginx" and head.header(_NGINX_VERIFY) != b"SUCCESS":
        raise Unverified("mtls_not_verified")
    value = head.header(_HEADER[proxy]) or b""
    pem = unquote_to_bytes(_element(value) if proxy == "envoy" else value)
    # A comma: the header came twice, and one of them may be the sender's own. A second certificate: a chain, or worse.
    if len(value) > MAX_HEADER or b"," in pem or pem.count(b"-----BEGIN") != 1:
        raise Unverified("mtls_malformed")
    try:
        certificate = load_pem_x509_certificate(pem)
        begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    except Exception:  # noqa: BLE001 - its parsers raise several kinds
        raise Unverified("mtls_malformed") from None
    if not begins <= now <= ends:
        raise Unverified("mtls_certificate_expired")
    return certificate


def _element(value: bytes) -> bytes:
    """`Cert` of the one element of X-Forwarded-Client-Cert. Raises Unverified when there are more elements or none."""
    found, end = [], 0
    while (pair := _XFCC.match(value, end)) is not None and end < len(value):
        end = pair.end()
        if pair[1].lower() == b"cert":
            found.append(pair[2].strip(b'"'))
    if end != len(value) or len(found) != 1:
        raise Unverified("mtls_malformed")
    return found[0]


def _holds(certificate: Certificate, credential: MtlsCredential) -> bool:
    try:
        return (
            (credential.fingerprint is None or certificate.fingerprint(SHA256()) == credential.fingerprint)
            and (credential.subject is None or _subject(certificate.subject) == credential.subject)
            and (credential.san is None or credential.san.lower() in _names(certificate))
        )
    except Exception:  # noqa: BLE001 - subject and extensions are parsed only now, and raise several kinds
        raise Unverified("mtls_malformed") from None


def _names(certificate: Certificate) -> set[str]:
    try:
        names = certificate.extensions.get_extension_for_class(SubjectAlternativeName).value
    except ExtensionNotFound:
        return set()
    return {name.lower() for kind in (DNSName, UniformResourceIdentifier) for name in names.get_values_for_type(kind)}
