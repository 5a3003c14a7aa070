"""Pending work: lanes and their leases, deliveries, the outbox, maintenance, partitions.

Workers call this package. The endpoint calls it for `acknowledge="after_handling"`.

Must not record an outcome under a lease that is no longer held.
"""
