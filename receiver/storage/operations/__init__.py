"""Operations of the command line: queries, disclosure, corrections, reconciliation, backups.

Must not be needed by the accept path or by workers.
"""
