"""Fault injection for the project's own tests: kills a process, raises an error, or cuts its database connections.

Each package defines its fail-points with `point`. A fail-point does nothing unless RECEIVER_FAILPOINTS is set.

Must not act while a production destination is registered.
"""
