"""Posts a body with the signature of Standard Webhooks 1.0.

Source: github.com/standard-webhooks/standard-webhooks, spec/standard-webhooks.md. The signature is HMAC-SHA256, under
the secret's bytes, over "ID.TIMESTAMP.BODY". Must not retry, and must not follow a redirect.
"""

from __future__ import annotations

import base64
import binascii
import ssl
from hmac import digest
from typing import Final

from receiver.errors import ConfigurationError
from receiver.outbound.errors import UnusableAnswer
from receiver.outbound.single_exchange import exchange_once

# Seconds for the whole exchange.
POST_TIMEOUT: Final = 20.0
_MAX_ANSWER: Final = 64 * 1024
_PREFIX: Final = "whsec_"
# The specification asks for 24 to 64 bytes.
_LENGTHS: Final = range(24, 65)


def secret_key(secret: str) -> bytes:
    """Return the key of a secret: whsec_ and base64 of 24 to 64 bytes. Raises ConfigurationError, without a quote."""
    try:
        key = base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) not in _LENGTHS:
        raise ConfigurationError(
            "the webhook secret is not valid: use whsec_ followed by base64 of 24 to 64 random bytes, for example of "
            "`openssl rand -base64 32`"
        )
    return key


def signature(key: bytes, message_id: str, timestamp: int, body: bytes) -> str:
    """Return the header webhook-signature: version and base64 of the MAC."""
    mac = digest(key, f"{message_id}.{timestamp}.".encode() + body, "sha256")
    return f"v1,{base64.b64encode(mac).decode()}"


def post(
    url: str, secret: str, message_id: str, timestamp: int, body: bytes, *, ssl_context: ssl.SSLContext | None = None
) -> None:
    """Post a JSON body. `timestamp`: seconds since 1970.

    Raises ConfigurationError if the URL is not https (http for loopback only), and OutboundError unless the status is
    2xx.
    """
    answer = exchange_once(
        "POST",
        url,
        "a webhook",
        headers={
            "content-type": "application/json",
            "webhook-id": message_id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": signature(secret_key(secret), message_id, timestamp, body),
        },
        content=body,
        timeout=POST_TIMEOUT,
        most=_MAX_ANSWER,
        ssl_context=ssl_context,
    )
    if not answer.is_success:
        host, status = answer.request.url.host, answer.status_code
        raise UnusableAnswer(f"{host} responded with HTTP {status}", status=status)
