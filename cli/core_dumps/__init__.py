"""`core-dumps`: what coredumpctl is for one host, for the bucket of a fleet."""

from importlib.metadata import version

__version__ = version("core-dump-handler")
