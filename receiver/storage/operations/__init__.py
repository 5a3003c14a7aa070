"""What people ask and correct: queries, disclosure, corrections, reconciliation, backups.

Called by the command line.

Must not be needed by the accept path or by workers.
"""
