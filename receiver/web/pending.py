"""An answer of a WSGI application that is not known yet. May not know a framework, nor the server."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

from receiver.protocol.message import Reply
from receiver.web.answers import Fields
from receiver.web.steps import Walk

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse


class Pending:
    """The body of an answer whose steps are still to be taken (PEP 3333).

    Who iterates over it waits for them, and only then is `start_response` called, as PEP 3333 allows. A server that has
    something better to do takes `walk` itself, and then `answer`.
    """

    def __init__(self, walk: Walk[Reply], fields_of: Callable[[Reply], Fields], start_response: StartResponse) -> None:
        self.walk: Final = walk
        self._fields_of, self._start_response = fields_of, start_response

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.answer(self.walk.finish(self.walk.go())))

    def answer(self, reply: Reply) -> Iterable[bytes]:
        """Say it: the head through `start_response`, the body as it is returned."""
        self._start_response(f"{reply.status} {HTTPStatus(reply.status).phrase}",
                             [*self._fields_of(reply), ("Content-Length", str(len(reply.body)))])
        return (reply.body,)

    def close(self) -> None:
        """Give up what has not ended."""
        self.walk.close()
