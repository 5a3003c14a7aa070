"""What is stored: the tables, and the rooms that write and read them.

`accept` is the hot path, `registry` what may come in, `queue` what is still to do, `evidence` what proves it, and
`operations` what people ask and correct.

Must not import a web framework, nor `receiver.web`.
"""
