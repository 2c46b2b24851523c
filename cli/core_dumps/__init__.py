"""`core-dumps` finds, downloads and opens the core dumps in a fleet's bucket, as coredumpctl does on one host."""


def version() -> str:
    """Return the version of the installed package; importing `importlib.metadata` takes as long as `typer`."""
    from importlib import metadata  # noqa: PLC0415  see above

    return metadata.version("core-dump-handler")
