"""Fetches a set of public keys (JWKS) with one GET.

Must not decide when to fetch: a timer or an operator does, never a request.
"""

from __future__ import annotations

import ssl
from typing import Final

import httpx2

from receiver.outbound.errors import UnusableAnswer
from receiver.outbound.single_exchange import exchange_once

# Bytes. Real key sets have a few keys of half a kilobyte each.
MAX_BYTES: Final = 256 * 1024
# Seconds for the whole exchange.
FETCH_TIMEOUT: Final = 10.0


def fetch(url: str, *, ssl_context: ssl.SSLContext | None = None) -> bytes:
    """Return the content of the URL. Raises ConfigurationError if the URL is not https, and OutboundError."""
    answer = exchange_once(
        "GET",
        url,
        "a key set",
        headers={"accept": "application/jwk-set+json, application/json"},
        timeout=FETCH_TIMEOUT,
        most=MAX_BYTES,
        ssl_context=ssl_context,
    )
    if answer.status_code != httpx2.codes.OK:
        host, status = answer.request.url.host, answer.status_code
        raise UnusableAnswer(f"{host} responded with HTTP {status} instead of a key set", status=status)
    return answer.content
