"""gunicorn's configuration, to run gunicorn yourself: `gunicorn -c deploy/gunicorn.conf.py`, from any directory.

`redox-receiver serve` does not need it: it starts gunicorn with the same settings. They all come from
receiver.server.conf, which reads the RECEIVER_* variables. The settings named here are those that you may want to
change, each with the reason for its value. Do not change the others: the worker class has the deadlines that keep slow
clients from holding connections, and the rest keeps a client's claims from being believed and tokens out of the log.

`python -m tests.bench.serving` measures processes and threads on your machine.
"""

from receiver.server import conf as ours
from receiver.server.conf import *  # noqa: F403 - gunicorn looks for these names here

# Processes (RECEIVER_RECEIVERS). Each has one event loop, which fills one core, so run as many as there are cores for
# it. Each writes through one connection and commits together what arrives together: more processes than cores make
# smaller commits, not more messages.
workers = ours.workers

# Threads of each process (RECEIVER_THREADS). The event loop serves small messages without them. A thread works on a
# body of more than 1 MB, on a signature that may be used once, and waits for a handler; queries and after_handling take
# up to half of the threads, however long they last.
threads = ours.threads

# Connections that the kernel holds while no process accepts them: all processes restart, or are busy. If there are too
# few, the kernel refuses the rest, and Redox counts that as a failure. More than net.core.somaxconn (4096) has no
# effect.
backlog = 2048

# Seconds until an idle connection is closed: longer than proxies keep theirs (nginx: 60 s). The sender must close
# first, or a message runs into a closing connection, and Redox counts that as a failure. An idle connection costs a
# descriptor and no thread.
keepalive = ours.keepalive

# The directory of the heartbeat file: in memory. On a disk that stalls, workers look dead, and gunicorn kills them with
# all the requests that they have begun. None (the system's temporary directory) where there is no /dev/shm.
worker_tmp_dir = ours.worker_tmp_dir

# Seconds that a worker has to finish its requests at a restart. A message takes five at most. A responder may take
# longer; then Redox sends the query again.
graceful_timeout = ours.graceful_timeout

# No preload_app: threads, sockets and the keyring's keys belong to one process and are made after the fork. No
# max_requests: it would hide a growth of memory whose cause should be found.
