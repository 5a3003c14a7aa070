"""The checks of `check` and `db check`. Each result has a stable name and, for a problem, its fix.

Those two commands call it.

Must not change anything. Starts nothing but the embedded PostgreSQL, if that does not run.
"""
