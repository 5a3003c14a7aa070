"""The command `up`: runs all parts on one machine and supervises their processes.

Must not do the work of a part: it starts `serve`, `admin` and `worker`.
"""
