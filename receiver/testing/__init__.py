"""For plugin authors: an example plugin.

Tests of a plugin also use receiver.samples (a body of every kind), receiver.simulator.fake_redox (a Redox that sends
them) and receiver.simulator.api (a Redox API that receives). Must not be imported by the receiver.
"""
