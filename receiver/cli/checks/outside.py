"""Checks of the public URL, made from this host."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Final
from urllib.parse import urlsplit

from receiver.cli.checks.result import CheckResult

_CERTIFICATE_DAYS: Final = 14


def check_public_url(url: str) -> Iterator[CheckResult]:
    """Check `url`: it answers, its TLS certificate is valid, and the admin listener is not exposed."""
    parts = urlsplit(url)
    if parts.scheme != "https":
        yield CheckResult(
            name="tls",
            state="bad",
            message=f"{url} is plain HTTP, but Redox requires https",
            fix="put a TLS proxy in front of it",
        )
    else:
        yield _certificate(parts.hostname or "", parts.port or 443)
    live, admin = _get(url, "/livez"), [path for path in ("/readyz", "/metrics") if _get(url, path) == 200]
    if live == 200:
        yield CheckResult(name="reachable", state="ok", message=f"{url} answers")
    else:
        yield CheckResult(
            name="reachable",
            state="bad",
            message=f"{url}/livez: {live or 'no answer'}",
            fix="check the proxy, and that the receiver runs",
        )
    if admin:
        yield CheckResult(
            name="admin_hidden",
            state="bad",
            message=f"{', '.join(admin)} can be reached at this URL",
            fix="forward requests to the public listener (RECEIVER_BIND), not to the admin listener",
        )


def _certificate(host: str, port: int) -> CheckResult:
    try:
        with (
            socket.create_connection((host, port), timeout=5) as plain,
            ssl.create_default_context().wrap_socket(plain, server_hostname=host) as tls,
        ):
            ends = datetime.fromtimestamp(ssl.cert_time_to_seconds(str((tls.getpeercert() or {})["notAfter"])), UTC)
    except (OSError, KeyError, ValueError) as exc:
        return CheckResult(
            name="tls",
            state="bad",
            message=f"{host}:{port}: {_why(exc)}",
            fix="install a valid certificate for this host name: Redox does not connect without one",
        )
    days = (ends - datetime.now(UTC)).days
    message = f"the certificate expires in {days} days"
    return (
        CheckResult(name="tls", state="ok", message=message)
        if days >= _CERTIFICATE_DAYS
        else CheckResult(name="tls", state="bad", message=message, fix="renew the certificate")
    )


def _why(exc: Exception) -> str:
    """The reason of a failed connection, from OpenSSL or the operating system."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"the certificate is not valid: {exc.verify_message.rstrip('.')}"
    if isinstance(exc, ssl.SSLError):
        return f"TLS failed: {(exc.reason or type(exc).__name__).lower().replace('_', ' ')}"
    return (isinstance(exc, OSError) and exc.strerror) or type(exc).__name__


def _get(url: str, path: str) -> int | None:
    parts = urlsplit(url)
    made = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    connection = made(parts.hostname or "", parts.port, timeout=5)
    try:
        connection.request("GET", parts.path.rstrip("/") + path)
        return connection.getresponse().status
    except (OSError, HTTPException):
        return None
    finally:
        with suppress(OSError):
            connection.close()
