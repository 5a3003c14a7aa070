"""The delivery worker: claims lanes, runs their deliveries in handler processes, records the outcomes.

Called by `redox-receiver worker`; `inline` also by the receiver, for queries and `acknowledge="after_handling"`.

Must not import a handler into the worker process. Must not import a web framework.
"""
