"""Redox's protocol as pure functions and values: verifies requests, parses messages, and decides about them.

Called by the pipeline, storage and the command line. Must not import anything of the package except `receiver.errors`,
do I/O, read the environment or a clock, or log: bytes, keys and `now` are arguments; the result is a value or an error
of `receiver.errors`. tests/test_imports.py checks the imports.
"""
