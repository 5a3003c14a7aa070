"""redox-receiver: stands at the URL of a Redox destination, and loses nothing."""

__version__ = "0.1.0"
