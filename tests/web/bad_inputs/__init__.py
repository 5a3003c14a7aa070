"""Bad inputs as a table: each case has a name, its bytes, and its expected outcome at gunicorn alone and behind nginx.
At gunicorn alone it is the same in both server modes.

Each case has its own client address in 127.0.0.0/8, by which its audit rows are found. Each file of this folder is a
chapter. Must not judge: tests/web/test_bad_inputs.py does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Literal

from tests.support.site import Site, message, sent

MIB: Final = 1024 * 1024
Front = Literal["alone", "asgi", "nginx"]
CHUNKED: Final[Mapping[str, str | None]] = MappingProxyType({"content_length": None, "transfer_encoding": "chunked"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """The expected outcome of a case.

    `statuses` of the replies, in order; None: refused with any status of 400 or more, or by closing. `records`: outcome
    and reason of the audit rows. `closes`: the connection closes after the last reply.
    """

    statuses: tuple[int, ...] | None
    records: tuple[tuple[str, str | None], ...] = ()
    closes: bool = False


REFUSED: Final = Expected(statuses=None)
ACCEPTED: Final = Expected(statuses=(200,), records=(("unhandled", None),))
CHALLENGED: Final = Expected(statuses=(200,), records=(("answered", None),))


def quarantined(reason: str) -> Expected:
    """200, with the exact bytes stored."""
    return Expected(statuses=(200,), records=(("quarantined", reason),))


def refused(status: int, reason: str) -> Expected:
    """Refused by the receiver, which audits the reason and stores nothing of the body."""
    return Expected(statuses=(status,), records=(("refused", reason),))


def by_server(status: int) -> Expected:
    """Refused by the server, before the application."""
    return Expected(statuses=(status,), closes=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stand:
    """The place of a case: its front and its site. `trap`: a URL that must not be fetched."""

    site: Site
    front: Front
    trap: str

    def name(self, to: str = "lab") -> str:
        """The destination's name. Each front has its own, because the same body again would be a duplicate."""
        return f"{to}-{self.front}"

    def token(self, to: str = "lab") -> str:
        """The destination's token, or another token of that name."""
        return self.site.tokens[self.name(to)]

    def sent(
        self,
        body: bytes | None = None,
        headers: Mapping[str, str | None] = MappingProxyType({}),
        *,
        to: str = "lab",
        **named: str | None,
    ) -> bytes:
        """A request as Redox sends it, changed by `headers` and `named`."""
        return sent(self.site, body, headers, to=self.name(to), **named)


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """The bytes that are sent on one connection, and the number of replies to wait for.

    `kept`: the bodies that may be found afterwards, if the case is one of those that are kept. `finish`: FIN after it.
    `plain`: without TLS, whatever the front speaks. `never`: what may be in no answer.
    """

    data: bytes = field(repr=False)
    kept: tuple[bytes, ...] = field(default=(), repr=False)
    answers: int = 1
    finish: bool = False
    plain: bool = False
    never: bytes | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A bad input. `behind`: the expected outcome behind nginx, if it differs.

    `columns`: of the row of the message that is kept.
    """

    name: str
    expected: Expected
    behind: Expected
    make: Callable[[Stand], Exchange]
    columns: Mapping[str, Any] = field(default_factory=dict)

    def expected_from(self, front: Front) -> Expected:
        """The expected outcome there."""
        return self.behind if front == "nginx" else self.expected


def case(
    name: str, expected: Expected, make: Callable[[Stand], Exchange], *, behind: Expected | None = None, **columns: Any
) -> Case:
    """Make a case. What the server refuses before the application, nginx may refuse in its own way."""
    other = REFUSED if expected.closes and not expected.records else expected
    return Case(name=name, expected=expected, behind=behind or other, make=make, columns=columns)


def body(content: bytes | Callable[[Stand], bytes], **headers: str | None) -> Callable[[Stand], Exchange]:
    """This body with the right token."""

    def make(stand: Stand) -> Exchange:
        made = content if isinstance(content, bytes) else content(stand)
        return Exchange(data=stand.sent(made, headers), kept=(made,))

    return make


def headers(given: Callable[[Stand], Mapping[str, str | None]], *, to: str = "lab") -> Callable[[Stand], Exchange]:
    """A message with these header fields instead of its own."""

    def make(stand: Stand) -> Exchange:
        made = message()
        return Exchange(data=stand.sent(made, given(stand), to=to), kept=(made,))

    return make


def changed(change: Callable[[bytes], bytes]) -> Callable[[Stand], Exchange]:
    """A message with changed bytes of its request."""

    def make(stand: Stand) -> Exchange:
        made = message()
        whole = stand.sent(made)
        assert change(whole) != whole
        return Exchange(data=change(whole), kept=(made,))

    return make
