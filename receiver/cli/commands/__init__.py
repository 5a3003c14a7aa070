"""The commands of `redox-receiver`: one file for each group.

Imported by `receiver.cli` when a command of the group runs.

Must not hold a rule: a command reads options, calls one of the other rooms, and prints.
"""
