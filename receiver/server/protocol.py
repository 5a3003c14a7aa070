"""uvicorn's HTTP protocol, made to serve clients without a proxy in between.

`HttpProtocol` overrides nothing but the methods of asyncio.Protocol and the callbacks of httptools' parser. It reports
them to a ClientConnection (receiver.server.client_connection), which has the deadlines, and to its RequestHead
(receiver.server.request_head), which has the bounds. Between uvicorn and the socket stands a transport (`_Transport`),
by which the connection learns what uvicorn writes and closes.

A field that comes after the body (a trailer) is dropped: uvicorn would merge it into the request's header. How long a
body may take is the endpoint's (receiver.web.body). Must not judge a request.
"""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from receiver.server.client_connection import ClientConnection
from receiver.server.connections import ConnectionTable
from receiver.web.asgi_request import CONNECTION


class _Transport(asyncio.Transport):
    """The transport that uvicorn gets: the connection decides what is written and when it closes."""

    def __init__(self, transport: asyncio.Transport, connection: ClientConnection) -> None:
        super().__init__()
        self._real, self._connection = transport, connection

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._real.get_extra_info(name, default)

    def is_closing(self) -> bool:
        return self._connection.is_closing()

    def write(self, data: Any) -> None:
        if self._connection.may_write(data):
            self._real.write(data)

    def close(self) -> None:
        self._connection.close(linger=self._connection.has_replied)

    def abort(self) -> None:
        self._real.abort()

    def pause_reading(self) -> None:
        if not self._connection.is_closing():
            self._real.pause_reading()

    def resume_reading(self) -> None:
        if not self._connection.is_closing():
            self._real.resume_reading()


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which reports each event to a ClientConnection. `protocol_class` sets `table`."""

    table: ClassVar[ConnectionTable]

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self.tracked = ClientConnection(self.table)
        super().__init__(config, server_state, {**app_state, CONNECTION: self.tracked}, _loop)

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvicorn's signature
        """See asyncio.Protocol."""
        self.tracked.made(transport, asyncio.get_running_loop())
        super().connection_made(_Transport(transport, self.tracked))

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self.tracked.lost()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if self.tracked.before_parsing(data):
            super().data_received(data)
            self.tracked.after_parsing(data)

    def eof_received(self) -> bool:  # type: ignore[override]  # uvicorn's never keeps the connection
        """See asyncio.Protocol."""
        return self.tracked.ended()

    # --- httptools

    def on_message_begin(self) -> None:
        """See httptools."""
        self.tracked.message_begin()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """See httptools."""
        self.tracked.head.url(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """See httptools, which keeps trailing spaces of a value (RFC 9110 section 5.5 removes them)."""
        value = value.rstrip(b" \t")
        if self.tracked.head.field(name, value):
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """See httptools."""
        self.tracked.head.version(self.parser.get_http_version())
        super().on_headers_complete()
        self.tracked.head_complete()

    def on_body(self, body: bytes) -> None:
        """See httptools."""
        self.tracked.body()
        super().on_body(body)

    def on_message_complete(self) -> None:
        """See httptools."""
        self.tracked.message_complete()
        super().on_message_complete()


def protocol_class(limit: int) -> type[HttpProtocol]:
    """Return the protocol class of a process that keeps at most `limit` connections."""
    return type("HttpProtocol", (HttpProtocol,), {"table": ConnectionTable(limit)})
