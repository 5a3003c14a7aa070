"""The commands `serve`, `admin` and `worker`: run one part, started by `up` or by a process manager.

Must not start a database: without DATABASE_URL, the embedded one must already run under `up`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from receiver import logs
from receiver import settings as table
from receiver.cli.options import example
from receiver.database.embedded.cluster import Cluster
from receiver.fault_injection import enable
from receiver.metrics.directory import share_counters
from receiver.settings import Settings


def settings_help(field: str) -> str:
    """The end of an option's help: the variable of the setting `field`, and its default."""
    return f"  [env: {table.variable(field)}; default: {Settings.model_fields[field].default}]"


_descriptor = click.option("--fd", type=int, hidden=True, help="File descriptor of an inherited listening socket.")


@click.command(epilog=example("serve", "serve --bind 0.0.0.0:8080 --receivers 4"))
@click.option("--bind", metavar="HOST:PORT", help="Address of the public listener." + settings_help("bind"))
@click.option("--receivers", type=int, metavar="N", help="Number of receiver processes." + settings_help("receivers"))
@_descriptor
def serve(bind: str | None, receivers: int | None, fd: int | None) -> None:
    """Run only the receiver: the public listener, under gunicorn."""
    _gunicorn(_settings(bind=bind, receivers=receivers), *([] if fd is None else ["--bind", f"fd://{fd}"]))


@click.command(epilog=example("admin", "admin --admin-bind 127.0.0.1:9081"))
@click.option(
    "--admin-bind",
    metavar="HOST:PORT",
    help="Address of the admin listener. Keep it on loopback." + settings_help("admin_bind"),
)
@_descriptor
def admin(admin_bind: str | None, fd: int | None) -> None:
    """Run only the admin listener: liveness and readiness, for your monitoring."""
    settings = _settings(admin_bind=admin_bind)
    listen = settings.admin_bind if fd is None else f"fd://{fd}"
    _gunicorn(settings, "--bind", listen, "--workers", "1", "receiver.asgi:admin")


@click.command(epilog=example("worker", "worker --concurrency 8"))
@click.option(
    "--concurrency",
    type=int,
    metavar="N",
    help="Number of handlers that run at the same time." + settings_help("concurrency"),
)
def worker(concurrency: int | None) -> None:
    """Run only a delivery worker: it delivers recorded messages to handlers."""
    settings = _settings(concurrency=concurrency)
    logs.configure(settings.log_level)
    share_counters(settings.data_dir)
    from receiver.worker.main import run_worker

    run_worker(settings)


def settle_paths(settings: Settings) -> None:
    """Make the paths in the environment absolute, for child processes with another working directory."""
    os.environ[table.variable("data_dir")] = str(settings.data_dir.absolute())
    if settings.keyring is not None:
        os.environ[table.variable("keyring")] = str(settings.keyring.absolute())
    if named := os.environ.get(f"{table.PREFIX}ENV_FILE"):
        os.environ[f"{table.PREFIX}ENV_FILE"] = str(Path(named).expanduser().absolute())


def _settings(**given: object) -> Settings:
    """Load the settings, after writing options to the environment. Raises ConfigurationError."""
    for field, value in given.items():
        if value is not None:
            os.environ[table.variable(field)] = str(value)
    settings = table.load_settings()
    settle_paths(settings)
    database_url(settings)
    return settings


def database_url(settings: Settings) -> str:
    """DATABASE_URL, or the URL of the embedded PostgreSQL. Raises ConfigurationError when that does not run."""
    if settings.database_url is not None:
        return settings.database_url.get_secret_value()
    return Cluster(settings.data_dir, account=settings.postgres_account).url


def _gunicorn(settings: Settings, *arguments: str) -> None:
    """Replace this process by gunicorn, in the root directory.

    Gunicorn puts its working directory first in the module search path. Only root can add a module to the root
    directory.
    """
    # Here for the error message: gunicorn's processes check it too, but print a traceback.
    enable.enable_faults(database_url(settings))
    os.chdir("/")
    command = [sys.executable, "-P", "-m", "gunicorn", "--config", "python:receiver.server.conf", *arguments]
    os.execv(command[0], command)  # noqa: S606 - without a shell
