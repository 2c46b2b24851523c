"""The format that helper, collector and `core-dumps` share (docs/contracts.md): names, keys, attributes, cores.

Pure: no file is touched here. Standard library only (isal where it is installed), Python 3.7, because the helper runs
with the Python of the host.
"""
