"""The account that PostgreSQL runs under when root starts it, and what that account can reach.

Must not create an account.
"""

from __future__ import annotations

import os
import pwd
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from receiver.database.embedded.server_settings import ENVIRONMENT
from receiver.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerAccount:
    """The unprivileged account that PostgreSQL runs under when root starts it."""

    name: str
    uid: int
    gid: int


def choose_account(name: str | None) -> ServerAccount:
    """Return the account `name`, by default `postgres` or `nobody`.

    Raises ConfigurationError when no such account exists, or it is root.
    """
    for each in (name,) if name else ("postgres", "nobody"):
        with suppress(KeyError):
            entry = pwd.getpwnam(each)
            if entry.pw_uid != 0:
                return ServerAccount(name=each, uid=entry.pw_uid, gid=entry.pw_gid)
    raise ConfigurationError(
        "PostgreSQL does not run as root, and there is no unprivileged account "
        f"{name or '`postgres` or `nobody`'}: name one in RECEIVER_POSTGRES_ACCOUNT, run as another "
        "user, or set DATABASE_URL"
    )


def account_of(uid: int, gid: int) -> ServerAccount:
    """Return the account that owns a cluster, known to the system or not."""
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        return ServerAccount(name=f"user id {uid}", uid=uid, gid=gid)
    return ServerAccount(name=entry.pw_name, uid=entry.pw_uid, gid=entry.pw_gid)


def child_arguments(account: ServerAccount | None) -> dict[str, Any]:
    """Return the subprocess arguments that run a child under the account, without the caller's environment."""
    common: dict[str, Any] = {"env": ENVIRONMENT, "umask": 0o077}
    if account is None:
        return common
    return {**common, "user": account.uid, "group": account.gid, "extra_groups": []}


def first_closed(account: ServerAccount, path: Path) -> Path | None:
    """Return the first directory on the way to `path`, itself included, that the account cannot enter.

    The kernel is asked, directory by directory, in a child of that account, because modes alone are not enough (access
    lists, network file systems).
    """
    asked = subprocess.run(
        [
            "/bin/sh",
            "-c",
            'for d; do cd "$d" 2>/dev/null || { printf %s "$d"; exit 1; }; done',
            "sh",
            *map(str, reversed(path.parents)),
            str(path),
        ],
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        check=False,
        **child_arguments(account),
    )
    return Path(os.fsdecode(asked.stdout)) if asked.returncode else None
