"""The registry: destinations, credentials, sources, subscriptions, and the receiver's own keys.

Processes follow it through `follower`. The command line changes it through `changes`, `api_keys` and `signing_keys`.

Must not change a row without an audit row and a MAC.
"""
