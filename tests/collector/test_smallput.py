"""Small bodies go past most of botocore: what arrives must be what botocore itself would have sent."""

import contextlib
import dataclasses
import http.server
from types import SimpleNamespace

import boto3
import botocore
import pytest
from botocore.auth import S3SigV4Auth, SigV4Auth
from botocore.awsrequest import AWSRequest, AWSResponse
from botocore.config import Config
from botocore.credentials import Credentials
from botocore.exceptions import ClientError, EndpointConnectionError
from tests.support.s3 import BUCKET
from tests.support.servers import answering

from core_dump_collector.s3 import signature
from core_dump_collector.s3.smallbody import SmallPut

OWN = {
    "amz-sdk-invocation-id",
    "amz-sdk-request",
    "authorization",
    "expect",
    "user-agent",
    "x-amz-date",
    "x-amz-sdk-checksum-algorithm",
}
"""Headers that differ from one request to the next, tell botocore's tries apart, or ask to wait with the body."""
PARAMETERS = {
    "Body": b"core" * 100,
    "ChecksumCRC32": "AAAAAA==",
    "IfNoneMatch": "*",
    "ContentType": "application/gzip",
    "Metadata": {"pid": "7", "comm": "a b"},
    "StorageClass": "STANDARD_IA",
    "ServerSideEncryption": "aws:kms",
    "SSEKMSKeyId": "alias/dumps",
    "Tagging": "team=core&a=b%20c",
    "ExpectedBucketOwner": "123456789012",
}
ELSEWHERE = b"<Error><Code>AuthorizationHeaderMalformed</Code><Region>us-west-2</Region></Error>"
DENIED = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>no</Message></Error>"


class Recorder(http.server.BaseHTTPRequestHandler):
    """Remembers every request and gives the answers that the test has prepared, then 200."""

    protocol_version = "HTTP/1.1"

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append(
            (self.path, {name.lower(): value for name, value in self.headers.items()}, body)
        )
        status, content = self.server.answers.pop(0) if self.server.answers else (200, b"")
        self.send_response(status)
        self.send_header("ETag", '"0123456789abcdef0123456789abcdef"')
        self.send_header("x-amz-checksum-crc32", "AAAAAA==")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def store():
    """A server that records."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Recorder)
    server.seen, server.answers = [], []
    with answering(server):
        yield server


@pytest.fixture
def client(store):
    """A client of that server."""
    with contextlib.closing(
        boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{store.server_port}",
            region_name="eu-central-1",
            aws_access_key_id="AK",
            aws_secret_access_key="SK",
            aws_session_token="TOKEN",
            config=Config(retries={"total_max_attempts": 1}),
        )
    ) as made:
        yield made


def signed_headers(headers):
    """Return the names under the signature."""
    return set(headers["authorization"].split("SignedHeaders=")[1].split(",")[0].split(";"))


@pytest.mark.parametrize("key", ["node/core-a-1-2-3.gz", "p r/e+f=i~x/ü&?#%2F.json", "a//b/../c"])
def test_request_is_the_one_that_botocore_sends(store, client, key):
    put = SmallPut(client)
    first = put(Bucket=BUCKET, Key=key, **PARAMETERS)
    second = put(Bucket=BUCKET, Key=key, **PARAMETERS)
    (path, headers, body), (own_path, own_headers, own_body) = store.seen
    assert (own_path, own_body) == (path, body)
    assert {n: v for n, v in own_headers.items() if n not in OWN} == {
        n: v for n, v in headers.items() if n not in OWN
    }
    assert own_headers["user-agent"].split(" m/")[0] == headers["user-agent"].split(" m/")[0]
    assert signed_headers(own_headers) >= signed_headers(headers) - OWN
    assert {name: first[name] for name in second} == second
    assert set(second) == {"ETag", "ChecksumCRC32"}


@pytest.mark.parametrize("sign_payload", [None, True, False])
@pytest.mark.parametrize("token", [None, "TOKEN"])
@pytest.mark.parametrize(
    "host", ["http://127.0.0.1:8333", "https://dumps.s3.eu-central-1.amazonaws.com", "http://[::1]:80"]
)
def test_signature_is_the_one_of_botocore(host, token, sign_payload):
    config = Config(s3=None if sign_payload is None else {"payload_signing_enabled": sign_payload})
    context = {"client_config": config, "has_streaming_input": True, "payload_signing_enabled": True}
    context["checksum"] = {"request_algorithm": {"in": "header", "name": "x-amz-checksum-crc32"}}
    headers = {"Content-Type": "a  b ", "x-amz-checksum-crc32": "AAAAAA==", "x-amz-meta-comm": "ä b"}
    for key in ("/dumps/p%20r/%C3%BC%26%3F%23", "/k"):
        auth = S3SigV4Auth(Credentials("AK", "SK", token), "s3", "eu-central-1")
        assert signature.can_sign(auth)
        for _ in range(3):  # a second may end in between
            ours = signature.Request(host + key, dict(headers), b"core", dict(context))
            theirs = AWSRequest("PUT", host + key, headers=dict(headers), data=b"core")
            theirs.context.update(context)
            signature.sign(auth, ours)
            auth.add_auth(theirs)
            if ours.headers["X-Amz-Date"] == theirs.headers["X-Amz-Date"]:
                break
        assert ours.headers == dict(theirs.headers.items())


@pytest.mark.parametrize(
    ("bucket", "config"),
    [("dumps--use1-az5--x-s3", None), (BUCKET, Config(signature_version=botocore.UNSIGNED))],
    ids=["directory bucket", "unsigned"],
)
def test_request_of_another_signature_is_left_to_the_client(bucket, config):
    keys = b"<AccessKeyId>A</AccessKeyId><SecretAccessKey>S</SecretAccessKey><SessionToken>T</SessionToken>"
    keys += b"<Expiration>2099-01-01T00:00:00Z</Expiration>"
    session = b"<CreateSessionResult><Credentials>%s</Credentials></CreateSessionResult>" % keys

    def answer(request, **_):
        body = session if request.method == "GET" else b""
        return AWSResponse(
            request.url, 200, {"ETag": '"x"'}, SimpleNamespace(stream=lambda *_, **__: iter([body]))
        )

    made = boto3.client(
        "s3",
        region_name="us-east-1",
        aws_access_key_id="AK",
        aws_secret_access_key="SK",
        config=config,
    )
    with contextlib.closing(made) as client:
        client.meta.events.register("before-send.s3", answer)
        put = SmallPut(client)
        for _ in range(2):
            assert put(Bucket=bucket, Key="k", Body=b"dump")["ETag"] == '"x"'
        assert put._pattern is None


def test_signer_of_another_kind_is_left_to_the_client():
    credentials = Credentials("AK", "SK")
    assert not signature.can_sign(SigV4Auth(credentials, "s3", "eu-central-1"))
    assert not signature.can_sign(S3SigV4Auth(None, "s3", "eu-central-1"))


def test_error_is_the_clients_and_the_next_request_asks_the_client_again(store, client):
    put = SmallPut(client)
    put(Bucket=BUCKET, Key="a", Body=b"1")
    store.answers.append((403, DENIED))
    with pytest.raises(ClientError) as refused:
        put(Bucket=BUCKET, Key="b", Body=b"2")
    assert refused.value.response["Error"]["Code"] == "AccessDenied"
    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403
    for body in (b"3", b"4"):
        put(Bucket=BUCKET, Key="c", Body=body)
    assert [("amz-sdk-invocation-id" in headers) for _, headers, _ in store.seen] == [
        True,
        False,
        True,
        False,
    ]


def test_pattern_of_one_bucket_is_not_used_for_another(store, client):
    put = SmallPut(client)
    for bucket in (BUCKET, "other"):
        put(Bucket=bucket, Key="k", Body=b"")
    assert [path for path, _, _ in store.seen] == [f"/{BUCKET}/k", "/other/k"]


def test_store_that_is_gone_is_an_error_of_the_network(store, client):
    put = SmallPut(client)
    put(Bucket=BUCKET, Key="k", Body=b"")
    put._pattern = dataclasses.replace(put._pattern, url="http://127.0.0.1:1/")
    with pytest.raises(EndpointConnectionError):
        put(Bucket=BUCKET, Key="k", Body=b"")


def test_answer_that_names_a_region_sends_the_request_again_and_all_later_ones_there(store, client):
    put = SmallPut(client)
    put(Bucket=BUCKET, Key="a", Body=b"1")
    store.answers += [(400, ELSEWHERE), (400, ELSEWHERE)]
    for body in (b"2", b"3"):
        assert put(Bucket=BUCKET, Key="b", Body=body, Metadata={"pid": "7"})["ETag"]
    scopes = [headers["authorization"].split("/")[2] for _, headers, _ in store.seen]
    assert scopes == ["eu-central-1"] * 3 + ["us-west-2"] * 2
    assert [body for _, _, body in store.seen] == [b"1", b"2", b"2", b"2", b"3"]
    assert all(headers["x-amz-meta-pid"] == "7" for _, headers, _ in store.seen[1:])


def test_redirect_is_followed_although_the_request_went_past_the_client(store, client):
    put = SmallPut(client)
    put(Bucket=BUCKET, Key="a", Body=b"1")
    store.answers += [(301, b""), (503, b"")]
    with pytest.raises(ClientError) as refused:
        put(Bucket=BUCKET, Key="b", Body=b"2")
    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 503
    assert "amz-sdk-invocation-id" in store.seen[-1][1]
