"""Test tools for plugin authors: FakeRedox, samples of every message, and a log of sent messages.

Part of the installed package. Must not be imported by the receiver, except by `simulate`.
"""
