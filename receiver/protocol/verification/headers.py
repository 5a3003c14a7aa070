"""Names of headers that settings may give: those that are looked for in no other's name."""

from __future__ import annotations

import re
from typing import Final

from receiver.errors import ConfigurationError

# Headers that every request has for a purpose of its own, or that a proxy in front sets. A signature or a secret that
# was looked for in one of them would refuse the whole feed.
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
    """The name in lower case; the very same object where it is. Raises ConfigurationError for a reserved one."""
    name = text.lower()
    if not _NAME.fullmatch(name):
        raise ConfigurationError("a header's name has letters, digits and hyphens")
    if name in RESERVED or name.startswith(_PREFIXES):
        raise ConfigurationError(
            f"{text} is a header that every request has, or that a proxy sets, for another "
            "purpose: the destination would refuse every request; name the header that was agreed "
            "upon"
        )
    # msgspec leaves a default out of what is stored where it is the default's own object.
    return text if name == text else name
