"""`core-dumps`: what coredumpctl is for one host, for the bucket of a fleet."""

__version__ = "0.1.0"
