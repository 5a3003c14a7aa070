"""The composition root of the admin listener: builds it from readiness, gauges and notices.

Apart from receiver.app, so that receivers do not load what only this listener needs. Must not hold a rule.
"""

from __future__ import annotations

import socket
from functools import partial

from sqlalchemy import Engine

from receiver import keyring as keyrings
from receiver import settings as table
from receiver.app import STATEMENT_TIMEOUT, database_url
from receiver.database.engine import open_engine
from receiver.fault_injection import enable
from receiver.findings.gauges import read_gauges
from receiver.keyring import Keyring
from receiver.notices import channels
from receiver.notices.look import FindingsLook
from receiver.notices.notifier import Notifier
from receiver.readiness import readiness
from receiver.settings import Settings
from receiver.storage.queue.heartbeats import Heartbeat
from receiver.web import admin, listening
from receiver.web.asgi import BlockingService
from receiver.worker.handler_process.bootstrap import process_name


def admin_service() -> BlockingService:
    """The admin listener, for the running event loop. Raises ConfigurationError as `compose` does, except for keys:
    `/readyz` tells of those.
    """
    settings = table.load_settings()
    keyring = keyrings.load_keyring(settings.keyring_path)
    url = database_url(settings)
    enable.enable_faults(url)
    engine = open_engine(url, pool_size=4, statement_timeout=STATEMENT_TIMEOUT)
    heartbeat = Heartbeat(
        engine, keyring, name=process_name(), role="admin", address=listening.address(settings.admin_bind)
    )
    notifier = _notifier(settings, engine, keyring)
    heartbeat.start()
    if notifier is not None:
        notifier.start()

    def stop() -> None:
        if notifier is not None:
            notifier.stop()
        heartbeat.stop()
        engine.dispose()

    app = admin.admin_app(partial(readiness, engine, keyring), partial(read_gauges, engine, keyring, settings.data_dir))
    return BlockingService(app, threads=settings.threads, stop=stop)


def _notifier(settings: Settings, engine: Engine, keyring: Keyring) -> Notifier | None:
    """Return the notifier of this host; None where no way of a notice is set. Raises ConfigurationError."""
    host = socket.gethostname()
    ways = []
    if settings.notify_url is not None and settings.notify_secret is not None:
        from receiver.outbound import standard_webhooks  # it takes megabytes

        secret = settings.notify_secret.get_secret_value()
        standard_webhooks.secret_key(secret)
        ways.append(channels.webhook(settings.notify_url.get_secret_value(), secret, host, standard_webhooks.post))
    if settings.notify_command is not None:
        ways.append(channels.command(settings.notify_command, host))
    if not ways:
        return None
    return Notifier(FindingsLook(engine, keyring, host), channels.each_of(ways), repeat=settings.notify_repeat)
