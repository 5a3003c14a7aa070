"""What is still to do: lanes and their leases, deliveries, the outbox, maintenance, partitions.

Called by workers, and by the endpoint for `acknowledge="after_handling"`.

Must not record an outcome under a lease that is no longer held.
"""
