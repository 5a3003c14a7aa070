"""Notices: tell people about findings that last, by a signed webhook or a command, without Prometheus.

The admin listener runs a `Notifier` where RECEIVER_NOTIFY_URL or RECEIVER_NOTIFY_COMMAND is set. Must not hold anything
of a patient: a notice carries the text of a finding, and the command that fixes it.
"""
