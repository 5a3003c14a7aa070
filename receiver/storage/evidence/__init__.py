"""Evidence: the audit log, MACs, encryption, and verification.

Called by every room that writes a row, and by `audit verify`.

Must not change how a row that exists is encoded: its MAC would not hold any longer.
"""
