"""A simulated Redox: feeds, handshakes, attacks, and the API that we speak to.

Called by `redox-receiver simulate` and by tests.

Must not be imported by anything that runs in production.
"""
