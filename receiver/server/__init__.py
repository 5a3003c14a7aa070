"""How gunicorn runs us: its configuration, worker and reload, and the protocol class of uvicorn's event loop.

Must not hold a rule about requests or replies, and must use public extension points only; `dependencies` lists each
name beyond those, and a start is refused where one is missing.
"""
