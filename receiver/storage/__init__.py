"""The database layer: the table schema, and the packages that write and read the tables.

`accept` is the hot path; `registry` holds destinations, credentials and keys; `queue` schedules work; `evidence` proves
integrity; `operations` serves the command line.

Must not import a web framework, nor `receiver.web`.
"""
