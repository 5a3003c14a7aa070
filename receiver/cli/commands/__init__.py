"""The commands of `redox-receiver`: one module for each group.

`receiver.cli` imports a module when one of its commands runs.

Must not contain business rules: a command reads options, calls another package, and prints the result.
"""
