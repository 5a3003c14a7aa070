"""Metrics for Prometheus: the counters that every process of a host adds to, and the exposition of all of them.

`directory` chooses where the processes of a host share their counters, and must be called before prometheus-client is
imported. The admin listener serves the sum of all processes, with the gauges of receiver.findings.gauges, at
`/metrics`.

Must not import another room, and must not hold anything that identifies a patient or a message: the values of labels
are names that an operator gave (destinations, handlers, API keys, registered sources) and fixed words.
"""
