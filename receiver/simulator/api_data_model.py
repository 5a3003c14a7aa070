"""The Data Model API of the simulated Redox: messages, queries and file uploads."""

from __future__ import annotations

import io
import threading
import uuid
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from werkzeug.formparser import MultiPartParser
from werkzeug.http import parse_options_header

from receiver.protocol.message import QUERIES, response_event
from receiver.simulator.api_exchange import Received, SimulatedApiAnswer

_LARGEST_UPLOAD: Final = 30 * 1024 * 1024

Responder = Callable[[dict[str, Any]], dict[str, Any]]


class DataModelApi:
    """Accepts messages and answers queries. `processed`: the accepted messages. Thread-safe."""

    def __init__(self) -> None:
        self.processed: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._responders: dict[str, Responder] = {}
        self._meta_errors: deque[list[dict[str, Any]]] = deque()

    def respond(self, kind: str, responder: Responder) -> None:
        """Answer queries of `kind` with the result of `responder`, plus Meta."""
        self._responders[kind] = responder

    def refuse_next(self, errors: list[dict[str, Any]]) -> None:
        """Answer the next message with status 200 and these `Meta.Errors`, and do not accept it."""
        self._meta_errors.append(errors)

    def answer(self, request: Received, *, source_required: bool) -> SimulatedApiAnswer:
        """Return the response to a message. `source_required`: Redox cannot tell the source from the API key."""
        message = request.json_object()
        claimed = message.get("Meta")
        meta: dict[str, Any] = claimed if isinstance(claimed, dict) else {}
        kind = f"{meta.get('DataModel')}.{meta.get('EventType')}".replace(" ", "")
        destinations = meta.get("Destinations")
        fault = None
        if not meta.get("DataModel") or not meta.get("EventType"):
            fault = "Meta.DataModel and Meta.EventType are required"
        elif not destinations or not all(isinstance(one, dict) and one.get("ID") for one in destinations):
            fault = "Meta.Destinations must name a destination"
        elif kind in QUERIES and len(destinations) != 1:
            fault = "a query has exactly one destination"
        elif source_required and not (meta.get("Source") or {}).get("ID") and "redox-source-id" not in request.headers:
            fault = "Meta.Source.ID is required"
        logs = [{"ID": str(uuid.uuid4()), "AttemptID": str(uuid.uuid4())}]
        if fault is not None:
            errors = [{"ID": 4001, "Text": fault, "Type": "client", "Module": "Endpoint"}]
            return SimulatedApiAnswer(status=400, body={"Meta": {**meta, "Logs": logs, "Errors": errors}})
        with self._lock:
            if self._meta_errors:
                return SimulatedApiAnswer(body={"Meta": {**meta, "Logs": logs, "Errors": self._meta_errors.popleft()}})
            self.processed.append(message)
        if kind not in QUERIES:
            return SimulatedApiAnswer(body={"Meta": {**meta, "Logs": logs}})
        responder = self._responders.get(kind)
        reply = responder(message) if responder else {}
        event = response_event(*kind.split(".", 1))
        return SimulatedApiAnswer(body={"Meta": {**meta, "EventType": event, "Logs": logs}, **reply})


def upload(request: Received, base_url: str, uploads: dict[str, bytes]) -> SimulatedApiAnswer:
    """Store a file in `uploads`. Returns the response with its URI."""
    media, options = parse_options_header(request.headers.get("content-type"))
    if media != "multipart/form-data" or not options.get("boundary"):
        return SimulatedApiAnswer(status=400, body="multipart/form-data required")
    parser = MultiPartParser(stream_factory=lambda *_, **__: io.BytesIO())
    try:
        _, files = parser.parse(io.BytesIO(request.body), options["boundary"].encode(), len(request.body))
    except ValueError:
        return SimulatedApiAnswer(status=400, body="multipart/form-data required")
    file = files.get("file")
    if file is None:
        return SimulatedApiAnswer(status=400, body="Missing file")
    content = file.stream.read()
    if len(content) > _LARGEST_UPLOAD:
        return SimulatedApiAnswer(status=413, body="Payload Too Large")
    uri = f"{base_url}/uploads/{uuid.uuid4()}"
    uploads[uri] = content
    return SimulatedApiAnswer(body={"URI": uri})
