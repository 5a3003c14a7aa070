"""The handler process: `python -m receiver.worker.handler_process FD` runs plugin code that can be killed.

`supervisor` is the parent's side, `ipc` the channel between the two; everything else runs in the child.

Must not outlive its lease: the supervisor kills it at its time-out.
"""
