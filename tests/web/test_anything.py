"""Any bytes at the public listener, on a real socket, and the rows in PostgreSQL afterwards.

Hypothesis makes requests that are nearly right: one thing about each is different. The valid outcomes follow from the
bytes that were sent, not from the receiver's own rules. HYPOTHESIS_EXAMPLES=20000 tries more of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from receiver.storage.registry.handler_changes import HandlerSpec
from tests.support.server import Answer, Server
from tests.support.site import SOURCE, Site, message, sent

# The same ones each time, unless more are asked for.
EXAMPLES: Final = int(os.environ.get("HYPOTHESIS_EXAMPLES", "250"))
AGAIN: Final = "HYPOTHESIS_EXAMPLES" not in os.environ
# This is in every body and in every wrong token. Afterwards it may be found only in sealed form.
CANARY: Final = "Quibbleworthington"
STRANGER: Final = f"{CANARY}-is-what-a-stranger-presents"
CHALLENGE: Final = "9a7e1c1e-7b0e-4d0c-8a42-0f6a3a2a7f11"
NEVER: Final = "4f0f6e3c-0000-4000-8000-000000000000"

# The only replies to a refused request; they quote nothing of it.
FIXED: Final = {
    400: b"bad request\n",
    401: b"unauthorized\n",
    403: b"forbidden\n",
    404: b"not found\n",
    405: b"method not allowed\n",
    413: b"too large\n",
}
# The server's own replies to malformed HTTP.
FRAMING: Final = {400, 408, 411, 414, 417, 431, 501, 505}


@pytest.fixture(scope="module", autouse=True)
def destinations(site: Site) -> None:
    """Made before the receiver starts: a destination that requires signatures, and a handler with after_handling."""
    site.add("signed", require=["hmac"])
    site.registration.enable_handler(
        "lab",
        HandlerSpec(
            handler="never-loaded",
            role="handler",
            patterns=("*",),
            ordering="source",
            patient_key=None,
            acknowledge="after_commit",
            on_failure="dead",
            max_attempts=1,
            timeout=1.0,
        ),
        datetime.now(UTC),
    )


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request. `proved`: a header holds the right token, once and exactly."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    token: str

    def values(self, name: str) -> list[str]:
        """The values of a header field, without surrounding whitespace (RFC 9110 section 5.5)."""
        return [value.strip(" \t") for each, value in self.headers if each.lower() == name]

    @property
    def proved(self) -> bool:
        return self.values("verification-token") == [self.token] or (
            [value.split(" ", 1) for value in self.values("authorization")]
            in ([["Bearer", self.token]], [["Bearer", f" {self.token}"]])
        )  # RFC 9110 11.4: a blank, or more

    @property
    def holds_token(self) -> bool:
        """Whether the request holds the right token anywhere. Without it nothing may be stored."""
        return self.token.encode() in self.data

    @property
    def data(self) -> bytes:
        lines = "".join(f"{name}: {value}\r\n" for name, value in self.headers)
        return f"{self.method} {self.target} HTTP/1.1\r\n{lines}\r\n".encode("latin-1") + self.body


# --- requests

_texts: Final = st.text(st.characters(min_codepoint=0, max_codepoint=0x2FFF), max_size=12)
_values: Final = st.text(st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f"), max_size=40)
_json: Final = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts, inner, max_size=3),
    max_leaves=8,
)
_sources: Final = st.sampled_from([SOURCE, SOURCE, NEVER, None]) | _json


@st.composite
def _meta(draw: st.DrawFn) -> Any:
    meta: dict[str, Any] = {
        "DataModel": draw(st.sampled_from(["PatientAdmin", "Results", "PatientSearch"]) | _json),
        "EventType": draw(st.sampled_from(["Arrival", "New", "Query"]) | _json),
        "Test": draw(st.booleans() | _json),
        "Source": draw(st.fixed_dictionaries({"ID": _sources}) | _json),
        "Logs": draw(st.just([{"ID": str(uuid4())}]) | _json),
        "EventDateTime": draw(_texts),
    }
    for name in draw(st.sets(st.sampled_from(sorted(meta)), max_size=2)):
        del meta[name]
    return draw(st.just(meta) | _json)


@st.composite
def _handshakes(draw: st.DrawFn, token: str) -> bytes:
    values = {
        "verification-token": draw(st.sampled_from([token, STRANGER, None]) | _json),
        "challenge": draw(st.sampled_from([CHALLENGE, CHALLENGE, "<b>", "a\r\nb"]) | _json),
    }
    for name in draw(st.sets(st.sampled_from(sorted(values)), max_size=1)):
        del values[name]
    return json.dumps(values).encode()


@st.composite
def _bodies(draw: st.DrawFn, token: str) -> bytes:
    kind = draw(st.sampled_from(["good", "good", "meta", "meta", "json", "handshake", "bytes"]))
    if kind == "handshake":
        return draw(_handshakes(token))
    if kind == "bytes":
        return draw(st.binary(max_size=300))
    if kind == "json":
        return json.dumps(draw(_json)).encode()
    body = message(Note=CANARY) if kind == "good" else json.dumps({"Meta": draw(_meta()), "Patient": CANARY}).encode()
    return draw(st.sampled_from([_same, _same, _same, _cut, _doubled, _marked, _spoilt, _sixteen]))(body)


def _same(body: bytes) -> bytes:
    return body


def _cut(body: bytes) -> bytes:
    return body[: len(body) // 2]


def _doubled(body: bytes) -> bytes:
    return body + body


def _marked(body: bytes) -> bytes:
    return b"\xef\xbb\xbf" + body


def _spoilt(body: bytes) -> bytes:
    return body.replace(b'"', b"\xff", 3)


def _sixteen(body: bytes) -> bytes:
    return body.decode("utf-8").encode("utf-16")


@st.composite
def _tokens(draw: st.DrawFn, token: str) -> list[tuple[str, str]]:
    """Header fields with the right token, a similar one, or both."""
    near = [token, token, token, STRANGER, token[:-1], token + "x", token.swapcase(), f" {token}\t", f'"{token}"', ""]
    value = draw(st.sampled_from(near) | _values)
    name = draw(st.sampled_from(["verification-token", "Verification-Token", "verification_token", "x-token"]))
    return draw(
        st.sampled_from(
            [
                [(name, value)],
                [(name, value)],
                [(name, value)],
                [],
                [(name, value), (name, token)],
                [("Authorization", f"Bearer {value}")],
                [("Authorization", f"Basic {value}")],
                [(name, value), ("Authorization", f"Bearer {STRANGER}")],
            ]
        )
    )


@st.composite
def _requests(draw: st.DrawFn, tokens: dict[str, str]) -> Asked:
    to = draw(st.sampled_from(["lab", "lab", "lab", "signed", "nobody"]))
    token = tokens.get(to, STRANGER)
    body = draw(_bodies(token))
    path = draw(
        st.sampled_from(
            [f"/redox/{to}"] * 6
            + [
                f"//redox//{to}/",
                f"http://elsewhere.test/redox/{to}",
                f"/redox/{to}?verification-token={token}&challenge=c",
                f"/redox/{to}?a=b",
                "/livez",
                "/.well-known/jwks.json",
                f"/oauth/{to}/token",
                "/readyz",
                "/redox/",
                "/",
                "/redox/%2e%2e/livez",
                f"/redox/{to}/more",
                "*",
            ]
        )
    )
    method = draw(st.sampled_from(["POST"] * 10 + ["GET", "GET", "PUT", "HEAD", "OPTIONS", "post", "CONNECT"]))
    length = draw(
        st.sampled_from(
            [str(len(body))] * 12
            + ["0", "-1", "+1", "1_0", "99999999999", "0x10", str(max(0, len(body) - 1)), f"{len(body)}, {len(body)}"]
        )
    )
    headers = [("Host", "receiver.test"), *draw(_tokens(token)), ("Content-Length", length)]
    headers += draw(
        st.lists(
            st.sampled_from(
                [
                    ("Content-Type", "application/json"),
                    ("Content-Type", "text/xml"),
                    ("Content-Encoding", "gzip"),
                    ("Content-Type", "multipart/form-data; boundary=x"),
                    ("Expect", "100-continue"),
                    ("Expect", "foo"),
                    ("Transfer-Encoding", "chunked"),
                    ("Transfer-Encoding", "xchunked"),
                    ("X-Forwarded-For", "127.0.0.1, x"),
                    ("Connection", "keep-alive"),
                    ("Upgrade", "h2c"),
                    ("X-HTTP-Method-Override", "GET"),
                ]
            )
            | st.tuples(st.sampled_from(["X-Anything", "Cookie", "Accept", "x-redox-signature"]), _values),
            max_size=3,
        )
    )
    return Asked(method=method, target=path, headers=tuple(headers), body=body, token=token)


# --- outcomes


def _answer(server: Server, asked: Asked) -> Answer | None:
    """The first reply that is not `100 Continue`; None if the connection was closed without one."""
    with server.wire(timeout=60.0) as wire:
        wire.send(asked.data).finish()
        try:
            answer = wire.answer(to_head=asked.method == "HEAD")
            return wire.answer(to_head=asked.method == "HEAD") if answer.status == 100 else answer
        except (EOFError, ConnectionResetError):
            return None


def _kept(site: Site) -> list[Any]:
    return site.rows("SELECT id, digest, state, query FROM messages ORDER BY id")


def _probe(site: Site, server: Server, before: int) -> Callable[[Asked], None]:
    known = before

    def probe(asked: Asked) -> None:
        nonlocal known
        note(repr(asked.data))
        answer = _answer(server, asked)
        new = [row for row in _kept(site) if row.id > known]
        known = max((row.id for row in new), default=known)
        _judge(site, asked, answer, new)

    return probe


def _judge(site: Site, asked: Asked, answer: Answer | None, new: list[Any]) -> None:
    if not asked.holds_token:
        assert new == []
    if answer is None:
        assert new == [] or asked.method == "HEAD"
        return
    assert len(new) <= 1
    if new:
        assert asked.proved
        assert asked.method == "POST"
        assert new[0].digest in (site.digest(asked.body[:length]) for length in range(len(asked.body) + 1))
        assert answer.status == 200 or new[0].query
    if answer.status == 200 and asked.target.strip("/").split("?")[0] not in ("livez", ".well-known/jwks.json"):
        handshake = answer.body != b""
        assert asked.holds_token
        assert handshake or new or asked.proved
        if handshake and asked.method != "HEAD":
            assert answer.headers["content-type"] == "text/plain; charset=utf-8"
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.body.decode("ascii").isprintable()
    if answer.status >= 500:
        assert answer.status == 501
        assert new or any(name.lower() == "transfer-encoding" for name, _ in asked.headers)
    elif answer.status in FIXED and answer.body and b"Meta" not in answer.body and b'"error"' not in answer.body:
        assert answer.body == FIXED[answer.status] or answer.status in FRAMING
    else:
        assert answer.status in {200, *FIXED, *FRAMING}
    assert CANARY.encode() not in answer.raw
    assert asked.token.encode() not in answer.raw


def test_whatever_comes(site: Site, server: Server) -> None:
    """Without the token nothing is stored. What is stored is what was sent, once, and was answered 200. No request
    makes the receiver fail, and nothing of a refused request is found anywhere."""
    probe = _probe(site, server, max((row.id for row in _kept(site)), default=0))

    @settings(
        max_examples=EXAMPLES,
        derandomize=AGAIN,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(_requests(site.tokens))
    def tried(asked: Asked) -> None:
        probe(asked)

    pids = [each.pid for each in server.workers()]
    tried()
    assert server.ask(sent(site)).status == 200
    assert [each.pid for each in server.workers()] == pids

    undispatched = site.rows(
        "SELECT count(*) FROM deliveries d JOIN messages m ON m.id = d.message_id "
        "WHERE m.state <> 'accepted' OR m.query"
    )
    assert undispatched[0][0] == 0
    server.process.terminate()  # the counts of a minute are written at the end
    assert server.process.wait(60) == 0
    audit = repr(site.rows("SELECT * FROM audit_events"))
    assert CANARY not in audit
    assert CANARY not in server.text()
    assert not [token for token in site.tokens.values() if token in audit + server.text()]
    assert server.lines("request.failed") == []
