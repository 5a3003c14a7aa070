"""One exchange with a server: which servers are trusted, how much is read, and how long it may take."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta

import httpx2
import pytest
import trustme

from receiver.errors import ConfigurationError
from receiver.fault_injection.api_faults import ApiFault
from receiver.outbound import (
    CANADA,
    US,
    AnswerLost,
    Limits,
    OutboundError,
    RedoxClient,
    RedoxUnavailable,
    SlidingWindow,
    Untrusted,
    UnusableAnswer,
)
from receiver.outbound.limits import deadline
from receiver.outbound.wire import Wire, check_base_url
from receiver.simulator.api import FakeRedoxApi
from tests.outbound.conftest import KEY, QUICK, Connect, message, serving, with_keys
from tests.support.waiting import until


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (US, "https://api.redoxengine.com"),
        (CANADA, "https://api.ca.redoxengine.com"),
        ("https://redox.example:8443/prefix/", "https://redox.example:8443/prefix"),
        ("http://127.0.0.1:9", "http://127.0.0.1:9"),
        ("http://[::1]:9", "http://[::1]:9"),
        ("http://localhost:9", "http://localhost:9"),
    ],
)
def test_a_base_url_is_https_or_loopback(given: str, taken: str) -> None:
    """A base URL is https, or http to loopback."""
    assert check_base_url(given) == taken


@pytest.mark.parametrize(
    "bad",
    [
        "http://api.redoxengine.com",
        "http://localhost.example",
        "http://127.0.0.1.example",
        "http://10.0.0.1",
        "ftp://127.0.0.1",
        "api.redoxengine.com",
        "",
        "https://",
        "https://user:pw@redox.example",
        "https://redox.example?x=1",
        "https://redox.example#f",
        "https://redox.example:port",
    ],
)
def test_any_other_base_url_is_refused(bad: str) -> None:
    """Plain http to another machine, or a URL with more than a base, is a configuration error."""
    with pytest.raises(ConfigurationError, match="base URL"):
        RedoxClient(KEY, base_url=bad)


def test_tls(tls_api: FakeRedoxApi, trusting: ssl.SSLContext) -> None:
    """With a trusted certificate, requests over TLS succeed."""
    with RedoxClient(KEY, base_url=tls_api.base_url, ssl_context=trusting) as client:
        assert client.send(message()).status == 200
        assert client.upload(b"synthetic") in tls_api.uploads


@contextmanager
def presenting(certificate: trustme.LeafCert) -> Iterator[FakeRedoxApi]:
    with FakeRedoxApi(ssl_context=serving(certificate)) as running:
        yield with_keys(running)


@pytest.mark.parametrize("which", ["expired", "wrong host", "unknown authority", "system authorities"])
def test_untrusted_servers(authority: trustme.CA, trusting: ssl.SSLContext, which: str) -> None:
    """With an expired, misnamed or unknown certificate nothing is sent, and there is no retry."""
    past = datetime.now(UTC) - timedelta(days=1)
    certificate = {
        "expired": lambda: authority.issue_cert("127.0.0.1", not_before=past - timedelta(days=9), not_after=past),
        "wrong host": lambda: authority.issue_cert("redox.example"),
        "unknown authority": lambda: trustme.CA().issue_cert("127.0.0.1"),
        "system authorities": lambda: authority.issue_cert("127.0.0.1"),
    }[which]()
    context = None if which == "system authorities" else trusting
    with (
        presenting(certificate) as api,
        RedoxClient(KEY, base_url=api.base_url, ssl_context=context, limits=QUICK) as client,
    ):
        with pytest.raises(Untrusted, match=r"certificate of 127\.0\.0\.1 is not valid") as caught:
            client.send(message())
        assert not caught.value.retryable
        assert caught.value.not_processed
        assert api.requests == []


def test_the_environment_is_not_read(
    api: FakeRedoxApi, connect: Connect, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Proxies, certificate paths and .netrc of the environment have no effect."""
    home = tmp_path_factory.mktemp("home")
    (home / ".netrc").write_text("machine 127.0.0.1 login canary password canary")
    monkeypatch.setenv("HOME", str(home))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.setenv("SSL_CERT_FILE", str(home / "missing.pem"))

    assert connect().send(message()).status == 200
    assert all(one.headers.get("authorization", "Bearer ").startswith("Bearer ") for one in api.requests)


def fails(client: RedoxClient) -> OutboundError:
    with pytest.raises(OutboundError) as caught:
        client.send(message())
    return caught.value


def test_a_redirect_is_not_followed(api: FakeRedoxApi, connect: Connect) -> None:
    """The target of a redirect receives neither the request nor the token."""
    with FakeRedoxApi() as elsewhere:
        api.redirect_to = f"{elsewhere.base_url}/endpoint"
        api.fail("/endpoint", ApiFault.REDIRECT)

        error = fails(connect())
        assert (type(error), error.status, error.retryable) == (UnusableAnswer, 307, False)
        assert elsewhere.base_url not in str(error)
        assert elsewhere.requests == []


def test_a_compressed_answer_is_refused(api: FakeRedoxApi, connect: Connect) -> None:
    """No compression is requested, and a compressed body is refused without decompressing it."""
    api.fail("/endpoint", ApiFault.GZIP_BOMB)

    error = fails(connect())
    assert type(error) is UnusableAnswer
    assert "compressed" in str(error)
    assert {one.headers["accept-encoding"] for one in api.requests} == {"identity"}


def test_an_answer_over_the_cap_is_refused(api: FakeRedoxApi, connect: Connect) -> None:
    """A body above the limit is not read to its end; below the limit it is read."""
    api.fail("/endpoint", ApiFault.HUGE, times=2)

    error = fails(connect(limits=Limits(response_bytes=1_000_000)))
    assert type(error) is UnusableAnswer
    assert "larger than 1000000 bytes" in str(error)
    assert "10485760 bytes" in str(fails(connect()))


@pytest.mark.parametrize("fault", [ApiFault.DRIP, ApiFault.SILENCE], ids=lambda fault: fault.name)
def test_a_slow_server_is_left_at_the_deadline(api: FakeRedoxApi, connect: Connect, fault: ApiFault) -> None:
    """The total timeout ends a response that arrives one byte at a time."""
    client = connect(limits=Limits(total=1.0, read=60.0))
    client.send(message())
    api.fail("/endpoint", fault)

    error = fails(client)
    assert type(error) is AnswerLost
    assert not error.not_processed


def test_a_read_has_its_own_time_out(api: FakeRedoxApi, connect: Connect) -> None:
    """The read timeout ends a silent connection long before the total timeout."""
    api.fail("/endpoint", ApiFault.SILENCE)

    assert type(fails(connect(limits=Limits(read=0.2, total=3_000.0)))) is AnswerLost


@pytest.mark.parametrize(
    "fault",
    [ApiFault.NOT_HTTP, ApiFault.DROP_BEFORE, ApiFault.DROP_AFTER, ApiFault.CUT_SHORT],
    ids=lambda fault: fault.name,
)
def test_a_broken_answer_is_a_lost_one(api: FakeRedoxApi, connect: Connect, fault: ApiFault) -> None:
    """When the request was sent and no whole answer came, it counts as possibly processed."""
    api.fail("/endpoint", fault)

    error = fails(connect())
    assert type(error) is AnswerLost
    assert (error.retryable, error.not_processed) == (True, False)
    assert len(api.received("/endpoint")) == 1


def test_connection_refused(connect: Connect) -> None:
    """A refused connection counts as not processed."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

    error = fails(connect(base_url=f"http://127.0.0.1:{port}"))
    assert type(error) is RedoxUnavailable
    assert error.not_processed
    assert "no connection to 127.0.0.1 (ConnectionRefusedError)" in str(error)


def test_a_handshake_that_never_comes(connect: Connect) -> None:
    """The connect timeout ends a TLS handshake that the server does not answer."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        error = fails(
            connect(base_url=f"https://127.0.0.1:{server.getsockname()[1]}", limits=Limits(connect=0.2, attempts=1))
        )

    assert type(error) is RedoxUnavailable
    assert error.not_processed


def test_out_of_time_before_sending(api: FakeRedoxApi) -> None:
    """When the time is over before a request is sent, the error says so, and nothing is sent."""
    with closing(Wire(limits=QUICK)) as wire, deadline(0.0), pytest.raises(RedoxUnavailable, match="before") as caught:
        wire.exchange(httpx2.Request("GET", api.base_url), most=1_000)
    assert caught.value.not_processed
    assert api.requests == []


def test_more_threads_than_connections(api: FakeRedoxApi) -> None:
    """A call that gets no free connection in time counts as not processed, and the error says why."""
    with closing(Wire(limits=Limits(connections=1))) as wire:

        def ask(seconds: float) -> None:
            with deadline(seconds), pytest.raises(OutboundError) as caught:
                wire.exchange(httpx2.Request("GET", api.base_url), most=1_000)
            outcomes.append(caught.value)

        outcomes: list[OutboundError] = []
        api.fail("/", ApiFault.SILENCE)
        holding = threading.Thread(target=ask, args=(10.0,))
        holding.start()
        until(lambda: len(api.requests) == 1)
        ask(0.1)
        api.__exit__(None, None, None)
        holding.join()

    hurried, held = outcomes
    assert (type(hurried), hurried.not_processed) == (RedoxUnavailable, True)
    assert "all connections of this client are in use" in str(hurried)
    assert type(held) is AnswerLost


def test_the_window_is_respected(api: FakeRedoxApi, connect: Connect) -> None:
    """Token requests count too: with a window of two, the second message is not sent, and counts as not processed."""
    client = connect(rate=SlidingWindow(2, 3_000.0))
    client.send(message())

    error = fails(client)
    assert (type(error).__name__, error.not_processed) == ("RateLimited", True)
    assert len(api.requests) == 2
