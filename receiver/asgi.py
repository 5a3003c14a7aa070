"""The ASGI applications of the public and the admin listener:
`gunicorn -k receiver.server.worker.Worker receiver.asgi:application`.

`redox-receiver serve` runs the same with receiver.server.conf. Any ASGI server with a lifespan can serve them, behind a
proxy.
"""

from typing import Final

from receiver import logs, settings
from receiver.app import compose
from receiver.web.asgi import Application, Service


def _public() -> Service:
    logs.configure(settings.load_settings().log_level)
    return compose().service()


def _admin() -> Service:
    from receiver.admin_listener import admin_service  # the public listener does without

    logs.configure(settings.load_settings().log_level)
    return admin_service()


application: Final = Application(_public)
admin: Final = Application(_admin)
