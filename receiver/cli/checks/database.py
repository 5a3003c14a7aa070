"""Checks of PostgreSQL itself, its connection, schema, clock and keys."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from typing import Any, Final

from sqlalchemy import Connection

from receiver.cli import session
from receiver.cli.checks.result import CheckResult
from receiver.database import clock, compatibility
from receiver.errors import DatabaseUnavailable, ReceiverError
from receiver.keyring import Keyring
from receiver.settings import Settings
from receiver.storage.registry.key_records import check_keys

_OLDEST_POSTGRESQL: Final = 14

# A check of the database.
DatabaseCheck = Callable[[Connection, Keyring | None], "CheckResult | list[CheckResult] | None"]


def run_checks(settings: Settings, checks: Sequence[DatabaseCheck], keyring: Keyring | None) -> list[CheckResult]:
    """Run checks of the database. Stops if the database cannot be reached, or if its schema does not fit."""
    found: list[CheckResult] = []
    try:
        with session.database(settings) as engine:
            for check in checks:
                with engine.connect() as connection:
                    result = check(connection, keyring)
                found += [result] if isinstance(result, CheckResult) else result or ()
                if any(each.name == "migrations" and each.state == "bad" for each in found):
                    break  # the next checks read our tables
    except DatabaseUnavailable as exc:
        found.append(CheckResult(name="database", state="bad", message=exc.problem, fix=exc.fix))
    except ReceiverError as exc:
        found.append(CheckResult(name="database", state="bad", message=str(exc), fix="see DATABASE_URL"))
    return found


def _shown(connection: Connection, setting: str) -> str:
    return str(connection.exec_driver_sql(f"SHOW {setting}").scalar_one())


def _version(connection: Connection, _: Keyring | None) -> CheckResult:
    version = _shown(connection, "server_version")
    if int(_shown(connection, "server_version_num")) < _OLDEST_POSTGRESQL * 10_000:
        return CheckResult(
            name="database",
            state="bad",
            message=f"PostgreSQL {version}",
            fix=f"upgrade to PostgreSQL {_OLDEST_POSTGRESQL} or later",
        )
    return CheckResult(name="database", state="ok", message=f"PostgreSQL {version} answers")


def _writable(connection: Connection, _: Keyring | None) -> CheckResult:
    if connection.exec_driver_sql("SELECT pg_is_in_recovery()").scalar_one():
        return CheckResult(
            name="writable",
            state="bad",
            message="this is a standby: nothing can be recorded, and every request gets 503",
            fix="point DATABASE_URL at the primary (target_session_attrs=read-write)",
        )
    if _shown(connection, "default_transaction_read_only") == "on":
        return CheckResult(
            name="writable",
            state="bad",
            message="the database is read-only: nothing can be recorded, and every request gets 503",
            fix="set default_transaction_read_only = off",
        )
    return CheckResult(name="writable", state="ok", message="a primary that accepts writes")


def _durable(connection: Connection, _: Keyring | None) -> CheckResult:
    lossy = [name for name in ("fsync", "full_page_writes", "synchronous_commit") if _shown(connection, name) == "off"]
    if lossy:
        return CheckResult(
            name="durability",
            state="bad",
            message=f"{', '.join(lossy)} off: a crash loses messages that were answered 200, "
            "and Redox does not resend them",
            fix="set to on",
        )
    standbys = connection.exec_driver_sql(
        "SELECT count(*) FILTER (WHERE sync_state = 'async'), count(*) FROM pg_stat_replication"
    ).one()
    if standbys[1] and standbys[0] == standbys[1]:
        return CheckResult(
            name="durability",
            state="warn",
            message="every standby is asynchronous: a failover can lose the latest messages, which were answered 200",
            fix="set synchronous_standby_names",
        )
    return CheckResult(name="durability", state="ok", message="committed data is on disk")


def _pooler(connection: Connection, _: Keyring | None) -> CheckResult | None:
    """Detect a proxy or pooler: PostgreSQL then sees another client port than ours."""
    raw: Any = connection.connection.driver_connection
    seen = connection.exec_driver_sql("SELECT inet_client_port()").scalar_one()
    if seen is None:  # a Unix socket
        return None
    with socket.socket(fileno=os.dup(raw.fileno())) as ours:
        if ours.getsockname()[1] == seen:
            return CheckResult(name="pooler", state="ok", message="direct connection to PostgreSQL")
    return CheckResult(
        name="pooler",
        state="warn",
        message="the connection goes through a proxy or pooler. With PgBouncer "
        "in transaction mode, workers miss notifications (LISTEN), and prepared statements fail",
        fix="set pool_mode = session, or connect to PostgreSQL directly",
    )


def _migrations(connection: Connection, _: Keyring | None) -> CheckResult:
    found = compatibility.schema_compatibility(connection)
    if found.state == "level":
        return CheckResult(name="migrations", state="ok", message=f"at revision {found.current}")
    return CheckResult(
        name="migrations",
        state="warn" if found.compatible else "bad",
        message=f"at revision {found.current or '(none)'}, but this release needs {found.wanted}",
        fix="redox-receiver db upgrade"
        if found.state == "behind"
        else "upgrade this host to the release that migrated it",
    )


def _keys(connection: Connection, keyring: Keyring | None) -> CheckResult | None:
    if keyring is None:
        return None
    try:
        check_keys(connection, keyring)
    except ReceiverError as exc:
        return CheckResult(name="keys", state="bad", message=str(exc), fix="see RECEIVER_KEYRING")
    return CheckResult(name="keys", state="ok", message="the keyring matches the database")


def _clock(connection: Connection, _: Keyring | None) -> CheckResult:
    ahead = clock.clock_skew(connection)
    if ahead is None:
        return CheckResult(
            name="clock",
            state="warn",
            message="the database took too long to return its time",
            fix="check its load and the network",
        )
    message = f"{clock.skew_message(ahead)} the database's clock, which decides every time limit"
    return (
        CheckResult(name="clock", state="ok", message=message)
        if abs(ahead) < clock.MAX_CLOCK_SKEW
        else CheckResult(name="clock", state="bad", message=message, fix=clock.FIX)
    )


CHECKS: Final = (_version, _writable, _durable, _pooler, _clock, _migrations, _keys)
