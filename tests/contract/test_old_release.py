"""Helper, collector and `core-dumps` one release apart work together: files that a release left behind are read."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.cli.conftest import Cli
from tests.helper.conftest import Station
from tests.helper.test_helper_vital import large  # noqa: F401  a fixture
from tests.support import s3
from tests.support.collector import IMPATIENT, running, wait_until
from tests.support.cores import simple as elf
from tests.support.record_release import PARTS_NAME, move_into_the_past
from tests.support.uploads import MEBIBYTE, connected, send

from core_dump_collector.jobs import Outcome

RELEASES = sorted((Path(__file__).parents[1] / "fixtures").glob("release-*"))
assert RELEASES, "without fixtures nothing would be tested"
KEY = f"node-1/{PARTS_NAME}"
VERSIONED = {"fingerprint", "frames"}
"""Fields that another version of the fingerprint changes."""
CHANGED = {"uploaded_at", "collector_version"}
"""Fields of a metadata object that differ with each upload."""


@dataclass(frozen=True)
class Release:
    """The files recorded from one release."""

    path: Path

    def json(self, name):
        return json.loads((self.path / name).read_text())

    def fill(self, watch_dir):
        """Restore the watch directory as its helper left it."""
        for name, facts in self.json("watch.json").items():
            content = (self.path / "watch" / name.replace(".helper", "helper")).read_bytes()
            restore(watch_dir / name, content, facts)

    def upload(self, watch_dir, state):
        """Restore the dump whose upload stopped in this state; return its path and the recorded facts."""
        facts = self.json("uploads.json")[state]
        content = gzip.decompress((self.path / "parts.gz").read_bytes())[: facts["size"]]
        path = watch_dir / PARTS_NAME
        restore(path, content, facts)
        return path, content

    def objects(self):
        """Return key and body of every object in its bucket."""
        return {
            item["key"]: (self.path / "bucket" / item["key"]).read_bytes()
            for item in self.json("listing.json")
        }


def restore(path, content, facts):
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.write_bytes(content)
    path.chmod(int(facts["mode"], 8))
    for name, value in facts["attributes"].items():
        os.setxattr(path, name, value.encode(errors="surrogateescape"))
    os.utime(path, ns=(facts["mtime_ns"], facts["mtime_ns"]))


def metadata_of(objects):
    """Return every metadata object without the fields that differ with each upload."""
    parsed = {key: json.loads(body) for key, body in objects.items() if key.endswith(".json")}
    return {key: {k: v for k, v in fields.items() if k not in CHANGED} for key, fields in parsed.items()}


@pytest.fixture
def station(tmp_path, watch_dir):
    return Station(tmp_path, watch_dir)


@pytest.fixture(params=RELEASES, ids=lambda path: path.name)
def old(request):
    return Release(request.param)


def test_dumps_and_records_of_the_old_helper_become_the_same_objects(
    old, seaweed, bucket, watch_dir, tmp_path
):
    old.fill(watch_dir)
    wanted = old.objects()
    with running(watch_dir, seaweed.environ(), tmp_path, program=IMPATIENT):
        wait_until(lambda: len(s3.keys_in(bucket)) >= len(wanted), 30, "every object")
        wait_until(lambda: not list(watch_dir.glob("core*")), 10, "every dump to be deleted")
    found = {key: s3.body_of(bucket, key) for key in s3.keys_in(bucket)}
    assert found.keys() == wanted.keys()
    before, now = metadata_of(wanted), metadata_of(found)
    for key, fields in before.items():
        assert fields.items() - now[key].items() <= {(name, fields.get(name)) for name in VERSIONED}, key
        assert "fingerprint" not in fields or now[key]["fingerprint_version"] == 2
    for key in found.keys() - now.keys():
        assert gzip.decompress(found[key]) == gzip.decompress(wanted[key])


def start_upload(bucket, path, content, numbers):
    """Put parts of the dump into the store, and the id of their upload into its record."""
    record = json.loads(os.getxattr(path, "user.coredump.upload"))
    checksum = {"ChecksumAlgorithm": "CRC32", "ChecksumType": "FULL_OBJECT"}
    upload = bucket.create_multipart_upload(Bucket=s3.BUCKET, Key=KEY, **checksum)["UploadId"]
    tags = {}
    for number in numbers:
        body = content[(number - 1) * record["part_bytes"] : number * record["part_bytes"]]
        stored = bucket.upload_part(Bucket=s3.BUCKET, Key=KEY, UploadId=upload, PartNumber=number, Body=body)
        tags[number] = stored["ETag"]
    os.setxattr(path, "user.coredump.upload", json.dumps(record | {"upload_id": upload}).encode())
    return upload, [{"PartNumber": number, "ETag": tag} for number, tag in tags.items()]


def assert_arrived(bucket, path, content):
    assert s3.body_of(bucket, KEY) == content
    assert set(s3.keys_in(bucket)) == {KEY, KEY + ".json"}
    assert s3.unfinished_multiparts(bucket) == []
    assert not path.exists()


def refusing(seaweed, tmp_path, *rules):
    """Run haproxy that refuses what a resumed upload must not do."""
    return s3.haproxy(tmp_path, seaweed, *(f"http-request deny if {rule}" for rule in rules))


CREATES = "{ method POST } { url_sub uploads }"
SENDS_PARTS = "{ method PUT } { url_param(partNumber) -m found }"
SENDS_STORED_PARTS = "{ method PUT } { url_param(partNumber) -m int le 2 }"


@pytest.mark.parametrize("state", ["sending", "sent"])
def test_an_upload_that_the_old_collector_began_sends_only_the_missing_parts(
    old, seaweed, bucket, watch_dir, tmp_path, state
):
    path, content = old.upload(watch_dir, state)
    start_upload(bucket, path, content, [1, 2])
    with (
        refusing(seaweed, tmp_path, CREATES, SENDS_STORED_PARTS) as proxy,
        connected(seaweed.environ() | {"AWS_ENDPOINT_URL_S3": proxy.endpoint}),
    ):
        assert send(path).outcome == Outcome.UPLOADED
    assert_arrived(bucket, path, content)


def test_an_upload_that_the_old_collector_completed_without_a_response_is_not_repeated(
    old, seaweed, bucket, watch_dir, tmp_path
):
    path, content = old.upload(watch_dir, "sent")
    upload, parts = start_upload(bucket, path, content, [1, 2, 3])
    bucket.complete_multipart_upload(
        Bucket=s3.BUCKET, Key=KEY, UploadId=upload, MultipartUpload={"Parts": parts}
    )
    with (
        refusing(seaweed, tmp_path, CREATES, SENDS_PARTS) as proxy,
        connected(seaweed.environ() | {"AWS_ENDPOINT_URL_S3": proxy.endpoint}),
    ):
        assert send(path).outcome == Outcome.ALREADY_STORED
    assert_arrived(bucket, path, content)


def test_a_dump_that_the_old_collector_stored_gets_only_its_metadata_object(
    old, seaweed, bucket, watch_dir, tmp_path
):
    path, content = old.upload(watch_dir, "stored")
    bucket.put_object(Bucket=s3.BUCKET, Key=KEY, Body=content)
    with (
        refusing(seaweed, tmp_path, "{ method PUT POST } !{ path_end .json }") as proxy,
        connected(seaweed.environ() | {"AWS_ENDPOINT_URL_S3": proxy.endpoint}),
    ):
        assert send(path).outcome == Outcome.ALREADY_STORED
    assert_arrived(bucket, path, content)


@pytest.mark.parametrize("arrived", [True, False])
def test_a_dump_of_one_request_without_a_response_is_stored_once(old, seaweed, bucket, watch_dir, arrived):
    path, content = old.upload(watch_dir, "sent-whole")
    assert len(content) < MEBIBYTE
    if arrived:
        bucket.put_object(Bucket=s3.BUCKET, Key=KEY, Body=content)
    with connected(seaweed.environ()):
        outcome = send(path).outcome
    assert outcome == (Outcome.ALREADY_STORED if arrived else Outcome.UPLOADED)
    assert_arrived(bucket, path, content)


def test_core_dumps_lists_explains_and_fetches_old_objects(old, seaweed, bucket, tmp_path):
    objects = old.objects()
    for item in old.json("listing.json"):
        body = objects[item["key"]]
        bucket.put_object(Bucket=s3.BUCKET, Key=item["key"], Body=body, Metadata=item["metadata"])
    cli = Cli(seaweed, "", tmp_path)
    documents = {key: json.loads(body) for key, body in objects.items() if key.endswith(".json")}
    dumps = {key: fields for key, fields in documents.items() if key.removesuffix(".json") in objects}
    rows = {row["key"]: row for row in cli.json()}
    assert rows.keys() >= {key.removesuffix(".json") for key in dumps}
    for key, fields in dumps.items():
        row = rows[key.removesuffix(".json")]
        assert (row["pid"], row["sig"], row["size"]) == (
            fields["pid"],
            fields["signal"],
            fields["size_bytes"],
        )
    (app,) = (fields for fields in dumps.values() if fields["comm"] == "app" and not fields["sensitive"])
    text = cli.run("info", app["pid"]).stdout
    assert app["build_id"] in text
    assert "SIGSEGV" in text
    done = cli.run("get", app["pid"], "-o", tmp_path / "core")
    assert "verified: CRC-32, ELF length" in done.stdout
    assert (tmp_path / "core").read_bytes() == gzip.decompress(objects[app["key"]])


def test_the_old_collector_uploads_what_the_helper_writes_today(
    old, seaweed, bucket, station, watch_dir, tmp_path
):
    core = elf(bytes(100_000))
    station.run(core)
    station.settings["RATE_LIMIT"] = "1/600"
    for _ in range(2):
        station.run(core, name="storm")
    move_into_the_past(watch_dir / ".helper")
    (wheel,) = old.path.glob("*.whl")
    environ = seaweed.environ() | {"PYTHONPATH": str(wheel)}
    shown = [sys.executable, "-c", "import core_dump_collector; print(core_dump_collector.__file__)"]
    assert subprocess.check_output(shown, env=environ, text=True).startswith(str(wheel))
    with running(watch_dir, environ, tmp_path):
        wait_until(lambda: len(s3.keys_in(bucket)) >= 7, 30, "three dumps and one suppressed record")
    metadata = [json.loads(s3.body_of(bucket, key)) for key in s3.keys_in(bucket) if key.endswith(".json")]
    assert {fields["collector_version"] for fields in metadata} == {old.path.name.removeprefix("release-")}
    assert sorted(fields["state"] for fields in metadata) == [
        "complete",
        "complete",
        "complete",
        "suppressed",
    ]
    whole = next(
        fields for fields in metadata if fields.get("timestamp") == 1700000000 and "-app-" in fields["key"]
    )
    assert (whole["pid"], whole["signal"], whole["bytes"]) == (os.getpid(), 11, len(core))
    assert gzip.decompress(s3.body_of(bucket, whole["key"])) == core


def test_readers_of_the_old_release_call_a_trimmed_dump_truncated(
    old,
    seaweed,
    bucket,
    station,
    watch_dir,
    tmp_path,
    large,  # noqa: F811
):
    large(RATE_LIMIT="1/600", VITAL_LIMIT="1/600")
    large(RATE_LIMIT="1/600", VITAL_LIMIT="1/600")
    (trimmed,) = [name for name in station.names() if "trimmed" in station.attributes(watch_dir / name)]
    content = (watch_dir / trimmed).read_bytes()
    (wheel,) = old.path.glob("*.whl")
    environ = seaweed.environ() | {"PYTHONPATH": str(wheel)}
    with running(watch_dir, environ, tmp_path):
        wait_until(lambda: len(s3.keys_in(bucket)) >= 4, 30, "two dumps")
    (key,) = [key for key in s3.keys_in(bucket) if key.endswith(trimmed)]
    assert s3.body_of(bucket, key) == content
    fields = json.loads(s3.body_of(bucket, key + ".json"))
    assert (fields["state"], fields["truncated"]) == ("truncated", "max_dump_bytes")
    script = (
        "import sys; from core_dumps.dump import Dump\n"
        "dump = Dump('k', 1, 1, True, {}).with_sidecar(sys.stdin.buffer.read())\n"
        "print(dump.states)"
    )
    given = json.dumps({"state": "trimmed", "trimmed": "rate_limit", "truncated": "max_dump_bytes"}).encode()
    told = subprocess.check_output([sys.executable, "-c", script], input=given, env=environ)
    assert told == b"['truncated']\n"


def test_the_old_configuration_means_the_same_to_the_helper(old, station, tmp_path, watch_dir):
    config = tmp_path / "old.conf"
    config.write_text(
        (old.path / "helper.conf").read_text().replace("WATCH_DIR=/core_dumps", f"WATCH_DIR={watch_dir}")
    )
    config.chmod(0o644)
    values = {"%P": os.getpid(), "%p": 7, "%i": os.getpid(), "%u": os.getuid(), "%g": os.getgid(), "%s": 11}
    values |= {"%t": 1700000000, "%c": 0, "%d": 1, "%F": "", "%h": "node", "%e": "app"}
    given = (old.path / "arguments").read_text().removesuffix(" -- %e\n")
    for specifier, value in values.items():
        given = given.replace(specifier, str(value))
    logged = station.run(elf(bytes(1000)), f"-C{config}", *given.split())
    assert "ignored" not in logged
    assert station.dump().name == "core-app-1700000000-7-11.gz"
    assert station.attributes()["hostname"] == "node"
