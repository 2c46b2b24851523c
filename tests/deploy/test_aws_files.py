"""ecs/ and iam/: held against AWS's own schemas, and the policies against a server that enforces them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError
from tests.support import collector, deploy, s3
from tests.support.cloudformation import Stack

from core_dump_collector.config import Settings
from core_dump_format.keys import literal_folder

IAM = deploy.ROOT / "iam"
TEMPLATE = deploy.ROOT / "ecs/core-dumps.yaml"
TEMPLATES = [TEMPLATE, deploy.ROOT / "eks/core-dumps.yaml"]
PERMISSIONS = ["write-only", "write-only-prefix", "duplicate-detection", "kms", "tags", "read", "read-tenant"]
BUCKET_POLICIES = ["bucket-policy", "bucket-policy-prefix", "bucket-policy-other-account"]
TRUST = ["trust-irsa", "trust-pod-identity", "trust-ecs"]
ACCEPTED = {
    "CKV_AWS_18",  # access logs need a bucket of their own: the account's choice
    "CKV_AWS_21",  # nothing in the bucket is overwritten, dumps expire: versions would only keep secrets longer
    "CKV_AWS_158",  # the collector's log holds no secrets
}


def policy(name, bucket="my-core-dumps"):
    return json.loads((IAM / f"{name}.json").read_text().replace("my-core-dumps", bucket))


@pytest.mark.parametrize("template", TEMPLATES, ids=["ecs", "eks"])
def test_template_passes_cfn_lint(template):
    deploy.succeed(deploy.tool("cfn-lint"), template)


def test_cfn_lint_finds_a_misspelt_property(tmp_path):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(TEMPLATE.read_text().replace("LaunchType:", "LaunchTyp:"))
    assert "E3002" in deploy.run(deploy.tool("cfn-lint"), wrong).stdout


def test_policy_linter_finds_only_what_is_explained():
    options = ["--framework", "cloudformation", "--skip-download", "--output", "json", "--quiet"]
    files = [word for template in TEMPLATES for word in ("-f", template)]
    done = deploy.run(deploy.tool("checkov"), *files, *options, env=os.environ | {"LOG_LEVEL": "ERROR"})
    report = json.loads(done.stdout)
    assert report["summary"]["passed"] >= 20
    assert {check["check_id"] for check in report["results"]["failed_checks"]} == ACCEPTED


def test_policies_are_what_iam_takes(tmp_path):
    roles = {
        name: {"Type": "AWS::IAM::Role", "Properties": {"AssumeRolePolicyDocument": policy(name)}}
        for name in TRUST
    }
    policies = {
        name: {"Type": "AWS::IAM::ManagedPolicy", "Properties": {"PolicyDocument": policy(name)}}
        for name in PERMISSIONS
    }
    buckets = {
        name: {
            "Type": "AWS::S3::BucketPolicy",
            "Properties": {"Bucket": name, "PolicyDocument": policy(name)},
        }
        for name in BUCKET_POLICIES
    }
    key = policy("key-policy-other-account")
    keys = {"key-policy-other-account": {"Type": "AWS::KMS::Key", "Properties": {"KeyPolicy": key}}}
    every = roles | policies | buckets | keys
    assert set(every) | {"lifecycle"} == {path.stem for path in IAM.glob("*.json")}
    resources = {name.title().replace("-", ""): value for name, value in every.items()}
    template = tmp_path / "policies.json"
    template.write_text(json.dumps({"AWSTemplateFormatVersion": "2010-09-09", "Resources": resources}))
    deploy.succeed(deploy.tool("cfn-lint"), template)


def container():
    """Return the collector's container of the template."""
    decode = pytest.importorskip("cfnlint.decode")
    template, problems = decode.decode(str(TEMPLATE))
    assert problems == []
    (found,) = template["Resources"]["TaskDefinition"]["Properties"]["ContainerDefinitions"]
    return template["Resources"], found


def test_task_gives_the_collector_settings_that_it_accepts_and_time_to_end():
    resources, task = container()
    given = {pair["Name"].lower(): pair["Value"] for pair in task["Environment"]}
    del given["aws_region"]
    assert set(given) <= set(Settings.model_fields)
    assert task["StopTimeout"] >= float(given["shutdown_seconds"]) + 20
    assert resources["Service"]["Properties"]["SchedulingStrategy"] == "DAEMON"
    role = resources["TaskRole"]["Properties"]["Policies"][0]["PolicyDocument"]
    assert role["Statement"][0]["Action"] == policy("write-only")["Statement"][0]["Action"]


def test_health_check_of_the_task_asks_the_running_collector(seaweed, watch_dir, tmp_path):
    _, task = container()
    kind, program, *arguments = task["HealthCheck"]["Command"]
    assert (kind, program) == ("CMD", "python3")
    with collector.running(watch_dir, seaweed.environ(), tmp_path) as daemon:
        asked = [text.replace(":9412", f":{daemon.port}") for text in arguments]
        deploy.succeed(sys.executable, *asked)
        daemon.stop()
        assert deploy.run(sys.executable, *asked).returncode != 0


def connect(endpoint, service, keys):
    config = Config(s3={"addressing_style": "path"}, retries={"max_attempts": 1})
    names = {"aws_access_key_id": keys[0], "aws_secret_access_key": keys[1], "region_name": "us-east-1"}
    return contextlib.closing(boto3.client(service, endpoint_url=endpoint, config=config, **names))


def make_user(iam, name, statements):
    """Make a user with a policy; three calls. Return its keys."""
    iam.create_user(UserName=name)
    document = json.dumps({"Version": "2012-10-17", "Statement": statements})
    iam.put_user_policy(UserName=name, PolicyName=name, PolicyDocument=document)
    key = iam.create_access_key(UserName=name)["AccessKey"]
    return key["AccessKeyId"], key["SecretAccessKey"]


@contextlib.contextmanager
def enforcing_server(scratch, statements):
    """Run an S3 server that enforces policies; yield its address, an admin's keys and those with the statements."""
    (port,) = s3.free_ports(1)
    # The first six calls make the two users; every later one is checked.
    environ = os.environ | {"INITIAL_NO_AUTH_ACTION_COUNT": "6"}
    with (scratch / "moto.log").open("wb") as log:
        command = [deploy.tool("moto_server"), "-H", "127.0.0.1", "-p", str(port)]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environ)
    try:
        assert s3.wait_for_port(port, process)
        endpoint = f"http://127.0.0.1:{port}"
        with connect(endpoint, "iam", ("none", "none")) as iam:
            admin = make_user(iam, "admin", [{"Effect": "Allow", "Action": "*", "Resource": "*"}])
            yield endpoint, admin, make_user(iam, "collector", statements)
    finally:
        process.terminate()
        process.wait(10)


@pytest.mark.parametrize("megabytes", [1, 40], ids=["one put", "multipart"])
@pytest.mark.parametrize("name", ["write-only", "duplicate-detection"])
def test_collector_works_with_each_policy_where_it_is_enforced(watch_dir, tmp_path, name, megabytes):
    (watch_dir / "core-app-1790000000-42-11.gz").write_bytes(os.urandom(megabytes << 20))
    with enforcing_server(tmp_path, policy(name, s3.BUCKET)["Statement"]) as (endpoint, admin, keys):
        with connect(endpoint, "s3", admin) as client:
            client.create_bucket(Bucket=s3.BUCKET)
        environ = {"AWS_ENDPOINT_URL": endpoint, "AWS_REGION": "us-east-1", "ADDRESSING_STYLE": "path"}
        environ |= {"AWS_ACCESS_KEY_ID": keys[0], "AWS_SECRET_ACCESS_KEY": keys[1]}
        with collector.running(watch_dir, environ, tmp_path) as daemon:
            collector.wait_until(
                lambda: daemon.metric('core_dump_uploads_total{result="uploaded"}') == 1, 60, "the upload"
            )
        assert list(watch_dir.glob("core*")) == []
        with connect(endpoint, "s3", admin) as client:
            assert len(s3.keys_in(client)) == 2
        with connect(endpoint, "s3", keys) as client, pytest.raises(ClientError, match="AccessDenied"):
            client.delete_object(Bucket=s3.BUCKET, Key="node-1/core-app-1790000000-42-11.gz")


@pytest.mark.parametrize(("name", "objects"), [("write-only", 3), ("duplicate-detection", 2)])
def test_policy_decides_whether_a_dump_that_is_there_is_recognised(watch_dir, tmp_path, name, objects):
    dump = watch_dir / "core-app-1790000000-42-11.gz"
    dump.write_bytes(os.urandom(1 << 20))
    with enforcing_server(tmp_path, policy(name, s3.BUCKET)["Statement"]) as (endpoint, admin, keys):
        with connect(endpoint, "s3", admin) as client:
            client.create_bucket(Bucket=s3.BUCKET)
            client.put_object(
                Bucket=s3.BUCKET, Key=f"node-1/{dump.name}", Body=dump.read_bytes(), ChecksumAlgorithm="CRC32"
            )
        environ = {"AWS_ENDPOINT_URL": endpoint, "AWS_REGION": "us-east-1", "ADDRESSING_STYLE": "path"}
        environ |= {"AWS_ACCESS_KEY_ID": keys[0], "AWS_SECRET_ACCESS_KEY": keys[1]}
        with collector.running(watch_dir, environ, tmp_path):
            collector.wait_until(lambda: not dump.exists(), 60, "the upload")
        with connect(endpoint, "s3", admin) as client:
            assert len(s3.keys_in(client)) == objects


def test_rules_expire_dumps_and_no_modules(tmp_path):
    """By the prefix that the default template gives to dumps, in the stack and in the file alike."""
    rules = json.loads((IAM / "lifecycle.json").read_text())
    with (
        enforcing_server(tmp_path, policy("write-only")["Statement"]) as (endpoint, admin, _),
        connect(endpoint, "s3", admin) as client,
    ):
        client.create_bucket(Bucket=s3.BUCKET)
        client.put_bucket_lifecycle_configuration(Bucket=s3.BUCKET, LifecycleConfiguration=rules)
        kept = client.get_bucket_lifecycle_configuration(Bucket=s3.BUCKET)["Rules"]
    (expiring,) = [rule for rule in kept if "Expiration" in rule]
    folder = literal_folder(Settings.model_fields["key_template"].default)
    assert (expiring["Filter"]["Prefix"], expiring["Status"]) == (folder, "Enabled")
    for template in TEMPLATES:
        given = {"Cluster": "c"} | ({"Image": "i"} if template is TEMPLATE else {})
        stack = Stack(template, given, "eu-central-1", "aws", "amazonaws.com")
        own = stack.resources["Bucket"]["LifecycleConfiguration"]["Rules"]
        assert [rule["Prefix"] for rule in own if "ExpirationInDays" in rule] == [folder]


def test_enforcement_is_real_for_an_identity_that_may_only_read(watch_dir, tmp_path):
    (watch_dir / "core-app-1790000000-42-11.gz").write_bytes(b"dump")
    statements = [{"Effect": "Allow", "Action": "s3:GetObject", "Resource": "*"}]
    with enforcing_server(tmp_path, statements) as (endpoint, admin, keys):
        with connect(endpoint, "s3", admin) as client:
            client.create_bucket(Bucket=s3.BUCKET)
        environ = {"AWS_ENDPOINT_URL": endpoint, "AWS_REGION": "us-east-1", "ADDRESSING_STYLE": "path"}
        environ |= {"AWS_ACCESS_KEY_ID": keys[0], "AWS_SECRET_ACCESS_KEY": keys[1]}
        with collector.running(watch_dir, environ, tmp_path) as daemon:
            collector.wait_until(lambda: "AccessDenied" in daemon.log_path.read_text(), 60, "the refusal")
        assert [path.name for path in watch_dir.glob("core*")] == ["core-app-1790000000-42-11.gz"]
