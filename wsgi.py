"""The public application for any WSGI server, such as `gunicorn -k gthread wsgi:application`.

Must not be preloaded before a fork: threads and sockets do not survive it. Run such a server behind nginx, because it
has no defense against slow clients. `redox-receiver serve` runs the same application in an event loop, under gunicorn.
"""

from receiver import logs, settings
from receiver.metrics.directory import share_counters

_settings = settings.load_settings()
logs.configure(_settings.log_level)
share_counters(_settings.data_dir)

from receiver.app import public_app  # noqa: E402 - it imports the metrics

application = public_app()
