"""Fault injection for the project's own tests. All of it is in this folder.

`faults`: fail-points, named places in the program where a test can kill, fail or delay the process, or cut its database
connections. A fail-point is a function that does nothing unless the process starts with RECEIVER_FAILPOINTS set.
`enable`: reads that variable when a process starts. `api_faults`: what the simulated Redox API can get wrong.

Each room may import `point` from `faults`, only the start of a process `enable`, and only the simulator `api_faults`.
Must not act while a production destination is registered.
"""
