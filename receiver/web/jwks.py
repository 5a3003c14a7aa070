"""`/.well-known/jwks.json` on the public listener: the public keys with which Redox verifies our client assertions
(RFC 7517).

Served from memory, at most a second behind the registry. Must not serve anything but the public half of a key, as the
registry publishes it.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from typing import Final

import msgspec
from flask import Flask, Response, request

from receiver.protocol.registry import Registry

PATH: Final = "/.well-known/jwks.json"
# Seconds for which clients may cache it. A key is published for longer than that before and after it signs.
MAX_AGE: Final = 300


def publish(app: Flask, registry: Callable[[], Registry | None], unavailable: Callable[[], Response]) -> None:
    """Add the route to `app`. `unavailable` is the response until the registry is loaded."""

    @app.get(PATH, provide_automatic_options=False)
    def jwks() -> Response:
        current = registry()
        if current is None:
            return unavailable()
        body = msgspec.json.encode({"keys": current.public_keys})
        response = Response(body, content_type="application/json")
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Cache-Control"] = f"public, max-age={MAX_AGE}"
        response.set_etag(sha256(body).hexdigest()[:32])
        response.make_conditional(request.environ)
        return response
