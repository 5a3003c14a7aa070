"""`up`: everything on one machine, and the child processes that it keeps running.

Must not do what a part does: it starts `serve`, `admin` and `worker`.
"""
