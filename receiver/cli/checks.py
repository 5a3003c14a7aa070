"""What `check` and `db check` look at: each a finding with a stable name, and what mends it.

May not mend anything, and starts nothing but the embedded PostgreSQL where it does not run.
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

from receiver import findings
from receiver import keyring as keyrings
from receiver import settings as table
from receiver.cli import output, session
from receiver.database import clock, compatibility
from receiver.errors import DatabaseUnavailable, ReceiverError
from receiver.fault_injection import faults
from receiver.keyring import Keyring
from receiver.settings import Settings
from receiver.storage.operations import backups, queries
from receiver.storage.registry.changes import HandlerSpec, check_keys
from receiver.worker import discovery

State = Literal["ok", "warn", "bad"]

# What `check` looks at more closely itself.
_OWN: Final = frozenset({"clock", "no_worker", "no_credential", "credential_expires"})

_OLDEST_POSTGRESQL: Final = 14
_ENDS_SOON: Final = timedelta(days=30)
# Networks of proxies that are believed without a warning have prefixes of this length, or longer.
_NARROWEST_4: Final = 8
_NARROWEST_6: Final = 32
_LEAST_DISK: Final = 2 * 1024**3
_CERTIFICATE_DAYS: Final = 14


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What was looked at, how it is, and the setting or command that mends it. `name` is a contract."""

    name: str
    state: State
    told: str
    mend: str | None = None


# A look at the database: what it finds.
_Look = Callable[[Connection, Keyring | None], "Finding | list[Finding] | None"]


def report(found: Sequence[Finding], *, as_json: bool) -> None:
    """Print what was found, and end with status 1 when something is bad."""
    if as_json:
        output.document([asdict(each) for each in found])
    else:
        width = max(len(each.name) for each in found)
        for each in found:
            label = {"ok": "OK", "warn": "WARN", "bad": "BAD"}[each.state]
            colour = {"ok": "green", "warn": "yellow", "bad": "red"}[each.state]
            begin = f"{label:<4}  {each.name:<{width}}  "
            text = output.escaped(each.told) + (f" → {output.escaped(each.mend)}" if each.mend else "")
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
    """All there is to look at on this host; `url`: where the world reaches the public listener."""
    try:
        settings = table.load_settings()
    except ReceiverError as exc:
        return [
            Finding(name="settings", state="bad", told="; ".join(str(exc).splitlines()), mend="correct the variable")
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
    """What concerns the database alone."""
    return _with_database(settings, _DATABASE, _keyring(settings)[0])


# --- this host


def _settings() -> Finding:
    """Variables of ours that nothing reads are misspelt."""
    if (found := table.misspelt()) is None:
        return Finding(name="settings", state="ok", told="every RECEIVER_* variable is one that is read")
    return Finding(
        name="settings",
        state="bad",
        told=f"nothing reads {found}",
        mend="correct the name; .env.example lists them all",
    )


def _failpoints(settings: Settings) -> Iterator[Finding]:
    if settings.failpoints:
        told = ", ".join(f"{name} ({order.action})" for name, order in faults.parse(settings.failpoints).items())
        yield Finding(
            name="failpoints",
            state="bad",
            told=f"what is started here is to fail, at {told}",
            mend=f"take {faults.VARIABLE} out of the environment",
        )


def _files(settings: Settings) -> Iterator[Finding]:
    directory, env_file = settings.data_dir, table.env_file(os.environ)
    if not directory.is_dir():
        yield Finding(
            name="data_directory",
            state="warn",
            told=f"{directory} is not there yet",
            mend="`redox-receiver up` makes it",
        )
    elif directory.stat().st_mode & 0o067:
        yield Finding(
            name="data_directory",
            state="bad",
            told=f"{directory} is open to others",
            mend=f"chmod go-rw,o-x {directory}",
        )
    else:
        yield Finding(name="data_directory", state="ok", told=str(directory))
    if env_file.is_file() and stat.S_IMODE(env_file.stat().st_mode) & 0o077:
        yield Finding(
            name="env_file", state="bad", told=f"{env_file} can be read by others", mend=f"chmod 600 {env_file}"
        )


def _listeners(served: Mapping[str, Sequence[str]], how: str) -> Iterator[Finding]:
    """The addresses of this host by role (`receiver`, `admin`); `how` they are known."""
    for address in served["receiver"]:
        if all(map(_loopback, address.split(", "))):
            yield Finding(
                name="listener", state="ok", told=f"{how} {address}, for a proxy on this host that speaks TLS"
            )
        else:
            yield Finding(
                name="listener",
                state="warn",
                told=f"{how} {address}, which speaks plain HTTP and is not on loopback",
                mend="let only a proxy that speaks TLS reach it, or set RECEIVER_BIND=127.0.0.1:PORT",
            )
    for address in served["admin"]:
        if all(map(_loopback, address.split(", "))):
            yield Finding(name="admin_listener", state="ok", told=f"{how} {address}")
        else:
            yield Finding(
                name="admin_listener",
                state="warn",
                told=f"{how} {address}, which is not on loopback",
                mend="let nobody but your monitoring reach it, or set RECEIVER_ADMIN_BIND=127.0.0.1:PORT",
            )


def _proxies(settings: Settings) -> Iterator[Finding]:
    """Whoever is believed can say that a request comes from any address, and bears any client certificate."""
    wide = [
        each
        for each in settings.trusted_proxies
        if (net := ip_network(each, strict=False)).prefixlen < (_NARROWEST_4 if net.version == 4 else _NARROWEST_6)
    ]
    if wide:
        yield Finding(
            name="trusted_proxies",
            state="warn",
            told="RECEIVER_TRUSTED_PROXIES believes "
            f"{', '.join(wide)}: anybody there can claim any address and, where they know the proxy's "
            "secret, any client certificate",
            mend="name your proxies' own addresses",
        )


def _account(settings: Settings) -> Iterator[Finding]:
    """The embedded PostgreSQL, when root starts it."""
    if (
        settings.database_url is None
        and os.geteuid() == 0
        and (settings.postgres_account == "nobody" or (settings.postgres_account is None and not _exists("postgres")))
    ):
        yield Finding(
            name="postgres_account",
            state="warn",
            told="the embedded PostgreSQL runs as nobody, an account "
            "that other programs use: they can read and change its files",
            mend="make an account of its own "
            "(adduser --system postgres) before the first start, or name one in RECEIVER_POSTGRES_ACCOUNT",
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
    told = f"{free / 1024**3:.1f} GiB free at {place}"
    return (
        Finding(name="disk", state="ok", told=told)
        if free >= _LEAST_DISK
        else Finding(name="disk", state="bad", told=told, mend="make room: without it everything is answered 503")
    )


def _keyring(settings: Settings) -> tuple[Keyring | None, Finding]:
    path = settings.keyring_path
    try:
        keyring = keyrings.load_keyring(path)
    except ReceiverError as exc:
        return None, Finding(name="keyring", state="bad", told=str(exc), mend="see RECEIVER_KEYRING")
    if any((path.parent / name).exists() for name in (backups.MANIFEST, backups.DUMP)):
        return keyring, Finding(
            name="keyring",
            state="bad",
            told=f"{path} lies beside a backup of the database",
            mend="keep the two apart: together they are as good as no encryption",
        )
    held = output.count(len(keyring.keys), "key", "keys")
    return keyring, Finding(name="keyring", state="ok", told=f"{path}: {held}")


# --- the database


def _with_database(settings: Settings, looks: Sequence[_Look], keyring: Keyring | None) -> list[Finding]:
    """Look at the database; the first that is amiss with reaching it ends the looking."""
    found: list[Finding] = []
    try:
        with session.database(settings) as engine:
            for look in looks:
                with engine.connect() as connection:
                    seen = look(connection, keyring)
                found += [seen] if isinstance(seen, Finding) else seen or ()
                if any(each.name == "migrations" and each.state == "bad" for each in found):
                    break  # what is next reads our tables
    except DatabaseUnavailable as exc:
        found.append(Finding(name="database", state="bad", told=exc.problem, mend=exc.fix))
    except ReceiverError as exc:
        found.append(Finding(name="database", state="bad", told=str(exc), mend="see DATABASE_URL"))
    return found


def _shown(connection: Connection, setting: str) -> str:
    return str(connection.exec_driver_sql(f"SHOW {setting}").scalar_one())


def _version(connection: Connection, _: Keyring | None) -> Finding:
    version = _shown(connection, "server_version")
    if int(_shown(connection, "server_version_num")) < _OLDEST_POSTGRESQL * 10_000:
        return Finding(
            name="database",
            state="bad",
            told=f"PostgreSQL {version}",
            mend=f"PostgreSQL {_OLDEST_POSTGRESQL} or later is needed",
        )
    return Finding(name="database", state="ok", told=f"PostgreSQL {version} answers")


def _writable(connection: Connection, _: Keyring | None) -> Finding:
    if connection.exec_driver_sql("SELECT pg_is_in_recovery()").scalar_one():
        return Finding(
            name="writable",
            state="bad",
            told="this is a standby: nothing can be recorded, all is 503",
            mend="point DATABASE_URL at the primary (target_session_attrs=read-write)",
        )
    if _shown(connection, "default_transaction_read_only") == "on":
        return Finding(
            name="writable",
            state="bad",
            told="the database is read-only: nothing can be recorded",
            mend="set default_transaction_read_only = off",
        )
    return Finding(name="writable", state="ok", told="a primary that takes writes")


def _durable(connection: Connection, _: Keyring | None) -> Finding:
    lossy = [name for name in ("fsync", "full_page_writes", "synchronous_commit") if _shown(connection, name) == "off"]
    if lossy:
        return Finding(
            name="durability",
            state="bad",
            told=f"{', '.join(lossy)} off: a crash loses what was answered 200, and Redox does not send it again",
            mend="set them on",
        )
    standbys = connection.exec_driver_sql(
        "SELECT count(*) FILTER (WHERE sync_state = 'async'), count(*) FROM pg_stat_replication"
    ).one()
    if standbys[1] and standbys[0] == standbys[1]:
        return Finding(
            name="durability",
            state="warn",
            told="every standby is asynchronous: a failover can lose the "
            "last moments' messages, which were answered 200",
            mend="set synchronous_standby_names",
        )
    return Finding(name="durability", state="ok", told="what is committed is on disk")


def _pooler(connection: Connection, _: Keyring | None) -> Finding | None:
    """A server that sees another port than ours is reached through something."""
    raw: Any = connection.connection.driver_connection
    seen = connection.exec_driver_sql("SELECT inet_client_port()").scalar_one()
    if seen is None:  # a Unix socket
        return None
    with socket.socket(fileno=os.dup(raw.fileno())) as ours:
        if ours.getsockname()[1] == seen:
            return Finding(name="pooler", state="ok", told="nothing between here and PostgreSQL")
    return Finding(
        name="pooler",
        state="warn",
        told="something stands between here and PostgreSQL. If it is PgBouncer "
        "in transaction mode: workers miss their wake-ups (LISTEN), and prepared statements fail",
        mend="pool_mode = session, or connect to PostgreSQL itself",
    )


def _migrations(connection: Connection, _: Keyring | None) -> Finding:
    found = compatibility.schema_compatibility(connection)
    if found.state == "level":
        return Finding(name="migrations", state="ok", told=f"at revision {found.current}")
    return Finding(
        name="migrations",
        state="warn" if found.compatible else "bad",
        told=f"at revision {found.current or '(none)'}, {found.wanted} is wanted",
        mend="redox-receiver db upgrade" if found.state == "behind" else "install the release that moved it",
    )


def _keys(connection: Connection, keyring: Keyring | None) -> Finding | None:
    if keyring is None:
        return None
    try:
        check_keys(connection, keyring)
    except ReceiverError as exc:
        return Finding(name="keys", state="bad", told=str(exc), mend="see RECEIVER_KEYRING")
    return Finding(name="keys", state="ok", told="the keyring is the one that this database was written with")


def _clock(connection: Connection, _: Keyring | None) -> Finding:
    ahead = clock.clock_skew(connection)
    if ahead is None:
        return Finding(
            name="clock",
            state="warn",
            told="the database took too long to say its time",
            mend="look at its load, and at the way to it",
        )
    told = f"{clock.skew_message(ahead)} the database's; by that everything is judged"
    return (
        Finding(name="clock", state="ok", told=told)
        if abs(ahead) < clock.MAX_CLOCK_SKEW
        else Finding(name="clock", state="bad", told=told, mend=clock.FIX)
    )


_DATABASE: Final = (_version, _writable, _durable, _pooler, _clock, _migrations, _keys)


# --- what is to be done with messages


def _credentials(connection: Connection, _: Keyring | None) -> Finding:
    """A destination whose required kinds have no live credential refuses everything."""
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
            told=f"{', '.join(closed)} refuses everything: no live credential of the kinds it requires",
            mend=f"redox-receiver credential add {closed[0]} --kind …",
        )
    if ending:
        return Finding(
            name="credentials",
            state="warn",
            told=f"ends soon: {'; '.join(ending)}",
            mend="redox-receiver credential add DESTINATION --kind …, then set it at Redox",
        )
    return Finding(name="credentials", state="ok", told="every destination has what it requires, for 30 days at least")


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
            told="no delivery worker is alive: what comes in waits",
            mend="redox-receiver up, or redox-receiver worker",
        )
    if missing:
        return Finding(
            name="workers",
            state="bad",
            told=f"no live worker has loaded {', '.join(missing)}",
            mend="install the plugin or set RECEIVER_HANDLERS, then see `redox-receiver handlers list`",
        )
    return Finding(name="workers", state="ok", told=f"{len(alive)} alive")


def _plugins(connection: Connection, _: Keyring | None) -> Finding:
    """What is enabled and installed here, imported as a worker imports it."""
    bound = [each for each in queries.subscriptions(connection) if each["enabled"]]
    specs: dict[str, list[HandlerSpec]] = {}
    plugins = discovery.load_handlers({each["handler"] for each in bound}, table.load_settings().handlers)
    for each in bound:
        if each["handler"] in plugins.loaded:
            specs.setdefault(each["destination"], []).append(plugins.loaded[each["handler"]].spec)
    wrong = [each.message for each in plugins.failures]
    wrong += [sentence for *_, sentence in discovery.responder_conflicts(specs)]
    if wrong:
        return Finding(name="plugins", state="bad", told="; ".join(wrong), mend="redox-receiver handlers check")
    told = output.count(len(plugins.loaded), "handler", "handlers") + " imported"
    return Finding(name="plugins", state="ok", told=told if plugins.loaded else "no handler is enabled")


def _listening(settings: Settings, connection: Connection, _: Keyring | None) -> list[Finding]:
    """Where the processes of this host listen, or would."""
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
    """The findings of `status`."""
    return [
        Finding(name=each.code, state="bad" if each.severity == "error" else "warn", told=each.text, mend=each.fix)
        for each in findings.collect(findings.read(connection, keyring))
        if each.code not in _OWN
    ]


_WORK: Final = (_credentials, _plugins, _workers)


# --- from outside


def _outside(url: str) -> Iterator[Finding]:
    """What the world sees at `url`: the listener answers, by TLS that lasts, and serves nothing of the admin's."""
    parts = urlsplit(url)
    if parts.scheme != "https":
        yield Finding(
            name="tls",
            state="bad",
            told=f"{url} is plain HTTP, and Redox wants https",
            mend="put a proxy that speaks TLS before it",
        )
    else:
        yield _certificate(parts.hostname or "", parts.port or 443)
    live, admin = _get(url, "/livez"), [path for path in ("/readyz", "/metrics") if _get(url, path) == 200]
    if live == 200:
        yield Finding(name="reachable", state="ok", told=f"{url} answers")
    else:
        yield Finding(
            name="reachable",
            state="bad",
            told=f"{url}/livez: {live or 'no answer'}",
            mend="look at the proxy, and whether the receiver runs",
        )
    if admin:
        yield Finding(
            name="admin_hidden",
            state="bad",
            told=f"{', '.join(admin)} can be reached from outside",
            mend="the proxy must lead to the public listener (RECEIVER_BIND), not to the admin's",
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
            told=f"{host}:{port}: {_why(exc)}",
            mend="without a certificate that proves this name, Redox does not connect",
        )
    days = (ends - datetime.now(UTC)).days
    told = f"the certificate ends in {days} days"
    return (
        Finding(name="tls", state="ok", told=told)
        if days >= _CERTIFICATE_DAYS
        else Finding(name="tls", state="bad", told=told, mend="renew it")
    )


def _why(exc: Exception) -> str:
    """Why the connection did not come about, in the words of OpenSSL or of the operating system."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"the certificate is not accepted: {exc.verify_message.rstrip('.')}"
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
