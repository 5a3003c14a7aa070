"""The checks of `check` and `db check`. Each result has a stable name and, for a problem, its fix.

Must not change anything. Starts nothing but the embedded PostgreSQL, if that does not run.
"""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import ssl
import stat
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from ipaddress import ip_address, ip_network
from typing import Any, Final, Literal
from urllib.parse import urlsplit

import click
from sqlalchemy import Connection

from receiver import findings, settings_variables
from receiver import keyring as keyrings
from receiver import settings as table
from receiver.cli import output, session
from receiver.database import clock, compatibility
from receiver.errors import DatabaseUnavailable, ReceiverError
from receiver.fault_injection import faults
from receiver.findings.formatting import count
from receiver.keyring import Keyring
from receiver.settings import Settings
from receiver.storage.operations import backups, queries
from receiver.storage.registry.handler_changes import HandlerSpec
from receiver.storage.registry.key_records import check_keys
from receiver.worker import discovery

State = Literal["ok", "warn", "bad"]

# Findings of `status` that `check` replaces by closer checks of its own.
_OWN: Final = frozenset({"clock", "no_worker", "no_credential", "credential_expires"})

_OLDEST_POSTGRESQL: Final = 14
_ENDS_SOON: Final = timedelta(days=30)
# A trusted network with a shorter prefix than this, in bits, gets a warning.
_NARROWEST_4: Final = 8
_NARROWEST_6: Final = 32
_LEAST_DISK: Final = 2 * 1024**3
_CERTIFICATE_DAYS: Final = 14


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """The result of one check, and the setting or command that fixes a problem. `name` is a contract."""

    name: str
    state: State
    message: str
    fix: str | None = None


# A check of the database.
_Check = Callable[[Connection, Keyring | None], "Finding | list[Finding] | None"]


def report(found: Sequence[Finding], *, as_json: bool) -> None:
    """Print the results. Exits with status 1 if one is bad."""
    if as_json:
        output.document([asdict(each) for each in found])
    else:
        width = max(len(each.name) for each in found)
        for each in found:
            label = {"ok": "OK", "warn": "WARN", "bad": "BAD"}[each.state]
            colour = {"ok": "green", "warn": "yellow", "bad": "red"}[each.state]
            begin = f"{label:<4}  {each.name:<{width}}  "
            text = output.escaped(each.message) + (f" → {output.escaped(each.fix)}" if each.fix else "")
            room = output.width()
            lines = (
                [text]
                if room is None
                else textwrap.wrap(text, max(20, room - len(begin)), break_long_words=False, break_on_hyphens=False)
            )
            click.echo(click.style(label, fg=colour) + begin[len(label) :] + f"\n{' ' * len(begin)}".join(lines))
    if any(each.state == "bad" for each in found):
        click.get_current_context().exit(1)


def of_everything(url: str | None) -> list[Finding]:
    """Run all checks of this host. `url`: the public URL of the receiver, checked from here if given."""
    try:
        settings = table.load_settings()
    except ReceiverError as exc:
        return [
            Finding(name="settings", state="bad", message="; ".join(str(exc).splitlines()), fix="correct the variable")
        ]
    found = [
        _settings(),
        *_failpoints(settings),
        *_files(settings),
        *_proxies(settings),
        *_account(settings),
        _disk(settings),
    ]
    keyring, keyring_finding = _keyring(settings)
    found.append(keyring_finding)
    found += _with_database(settings, [*_DATABASE, *_WORK, partial(_listening, settings), _status], keyring)
    if not any(each.name == "listener" for each in found):
        found += _listeners({"receiver": [settings.bind], "admin": [settings.admin_bind]}, "would listen at")
    return [*found, *(() if url is None else _outside(url))]


def of_database(settings: Settings) -> list[Finding]:
    """Run only the checks of the database."""
    return _with_database(settings, _DATABASE, _keyring(settings)[0])


# --- this host


def _settings() -> Finding:
    """An unknown RECEIVER_* variable is misspelled."""
    if (found := settings_variables.misspelt()) is None:
        return Finding(name="settings", state="ok", message="every RECEIVER_* variable is known")
    return Finding(
        name="settings",
        state="bad",
        message=f"unknown variable {found}",
        fix="correct the name; .env.example lists them all",
    )


def _failpoints(settings: Settings) -> Iterator[Finding]:
    if settings.failpoints:
        message = ", ".join(f"{name} ({order.action})" for name, order in faults.parse(settings.failpoints).items())
        yield Finding(
            name="failpoints",
            state="bad",
            message=f"fault injection is on: processes started here fail at {message}",
            fix=f"remove {faults.VARIABLE} from the environment",
        )


def _files(settings: Settings) -> Iterator[Finding]:
    directory, env_file = settings.data_dir, table.env_file(os.environ)
    if not directory.is_dir():
        yield Finding(
            name="data_directory",
            state="warn",
            message=f"{directory} does not exist yet",
            fix="run `redox-receiver up`, which creates it",
        )
    elif directory.stat().st_mode & 0o067:
        yield Finding(
            name="data_directory",
            state="bad",
            message=f"other users have access to {directory}",
            fix=f"chmod go-rw,o-x {directory}",
        )
    else:
        yield Finding(name="data_directory", state="ok", message=str(directory))
    if env_file.is_file() and stat.S_IMODE(env_file.stat().st_mode) & 0o077:
        yield Finding(
            name="env_file", state="bad", message=f"other users have access to {env_file}", fix=f"chmod 600 {env_file}"
        )


def _listeners(served: Mapping[str, Sequence[str]], how: str) -> Iterator[Finding]:
    """Check the addresses of this host by role (`receiver`, `admin`). `how` begins each message."""
    for address in served["receiver"]:
        if all(map(_loopback, address.split(", "))):
            yield Finding(name="listener", state="ok", message=f"{how} {address}, for a TLS proxy on this host")
        else:
            yield Finding(
                name="listener",
                state="warn",
                message=f"{how} {address}, which is plain HTTP and not on loopback",
                fix="allow only your TLS proxy to reach it, or set RECEIVER_BIND=127.0.0.1:PORT",
            )
    for address in served["admin"]:
        if all(map(_loopback, address.split(", "))):
            yield Finding(name="admin_listener", state="ok", message=f"{how} {address}")
        else:
            yield Finding(
                name="admin_listener",
                state="warn",
                message=f"{how} {address}, which is not on loopback",
                fix="allow only your monitoring to reach it, or set RECEIVER_ADMIN_BIND=127.0.0.1:PORT",
            )


def _proxies(settings: Settings) -> Iterator[Finding]:
    """A trusted proxy can claim any client address and any client certificate."""
    wide = [
        each
        for each in settings.trusted_proxies
        if (net := ip_network(each, strict=False)).prefixlen < (_NARROWEST_4 if net.version == 4 else _NARROWEST_6)
    ]
    if wide:
        yield Finding(
            name="trusted_proxies",
            state="warn",
            message="RECEIVER_TRUSTED_PROXIES trusts "
            f"{', '.join(wide)}: every host there can claim any client address and, with the proxy's "
            "secret, any client certificate",
            fix="set it to the addresses of your proxies",
        )


def _account(settings: Settings) -> Iterator[Finding]:
    """Check the account of the embedded PostgreSQL, when root starts it."""
    if (
        settings.database_url is None
        and os.geteuid() == 0
        and (settings.postgres_account == "nobody" or (settings.postgres_account is None and not _exists("postgres")))
    ):
        yield Finding(
            name="postgres_account",
            state="warn",
            message="the embedded PostgreSQL runs as nobody, an account "
            "that other programs use: they can read and change its files",
            fix="create a dedicated account "
            "(adduser --system postgres) before the first start, or set RECEIVER_POSTGRES_ACCOUNT",
        )


def _exists(account: str) -> bool:
    try:
        pwd.getpwnam(account)
    except KeyError:
        return False
    return True


def _loopback(bind: str) -> bool:
    host = bind.rpartition(":")[0].strip("[]")
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _disk(settings: Settings) -> Finding:
    place = next(each for each in (settings.data_dir, *settings.data_dir.resolve().parents) if each.is_dir())
    free = shutil.disk_usage(place).free
    message = f"{free / 1024**3:.1f} GiB free at {place}"
    return (
        Finding(name="disk", state="ok", message=message)
        if free >= _LEAST_DISK
        else Finding(
            name="disk",
            state="bad",
            message=message,
            fix="free disk space: when the disk is full, every request gets 503",
        )
    )


def _keyring(settings: Settings) -> tuple[Keyring | None, Finding]:
    path = settings.keyring_path
    try:
        keyring = keyrings.load_keyring(path)
    except ReceiverError as exc:
        return None, Finding(name="keyring", state="bad", message=str(exc), fix="see RECEIVER_KEYRING")
    if any((path.parent / name).exists() for name in (backups.MANIFEST, backups.DUMP)):
        return keyring, Finding(
            name="keyring",
            state="bad",
            message=f"{path} is in the same directory as a backup of the database",
            fix="store them in different places: together they defeat the encryption",
        )
    held = count(len(keyring.keys), "key", "keys")
    return keyring, Finding(name="keyring", state="ok", message=f"{path}: {held}")


# --- the database


def _with_database(settings: Settings, checks: Sequence[_Check], keyring: Keyring | None) -> list[Finding]:
    """Run checks of the database. Stops if the database cannot be reached, or if its schema does not fit."""
    found: list[Finding] = []
    try:
        with session.database(settings) as engine:
            for check in checks:
                with engine.connect() as connection:
                    result = check(connection, keyring)
                found += [result] if isinstance(result, Finding) else result or ()
                if any(each.name == "migrations" and each.state == "bad" for each in found):
                    break  # the next checks read our tables
    except DatabaseUnavailable as exc:
        found.append(Finding(name="database", state="bad", message=exc.problem, fix=exc.fix))
    except ReceiverError as exc:
        found.append(Finding(name="database", state="bad", message=str(exc), fix="see DATABASE_URL"))
    return found


def _shown(connection: Connection, setting: str) -> str:
    return str(connection.exec_driver_sql(f"SHOW {setting}").scalar_one())


def _version(connection: Connection, _: Keyring | None) -> Finding:
    version = _shown(connection, "server_version")
    if int(_shown(connection, "server_version_num")) < _OLDEST_POSTGRESQL * 10_000:
        return Finding(
            name="database",
            state="bad",
            message=f"PostgreSQL {version}",
            fix=f"upgrade to PostgreSQL {_OLDEST_POSTGRESQL} or later",
        )
    return Finding(name="database", state="ok", message=f"PostgreSQL {version} answers")


def _writable(connection: Connection, _: Keyring | None) -> Finding:
    if connection.exec_driver_sql("SELECT pg_is_in_recovery()").scalar_one():
        return Finding(
            name="writable",
            state="bad",
            message="this is a standby: nothing can be recorded, and every request gets 503",
            fix="point DATABASE_URL at the primary (target_session_attrs=read-write)",
        )
    if _shown(connection, "default_transaction_read_only") == "on":
        return Finding(
            name="writable",
            state="bad",
            message="the database is read-only: nothing can be recorded, and every request gets 503",
            fix="set default_transaction_read_only = off",
        )
    return Finding(name="writable", state="ok", message="a primary that accepts writes")


def _durable(connection: Connection, _: Keyring | None) -> Finding:
    lossy = [name for name in ("fsync", "full_page_writes", "synchronous_commit") if _shown(connection, name) == "off"]
    if lossy:
        return Finding(
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
        return Finding(
            name="durability",
            state="warn",
            message="every standby is asynchronous: a failover can lose the latest messages, which were answered 200",
            fix="set synchronous_standby_names",
        )
    return Finding(name="durability", state="ok", message="committed data is on disk")


def _pooler(connection: Connection, _: Keyring | None) -> Finding | None:
    """Detect a proxy or pooler: PostgreSQL then sees another client port than ours."""
    raw: Any = connection.connection.driver_connection
    seen = connection.exec_driver_sql("SELECT inet_client_port()").scalar_one()
    if seen is None:  # a Unix socket
        return None
    with socket.socket(fileno=os.dup(raw.fileno())) as ours:
        if ours.getsockname()[1] == seen:
            return Finding(name="pooler", state="ok", message="direct connection to PostgreSQL")
    return Finding(
        name="pooler",
        state="warn",
        message="the connection goes through a proxy or pooler. With PgBouncer "
        "in transaction mode, workers miss notifications (LISTEN), and prepared statements fail",
        fix="set pool_mode = session, or connect to PostgreSQL directly",
    )


def _migrations(connection: Connection, _: Keyring | None) -> Finding:
    found = compatibility.schema_compatibility(connection)
    if found.state == "level":
        return Finding(name="migrations", state="ok", message=f"at revision {found.current}")
    return Finding(
        name="migrations",
        state="warn" if found.compatible else "bad",
        message=f"at revision {found.current or '(none)'}, but this release needs {found.wanted}",
        fix="redox-receiver db upgrade"
        if found.state == "behind"
        else "upgrade this host to the release that migrated it",
    )


def _keys(connection: Connection, keyring: Keyring | None) -> Finding | None:
    if keyring is None:
        return None
    try:
        check_keys(connection, keyring)
    except ReceiverError as exc:
        return Finding(name="keys", state="bad", message=str(exc), fix="see RECEIVER_KEYRING")
    return Finding(name="keys", state="ok", message="the keyring matches the database")


def _clock(connection: Connection, _: Keyring | None) -> Finding:
    ahead = clock.clock_skew(connection)
    if ahead is None:
        return Finding(
            name="clock",
            state="warn",
            message="the database took too long to return its time",
            fix="check its load and the network",
        )
    message = f"{clock.skew_message(ahead)} the database's clock, which decides every time limit"
    return (
        Finding(name="clock", state="ok", message=message)
        if abs(ahead) < clock.MAX_CLOCK_SKEW
        else Finding(name="clock", state="bad", message=message, fix=clock.FIX)
    )


_DATABASE: Final = (_version, _writable, _durable, _pooler, _clock, _migrations, _keys)


# --- registry and workers


def _credentials(connection: Connection, _: Keyring | None) -> Finding:
    """Check that each destination has live credentials of the kinds it requires."""
    live: dict[str, set[str]] = {}
    ending = []
    for each in queries.credentials(connection):
        if each["live"]:
            live.setdefault(each["destination"], set()).add(each["kind"])
            if each["expires_at"] is not None and each["expires_at"] < datetime.now(UTC) + _ENDS_SOON:
                ending.append(f"credential {each['id']} of {each['destination']} on {each['expires_at']:%Y-%m-%d}")
    closed = [
        each["name"]
        for each in queries.destinations(connection)
        if each["enabled"]
        and not any(set(kinds.split("+")) <= live.get(each["name"], set()) for kinds in each["require"])
    ]
    if closed:
        return Finding(
            name="credentials",
            state="bad",
            message=f"every request to {', '.join(closed)} is refused: no live credential of the kinds it requires",
            fix=f"redox-receiver credential add {closed[0]} --kind …",
        )
    if ending:
        return Finding(
            name="credentials",
            state="warn",
            message=f"expires soon: {'; '.join(ending)}",
            fix="redox-receiver credential add DESTINATION --kind …, then enter it at Redox",
        )
    return Finding(
        name="credentials",
        state="ok",
        message="every destination has the credentials it requires, for at least 30 days",
    )


def _workers(connection: Connection, _: Keyring | None) -> Finding:
    alive = [each for each in queries.workers(connection) if each["alive"]]
    wanted = {
        each["handler"] for each in queries.subscriptions(connection) if each["enabled"] and each["role"] == "handler"
    }
    missing = sorted(wanted - {name for each in alive for name in each["handlers"]})
    if wanted and not alive:
        return Finding(
            name="workers",
            state="bad",
            message="no delivery worker is alive: deliveries wait",
            fix="redox-receiver up, or redox-receiver worker",
        )
    if missing:
        return Finding(
            name="workers",
            state="bad",
            message=f"no live worker has loaded {', '.join(missing)}",
            fix="install the plugin or set RECEIVER_HANDLERS, then see `redox-receiver handlers list`",
        )
    return Finding(name="workers", state="ok", message=f"{len(alive)} alive")


def _plugins(connection: Connection, _: Keyring | None) -> Finding:
    """Import the enabled handlers on this host as a worker does."""
    bound = [each for each in queries.subscriptions(connection) if each["enabled"]]
    specs: dict[str, list[HandlerSpec]] = {}
    plugins = discovery.load_handlers({each["handler"] for each in bound}, table.load_settings().handlers)
    for each in bound:
        if each["handler"] in plugins.loaded:
            specs.setdefault(each["destination"], []).append(plugins.loaded[each["handler"]].spec)
    wrong = [each.message for each in plugins.failures]
    wrong += [sentence for *_, sentence in discovery.responder_conflicts(specs)]
    if wrong:
        return Finding(name="plugins", state="bad", message="; ".join(wrong), fix="redox-receiver handlers check")
    message = count(len(plugins.loaded), "handler", "handlers") + " imported"
    return Finding(name="plugins", state="ok", message=message if plugins.loaded else "no handler is enabled")


def _listening(settings: Settings, connection: Connection, _: Keyring | None) -> list[Finding]:
    """Check the addresses at which the processes of this host listen, or would listen."""
    running = [each for each in queries.listeners(connection) if each["alive"] and each["host"] == socket.gethostname()]
    found: list[Finding] = []
    for role, bind in (("receiver", settings.bind), ("admin", settings.admin_bind)):
        served = [each["address"] for each in running if each["role"] == role]
        found += _listeners(
            {"receiver": [], "admin": [], role: served or [bind]},
            "listens at" if served else "does not run here; would listen at",
        )
    return found


def _status(connection: Connection, keyring: Keyring | None) -> list[Finding]:
    """Return the findings of `status`."""
    return [
        Finding(name=each.code, state="bad" if each.severity == "error" else "warn", message=each.text, fix=each.fix)
        for each in findings.collect(findings.read(connection, keyring))
        if each.code not in _OWN
    ]


_WORK: Final = (_credentials, _plugins, _workers)


# --- from outside


def _outside(url: str) -> Iterator[Finding]:
    """Check `url`: it answers, its TLS certificate is valid, and the admin listener is not exposed."""
    parts = urlsplit(url)
    if parts.scheme != "https":
        yield Finding(
            name="tls",
            state="bad",
            message=f"{url} is plain HTTP, but Redox requires https",
            fix="put a TLS proxy in front of it",
        )
    else:
        yield _certificate(parts.hostname or "", parts.port or 443)
    live, admin = _get(url, "/livez"), [path for path in ("/readyz", "/metrics") if _get(url, path) == 200]
    if live == 200:
        yield Finding(name="reachable", state="ok", message=f"{url} answers")
    else:
        yield Finding(
            name="reachable",
            state="bad",
            message=f"{url}/livez: {live or 'no answer'}",
            fix="check the proxy, and that the receiver runs",
        )
    if admin:
        yield Finding(
            name="admin_hidden",
            state="bad",
            message=f"{', '.join(admin)} can be reached at this URL",
            fix="forward requests to the public listener (RECEIVER_BIND), not to the admin listener",
        )


def _certificate(host: str, port: int) -> Finding:
    try:
        with (
            socket.create_connection((host, port), timeout=5) as plain,
            ssl.create_default_context().wrap_socket(plain, server_hostname=host) as tls,
        ):
            ends = datetime.fromtimestamp(ssl.cert_time_to_seconds(str((tls.getpeercert() or {})["notAfter"])), UTC)
    except (OSError, KeyError, ValueError) as exc:
        return Finding(
            name="tls",
            state="bad",
            message=f"{host}:{port}: {_why(exc)}",
            fix="install a valid certificate for this host name: Redox does not connect without one",
        )
    days = (ends - datetime.now(UTC)).days
    message = f"the certificate expires in {days} days"
    return (
        Finding(name="tls", state="ok", message=message)
        if days >= _CERTIFICATE_DAYS
        else Finding(name="tls", state="bad", message=message, fix="renew the certificate")
    )


def _why(exc: Exception) -> str:
    """The reason of a failed connection, from OpenSSL or the operating system."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"the certificate is not valid: {exc.verify_message.rstrip('.')}"
    if isinstance(exc, ssl.SSLError):
        return f"TLS failed: {(exc.reason or type(exc).__name__).lower().replace('_', ' ')}"
    return (isinstance(exc, OSError) and exc.strerror) or type(exc).__name__


def _get(url: str, path: str) -> int | None:
    parts = urlsplit(url)
    made = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    connection = made(parts.hostname or "", parts.port, timeout=5)
    try:
        connection.request("GET", parts.path.rstrip("/") + path)
        return connection.getresponse().status
    except (OSError, HTTPException):
        return None
    finally:
        with suppress(OSError):
            connection.close()
