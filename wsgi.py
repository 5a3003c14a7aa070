"""The public application for any WSGI server, such as `gunicorn -k gthread wsgi:application`.

May not be preloaded before a fork: its threads and sockets would not survive it. `redox-receiver serve` runs the same
under a gunicorn that is configured for it.
"""

from receiver import logs, settings
from receiver.app import public_app

logs.configure(settings.load().log_level)
application = public_app()
