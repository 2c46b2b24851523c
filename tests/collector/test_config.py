import dataclasses
import pickle

import pytest

from core_dump_collector import config
from core_dump_collector.config import Settings
from core_dump_collector.errors import ConfigError


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)


def test_bucket_may_carry_a_prefix():
    settings = config.load({"bucket_name": "s3://dumps/fleet/a"})
    assert (settings.bucket, settings.prefix) == ("dumps", "fleet/a/")


def test_bare_bucket_has_no_prefix():
    settings = config.load({"bucket_name": "dumps"})
    assert (settings.bucket, settings.prefix) == ("dumps", "")


def test_environment_and_flag_are_one_setting_and_the_flag_wins(monkeypatch):
    monkeypatch.setenv("BUCKET_NAME", "from-environment")
    monkeypatch.setenv("WORKERS", "7")
    settings = config.load({"bucket_name": "from-flag"})
    assert (settings.bucket, settings.workers) == ("from-flag", 7)


def test_lists_are_comma_separated():
    settings = config.load(
        {"bucket_name": "dumps", "file_patterns": "core*, *.hprof", "object_tags": "team=core,env=prod"}
    )
    assert settings.file_patterns == ("core*", "*.hprof")
    assert settings.object_tags == {"team": "core", "env": "prod"}


@pytest.mark.parametrize(
    ("flags", "setting"),
    [
        ({}, "BUCKET_NAME is not set"),
        ({"bucket_name": ""}, "BUCKET_NAME="),
        ({"bucket_name": "Upper"}, "BUCKET_NAME='Upper'"),
        ({"bucket_name": "dumps/../etc"}, "BUCKET_NAME="),
        ({"bucket_name": "dumps", "workers": "0"}, "WORKERS='0'"),
        ({"bucket_name": "dumps", "workers": "many"}, "WORKERS='many'"),
        ({"bucket_name": "dumps", "node_name": "a/b"}, "NODE_NAME='a/b'"),
        ({"bucket_name": "dumps", "node_name": ".."}, "NODE_NAME='..'"),
        ({"bucket_name": "dumps", "max_upload_bytes_per_second": "9999"}, "at least 10000 bytes a second"),
        ({"bucket_name": "dumps", "max_upload_bytes_per_second": "-1"}, "MAX_UPLOAD_BYTES_PER_SECOND='-1'"),
        ({"bucket_name": "dumps", "key_template": "{nope}/{name}"}, "KEY_TEMPLATE="),
        ({"bucket_name": "dumps", "file_patterns": "core*,/etc/*"}, "FILE_PATTERNS="),
        ({"bucket_name": "dumps", "object_tags": "a=1,a=2"}, "OBJECT_TAGS="),
        ({"bucket_name": "dumps", "object_tags": "novalue"}, "OBJECT_TAGS="),
        ({"bucket_name": "dumps", "checksum": "md5"}, "CHECKSUM='md5'"),
        ({"bucket_name": "dumps", "sse": "aes"}, "SSE='aes'"),
        ({"bucket_name": "dumps", "sse": "AES256", "kms_key_id": "alias/a"}, "KMS_KEY_ID='alias/a'"),
        ({"bucket_name": "dumps", "part_bytes": "1000"}, "PART_BYTES='1000'"),
        ({"bucket_name": "dumps", "expected_bucket_owner": "12"}, "EXPECTED_BUCKET_OWNER='12'"),
        ({"bucket_name": "dumps", "no_such": "1"}, "NO_SUCH"),
    ],
)
def test_bad_setting_is_one_line_that_names_it(flags, setting):
    with pytest.raises(ConfigError) as caught:
        config.load(flags)
    assert setting in str(caught.value)
    assert "\n" not in str(caught.value)


def test_secrets_are_masked_in_the_startup_log(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "hunter3")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    shown = config.describe(config.load({"bucket_name": "dumps"}))
    assert shown["AWS_REGION"] == "eu-west-1"
    assert "hunter" not in repr(shown)


def test_every_setting_stands_in_the_table():
    table = config.render_markdown()
    for name, field in Settings.model_fields.items():
        assert f"`{name.upper()}`" in table
        assert field.description


def test_workers_get_a_small_frozen_copy_without_the_code_that_checks_settings():
    settings = config.load({"bucket_name": "s3://dumps/fleet", "object_tags": "team=a"})
    given = pickle.loads(pickle.dumps(settings.upload_options()))
    assert given == settings.upload_options()
    assert (given.bucket, given.prefix, given.object_tags) == ("dumps", "fleet/", {"team": "a"})
    with pytest.raises(dataclasses.FrozenInstanceError):
        given.bucket = "other"


@pytest.mark.parametrize("name", ["metadata", "sidecar"])
def test_metadata_objects_are_switched_off_by_the_old_name_too(monkeypatch, name):
    assert config.load({"bucket_name": "dumps"}).metadata
    assert not config.load({"bucket_name": "dumps", name: "false"}).metadata
    monkeypatch.setenv(name.upper(), "false")
    assert not config.load({"bucket_name": "dumps"}).metadata
    assert config.load({"bucket_name": "dumps", "metadata": "true"}).metadata, "a flag wins"


def test_a_bad_value_under_an_old_name_is_explained():
    with pytest.raises(ConfigError, match="SIDECAR='maybe'"):
        config.load({"bucket_name": "dumps", "sidecar": "maybe"})


@pytest.mark.parametrize("name", ["AWS_REGION", "AWS_DEFAULT_REGION"])
@pytest.mark.parametrize("region", ["eu central", "eu-central-1a/..", "-eu", "12"])
def test_region_that_boto3_would_refuse_is_one_line_that_names_it(monkeypatch, name, region):
    monkeypatch.setenv(name, region)
    with pytest.raises(ConfigError, match=f"^{name}="):
        config.load({"bucket_name": "dumps"})


def test_variable_of_boto3_that_is_wrong_is_one_line_that_names_it(monkeypatch):
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "never")
    with pytest.raises(
        ConfigError, match=r"^AWS_REQUEST_CHECKSUM_CALCULATION='never': takes when_supported or"
    ):
        config.load({"bucket_name": "dumps"})
