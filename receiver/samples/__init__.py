"""Samples: a valid, plausible body for every kind of message that Redox sends.

Used by the simulator, by `testing`, and by tests. Must not contain data of real people: all names and numbers are
synthetic.
"""
