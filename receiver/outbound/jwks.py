"""Fetches a set of public keys: one GET, with the manners of all that goes out.

May not decide when: a timer does, or an operator, and never a request.
"""

from __future__ import annotations

import ssl
from typing import Final

import httpx2

from receiver.errors import ConfigurationError
from receiver.outbound.errors import UnusableAnswer
from receiver.outbound.limits import Limits, deadline
from receiver.outbound.wire import Wire, check_base_url

# Real sets have a few keys of half a kilobyte each.
MAX_BYTES: Final = 256 * 1024
# Seconds for all of it.
FETCH_TIMEOUT: Final = 10.0


def fetch(url: str, *, ssl_context: ssl.SSLContext | None = None) -> bytes:
    """What the URL holds. Raises ConfigurationError for a URL that is not https, OutboundError."""
    try:
        parsed = httpx2.URL(url)
        check_base_url(str(parsed.copy_with(query=None)))
    except (httpx2.InvalidURL, ConfigurationError):
        raise ConfigurationError("a URL of keys begins with https:// (http:// is for loopback only)") from None
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
        raise UnusableAnswer(f"{parsed.host} answered {answer.status_code} instead of keys", status=answer.status_code)
    return answer.content
