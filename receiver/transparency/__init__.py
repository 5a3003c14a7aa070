"""The transparency log's formats: Merkle tree, signed checkpoints, and proof files.

Pure functions over bytes and text. `receiver.storage` fills a log with the audit's rows; `audit check-proof` verifies
a proof with the public key alone.

Must not import anything of ours but `receiver.errors`, and must not do I/O: somebody who holds a proof and a public
key needs neither our database nor our keyring.
"""
