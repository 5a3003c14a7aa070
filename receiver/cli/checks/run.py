"""Run the checks: all of this host, or only those of the database."""

from __future__ import annotations

from functools import partial

from receiver import settings as table
from receiver.cli.checks import database, host, installation, outside
from receiver.cli.checks.result import CheckResult
from receiver.errors import ReceiverError
from receiver.settings import Settings


def check_everything(url: str | None) -> list[CheckResult]:
    """Run all checks of this host. `url`: the public URL of the receiver, checked from here if given."""
    try:
        settings = table.load_settings()
    except ReceiverError as exc:
        return [
            CheckResult(
                name="settings", state="bad", message="; ".join(str(exc).splitlines()), fix="correct the variable"
            )
        ]
    found = host.check_host(settings)
    keyring, loaded = host.check_keyring(settings)
    found.append(loaded)
    found += database.run_checks(
        settings,
        [
            *database.CHECKS,
            *installation.CHECKS,
            partial(installation.check_listening, settings),
            installation.check_status,
        ],
        keyring,
    )
    if not any(each.name == "listener" for each in found):
        found += host.check_listeners({"receiver": [settings.bind], "admin": [settings.admin_bind]}, "would listen at")
    return [*found, *(() if url is None else outside.check_public_url(url))]


def check_database(settings: Settings) -> list[CheckResult]:
    """Run only the checks of the database."""
    return database.run_checks(settings, database.CHECKS, host.check_keyring(settings)[0])
