"""Fault injection: what only our own tests switch on, so that a process dies, fails or loses its database.

Every room names the places where a fault can happen (`point`); they do nothing unless RECEIVER_FAILPOINTS is set.

Must not act where a production destination is registered.
"""
