"""`core-dumps` as a process, a bucket of one's own, and dumps put into it as docs/contracts.md has them."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import os
import re
import subprocess
import sys
import time
import uuid
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.support import s3
from typer.testing import CliRunner

from core_dumps.cli import app

ROOT = Path(__file__).parents[2]


@dataclass
class Cli:
    """`core-dumps` against a prefix of the bucket."""

    server: s3.S3Server
    prefix: str
    home: Path
    environ: dict[str, str] = field(default_factory=dict)

    def variables(self) -> dict[str, str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("AWS_") and k != "NO_COLOR"}
        sources = os.pathsep.join(str(ROOT / folder) for folder in ("format", "cli"))
        mine = {
            "PYTHONPATH": sources,
            "BUCKET_NAME": f"s3://{s3.BUCKET}/{self.prefix}",
            "HOME": str(self.home),
            "TZ": "UTC",
        }
        return (
            clean
            | self.server.environ()
            | {"AWS_EC2_METADATA_DISABLED": "true", "COLUMNS": "200"}
            | mine
            | self.environ
        )

    def run(self, *arguments: object, code: int = 0, **options):
        """Run it and check its exit code: in this process, or in one of its own where descriptors are given."""
        words = list(map(str, arguments))
        run = self._process if options.keys() - {"cwd"} else self._here
        done = run(words, **options)
        assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
        assert not re.search(r"Traceback[\s\S]+core_dumps", str(done.stderr)), done.stderr
        return done

    def _process(self, words: list[str], **options):
        options = {"capture_output": True, "text": True, "cwd": self.home, "timeout": 100} | options
        command = [sys.executable, "-m", "core_dumps.cli", *words]
        return subprocess.run(command, env=self.variables(), check=False, **options)

    def _here(self, words: list[str], cwd=None):
        """Call the program as its main does; a process would spend most of a second on imports."""
        with pytest.MonkeyPatch.context() as patch, contextlib.chdir(cwd or self.home):
            for name in os.environ.keys() - self.variables().keys():
                patch.delenv(name)
            for name, value in self.variables().items():
                patch.setenv(name, value)
            time.tzset()
            result = CliRunner().invoke(app, words, prog_name="core-dumps")
        time.tzset()
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return subprocess.CompletedProcess(words, result.exit_code, result.stdout, result.stderr)

    def json(self, *arguments: object):
        return json.loads(self.run("list", "--json=short", *arguments).stdout)

    def put(self, key: str, body: bytes, fields: dict | None = None, *, metadata: bool = True) -> str:
        """Put a dump and its metadata object, as the collector would."""
        whole = f"{self.prefix}/{key}"
        crc = base64.b64encode(zlib.crc32(body).to_bytes(4, "big")).decode()
        content = {"schema": 1, "key": whole, "bucket": s3.BUCKET, "size_bytes": len(body), "crc32": crc}
        content |= {"state": "complete", "sensitive": False} | (fields or {})
        with self.server.client() as client:
            client.put_object(Bucket=s3.BUCKET, Key=whole, Body=body)
            if metadata:
                client.put_object(Bucket=s3.BUCKET, Key=whole + ".json", Body=json.dumps(content).encode())
        return whole

    def put_raw(self, key: str, body: bytes) -> None:
        with self.server.client() as client:
            client.put_object(Bucket=s3.BUCKET, Key=f"{self.prefix}/{key}", Body=body)


@pytest.fixture
def cli(seaweed, tmp_path):
    return Cli(seaweed, f"t-{uuid.uuid4().hex[:8]}", tmp_path)


@pytest.fixture
def gz():
    return lambda content: gzip.compress(content, 1, mtime=0)
