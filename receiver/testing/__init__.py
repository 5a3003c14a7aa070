"""What plugin authors test with: FakeRedox, samples of every message, a ledger of what was sent.

Shipped in the package. May not be imported by the receiver itself; `simulate` is the one exception.
"""
