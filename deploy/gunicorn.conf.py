"""gunicorn, for those who start it themselves: `gunicorn -c deploy/gunicorn.conf.py`, from anywhere.

`redox-receiver serve` needs none of this: it starts gunicorn with the same settings. They are taken over whole from
receiver.server.conf, which reads the RECEIVER_* variables; here stands what an operator may think of changing,
and why it is as it is. What is not named here is not for changing: the worker class has the deadlines that keep slow
clients from holding connections, and the rest keeps peers from being believed and tokens out of the log.

The figures are of `python -m tests.bench.serving`, which says how to have them on your machine.
"""

from receiver.server import conf as ours
from receiver.server.conf import *  # noqa: F403 - gunicorn looks for these names here

# Processes. Each fills a core with Python, so as many as there are cores for it (RECEIVER_RECEIVERS); each keeps one
# connection to write through, and commits together what has come together. On two cores, PostgreSQL and the load on
# them too, 64 connections: one process 1,976 messages a second, two 2,821, four 2,829.
workers = ours.workers

# Request threads of each process (RECEIVER_THREADS): for large bodies, and for requests that wait for a handler;
# queries and after_handling take up to half of them, however long they last. Small messages are the event loop's and
# need none: two processes took 2,866 a second with 4 threads, 2,821 with 16, 2,898 with 64.
threads = ours.threads

# Connections that the kernel keeps for us while nobody accepts any: while all processes restart, or are at work. Too
# few are refused by the kernel, and Redox takes that for a failure. More than net.core.somaxconn (4096) has no effect.
backlog = 2048

# Longer than proxies keep theirs (nginx: 60 s): the sender must close first, or a message runs into
# a closing connection, and Redox takes that for a failure. An idle connection costs a descriptor and no thread.
keepalive = ours.keepalive

# Where the heartbeat's file is: in memory. On a disk that stalls, workers look dead and are killed, with all that they
# have in hand. None (the system's temporary directory) where there is no /dev/shm.
worker_tmp_dir = ours.worker_tmp_dir

# Seconds in which requests at work may end at a restart. A message takes five at most; a responder may take longer, and
# the query is asked again.
graceful_timeout = ours.graceful_timeout

# No preload: threads, sockets and the keyring's keys belong to one process, made after the fork. No max_requests: it
# would hide growth that ought to be understood.
