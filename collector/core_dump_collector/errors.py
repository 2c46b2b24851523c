"""Owns the error that ends a start. What can go wrong with the store is in `s3/errors`."""

from __future__ import annotations


class ConfigError(Exception):
    """A setting or the node is not as it must be; the message is one line and says what to do."""
