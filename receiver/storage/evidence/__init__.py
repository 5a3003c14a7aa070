"""Evidence: the audit log, MACs, encryption, and verification.

Every module that writes a row calls it, and so does `audit verify`.

Must not change how an existing row is encoded: its MAC would no longer verify.
"""
