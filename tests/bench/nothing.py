"""Endpoints that read the body and do nothing: what a server and a framework cost by themselves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from flask import Flask, request

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

flask_app = Flask(__name__, static_folder=None)


@flask_app.post("/redox")
def receive() -> str:
    """Read it."""
    request.get_data(cache=False)
    return ""


def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Read it, without a framework."""
    environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "0")])
    return []
