"""One request to a URL that an operator gave, over a connection of its own.

Must not decide when to send, must not retry, and must not follow a redirect.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping

import httpx2

from receiver.errors import ConfigurationError
from receiver.outbound.limits import Limits, deadline
from receiver.outbound.wire import Wire, check_base_url


def exchange_once(
    method: str,
    url: str,
    what: str,
    *,
    headers: Mapping[str, str],
    content: bytes | None = None,
    timeout: float,
    most: int,
    ssl_context: ssl.SSLContext | None = None,
) -> httpx2.Response:
    """Return the response, of any status but a redirect.

    `what` the URL is of, for the error. `timeout`: seconds for the whole exchange. `most`: bytes of the response.

    Raises ConfigurationError if the URL is not https (http for loopback only), and OutboundError.
    """
    try:
        parsed = httpx2.URL(url)
        check_base_url(str(parsed.copy_with(query=None)))
    except (httpx2.InvalidURL, ConfigurationError):
        raise ConfigurationError(
            f"the URL of {what} must begin with https:// (http:// is allowed for loopback only)"
        ) from None
    request = httpx2.Request(
        method,
        parsed,
        headers={**headers, "accept-encoding": "identity", "user-agent": "redox-receiver"},
        content=content,
    )
    wire = Wire(limits=Limits(connect=timeout, read=timeout), ssl_context=ssl_context)
    try:
        with deadline(timeout):
            return wire.exchange(request, most=most)
    finally:
        wire.close()
