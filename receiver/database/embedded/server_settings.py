"""What the embedded server is called, the settings it starts with, and the environment of its processes."""

from __future__ import annotations

from collections.abc import Mapping

ROLE = "redox_receiver"
DATABASE = "redox_receiver"

# Only names the socket file. It is always passed explicitly, so that a PGPORT in the environment changes nothing.
PORT = "5432"

SETTINGS: Mapping[str, str] = {
    "listen_addresses": "",
    "port": PORT,
    "unix_socket_permissions": "0700",
    "max_connections": "100",
    "shared_buffers": "128MB",
    "fsync": "on",
    "full_page_writes": "on",
    "synchronous_commit": "on",
    "jit": "off",  # costs more than it saves on short statements
    "timezone": "UTC",
    "log_timezone": "UTC",
    "cluster_name": "redox-receiver",
    # An error's first line can quote a value as well as its detail can (`invalid input syntax … "Doe"`), so errors of
    # statements are not logged at all: `log` ranks above `error`. Log lines are terse and name no statement.
    "log_min_messages": "log",
    "log_min_error_statement": "panic",
    "log_error_verbosity": "terse",
    "log_statement": "none",
    "log_min_duration_statement": "-1",
    "log_parameter_max_length": "0",
    "log_parameter_max_length_on_error": "0",
    "log_lock_waits": "off",
    "log_checkpoints": "off",
    "logging_collector": "off",
}

# Nothing of the caller's environment reaches PostgreSQL: PGDATA, PGOPTIONS and others would change its behavior.
ENVIRONMENT: Mapping[str, str] = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}
