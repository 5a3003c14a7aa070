"""Checks of this host: settings, files, listeners, proxies, the account of PostgreSQL, disk, keyring."""

from __future__ import annotations

import os
import pwd
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from ipaddress import ip_address, ip_network
from typing import Final

from receiver import keyring as keyrings
from receiver import settings as table
from receiver import settings_variables
from receiver.cli.checks.result import CheckResult
from receiver.errors import ReceiverError
from receiver.fault_injection import faults
from receiver.findings.formatting import count
from receiver.keyring import Keyring
from receiver.settings import Settings
from receiver.storage.operations import backups

# A trusted network with a shorter prefix than this, in bits, gets a warning.
_NARROWEST_4: Final = 8
_NARROWEST_6: Final = 32
_LEAST_DISK: Final = 2 * 1024**3  # bytes


def check_host(settings: Settings) -> list[CheckResult]:
    """Run the checks of this host that need no database and no keyring."""
    return [
        _settings(),
        *_failpoints(settings),
        *_files(settings),
        *_proxies(settings),
        *_account(settings),
        _disk(settings),
    ]


def _settings() -> CheckResult:
    """An unknown RECEIVER_* variable is misspelled."""
    if (found := settings_variables.misspelled()) is None:
        return CheckResult(name="settings", state="ok", message="every RECEIVER_* variable is known")
    return CheckResult(
        name="settings",
        state="bad",
        message=f"unknown variable {found}",
        fix="correct the name; .env.example lists them all",
    )


def _failpoints(settings: Settings) -> Iterator[CheckResult]:
    if settings.failpoints:
        message = ", ".join(f"{name} ({order.action})" for name, order in faults.parse(settings.failpoints).items())
        yield CheckResult(
            name="failpoints",
            state="bad",
            message=f"fault injection is on: processes started here fail at {message}",
            fix=f"remove {faults.VARIABLE} from the environment",
        )


def _files(settings: Settings) -> Iterator[CheckResult]:
    directory, env_file = settings.data_dir, table.env_file(os.environ)
    if not directory.is_dir():
        yield CheckResult(
            name="data_directory",
            state="warn",
            message=f"{directory} does not exist yet",
            fix="run `redox-receiver up`, which creates it",
        )
    elif directory.stat().st_mode & 0o067:
        yield CheckResult(
            name="data_directory",
            state="bad",
            message=f"other users have access to {directory}",
            fix=f"chmod go-rw,o-x {directory}",
        )
    else:
        yield CheckResult(name="data_directory", state="ok", message=str(directory))
    if env_file.is_file() and stat.S_IMODE(env_file.stat().st_mode) & 0o077:
        yield CheckResult(
            name="env_file", state="bad", message=f"other users have access to {env_file}", fix=f"chmod 600 {env_file}"
        )


def check_listeners(served: Mapping[str, Sequence[str]], how: str) -> Iterator[CheckResult]:
    """Check the addresses of this host by role (`receiver`, `admin`). `how` begins each message."""
    for address in served["receiver"]:
        if all(map(_loopback, address.split(", "))):
            yield CheckResult(name="listener", state="ok", message=f"{how} {address}, for a TLS proxy on this host")
        else:
            yield CheckResult(
                name="listener",
                state="warn",
                message=f"{how} {address}, which is plain HTTP and not on loopback",
                fix="allow only your TLS proxy to reach it, or set RECEIVER_BIND=127.0.0.1:PORT",
            )
    for address in served["admin"]:
        if all(map(_loopback, address.split(", "))):
            yield CheckResult(name="admin_listener", state="ok", message=f"{how} {address}")
        else:
            yield CheckResult(
                name="admin_listener",
                state="warn",
                message=f"{how} {address}, which is not on loopback",
                fix="allow only your monitoring to reach it, or set RECEIVER_ADMIN_BIND=127.0.0.1:PORT",
            )


def _proxies(settings: Settings) -> Iterator[CheckResult]:
    """A trusted proxy can claim any client address and any client certificate."""
    wide = [
        each
        for each in settings.trusted_proxies
        if (net := ip_network(each, strict=False)).prefixlen < (_NARROWEST_4 if net.version == 4 else _NARROWEST_6)
    ]
    if wide:
        yield CheckResult(
            name="trusted_proxies",
            state="warn",
            message="RECEIVER_TRUSTED_PROXIES trusts "
            f"{', '.join(wide)}: every host there can claim any client address and, with the proxy's "
            "secret, any client certificate",
            fix="set it to the addresses of your proxies",
        )


def _account(settings: Settings) -> Iterator[CheckResult]:
    """Check the account of the embedded PostgreSQL, when root starts it."""
    if (
        settings.database_url is None
        and os.geteuid() == 0
        and (settings.postgres_account == "nobody" or (settings.postgres_account is None and not _exists("postgres")))
    ):
        yield CheckResult(
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


def _disk(settings: Settings) -> CheckResult:
    place = next(each for each in (settings.data_dir, *settings.data_dir.resolve().parents) if each.is_dir())
    free = shutil.disk_usage(place).free
    message = f"{free / 1024**3:.1f} GiB free at {place}"
    return (
        CheckResult(name="disk", state="ok", message=message)
        if free >= _LEAST_DISK
        else CheckResult(
            name="disk",
            state="bad",
            message=message,
            fix="free disk space: when the disk is full, every request gets 503",
        )
    )


def check_keyring(settings: Settings) -> tuple[Keyring | None, CheckResult]:
    path = settings.keyring_path
    try:
        keyring = keyrings.load_keyring(path)
    except ReceiverError as exc:
        return None, CheckResult(name="keyring", state="bad", message=str(exc), fix="see RECEIVER_KEYRING")
    if any((path.parent / name).exists() for name in (backups.MANIFEST, backups.DUMP)):
        return keyring, CheckResult(
            name="keyring",
            state="bad",
            message=f"{path} is in the same directory as a backup of the database",
            fix="store them in different places: together they defeat the encryption",
        )
    held = count(len(keyring.keys), "key", "keys")
    return keyring, CheckResult(name="keyring", state="ok", message=f"{path}: {held}")
