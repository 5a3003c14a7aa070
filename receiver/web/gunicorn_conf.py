"""gunicorn as it runs our listeners: `gunicorn -c python:receiver.web.gunicorn_conf`.

The admin listener takes the same, with its own application, `--bind`, `--workers` and `--worker-class`, for it is
Flask's whatever serves the public one. May not hold settings of its own: what an operator may choose are the RECEIVER_*
variables.
"""

import os
import resource
from typing import Any

import receiver.web.lean  # noqa: F401 - first of all

# isort: split
from receiver.settings import load
from receiver.web import listening
from receiver.web.gunicorn_logger import JsonLogger
from receiver.web.gunicorn_reload import Reload

_settings = load()

bind = _settings.bind
workers = _settings.receivers
if _settings.door == "asgi":
    wsgi_app, worker_class = "receiver.web.asgi:application", "receiver.web.gunicorn_asgi_worker.Worker"
else:
    wsgi_app, worker_class = "receiver.app:public_app()", "receiver.web.gunicorn_worker.Worker"
threads = _settings.threads
# Each connection takes a descriptor; the rest is for database, log and handlers.
worker_connections = max(2 * threads, min(1000, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 128))

# Threads and sockets only after fork. A worker that needs to be renewed now and then was not understood.
preload_app = False
max_requests = 0

# The heartbeat of the main loop, which waits for nothing; the file behind it must not be on a slow disk.
timeout = 60
_memory = "/dev/shm"  # noqa: S108 - the file has no name there
worker_tmp_dir = _memory if os.access(_memory, os.W_OK) else None
# Who has hung up is not answered, but what was begun for them is carried out.
asgi_disconnect_grace_period = 120
# A worker that stops answers what it has begun: five seconds for a message, longer for a responder.
graceful_timeout = 30
# Longer than proxies keep theirs (nginx: 60 s), so that none sends into a connection that we are closing.
keepalive = 75

limit_request_line = 4094
limit_request_fields = 100
limit_request_field_size = 8190

# Nothing that a peer says of itself is believed by the server; receiver.web.peers judges X-Forwarded-For.
forwarded_allow_ips = ""
forwarder_headers = ""
secure_scheme_headers: dict[str, str] = {}
proxy_protocol = "off"
header_map = "drop"
control_socket_disable = True

logger_class = JsonLogger
loglevel = _settings.log_level


def post_fork(_server: Any, worker: Any) -> None:
    """Note where the process listens, for its heartbeats. The signature is gunicorn's."""
    listening.note(worker.sockets)


def on_starting(server: Any) -> None:
    """Have a SIGHUP change nothing where what is configured anew does not hold. The signature is gunicorn's."""
    server.reload = Reload(server)
