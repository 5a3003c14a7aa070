"""Malformed and ambiguous HTTP."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from tests.support.server import post
from tests.support.site import message
from tests.web.bad_inputs import (
    ACCEPTED,
    CHUNKED,
    MIB,
    REFUSED,
    Case,
    Exchange,
    Expected,
    Stand,
    by_server,
    case,
    changed,
    refused,
)

# nginx reads the whole body before it forwards the request.
_BROKEN: Final = refused(400, "body_malformed")
_SHORT: Final = refused(400, "body_incomplete")
_MISSING: Final = refused(401, "credential_missing")
# As refused(413), or 502: if a large body is refused unread, nginx may see only that the connection closes.
_TOO_LARGE: Final = refused(413, "body_too_large")
_PERHAPS_TOO_LARGE: Final = Expected(statuses=None, records=_TOO_LARGE.records)


def _before_host(line: bytes) -> Callable[[bytes], bytes]:
    return lambda raw: raw.replace(b"host: ", line + b"\r\nhost: ", 1)


def _length(pattern: bytes) -> Callable[[bytes], bytes]:
    return lambda raw: re.sub(rb"(content-length: )(\d+)\r\n", pattern, raw, count=1)


def _chunks(rest: bytes, *, finish: bool = False) -> Callable[[Stand], Exchange]:
    return lambda stand: Exchange(data=stand.sent(b"", CHUNKED) + rest, finish=finish)


def _over_the_cap(stand: Stand) -> Exchange:
    """An announced body: gunicorn refuses it at once; nginx waits for it."""
    size = 40 * MIB + 1
    return Exchange(data=stand.sent(b"", content_length=str(size)) + (size * b"x" if stand.front == "nginx" else b""))


def _chunks_over_the_cap(stand: Stand) -> Exchange:
    whole = 40 * (b"100000\r\n" + MIB * b"x" + b"\r\n") + b"1\r\nx\r\n0\r\n\r\n"
    return Exchange(data=stand.sent(b"", CHUNKED) + whole)


def _spelled(target: str, *, token: bool) -> Callable[[Stand], Exchange]:
    def make(stand: Stand) -> Exchange:
        made = message()
        whole = stand.sent(made) if token else stand.sent(made, verification_token=None)
        there = target.replace("NAME", stand.name())
        return Exchange(data=whole.replace(f"/redox/{stand.name()}".encode(), there.encode(), 1), kept=(made,))

    return make


def _two(stand: Stand) -> Exchange:
    first, second = message(), message()
    return Exchange(
        data=stand.sent(first) + stand.sent(second, verification_token="wrong" * 8), kept=(first,), answers=2
    )


def _hidden(stand: Stand) -> Exchange:
    """A request in the body of a refused one."""
    return Exchange(data=stand.sent(stand.sent(), verification_token="wrong" * 8))


def _smuggled(stand: Stand) -> Exchange:
    """Two readings of where the first request ends; in one of them a valid message follows."""
    raw = stand.sent(b"0\r\n\r\n" + stand.sent())
    return Exchange(data=raw.replace(b"content-length", b"transfer-encoding: chunked\r\ncontent-length", 1))


def _other(hello: bytes) -> Callable[[Stand], Exchange]:
    return lambda _: Exchange(data=hello, plain=True)


def _tls_or_not(stand: Stand) -> Exchange:
    """A TLS hello on the plain port, and a valid message without TLS on the TLS port."""
    if stand.front == "nginx":
        return Exchange(data=stand.sent(), plain=True)
    return Exchange(data=b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + 500 * b"\x00", plain=True)


CASES: Final[tuple[Case, ...]] = (
    case(
        "length and chunks",
        by_server(400),
        changed(lambda raw: raw.replace(b"content-length", b"transfer-encoding: chunked\r\ncontent-length")),
    ),
    case("length and chunks, smuggling", by_server(400), _smuggled),
    case("two lengths", by_server(400), changed(_length(rb"content-length: 3\r\n\1\2\r\n"))),
    case("two lengths that agree", by_server(400), changed(_length(rb"\1\2\r\n\1\2\r\n"))),
    case("a negative length", by_server(400), changed(_length(rb"\1-\2\r\n"))),
    case("a length with a sign", by_server(400), changed(_length(rb"\1+\2\r\n"))),
    case("a list of lengths", by_server(400), changed(_length(rb"\1\2, \2\r\n"))),
    case("a length in hexadecimal", by_server(400), changed(_length(rb"\g<1>0x\2\r\n"))),
    case(
        "compressed chunks",
        by_server(501),
        changed(lambda raw: raw.replace(b"content-length", b"transfer-encoding: gzip, chunked\r\nx-length")),
    ),
    case("a length of 30 digits", by_server(400), changed(_length(rb"\g<1>%s\r\n" % (30 * b"9"))), behind=REFUSED),
    case("over the cap", _TOO_LARGE, _over_the_cap, behind=_PERHAPS_TOO_LARGE),
    case(
        "far over the cap",
        _TOO_LARGE,
        lambda stand: Exchange(data=stand.sent(b"", content_length=str(90 * MIB))),
        behind=Expected(statuses=(413,)),
    ),
    case("chunks over the cap", _TOO_LARGE, _chunks_over_the_cap, behind=_PERHAPS_TOO_LARGE),
    case(
        "a short body",
        _SHORT,
        lambda stand: Exchange(data=stand.sent(b"{}", content_length="10"), finish=True),
        behind=REFUSED,
    ),
    *(
        case(f"bad chunk {rest!r}", _BROKEN, _chunks(rest), behind=REFUSED)
        for rest in (
            b"zz\r\n{}\r\n0\r\n\r\n",
            b"-2\r\n{}\r\n0\r\n\r\n",
            b"0x2\r\n{}\r\n0\r\n\r\n",
            b"2\r\n{}xx0\r\n\r\n",
            b"\r\n",
            b"99999999999999999999\r\n{}",
        )
    ),
    *(
        case(f"unfinished chunks {rest!r}", _BROKEN, _chunks(rest, finish=True), behind=REFUSED)
        for rest in (b"", b"5", b"5\r\n{", b"2\r\n{}\r\n", b"2\r\n{}\r\n0\r\n")
    ),
    case(
        "an unknown transfer coding",
        by_server(501),
        changed(lambda raw: raw.replace(b"content-length", b"transfer-encoding: xchunked\r\nx-length")),
    ),
    case("a NUL in a header", by_server(400), changed(_before_host(b"x-a: CAN\x00ARY"))),
    case("a CR in a header", by_server(400), changed(_before_host(b"x-a: CAN\rARY"))),
    case("an ESC in a header", by_server(400), changed(_before_host(b"x-a: \x1b[31mCANARY"))),
    case("a folded header", by_server(400), changed(_before_host(b"x-a: b\r\n CANARY"))),
    case("a header without a name", by_server(400), changed(_before_host(b": CANARY"))),
    case("a space before the colon", by_server(400), changed(_before_host(b"CANARY : x"))),
    # RFC 9112 section 2.2 allows a recipient to accept it; nginx forwards it as CRLF.
    case(
        "a bare LF",
        by_server(400),
        changed(lambda raw: raw.replace(b"receiver.test\r\n", b"receiver.test\n")),
        behind=ACCEPTED,
    ),
    case("110 headers", by_server(431), changed(_before_host(b"\r\n".join(b"x-%d: y" % n for n in range(110))))),
    case("a header of 9 KB", by_server(431), changed(_before_host(b"x-a: " + 9 * 1024 * b"y"))),
    case("a header of 1 MB", by_server(431), changed(_before_host(b"x-a: " + MIB * b"y"))),
    case(
        "a target of 9 KB",
        by_server(414),
        changed(lambda raw: raw.replace(b" HTTP/1.1", b"?CANARY" + 9 * 1024 * b"y" + b" HTTP/1.1", 1)),
    ),
    case("an unknown expectation", by_server(417), changed(_before_host(b"expect: CANARY")), behind=ACCEPTED),
    case("HTTP/3", by_server(400), changed(lambda raw: raw.replace(b"HTTP/1.1", b"HTTP/3.0", 1))),
    case("HTTP/1.CANARY", by_server(400), changed(lambda raw: raw.replace(b"HTTP/1.1", b"HTTP/1.CANARY", 1))),
    case("a method in lower case", by_server(400), changed(lambda raw: raw.replace(b"POST", b"post", 1))),
    *(
        case(
            f"the method {method}",
            Expected(statuses=(405,), closes=method != "TRACE"),
            changed(lambda raw, method=method: raw.replace(b"POST", method.encode(), 1)),  # type: ignore[misc]
            behind=Expected(statuses=(405,)),
        )
        for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "PROPFIND")
    ),
    case("pipelined", Expected(statuses=(200, 401), records=(("unhandled", None), ("refused", "token_wrong"))), _two),
    case("a request in a refused body", refused(401, "token_wrong"), _hidden),
    *(
        case(f"{target} {word} the token", expected, _spelled(target, token=token))
        for target in (
            "/redox/NAME/",
            "//redox/NAME",
            "/redox//NAME",
            "///redox///NAME///",
            "http://elsewhere.test/redox/NAME",
            "https://elsewhere.test//redox/NAME?x=CANARY",
        )
        for token, word, expected in ((True, "with", ACCEPTED), (False, "without", _MISSING))
    ),
    *(
        case(
            f"the path {target}",
            Expected(statuses=(404,)),
            _spelled(target, token=True),
            behind=REFUSED if ".." in target or "%2e" in target else None,
        )
        for target in (
            "/",
            "/redox",
            "/redox/NAME/x",
            "/readyz",
            "/metrics",
            "/redox/../redox/NAME",
            "/CANARY",
            "/%2e%2e/etc/passwd",
            "/redox/NAME%2fx",
            "/redox/%2e%2e/metrics",
        )
    ),
    case("TLS, or none", REFUSED, _tls_or_not),
    *(
        case(f"another protocol {hello[:12]!r}", REFUSED, _other(hello))
        for hello in (
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"\x80\x2e\x01\x00\x02" + 60 * b"\x00",
            b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n\r\n",
            100 * b"\x00",
            b"SSH-2.0-CANARY\r\n\r\n",
            b"GET / \r\n\r\n",
            b"EHLO x\r\n\r\n",
        )
    ),
    case(
        "CONNECT",
        Expected(statuses=None),
        lambda stand: Exchange(data=b"CONNECT elsewhere.test:443 HTTP/1.1\r\nhost: elsewhere.test\r\n\r\n"),
    ),
    case(
        "nothing but a GET",
        _MISSING,
        lambda stand: Exchange(data=post(f"/redox/{stand.name()}").replace(b"POST", b"GET", 1)),
    ),
)
