"""Corrections: retry or skip deliveries; release lanes; replay, release or discard messages; send requests again.

Must not run deliveries or send requests, nor decide whether a correction is wise: the caller gives a reason, which is
sealed in one audit row for each delivery, message, lane or request changed.
"""
