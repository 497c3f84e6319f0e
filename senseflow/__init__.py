"""SenseFlow: distils many-step text-to-image teachers into four-step students."""

__version__ = "0.1.0"
