"""`/.well-known/jwks.json` on the public listener: the keys that Redox proves our client assertions by (RFC 7517).

Answered from memory, a second at most behind the registry. Must not serve a key but as the registry publishes it, which
is its public half alone.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from typing import Final

import msgspec
from flask import Flask, Response, request

from receiver.protocol.registry import Registry

PATH: Final = "/.well-known/jwks.json"
# Seconds that anybody may keep it: a key is published before it signs, and for longer than that after.
MAX_AGE: Final = 300


def publish(app: Flask, registry: Callable[[], Registry | None], unavailable: Callable[[], Response]) -> None:
    """Add the route to `app`; `unavailable` answers as long as the registry was never loaded."""

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
