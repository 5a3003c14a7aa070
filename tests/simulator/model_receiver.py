"""A minimal receiver: the project's own verification behind a real socket, without a database.

It responds as documented. A test can change responses with a `spoil` function.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any
from urllib.parse import urlsplit

from receiver.pipeline import UNPROVED_BODY, Challenged, Refused, Verdict, check_head, judge
from receiver.protocol.message import Head, Inbound, error_body, response_event
from receiver.protocol.registry import Credential, Destination
from receiver.simulator.attacks import AttackTarget
from tests.protocol.made_up import SOURCE, TOKENS, destination, registry, token

# (status, media type, body)
Answer = tuple[int, str, bytes]
# Returns the response to send, given the request's body, the number of earlier requests, and the correct response.
Spoil = Callable[[bytes, int, Answer], Answer]

TEXT, JSON = "text/plain; charset=utf-8", "application/json"


def right(inbound: Inbound, at: Destination) -> Answer:
    """Return the documented response."""
    known, now = registry(at), datetime.now(UTC)
    accepted = check_head(inbound.head, known, now)
    verdict: Verdict
    if isinstance(accepted, Refused):
        verdict = accepted
    elif not accepted.whole and len(inbound.body) > UNPROVED_BODY:
        verdict = accepted.missing()
    else:
        verdict = judge(accepted, inbound.body, now)
    if isinstance(verdict, Refused):
        return verdict.status, TEXT, b""
    if isinstance(verdict, Challenged):
        return 200, TEXT, verdict.challenge.encode()
    if verdict.query is None:
        return 200, TEXT, b""
    return 501, JSON, json.dumps(error_body(kind=verdict.query, text="no responder")).encode()


def answered(body: bytes) -> Answer:
    """Return the response of a responder to the query in `body`."""
    meta = json.loads(body)["Meta"]
    model, event = (meta[name].replace(" ", "") for name in ("DataModel", "EventType"))
    return 200, JSON, json.dumps({"Meta": {"DataModel": model, "EventType": response_event(model, event)}}).encode()


@contextmanager
def model_receiver(
    spoil: Spoil = lambda _body, _count, answer: answer, credentials: Sequence[Credential] = (token(),), **policies: Any
) -> Iterator[AttackTarget]:
    """Serve on a random port of 127.0.0.1 during the block. Yields the destination."""
    at = destination(*credentials, **policies)
    lock, count = Lock(), 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self._do(self.rfile.read(int(self.headers["Content-Length"])))

        def do_GET(self) -> None:
            self._do(b"")

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self._answer(405, TEXT, b"")

        def _do(self, body: bytes) -> None:
            nonlocal count
            url = urlsplit(self.path)
            head = Head(
                destination=url.path.removeprefix("/redox/"),
                method="POST" if self.command == "POST" else "GET",
                headers={name.lower(): value for name, value in self.headers.items()},
                target=url.path,
                query=url.query,
                peer="127.0.0.1",
                received_at=datetime.now(UTC),
            )
            with lock:
                count += 1
                before = count - 1
            self._answer(*spoil(body, before, right(Inbound(head=head, body=body), at)))

        def _answer(self, status: int, media: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", media)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield AttackTarget(
            base_url=f"http://127.0.0.1:{server.server_port}",
            destination=at.name,
            token=TOKENS["first"],
            source_id=SOURCE,
        )
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
