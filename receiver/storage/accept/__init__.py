"""The hot path: from an admitted message to its COMMIT.

Called by the endpoint through `ledger`, once for each request.

Must not hold an ORM session, make a round trip that is not needed, or do work that can wait.
"""
