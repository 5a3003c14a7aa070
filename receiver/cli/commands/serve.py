"""`serve`, `admin`, `worker`: one part alone, as `up` starts it or as a process manager does.

May not start a database: without DATABASE_URL they want the embedded one running, which is `up`'s.
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
from receiver.settings import Settings

_descriptor = click.option("--fd", type=int, hidden=True, help="A listening socket that is inherited.")


@click.command(epilog=example("serve", "serve --bind 0.0.0.0:8080 --receivers 4"))
@click.option("--bind", metavar="HOST:PORT", help="Where to listen.  [env: RECEIVER_BIND]")
@click.option("--receivers", type=int, metavar="N", help="Receiver processes.  [env: RECEIVER_RECEIVERS]")
@_descriptor
def serve(bind: str | None, receivers: int | None, fd: int | None) -> None:
    """Run the receiver alone: the public listener, under gunicorn."""
    _gunicorn(_settings(bind=bind, receivers=receivers), *([] if fd is None else ["--bind", f"fd://{fd}"]))


@click.command(epilog=example("admin", "admin --admin-bind 127.0.0.1:9081"))
@click.option(
    "--admin-bind", metavar="HOST:PORT", help="Where to listen: keep it on loopback.  [env: RECEIVER_ADMIN_BIND]"
)
@_descriptor
def admin(admin_bind: str | None, fd: int | None) -> None:
    """Run the admin listener alone: liveness and readiness, for you and your monitoring."""
    settings = _settings(admin_bind=admin_bind)
    listen = settings.admin_bind if fd is None else f"fd://{fd}"
    _gunicorn(settings, "--bind", listen, "--workers", "1", "receiver.asgi:admin")


@click.command(epilog=example("worker", "worker --concurrency 8"))
@click.option(
    "--concurrency", type=int, metavar="N", help="Handlers that run at the same time.  [env: RECEIVER_CONCURRENCY]"
)
def worker(concurrency: int | None) -> None:
    """Run a delivery worker alone: it hands what was recorded to the handlers."""
    settings = _settings(concurrency=concurrency)
    logs.configure(settings.log_level)
    from receiver.worker.main import run_worker

    run_worker(settings)


def settle_paths(settings: Settings) -> None:
    """Make the paths in the environment absolute, for processes that stand elsewhere."""
    os.environ[table.variable("data_dir")] = str(settings.data_dir.absolute())
    if settings.keyring is not None:
        os.environ[table.variable("keyring")] = str(settings.keyring.absolute())
    if named := os.environ.get(f"{table.PREFIX}ENV_FILE"):
        os.environ[f"{table.PREFIX}ENV_FILE"] = str(Path(named).expanduser().absolute())


def _settings(**given: object) -> Settings:
    """The settings, with what the command line gives put into the environment. Raises ConfigurationError."""
    for field, value in given.items():
        if value is not None:
            os.environ[table.variable(field)] = str(value)
    settings = table.load_settings()
    settle_paths(settings)
    database_url(settings)
    return settings


def database_url(settings: Settings) -> str:
    """DATABASE_URL, or that of the embedded PostgreSQL. Raises ConfigurationError when that does not run."""
    if settings.database_url is not None:
        return settings.database_url.get_secret_value()
    return Cluster(settings.data_dir, account=settings.postgres_account).url


def _gunicorn(settings: Settings, *arguments: str) -> None:
    """Become gunicorn. It puts the directory it stands in before all others that modules are taken from: in the root
    directory there are none, and nobody but root can put one there.
    """
    enable.enable_faults(
        database_url(settings)
    )  # what is wrong with it is said by its processes too, but not in a sentence
    os.chdir("/")
    command = [sys.executable, "-P", "-m", "gunicorn", "--config", "python:receiver.server.conf", *arguments]
    os.execv(command[0], command)  # noqa: S606 - no shell is wanted
