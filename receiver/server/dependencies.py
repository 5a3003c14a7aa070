"""The undocumented names of gunicorn and uvicorn that we use, and a check that they exist.

Each dependency of this layer has an upper bound (pyproject.toml). If an installed version lacks one of these names, the
receiver refuses to start, because most of them would fail silently.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Mapping
from importlib import metadata
from types import FunctionType
from typing import Final

import structlog
from gunicorn.arbiter import Arbiter  # type: ignore[import-untyped]  # gunicorn ships no types
from gunicorn.glogging import Logger  # type: ignore[import-untyped]  # gunicorn ships no types
from gunicorn.workers.base import Worker  # type: ignore[import-untyped]  # gunicorn ships no types
from gunicorn.workers.workertmp import WorkerTmp  # type: ignore[import-untyped]  # gunicorn ships no types
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import Server, ServerState
from uvicorn_worker import UvicornWorker  # type: ignore[import-untyped]  # it ships no types

log: Final = structlog.get_logger(__name__)

# Distribution → classes and their members.
UNDOCUMENTED: Final[Mapping[str, tuple[tuple[type, tuple[str, ...]], ...]]] = {
    "gunicorn": (
        (  # receiver.server.reload
            Arbiter,
            (
                "SIG_QUEUE",
                "WORKERS",
                "WORKER_BOOT_ERROR",
                "app",
                "cfg",
                "kill_worker",
                "num_workers",
                "reap_workers",
                "reload",
                "setup",
                "spawn_worker",
                "worker_class",
            ),
        ),
        (WorkerTmp, ("close", "last_update")),
        # receiver.server.worker, receiver.server.logger
        (Worker, ("age", "alive", "cfg", "handle_exit", "notify", "ppid", "sockets", "wsgi")),
        (Logger, ("close_on_exec", "error_log", "reopen_files", "setup")),
    ),
    "uvicorn": (
        # receiver.server.worker
        (Server, ("lifespan", "server_state", "servers", "should_exit", "shutdown", "startup")),
        (ServerState, ("connections",)),
        (Config, ("http_protocol_class",)),
        (
            HttpToolsProtocol,
            (  # receiver.server.protocol
                "connection_lost",
                "connection_made",
                "data_received",
                "eof_received",
                "on_body",
                "on_header",
                "on_headers_complete",
                "on_message_begin",
                "on_message_complete",
                "on_url",
                "parser",
                "shutdown",
            ),
        ),
    ),
    "uvicorn-worker": ((UvicornWorker, ("CONFIG_KWARGS", "callback_notify", "config", "init_signals", "run")),),
}


def missing() -> list[str]:
    """Return a sentence for each missing name."""
    return [
        f"{name} {metadata.version(name)} has no {owner.__qualname__}.{member}: install the version of "
        "deploy/requirements.txt"
        for name, owners in UNDOCUMENTED.items()
        for owner, members in owners
        for member in members
        if not _has(owner, member)
    ]


def check() -> None:
    """Exit with a log line if a name is missing."""
    if found := missing():
        log.error("receiver.not_started", error="; ".join(found))
        sys.exit(1)


def _has(owner: type, member: str) -> bool:
    """Whether the class has the member, or one of its methods sets it on its instances."""
    return hasattr(owner, member) or any(
        each.opname == "STORE_ATTR" and each.argval == member
        for method in vars(owner).values()
        if isinstance(method, FunctionType)
        for each in dis.get_instructions(method)
    )
