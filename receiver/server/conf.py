"""gunicorn's configuration for our listeners: `gunicorn -c python:receiver.server.conf`.

The admin listener uses it too, with its own application, `--bind` and `--workers`. Must not hold settings of its own:
operators choose with the RECEIVER_* variables.
"""

import os
import resource
from typing import Any

from receiver.metrics.directory import share_counters
from receiver.server import dependencies
from receiver.server.logger import JsonLogger
from receiver.server.reload import Reload
from receiver.settings import load_settings
from receiver.web import listening

_settings = load_settings()
share_counters(_settings.data_dir)  # before a worker imports the metrics

bind = _settings.bind
workers = _settings.receivers
wsgi_app, worker_class = "receiver.asgi:application", "receiver.server.worker.Worker"
threads = _settings.threads
# Each connection takes a file descriptor; the rest is for database, log and handlers.
worker_connections = max(2 * threads, min(1000, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 128))

# Threads and sockets are made after fork. Restarting workers after so many requests would hide a leak.
preload_app = False
max_requests = 0

# The heartbeat of the event loop, which never blocks; the file behind it must not be on a slow disk.
timeout = 60
_memory = "/dev/shm"  # noqa: S108 - the file has no name there
worker_tmp_dir = _memory if os.access(_memory, os.W_OK) else None
# A worker that stops finishes its requests: five seconds for a message, longer for a responder.
graceful_timeout = 30
# Longer than proxies keep idle connections (nginx: 60 s), so that none sends into a connection that we close.
keepalive = 75

# No socket that accepts commands for gunicorn.
control_socket_disable = True

logger_class = JsonLogger
loglevel = _settings.log_level


def post_fork(_server: Any, worker: Any) -> None:
    """Note the addresses of the process, for its heartbeats. The signature is gunicorn's."""
    listening.note(worker.sockets)


def on_starting(server: Any) -> None:
    """Check the dependencies, and replace gunicorn's reload by ours. The signature is gunicorn's."""
    dependencies.check()
    server.reload = Reload(server)
