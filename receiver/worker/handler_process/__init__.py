"""The handler process: `python -m receiver.worker.handler_process FD` runs plugin code that can be killed.

`supervisor` runs in the parent, and `ipc` is the channel between parent and child. All other modules run in the child.

Must not outlive its lease: the supervisor kills the process at its timeout.
"""
