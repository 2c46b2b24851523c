"""Uploads the core dumps of one node to S3; see docs/architecture.md for the flow."""

__version__ = "0.1.0"
