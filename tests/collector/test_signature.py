"""A part's SHA-256 is computed with its checksum: the signature must be the one that botocore itself would make."""

import contextlib
from unittest import mock

import boto3
import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials

from core_dump_collector.s3 import signature
from core_dump_collector.s3.parts import Body, FilePart


@pytest.mark.parametrize("sign_payload", [None, True, False])
@pytest.mark.parametrize("has_checksum", [True, False])
@pytest.mark.parametrize("host", ["http://127.0.0.1:8333", "https://dumps.s3.eu-central-1.amazonaws.com"])
def test_signature_of_a_part_is_the_one_of_botocore_and_needs_no_second_look_at_it(
    tmp_path, host, has_checksum, sign_payload
):
    (tmp_path / "core.gz").write_bytes(b"core" * 200_000)
    config = Config(s3=None if sign_payload is None else {"payload_signing_enabled": sign_payload})
    context = {"client_config": config, "has_streaming_input": True, "payload_signing_enabled": True}
    context["checksum"] = {"request_algorithm": {"in": "header", "name": "x-amz-checksum-crc32"}}
    headers = {"x-amz-checksum-crc32": "AAAAAA=="} if has_checksum else {}
    with (tmp_path / "core.gz").open("rb") as file:
        part = FilePart(file.fileno(), 1, 4, 799_996, last=True)
        for is_known in (False, True):
            part.crc32(with_sha256=is_known)
            for _ in range(3):  # a second may end in between
                requests = []
                for kind in (S3SigV4Auth, signature.PartSigner):
                    body = Body(part)
                    request = AWSRequest(
                        "PUT", host + "/k?partNumber=1&uploadId=u", headers=dict(headers), data=body
                    )
                    request.context.update(context)
                    with mock.patch.object(body, "read", wraps=body.read) as read:
                        kind(Credentials("AK", "SK"), "s3", "eu-central-1").add_auth(request)
                    requests.append(request.headers)
                if requests[0]["X-Amz-Date"] == requests[1]["X-Amz-Date"]:
                    break
            assert dict(requests[0].items()) == dict(requests[1].items())
            is_signed = requests[1]["X-Amz-Content-SHA256"] != "UNSIGNED-PAYLOAD"
            assert bool(read.called) == (is_signed and not is_known)
            assert is_signed == (
                sign_payload if sign_payload is not None else host < "https" or not has_checksum
            )


def test_client_of_the_collector_signs_in_this_way_and_so_do_small_requests():
    signature.use_part_signer()
    made = boto3.client("s3", region_name="us-east-1", aws_access_key_id="AK", aws_secret_access_key="SK")
    with contextlib.closing(made) as client:
        auth = client._request_signer.get_auth_instance("s3", "us-east-1", "s3v4")
    assert type(auth) is signature.PartSigner
    assert signature.can_sign(auth)
