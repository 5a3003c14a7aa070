"""Validation of header names in credential settings."""

from __future__ import annotations

import re
from typing import Final

from receiver.errors import ConfigurationError

# Headers that every request has for another purpose, or that a proxy sets. If a signature or secret were looked for in
# one of them, the whole feed would be refused.
RESERVED: Final = frozenset(
    {
        "accept",
        "accept-charset",
        "accept-encoding",
        "accept-language",
        "authorization",
        "cache-control",
        "connection",
        "content-encoding",
        "content-length",
        "content-type",
        "cookie",
        "date",
        "expect",
        "forwarded",
        "host",
        "keep-alive",
        "origin",
        "pragma",
        "proxy-authorization",
        "proxy-connection",
        "referer",
        "te",
        "traceparent",
        "tracestate",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "user-agent",
        "verification-token",
        "via",
        "x-real-ip",
        "x-request-id",
    }
)
_PREFIXES: Final = ("ssl-client-", "x-amz-", "x-amzn-", "x-forwarded-")
_NAME: Final = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]+")  # RFC 9110 5.1, in lower case


def header_name(text: str) -> str:
    """Return the name in lower case. Raises ConfigurationError for an invalid or reserved name."""
    name = text.lower()
    if not _NAME.fullmatch(name):
        raise ConfigurationError(f"{text!r} is not a valid header name: use letters, digits and hyphens")
    if name in RESERVED or name.startswith(_PREFIXES):
        raise ConfigurationError(
            f"{text} is a header that every request has, or that a proxy sets, for another purpose: the destination "
            "would refuse every request; use the header that was agreed on"
        )
    # msgspec omits a default from what is stored only if it is the same object.
    return text if name == text else name
