"""The registry: destinations, credentials, sources, subscriptions, and our own keys.

Processes follow it through `loader`; the command line changes it through `changes`, `api_keys` and `signing_keys`.

Must not change a row without an audit row and a MAC.
"""
