"""The receiver behind nginx with deploy/nginx.conf: what the proxy does, and what it must not do."""

from __future__ import annotations

import itertools
import re
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256

from receiver.server import conf
from tests.support.server import ROOT, Server, Wire, post, serving
from tests.support.site import Site, message, sent
from tests.support.waiting import until
from tests.web import nginx as proxies
from tests.web.nginx import ADDRESS, CONFIGURATION, Nginx, proxying

MIB = 1024 * 1024
SECRET = "what the proxy alone knows"
# Seconds. Shorter than the deadlines of a silent client at the receiver and at nginx.
SOON = 5.0


@pytest.fixture(scope="module")
def server(site: Site) -> Iterator[Server]:
    """A receiver with few threads that trusts nginx, and no other address of this machine."""
    site.add("bank")
    with serving(
        site.directory, site.environment | {"RECEIVER_TRUSTED_PROXIES": ADDRESS, "RECEIVER_THREADS": "4"}
    ) as server:
        yield server


@pytest.fixture(scope="module")
def nginx(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    """nginx in front of it, with the receiver as two servers: nginx never marks a single server as failed."""
    upstream = f"server 127.0.0.1:{server.port} max_fails=0;"
    with proxying(tmp_path_factory.mktemp("nginx"), server.port, changes={upstream: f"{upstream} {upstream}"}) as nginx:
        yield nginx


@pytest.mark.parametrize("mutual", [False, True])
def test_the_configuration_is_valid(tmp_path: Path, mutual: bool) -> None:
    """`nginx -t` reports no warning, with and without mutual TLS."""
    output = proxies.judged(tmp_path, proxies.with_mutual_tls(tmp_path, SECRET) if mutual else {})
    assert "test is successful" in output
    assert not re.search(r"\[(warn|error|crit|alert|emerg)\]", output)


def test_the_receiver_keeps_connections_longer() -> None:
    """nginx closes an idle connection before the receiver does: no message is sent into one that closes."""
    keepalive = re.search(r"keepalive 32;\s+keepalive_timeout (\d+)s;", CONFIGURATION.read_text())
    assert keepalive is not None
    assert int(keepalive[1]) < conf.keepalive


def test_the_readme_points_to_it() -> None:
    """The documents name the file."""
    for name in ("README.md", "deploy/authentication.md"):
        assert "deploy/nginx.conf" in (ROOT / name).read_text()


def test_a_feed(site: Site, nginx: Nginx) -> None:
    """Many messages on one connection, with a length or chunked. The peer is the client, whatever it claims."""
    before = site.now()
    body = message()
    chunked = sent(site, b"", {"content_length": None, "transfer_encoding": "chunked"}, to="bank")
    with nginx.wire(source="127.0.0.9") as wire:
        for _ in range(5):
            assert wire.send(sent(site, x_forwarded_for="203.0.113.9", to="bank")).answer().status == 200
        assert wire.send(chunked + f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n").answer().status == 200
    peers = "SELECT DISTINCT peer FROM audit_events WHERE at > :before AND destination = 'bank'"
    assert site.rows(peers, before=before) == [("127.0.0.9",)]


def test_continue(site: Site, nginx: Nginx) -> None:
    """A client with "Expect: 100-continue" gets 100 from nginx."""
    body = message()
    head, _, _ = sent(site, body, expect="100-continue").partition(b"{")
    with nginx.wire() as wire:
        assert wire.send(head).answer().status == 100
        assert wire.send(body).answer().status == 200


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls(nginx: Nginx, version: ssl.TLSVersion) -> None:
    """TLS 1.2 and 1.3 with forward secrecy, and only HTTP/1.1."""
    tls = ssl.create_default_context()
    tls.load_verify_locations(nginx.directory / "authority.pem")
    tls.minimum_version = tls.maximum_version = version
    tls.set_alpn_protocols(["h2", "http/1.1"])
    with Wire(nginx.port, tls=tls) as wire:
        assert isinstance(wire.socket, ssl.SSLSocket)
        cipher = wire.socket.cipher()
        assert cipher is not None
        assert cipher[0].startswith(("ECDHE-", "TLS_"))
        assert wire.socket.selected_alpn_protocol() == "http/1.1"
        assert wire.send(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n").answer().body == b"ok\n"


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated")
def test_old_tls(nginx: Nginx) -> None:
    """Older versions of TLS are refused."""
    tls = ssl.create_default_context()
    tls.load_verify_locations(nginx.directory / "authority.pem")
    tls.minimum_version = tls.maximum_version = ssl.TLSVersion.TLSv1_1
    tls.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises(ssl.SSLError):
        Wire(nginx.port, tls=tls)


@pytest.mark.parametrize(
    "target", ["/", "/readyz", "/metrics", "/redox", "/oauth", "/x/redox/lab", "/redox/../readyz", "/livez/x"]
)
def test_nothing_else(site: Site, nginx: Nginx, target: str) -> None:
    """All other paths do not reach the receiver, even with the right token."""
    answer = nginx.ask(sent(site).replace(b"/redox/lab", target.encode(), 1))
    assert answer.status == 404
    assert answer.headers["server"] == "nginx"  # nginx's own reply, without a version


def test_the_other_public_paths(site: Site, nginx: Nginx) -> None:
    """The token endpoint, the public keys and the liveness path reach the receiver."""
    for raw, status in (
        (post("/oauth/lab/token", b"{}"), 401),
        (b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n", 200),
        (b"GET /.well-known/jwks.json HTTP/1.1\r\nHost: x\r\n\r\n", 200),
    ):
        answer = nginx.ask(raw)
        assert (answer.status, answer.headers["server"]) == (status, "redox-receiver")


def test_no_query_is_logged(site: Site, server: Server, nginx: Nginx, tmp_path: Path) -> None:
    """No log has the token of a handshake by GET, with or without the receiver, nor a client's other path."""
    token = site.tokens["lab"]
    handshake = f"GET /redox/lab?challenge=CANARY&verification-token={token} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    assert nginx.ask(handshake).body == b"CANARY"
    assert nginx.ask(handshake.replace(b"GET /redox/lab", b"GET /CANARY", 1)).status == 404
    assert nginx.ask(handshake.replace(b"?", b"?" + 20_000 * b"x", 1)).status in (400, 414)
    assert nginx.ask(handshake.replace(b"Host", b"Content-Length: 90000000\r\nHost")).status == 413
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    with proxying(tmp_path, port) as alone:
        assert alone.ask(handshake).status == 502
        [line] = until(lambda: [line for line in alone.lines() if line["path"] == "/redox/lab"])
        assert (line["status"], line["upstream_status"]) == (502, "502")
    for text in (nginx.text(), alone.text(), server.text()):
        assert token not in text
        assert "CANARY" not in text


def test_large_bodies_with_a_wrong_token(site: Site, server: Server, nginx: Nginx) -> None:
    """While bodies of 30 MB with a wrong token arrive, four at a time, every valid message is answered 200."""
    [worker] = server.workers()
    resident = worker.memory_info().rss
    body = 30 * MIB * b"x"
    refused: list[int] = []

    def flood() -> None:
        refused.extend(nginx.ask(sent(site, body, verification_token="wrong" * 8)).status for _ in range(2))

    threads = [threading.Thread(target=flood) for _ in range(4)]
    for thread in threads:
        thread.start()
    true = []
    while any(thread.is_alive() for thread in threads):
        with nginx.wire() as wire:  # nginx closes a connection after a thousand requests
            true += [wire.send(sent(site)).answer().status for _ in range(10)]
    for thread in threads:
        thread.join()
    assert len(true) > 2
    assert set(true) == {200}
    assert len(refused) == 8
    assert set(refused) <= {401, 502}
    assert worker.memory_info().rss - resident < 30 * MIB
    # And afterwards: nginx has not marked the receiver as failed.
    assert [nginx.ask(sent(site)).status for _ in range(5)] == 5 * [200]


def test_slow_clients(site: Site, server: Server, nginx: Nginx) -> None:
    """While 200 clients are slow in every way, others are answered, and the slow requests do not reach the receiver."""
    whole = sent(site)
    head, _, _ = whole.partition(b"\r\n\r\n")
    slow = [
        b"",
        b"POST /re",
        head[:60],
        head,
        head + b"\r\n\r\n{",
        post("/redox/lab", b"{", content_length="8000"),
        sent(site, b"", {"content_length": None, "transfer_encoding": "chunked"}) + b"5\r\n{",
        sent(site, verification_token="wrong" * 8),  # answered, and does not read the reply
    ]
    [worker] = server.workers()
    wires = [nginx.wire(timeout=60).send(start) for start, _ in zip(itertools.cycle(slow), range(200), strict=False)]
    until(lambda: sum(len(each.net_connections()) for each in nginx.workers()) >= 200)
    for _ in range(20):
        with nginx.wire(timeout=SOON) as wire:
            assert wire.send(sent(site)).answer().status == 200
    # Only idle connections that nginx keeps: it has forwarded no unfinished request.
    assert len(worker.net_connections()) < 100
    for wire in wires:
        wire.socket.close()
    assert nginx.ask(sent(site)).status == 200


def test_mutual_tls(site: Site, server: Server, tmp_path: Path) -> None:
    """With the commented directives, a certificate of the authority is accepted; a header that claims one is not."""
    authority = proxies.certificates(tmp_path)
    issued = authority.issue_cert("client.redox.example")
    certificate = x509.load_pem_x509_certificate(issued.cert_chain_pems[0].bytes())
    site.add("mutual", require=["mtls"])
    site.registration.add_credential(
        "mutual",
        datetime.now(UTC),
        "mtls",
        {"proxy": "nginx", "san": "client.redox.example", "fingerprint": certificate.fingerprint(SHA256()).hex()},
        SECRET.encode(),
        label=None,
        expires_at=None,
    )
    claimed: dict[str, str | None] = {
        "ssl_client_verify": "SUCCESS",
        "x_proxy_secret": SECRET,
        "ssl_client_cert": issued.cert_chain_pems[0].bytes().decode().replace("\n", "%0A"),
    }
    with proxying(
        tmp_path, server.port, changes=proxies.with_mutual_tls(tmp_path, SECRET), authority=authority
    ) as nginx:
        issued.configure_cert(nginx.tls)
        until(lambda: nginx.ask(sent(site, to="mutual")).status == 200)
        bare = ssl.create_default_context()
        authority.configure_trust(bare)
        with Wire(nginx.port, tls=bare) as wire:
            assert wire.send(sent(site, to="mutual")).answer().status == 401
            assert wire.send(sent(site, None, claimed, to="mutual")).answer().status == 401
            assert wire.send(sent(site, to="lab")).answer().status == 200
        for stranger in (authority, trustme.CA()):
            other = ssl.create_default_context()
            authority.configure_trust(other)
            stranger.issue_cert("other.example").configure_cert(other)
            with Wire(nginx.port, tls=other) as wire:
                answer = wire.send(sent(site, None, claimed, to="mutual")).answer()
                assert answer.status == (401 if stranger is authority else 400)
        until(lambda: any(line["certificate"].startswith("FAILED:") for line in nginx.lines()))
        assert SECRET not in nginx.text()


# --- two hosts


@contextmanager
def meanwhile(server: Server, directory: Path, other: int) -> Iterator[Nginx]:
    """nginx in front of two hosts: one at port `other`, and a running receiver."""
    upstream = f"server 127.0.0.1:{server.port} max_fails=0;"
    with proxying(
        directory, server.port, changes={upstream: f"server 127.0.0.1:{other} max_fails=0; {upstream}"}
    ) as nginx:
        yield nginx


def test_a_host_that_does_not_run(site: Site, server: Server, tmp_path: Path) -> None:
    """If one of two hosts does not run, the other answers every message 200."""
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    with meanwhile(server, tmp_path, port) as nginx:
        assert [nginx.ask(sent(site)).status for _ in range(40)] == 40 * [200]


@contextmanager
def dying(after: int, *, reset: bool) -> Iterator[tuple[int, list[int]]]:
    """A host that reads this many bytes of each request and dies; yields its port and the bytes that it read."""
    took: list[int] = []
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listener:

        def serve() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                with client:
                    size = len(start := client.recv(3)) if after else 0
                    if size and start != b"POS":  # a liveness probe of nginx
                        continue
                    while size < after and (data := client.recv(min(65536, after - size))):
                        size += len(data)
                    took.append(size)
                    if reset:
                        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1], took
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("after", [0, 100, MIB])
def test_a_host_that_dies_while_it_reads_a_message(
    site: Site, server: Server, tmp_path: Path, after: int, reset: bool
) -> None:
    """It has read nothing, a part of the head, or a part of the body: the other answers 200 and records it once."""
    body = message(Extra=(2 * MIB if after == MIB else 10) * "x")
    with dying(after, reset=reset) as (port, took), meanwhile(server, tmp_path, port) as nginx:
        while not took or sum(took) < after:
            assert nginx.ask(sent(site, body)).status == 200
        assert nginx.ask(sent(site, body)).status == 200
    assert site.rows("SELECT count(*) FROM messages WHERE digest = :digest", digest=site.digest(body)) == [(1,)]


def test_a_host_that_dies_after_it_has_recorded_a_message(site: Site, server: Server, tmp_path: Path) -> None:
    """It dies between COMMIT and reply: the other host answers 200 for a duplicate, and the message is stored once."""
    failing = {"RECEIVER_FAILPOINTS": "ledger.committed=kill", "RECEIVER_TRUSTED_PROXIES": ADDRESS}
    with serving(site.directory, site.environment | failing) as other, meanwhile(server, tmp_path, other.port) as nginx:
        bodies = [message() for _ in range(8)]
        for body in bodies:
            until(lambda: other.process.poll() is None and _alive(other))
            assert nginx.ask(sent(site, body)).status == 200
        assert "failpoint.triggered" in other.text()
        killed = other.text().count("failpoint.triggered")
    for body in bodies:
        [(uuid,)] = site.rows("SELECT uuid FROM messages WHERE digest = :digest", digest=site.digest(body))
        assert uuid
    duplicates = site.rows("SELECT count(*) FROM audit_events WHERE outcome = 'duplicate'")
    assert duplicates[0][0] >= killed


def test_one_address_has_a_quarter_of_the_connections(site: Site, server: Server, tmp_path: Path) -> None:
    """An address with too many unfinished bodies gets 503 from nginx; another address is served."""
    slow = sent(site, b"", content_length="5000")
    with proxying(tmp_path, server.port, changes={"limit_conn clients 1024;": "limit_conn clients 8;"}) as nginx:

        def status() -> int:
            with nginx.wire(source="127.0.0.9") as wire:
                return wire.send(sent(site)).answer().status

        held = [nginx.wire(source="127.0.0.9").send(slow) for _ in range(8)]
        until(lambda: status() == 503)
        assert [nginx.ask(sent(site)).status for _ in range(5)] == 5 * [200]
        for wire in held:
            wire.socket.close()
        until(lambda: status() == 200)


def _alive(server: Server) -> bool:
    try:
        with server.wire(timeout=2) as wire:
            return wire.send(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n").answer().status == 200
    except (OSError, EOFError):
        return False
