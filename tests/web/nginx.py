"""A real nginx in front of a receiver, with deploy/nginx.conf except for ports, paths and certificates."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil
import pytest
import trustme

from tests.support.processes import end
from tests.support.server import ROOT, Answer, Wire
from tests.support.waiting import until

CONFIGURATION: Final = ROOT / "deploy" / "nginx.conf"
# The address that nginx connects from, for RECEIVER_TRUSTED_PROXIES. Clients that bypass nginx have another.
ADDRESS: Final = "127.0.0.2"
MISSING: Final = "!! nginx IS NOT HERE (on Debian: apt-get install nginx-light). Nothing behind a proxy is shown."


@dataclass(frozen=True, kw_only=True, slots=True)
class Nginx:
    """A running nginx."""

    port: int
    process: subprocess.Popen[bytes]
    directory: Path
    tls: ssl.SSLContext

    def wire(self, *, timeout: float = 120.0, source: str = "127.0.0.1") -> Wire:
        """A new connection over TLS."""
        return Wire(self.port, timeout=timeout, tls=self.tls, source=source)

    def ask(self, data: bytes) -> Answer:
        """The reply to these bytes, on a new connection."""
        with self.wire() as wire:
            return wire.send(data).answer()

    def workers(self) -> list[psutil.Process]:
        """Its worker processes."""
        return list(psutil.Process(self.process.pid).children())

    def text(self) -> str:
        """All its output, in its logs and elsewhere."""
        return "".join(path.read_text() for path in sorted(self.directory.glob("*.log")))

    def lines(self) -> list[dict[str, Any]]:
        """Its access log."""
        return [json.loads(line) for line in (self.directory / "redox.log").read_text().splitlines()]


def found() -> str | None:
    """The path of nginx; None if it is not installed."""
    return shutil.which("nginx", path=os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin")))


def program() -> str:
    """The path of nginx. Skips the test if it is not installed."""
    path = found()
    if path is None:
        pytest.skip(MISSING)
    return path


def certificates(directory: Path) -> trustme.CA:
    """An authority, and the certificate of 127.0.0.1 that it has signed, as files that nginx reads."""
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    for number, blob in enumerate(issued.cert_chain_pems):
        blob.write_to_path(directory / "fullchain.pem", append=number > 0)
    issued.private_key_pem.write_to_path(directory / "privkey.pem")
    authority.cert_pem.write_to_path(directory / "authority.pem")
    return authority


def configured(directory: Path, *, port: int, upstream: int, changes: Mapping[str, str]) -> Path:
    """deploy/nginx.conf with these ports, and every path in `directory`; what is replaced must be there, once.

    `changes` are made after that.
    """
    text = CONFIGURATION.read_text()
    # Directories that Debian's build of nginx makes at its start, used or not.
    unused = "".join(f"{name}_temp_path {directory}/{name}; " for name in ("fastcgi", "uwsgi", "scgi"))
    own = {
        "user www-data;": f"user {psutil.Process().username()};",
        "pid /run/nginx.pid;": f"pid {directory}/nginx.pid;",
        "error_log /var/log/nginx/error.log warn;": f"error_log {directory}/error.log warn;",
        "error_log /var/log/nginx/error.log emerg;": f"error_log {directory}/error.log emerg;",
        "access_log /var/log/nginx/redox.log redox;": f"access_log {directory}/redox.log redox;",
        "client_body_temp_path /var/lib/nginx/body;": f"client_body_temp_path {directory}/body; {unused}",
        "proxy_temp_path /var/lib/nginx/proxy;": f"proxy_temp_path {directory}/proxy;",
        "server 127.0.0.1:8080 max_fails=0;": f"server 127.0.0.1:{upstream} max_fails=0;",
        "listen 443 ssl default_server;": f"listen 127.0.0.1:{port} ssl default_server;",
        "listen [::]:443 ssl default_server;": "",
        "proxy_connect_timeout 2s;": f"proxy_connect_timeout 2s; proxy_bind {ADDRESS};",
        "/etc/nginx/redox/fullchain.pem": f"{directory}/fullchain.pem",
        "/etc/nginx/redox/privkey.pem": f"{directory}/privkey.pem",
    }
    for old, new in (own | dict(changes)).items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = directory / "nginx.conf"
    path.write_text(text)
    return path


def with_mutual_tls(directory: Path, secret: str) -> dict[str, str]:
    """The changes for a client certificate of Redox: the commented directives of deploy/nginx.conf."""
    commented = re.findall(r"(?m)^ +(#ssl_[a-z_]+ [^\n]*;)$", CONFIGURATION.read_text())
    assert len(commented) == 3
    return {
        line: line[1:].replace("/etc/nginx/redox/redox-authority.pem", f"{directory}/authority.pem")
        for line in commented
    } | {'X-Proxy-Secret "";': f'X-Proxy-Secret "{secret}";'}


def judged(directory: Path, changes: Mapping[str, str]) -> str:
    """The output of `nginx -t` for the configuration with these changes."""
    path = program()
    certificates(directory)
    with _listener() as listener:
        configuration = configured(directory, port=listener.getsockname()[1], upstream=1, changes=changes)
        done: subprocess.CompletedProcess[str] = subprocess.run(
            [path, "-t", "-c", configuration],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            **_handed_over(listener),
        )
    return done.stdout + done.stderr


@contextmanager
def proxying(
    directory: Path, upstream: int, *, changes: Mapping[str, str] | None = None, authority: trustme.CA | None = None
) -> Iterator[Nginx]:
    """An nginx on a random port in front of the receiver at port `upstream`, while the block runs.

    Its files are in `directory`. `authority`: the authority of the certificate there (see `certificates`).
    """
    path = program()
    tls = ssl.create_default_context()
    (authority or certificates(directory)).configure_trust(tls)
    output = directory / "output.log"
    with _listener() as listener, output.open("wb") as file:
        port = listener.getsockname()[1]
        configuration = configured(directory, port=port, upstream=upstream, changes=changes or {})
        process = subprocess.Popen(
            [path, "-c", configuration, "-g", "daemon off;"],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            **_handed_over(listener),
        )
    nginx = Nginx(port=port, process=process, directory=directory, tls=tls)
    try:
        until(lambda: _alive(nginx) or process.poll() is not None)
        assert process.poll() is None, nginx.text()
        yield nginx
    finally:
        end(process, 30)


def _listener() -> socket.socket:
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    # nginx leaves an inherited socket as it is. If it blocks, a worker that accepts too late hangs with its clients.
    listener.setblocking(False)
    return listener


def _handed_over(listener: socket.socket) -> dict[str, Any]:
    """The variable by which nginx inherits a listening socket: the port is reserved before nginx starts."""
    return {"pass_fds": [listener.fileno()], "env": {"NGINX": f"{listener.fileno()};", "PATH": os.defpath}}


def _alive(nginx: Nginx) -> bool:
    """Whether nginx answers, with or without the receiver."""
    try:
        return nginx.ask(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n").status in (200, 502)
    except (OSError, EOFError):
        return False
