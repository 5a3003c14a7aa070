"""The web layer: HTTP in, a verdict out.

`endpoint`, `token_endpoint`, `body` and `runtime` know no framework; `wsgi` and `admin` are Flask's, `asgi` is the
adapter to an event loop. Must not see SQLAlchemy or the database: what an endpoint needs of those comes in as a
Protocol.
"""
