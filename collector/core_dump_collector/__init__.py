"""Uploads the core dumps of one node to S3; see docs/architecture.md for the flow."""

from importlib.metadata import version

__version__ = version("core-dump-handler")
