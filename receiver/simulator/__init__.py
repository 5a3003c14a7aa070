"""The Redox simulator: feeds, handshakes, attack cases, and the Redox API.

Used by `redox-receiver simulate` and by tests. Must not be imported by production code.
"""
