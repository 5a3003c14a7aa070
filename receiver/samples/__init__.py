"""A valid, plausible body of every kind of message that Redox sends.

Called by the simulator, by `testing`, and by tests.

Must not hold a real person's data: names and numbers are synthetic.
"""
