"""What Redox says, as values: verifying, reading and judging without doing.

Rules of this folder, held by a test that reads the imports: nothing of ours is imported but `receiver.errors` (and this
folder itself); no I/O, no environment, no clock, no logging. Bytes, keys and `now` come in as arguments; a value or one
of our errors comes out.
"""
