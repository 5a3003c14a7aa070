"""The hot path: from an admitted message to its COMMIT.

The endpoint calls it through `ledger`, once for each request.

Must not hold an ORM session, make an unnecessary round trip, or do work that can wait.
"""
