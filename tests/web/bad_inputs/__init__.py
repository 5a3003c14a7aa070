"""Bad inputs as a table: each case is a name, the bytes, and what becomes of it before gunicorn alone and behind nginx.
What becomes of it before gunicorn alone is so whichever door serves.

A case is told apart afterwards by the address that it came from: each has one of its own in 127.0.0.0/8, which the
audit names. A folder's file holds a chapter. May not judge: tests/web/test_bad_inputs.py does.
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
    """What becomes of a case.

    `statuses` of the answers, one after another; None: refused by any status of 400 or more, or by hanging up.
    `records`: outcome and reason of what the audit tells, of a message that is kept or a request that is refused.
    `closes`: the connection ends after the last answer.
    """

    statuses: tuple[int, ...] | None
    records: tuple[tuple[str, str | None], ...] = ()
    closes: bool = False


REFUSED: Final = Expected(statuses=None)
ACCEPTED: Final = Expected(statuses=(200,), records=(("unhandled", None),))
CHALLENGED: Final = Expected(statuses=(200,), records=(("answered", None),))


def quarantined(reason: str) -> Expected:
    """200, the exact bytes kept."""
    return Expected(statuses=(200,), records=(("quarantined", reason),))


def refused(status: int, reason: str) -> Expected:
    """Refused by the receiver, which writes down why and nothing of the body."""
    return Expected(statuses=(status,), records=(("refused", reason),))


def by_server(status: int) -> Expected:
    """Refused by gunicorn, before the receiver."""
    return Expected(statuses=(status,), closes=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stand:
    """Where a case is made: behind which front, and for what it may hold. `trap`: a URL that nobody may fetch."""

    site: Site
    front: Front
    trap: str

    def name(self, to: str = "lab") -> str:
        """The destination's name: each front has its own, for the same body again is a duplicate."""
        return f"{to}-{self.front}"

    def token(self, to: str = "lab") -> str:
        """That destination's token, or another that is known under that name."""
        return self.site.tokens[self.name(to)]

    def sent(
        self,
        body: bytes | None = None,
        headers: Mapping[str, str | None] = MappingProxyType({}),
        *,
        to: str = "lab",
        **named: str | None,
    ) -> bytes:
        """A request as Redox sends it, but for `headers` and `named`."""
        return sent(self.site, body, headers, to=self.name(to), **named)


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """What is sent on one connection, and how many answers are waited for.

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
    """A bad input. `behind`: what becomes of it behind nginx, where that is something else.

    `columns`: of the row of the message that is kept.
    """

    name: str
    expected: Expected
    behind: Expected
    make: Callable[[Stand], Exchange]
    columns: Mapping[str, Any] = field(default_factory=dict)

    def expected_from(self, front: Front) -> Expected:
        """What becomes of it there."""
        return self.behind if front == "nginx" else self.expected


def case(
    name: str, expected: Expected, make: Callable[[Stand], Exchange], *, behind: Expected | None = None, **columns: Any
) -> Case:
    """A case. What gunicorn refuses before the receiver, nginx may refuse in its own way."""
    other = REFUSED if expected.closes and not expected.records else expected
    return Case(name=name, expected=expected, behind=behind or other, make=make, columns=columns)


def body(content: bytes | Callable[[Stand], bytes], **headers: str | None) -> Callable[[Stand], Exchange]:
    """That body with the right token."""

    def make(stand: Stand) -> Exchange:
        made = content if isinstance(content, bytes) else content(stand)
        return Exchange(data=stand.sent(made, headers), kept=(made,))

    return make


def headers(given: Callable[[Stand], Mapping[str, str | None]], *, to: str = "lab") -> Callable[[Stand], Exchange]:
    """A message with those headers instead of its own."""

    def make(stand: Stand) -> Exchange:
        made = message()
        return Exchange(data=stand.sent(made, given(stand), to=to), kept=(made,))

    return make


def changed(change: Callable[[bytes], bytes]) -> Callable[[Stand], Exchange]:
    """A message whose request's bytes are changed."""

    def make(stand: Stand) -> Exchange:
        made = message()
        whole = stand.sent(made)
        assert change(whole) != whole
        return Exchange(data=change(whole), kept=(made,))

    return make
