"""`core-dumps` finds, downloads and opens the core dumps in a fleet's bucket, as coredumpctl does on one host."""

from importlib.metadata import version

__version__ = version("core-dump-handler")
