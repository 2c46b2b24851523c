"""iam/, ecs/ and eks/ where their conditions are evaluated: TLS, If-None-Match, prefixes, KMS, another account."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import sys

import botocore.session
import pytest
from botocore.exceptions import ClientError
from tests.support import collector, deploy, s3
from tests.support.cloudformation import Stack
from tests.support.policies import Gate, Principal, effect, enforcing

from core_dump_format.keys import parse_location

IAM = deploy.ROOT / "iam"
NAME = "core-app-1790000000-42-11.gz"
ROLE = "arn:aws:iam::111122223333:role/core-dump-collector"
OTHER = "arn:aws:iam::444455556666:role/core-dump-collector"


def render(*names, code=0, **options):
    given = {"bucket": s3.BUCKET, "region": "eu-central-1", "account": "111122223333", "tenant": "shop"}
    given |= {"key": "00000000-0000-0000-0000-000000000000", "oidc": "ABC"} | options
    words = [word for option, value in given.items() for word in (f"--{option}", value)]
    done = deploy.run(sys.executable, IAM / "render.py", *names, *words)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout) if code == 0 else done.stderr


@pytest.fixture
def gate(seaweed, bucket):
    """Run a server that enforces policies in front of the real one."""
    with contextlib.ExitStack() as stack:

        def started(principal, *, tls=False, **more):
            pair = None
            if tls:
                pair = (seaweed.ca_file, seaweed.ca_file.with_name("key.pem"))
            found = Gate({s3.ADMIN.access: principal}, **more)
            return stack.enter_context(enforcing(found, seaweed.port, pair))

        yield started


def environ(seaweed, gate, location=s3.BUCKET):
    return seaweed.environ() | {
        "AWS_ENDPOINT_URL_S3": gate.endpoint,
        "AWS_CA_BUNDLE": str(seaweed.ca_file),
        "ADDRESSING_STYLE": "path",
        "BUCKET_NAME": location,
    }


def upload(directory, variables, scratch, megabytes=1):
    """Let a collector upload a dump; return its log."""
    dump = directory / NAME
    dump.write_bytes(os.urandom(megabytes << 20))
    with collector.running(directory, variables, scratch) as daemon:

        def decided():
            return not dump.exists() or "AccessDenied" in daemon.log_path.read_text()

        collector.wait_until(decided, 60, "the upload or a refusal")
        return daemon.log_path.read_text()


@pytest.mark.parametrize("megabytes", [1, 40], ids=["one put", "multipart"])
def test_bucket_that_takes_only_new_objects_over_tls_takes_every_write_of_the_collector(
    seaweed, bucket, gate, watch_dir, tmp_path, megabytes
):
    role = Principal(ROLE, (render("write-only"),))
    store = gate(role, tls=True, bucket_policy=render("bucket-policy"))
    upload(watch_dir, environ(seaweed, store), tmp_path, megabytes)
    done = collector.run_check(watch_dir, environ(seaweed, store))
    assert "a second one under its key was refused" in done.stdout
    assert not (watch_dir / NAME).exists()
    assert len([key for key in s3.keys_in(bucket) if NAME in key]) == 2
    reading = {"HeadObject", "GetObject", "DeleteObject", "ListMultipartUploads"}
    assert {operation for operation, _ in store.refused} <= reading
    assert ("CompleteMultipartUpload" in {operation for operation, _ in store.allowed}) is (megabytes == 40)


def test_bucket_refuses_whoever_would_overwrite_or_speak_in_clear(seaweed, bucket, gate):
    anything = {"Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}
    clear = gate(Principal(ROLE, (anything,)), bucket_policy=render("bucket-policy"))
    with seaweed.client(endpoint=clear.endpoint) as client, pytest.raises(ClientError, match="AccessDenied"):
        client.put_object(Bucket=s3.BUCKET, Key="a", Body=b"a", IfNoneMatch="*")
    store = gate(Principal(ROLE, (anything,)), tls=True, bucket_policy=render("bucket-policy"))
    asked = environ(seaweed, store) | {"CONDITIONAL": "false"}
    script = "import boto3, sys; boto3.client('s3').put_object(Bucket=sys.argv[1], Key='a', Body=b'b')"
    done = deploy.run(sys.executable, "-c", script, s3.BUCKET, env=os.environ | asked)
    assert "AccessDenied" in done.stderr
    assert s3.keys_in(bucket) == {}


@pytest.mark.parametrize(("prefix", "stored"), [("cluster-a", True), ("cluster-b", False), ("", False)])
@pytest.mark.parametrize("where", ["identity", "bucket"])
def test_role_writes_below_the_prefix_of_its_tag_and_nowhere_else(
    seaweed, gate, watch_dir, tmp_path, prefix, stored, where
):
    own = render("write-only-prefix") if where == "identity" else render("write-only")
    of_bucket = render("bucket-policy-prefix") if where == "bucket" else {"Statement": []}
    role = Principal(ROLE, (own,), {"core-dump-prefix": "cluster-a"})
    store = gate(role, bucket_policy=of_bucket)
    upload(watch_dir, environ(seaweed, store, f"s3://{s3.BUCKET}/{prefix}"), tmp_path)
    assert (watch_dir / NAME).exists() is not stored
    untagged = Principal(ROLE, (own,))
    assert not Gate({}, bucket_policy=of_bucket).permits(
        untagged,
        "s3:PutObject",
        f"arn:aws:s3:::{s3.BUCKET}/cluster-a/x",
        of_bucket,
        {"aws:PrincipalArn": ROLE},
    )


@pytest.mark.parametrize(
    ("names", "key_policy", "stored"),
    [
        (("write-only", "kms"), True, True),
        (("write-only",), True, False),  # KMS is asked in the role's name
        (("write-only", "kms"), False, False),  # another account's key has to allow it too
    ],
)
def test_collector_of_another_account_needs_bucket_key_and_its_own_policy_to_allow_it(
    seaweed, gate, watch_dir, tmp_path, names, key_policy, stored
):
    role = Principal(OTHER, (render(*names),))
    allowed = render("bucket-policy-other-account", account="444455556666")
    key = render("key-policy-other-account", account="444455556666") if key_policy else {"Statement": []}
    store = gate(role, bucket_policy=allowed, key_policy=key)
    upload(watch_dir, environ(seaweed, store), tmp_path, 40)
    assert (watch_dir / NAME).exists() is not stored
    strangers = Gate({}, bucket_policy=render("bucket-policy-other-account"))
    assert not strangers.permits(
        role, "s3:PutObject", f"arn:aws:s3:::{s3.BUCKET}/x", strangers.bucket_policy, {}
    )


def test_tenant_lists_and_reads_its_own_dumps_and_no_others(seaweed, bucket, gate, tmp_path):
    for namespace in ("shop", "bank"):
        key = f"dumps/{namespace}/2026-09-21/pod-1/node-1/{NAME}"
        bucket.put_object(Bucket=s3.BUCKET, Key=key, Body=gzip.compress(namespace.encode()))
        bucket.put_object(Bucket=s3.BUCKET, Key=f"{key}.json", Body=b"{}")
    store = gate(Principal(ROLE, (render("read-tenant"),)))

    def core_dumps(*words, template):
        variables = environ(seaweed, store) | {"KEY_TEMPLATE": template, "XDG_CACHE_HOME": str(tmp_path)}
        return deploy.run(deploy.tool("core-dumps"), *words, env=os.environ | variables)

    template = "dumps/{}/{{date}}/{{pod}}/{{node}}/{{name}}"
    own = core_dumps("list", "--json", "short", template=template.format("shop"))
    assert own.returncode == 0, own.stderr
    assert "shop" in own.stdout
    assert "bank" not in own.stdout
    got = core_dumps(
        "get", NAME, "--keep-compressed", "-o", tmp_path / "dump", template=template.format("shop")
    )
    assert got.returncode == 0, got.stderr
    assert gzip.decompress((tmp_path / "dump").read_bytes()) == b"shop"
    assert store.refused == []
    other = core_dumps("list", template=template.format("bank"))
    assert other.returncode != 0
    assert "AccessDenied" in other.stderr
    with seaweed.client(endpoint=store.endpoint) as client:
        for refused in ({"Prefix": "dumps/"}, {}, {"Prefix": "dumps/bank/"}, {"Prefix": "_modules/"}):
            with pytest.raises(ClientError, match="AccessDenied"):
                client.list_objects_v2(Bucket=s3.BUCKET, **refused)


REGIONS = {
    "eu-central-1": ("aws", "amazonaws.com"),
    "cn-north-1": ("aws-cn", "amazonaws.com.cn"),
    "us-gov-west-1": ("aws-us-gov", "amazonaws.com"),
    "us-iso-east-1": ("aws-iso", "c2s.ic.gov"),
    "us-isob-east-1": ("aws-iso-b", "sc2s.sgov.gov"),
    "eu-isoe-west-1": ("aws-iso-e", "cloud.adc-e.uk"),
    "us-isof-south-1": ("aws-iso-f", "csp.hci.ic.gov"),
    "eusc-de-east-1": ("aws-eusc", "amazonaws.eu"),
}


def test_every_partition_that_boto3_knows_is_tried():
    data = botocore.session.get_session().get_data("partitions")
    known = {(part["id"], part["outputs"]["dnsSuffix"]) for part in data["partitions"]}
    assert known == set(REGIONS.values())


@pytest.mark.parametrize("region", REGIONS)
def test_rendered_policies_name_the_partition_of_the_region(region):
    partition, domain = REGIONS[region]
    names = sorted(path.stem for path in IAM.glob("*.json"))
    for name in names:
        text = json.dumps(render(name, region=region, account="999900001111", bucket="b-1", prefix="a/b"))
        assert {part.split(":")[0] for part in text.split("arn:")[1:]} <= {partition}, name
        for example in {"my-core-dumps", "111122223333", "eu-central-1", "my-tenant", "EXAMPLE"} - {region}:
            assert example not in text, name
    via = render("kms", region=region)["Statement"][0]["Condition"]["StringEquals"]["kms:ViaService"]
    assert via == f"s3.{region}.{domain}"
    assert f"oidc.eks.{region}.{domain}/id/ABC" in json.dumps(render("trust-irsa", region=region))


def test_value_that_looks_like_another_example_stays():
    found = render("write-only", bucket="dumps-eu-central-1", region="us-gov-west-1")
    assert found["Statement"][0]["Resource"] == "arn:aws-us-gov:s3:::dumps-eu-central-1/*"


def test_prefix_is_part_of_every_key_and_of_no_bucket():
    text = json.dumps([render(name, prefix="a/b") for name in ("read-tenant", "lifecycle", "bucket-policy")])
    keys = re.findall(f':::{s3.BUCKET}/([^"]*)"', text) + re.findall('"(?:s3:p|P)refix": "([^"]*)"', text)
    assert len(keys) == 7
    assert all(key.startswith("a/b/") for key in keys)
    assert f':::{s3.BUCKET}"' in text


@pytest.mark.parametrize(
    ("names", "options", "said"),
    [
        (["write-onli"], {}, "takes bucket-policy"),
        (["write-only"], {"bucket": ""}, "--bucket"),
        (["write-only"], {"bucket": 'b","Effect":"Allow'}, "--bucket"),
        (["write-only"], {"prefix": "/a"}, "--prefix"),
        (["kms"], {"account": "1"}, "--account"),
        (["write-only", "lifecycle"], {}, "two documents"),
    ],
)
def test_wrong_option_is_named(names, options, said):
    assert said in render(*names, code=2, **options)


def stack(folder, region="eu-central-1", **parameters):
    given = {"Cluster": "c"} | ({"Image": "i"} if folder == "ecs" else {}) | parameters
    return Stack(deploy.ROOT / folder / "core-dumps.yaml", given, region, *REGIONS[region])


def role_of(found):
    name = "TaskRole" if "TaskRole" in found.resources else "Role"
    return found.resources[name]["Policies"][0]["PolicyDocument"]


def variables_of(found):
    """Return the variables of the task."""
    container = found.resources["TaskDefinition"]["ContainerDefinitions"][0]
    return {item["Name"]: item["Value"] for item in container["Environment"]}


def location_of(found):
    """Return the stack's BUCKET_NAME: a variable of the task, or an output."""
    if "TaskDefinition" in found.resources:
        return variables_of(found)["BUCKET_NAME"]
    return found.outputs["BucketName"]


@pytest.mark.parametrize("folder", ["ecs", "eks"])
def test_stack_has_its_own_bucket_with_the_policy_of_iam_or_uses_yours(folder):
    own, yours = (
        stack(folder),
        stack(folder, "cn-north-1", BucketName="theirs", BucketRegion="cn-northwest-1"),
    )
    assert own.resources["BucketPolicy"]["PolicyDocument"] == render("bucket-policy", bucket="the-bucket")
    assert not {"Bucket", "BucketPolicy"} & set(yours.resources)
    assert role_of(own)["Statement"][0] == render("write-only", bucket="the-bucket")["Statement"][0]
    assert role_of(yours)["Statement"][0]["Resource"] == "arn:aws-cn:s3:::theirs/*"
    encryption = own.resources["Bucket"]["BucketEncryption"]["ServerSideEncryptionConfiguration"]
    assert "KMSMasterKeyID" not in encryption[0]["ServerSideEncryptionByDefault"]


@pytest.mark.parametrize("folder", ["ecs", "eks"])
def test_stack_with_key_and_prefix_lets_its_role_write_there_and_nowhere_else(
    seaweed, gate, watch_dir, tmp_path, folder
):
    key = "arn:aws:kms:eu-central-1:111122223333:key/00000000-0000-0000-0000-000000000000"
    found = stack(folder, BucketName=s3.BUCKET, Prefix="a/b", KmsKeyArn=key)
    delegates = {"Statement": [{"Effect": "Allow", "Principal": {"AWS": "arn:aws:iam::111122223333:root"},
                                "Action": "kms:*", "Resource": "*"}]}  # fmt: skip
    store = gate(Principal(ROLE, (role_of(found),)), key_policy=delegates)
    upload(watch_dir, environ(seaweed, store, location_of(found)), tmp_path, 40)
    assert not (watch_dir / NAME).exists()
    elsewhere = f"arn:aws:s3:::{s3.BUCKET}/c/x"
    assert effect(role_of(found), "s3:PutObject", elsewhere, {}, None) == ""
    own = stack(folder, Prefix="a/b", KmsKeyArn=key).resources["Bucket"]
    rules = [rule.get("Prefix") for rule in own["LifecycleConfiguration"]["Rules"]]
    assert rules == [None, "a/b/dumps/"]


@pytest.mark.parametrize("folder", ["ecs", "eks"])
def test_bucket_without_a_prefix_is_one_that_the_collector_takes(folder):
    assert parse_location(location_of(stack(folder, BucketName="theirs"))) == ("theirs", "")


def test_task_follows_the_parameters_of_region_template_instances_and_roll_out():
    changed = stack("ecs", BucketName="theirs", BucketRegion="us-east-2", LaunchType="EXTERNAL", CircuitBreaker="no",
                    KeyTemplate="{node}/{name}", MinimumHealthyPercent="90", PlacementConstraint="a == b")  # fmt: skip
    task, service = changed.resources["TaskDefinition"], changed.resources["Service"]
    variables = variables_of(changed)
    assert (variables["AWS_REGION"], variables["KEY_TEMPLATE"]) == ("us-east-2", "{node}/{name}")
    assert (task["RequiresCompatibilities"], service["LaunchType"]) == (["EXTERNAL"], "EXTERNAL")
    assert service["PlacementConstraints"] == [{"Type": "memberOf", "Expression": "a == b"}]
    rolling = service["DeploymentConfiguration"]
    assert rolling.pop("DeploymentCircuitBreaker") == {"Enable": False, "Rollback": False}
    assert rolling == {"MinimumHealthyPercent": "90", "MaximumPercent": 100}
    usual = stack("ecs").resources["Service"]
    assert usual["PlacementConstraints"][0]["Expression"] == "attribute:ecs.os-type == linux"
    assert usual["DeploymentConfiguration"]["DeploymentCircuitBreaker"] == {"Enable": True, "Rollback": True}


def test_pod_identity_of_the_stack_is_that_of_the_daemonset():
    yaml = pytest.importorskip("yaml")
    account = yaml.safe_load((deploy.ROOT / "kubernetes/base/serviceaccount.yaml").read_text())["metadata"]
    resources = stack("eks").resources
    identity = resources["PodIdentity"]
    assert (identity["Namespace"], identity["ServiceAccount"]) == (account["namespace"], account["name"])
    (statement,) = resources["Role"]["AssumeRolePolicyDocument"]["Statement"]
    asked = statement["Condition"]["StringEquals"]
    assert asked.pop("aws:RequestTag/eks-cluster-name") == "c"
    assert statement | {"Condition": {"StringEquals": asked}} == render("trust-pod-identity")["Statement"][0]
