"""Fetches a set of public keys (JWKS) with one GET.

Must not decide when to fetch: a timer or an operator does, never a request.
"""

from __future__ import annotations

import ssl
from typing import Final

import httpx2

from receiver.errors import ConfigurationError
from receiver.outbound.errors import UnusableAnswer
from receiver.outbound.limits import Limits, deadline
from receiver.outbound.wire import Wire, check_base_url

# Bytes. Real key sets have a few keys of half a kilobyte each.
MAX_BYTES: Final = 256 * 1024
# Seconds for the whole exchange.
FETCH_TIMEOUT: Final = 10.0


def fetch(url: str, *, ssl_context: ssl.SSLContext | None = None) -> bytes:
    """Return the content of the URL. Raises ConfigurationError if the URL is not https, and OutboundError."""
    try:
        parsed = httpx2.URL(url)
        check_base_url(str(parsed.copy_with(query=None)))
    except (httpx2.InvalidURL, ConfigurationError):
        raise ConfigurationError(
            "the URL of a key set must begin with https:// (http:// is allowed for loopback only)"
        ) from None
    wire = Wire(limits=Limits(connect=FETCH_TIMEOUT, read=FETCH_TIMEOUT), ssl_context=ssl_context)
    request = httpx2.Request(
        "GET",
        parsed,
        headers={
            "accept": "application/jwk-set+json, application/json",
            "accept-encoding": "identity",
            "user-agent": "redox-receiver",
        },
    )
    try:
        with deadline(FETCH_TIMEOUT):
            answer = wire.exchange(request, most=MAX_BYTES)
    finally:
        wire.close()
    if answer.status_code != httpx2.codes.OK:
        raise UnusableAnswer(
            f"{parsed.host} responded with HTTP {answer.status_code} instead of a key set", status=answer.status_code
        )
    return answer.content
