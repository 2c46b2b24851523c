"""Evaluates IAM, bucket and key policies in front of a real S3 server, which keeps the objects and checks signatures.

moto enforces actions and resources of identity policies only: it knows no condition, no principal of a bucket policy
and no KMS. This is AWS's evaluation as its documentation describes it (IAM User Guide, "Policy evaluation logic" and
"Policy elements: Condition operators"; S3 User Guide, "Enforce conditional writes"; KMS, "How S3 uses KMS").
"""

from __future__ import annotations

import contextlib
import fnmatch
import http.client
import re
import ssl
import urllib.parse
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any

from tests.support.servers import QuietServer, answering

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

Policy = dict[str, Any]
CREATING = {"PutObject", "CompleteMultipartUpload"}
"""Operations that make an object visible: s3:ObjectCreationOperation is true for them, and If-None-Match is known."""
DECRYPTING = {"UploadPart", "CompleteMultipartUpload", "GetObject"}
GENERATING = {"PutObject", "CreateMultipartUpload"}


@dataclass(frozen=True)
class Principal:
    """Who asks: an ARN of a role, its tags, and its policies."""

    arn: str
    policies: tuple[Policy, ...]
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def account(self) -> str:
        """Return the number of its account."""
        return self.arn.split(":")[4]


@dataclass
class Gate:
    """A bucket with its owner, its policies and its principals by their access keys."""

    principals: dict[str, Principal]
    owner: str = "111122223333"
    bucket_policy: Policy = field(default_factory=lambda: {"Statement": []})
    key_policy: Policy | None = None
    """With a KMS key, every object is encrypted with it."""
    key_arn: str = "arn:aws:kms:eu-central-1:111122223333:key/00000000-0000-0000-0000-000000000000"
    region: str = "eu-central-1"
    endpoint: str = ""
    refused: list[tuple[str, str]] = field(default_factory=list)
    """Operation and key of each request that was refused."""
    allowed: list[tuple[str, str]] = field(default_factory=list)

    def decides(self, asked: Asked, principal: Principal) -> bool:
        """Tell whether a request is allowed; S3 asks KMS in the principal's name."""
        needs = [(f"s3:{asked.action}", asked.resource, self.bucket_policy)]
        if self.key_policy is not None:
            actions = ["kms:GenerateDataKey"] * (asked.operation in GENERATING)
            actions += ["kms:Decrypt"] * (asked.operation in DECRYPTING)
            needs += [(action, self.key_arn, self.key_policy) for action in actions]
        context = self.context(asked, principal)
        return all(self.permits(principal, *need, context) for need in needs)

    def permits(
        self, principal: Principal, action: str, resource: str, of_resource: Policy, context: Policy
    ) -> bool:
        """Tell whether one action is permitted: no policy denies it, and those that must allow it do."""
        own = [effect(policy, action, resource, context, None) for policy in principal.policies]
        other = effect(of_resource, action, resource, context, principal.arn)
        if "Deny" in [*own, other]:
            return False
        if action.startswith("kms:") or principal.account != self.owner:
            # A key's policy gives its account the right to delegate; another account needs both. (KMS, "Key policies")
            return "Allow" in own and other == "Allow"
        return "Allow" in own or other == "Allow"

    def context(self, asked: Asked, principal: Principal) -> Policy:
        """Return the condition keys of a request; those that it does not have are absent."""
        found = {
            "aws:SecureTransport": "true" if asked.secure else "false",
            "aws:PrincipalArn": principal.arn,
            "kms:ViaService": f"s3.{self.region}.amazonaws.com",
        }
        found |= {f"aws:PrincipalTag/{name}": value for name, value in principal.tags.items()}
        if asked.action == "PutObject":
            found["s3:ObjectCreationOperation"] = "true" if asked.operation in CREATING else "false"
            if "if-none-match" in asked.headers:
                found["s3:if-none-match"] = asked.headers["if-none-match"]
        if asked.action == "ListBucket":
            found["s3:prefix"] = asked.query.get("prefix", "")
        return found


@dataclass(frozen=True)
class Asked:
    """A request, in the words of policies."""

    operation: str
    bucket: str
    key: str
    headers: Mapping[str, str]
    query: Mapping[str, str]
    secure: bool

    @property
    def action(self) -> str:
        """Return the action that the operation needs, without `s3:`."""
        others = {"UploadPart", "CreateMultipartUpload", "CompleteMultipartUpload"}
        names = {"HeadObject": "GetObject", "ListParts": "ListMultipartUploadParts"}
        names |= dict.fromkeys(others, "PutObject") | {"ListMultipartUploads": "ListBucketMultipartUploads"}
        return names.get(self.operation, self.operation)

    @property
    def resource(self) -> str:
        """Return the ARN of what is asked for."""
        return f"arn:aws:s3:::{self.bucket}" + (f"/{self.key}" if self.key else "")


def operation(method: str, key: str, query: Mapping[str, str]) -> str:
    """Return the name of the S3 operation of a request in path style."""
    if not key:
        return "ListMultipartUploads" if "uploads" in query else "ListBucket"
    if "uploadId" in query:
        parts = {"PUT": "UploadPart", "POST": "CompleteMultipartUpload", "DELETE": "AbortMultipartUpload"}
        return parts.get(method, "ListParts")
    if "attributes" in query:
        return "GetObjectAttributes"
    names = {
        "PUT": "PutObject",
        "POST": "CreateMultipartUpload",
        "DELETE": "DeleteObject",
        "HEAD": "HeadObject",
    }
    return names.get(method, "GetObject")


def effect(policy: Policy, action: str, resource: str, context: Policy, principal: str | None) -> str:
    """Return `Deny`, `Allow` or nothing: what the statements of a policy say about one action."""
    found = {
        statement["Effect"]
        for statement in policy["Statement"]
        if any(like(action, name) for name in as_list(statement["Action"]))
        and is_about(statement, resource, context)
        and (principal is None or is_principal(statement["Principal"], principal))
        and meets(statement.get("Condition", {}), context)
    }
    return "Deny" if "Deny" in found else "Allow" if found else ""


def as_list(value: Any) -> list[str]:
    """Return one or many texts as a list."""
    return [value] if isinstance(value, str) else value


def like(text: str, pattern: str) -> bool:
    """Match * and ? as policies do, across slashes."""
    return fnmatch.fnmatchcase(text, pattern.replace("[", "[[]"))


def is_about(statement: Policy, resource: str, context: Policy) -> bool:
    """Match Resource or NotResource; a variable without a value matches nothing."""
    name = "Resource" if "Resource" in statement else "NotResource"
    patterns = [filled(text, context) for text in as_list(statement[name])]
    matched = any(pattern is not None and like(resource, pattern) for pattern in patterns)
    return matched is (name == "Resource")


def filled(pattern: str, context: Policy) -> str | None:
    """Put condition keys in place of policy variables; None if one has no value."""
    names = re.findall(r"\$\{([^}]*)\}", pattern)
    if any(name not in context for name in names):
        return None
    return re.sub(r"\$\{([^}]*)\}", lambda found: context[found[1]], pattern)


def is_principal(given: Any, arn: str) -> bool:
    """Match a Principal; an account's root stands for everybody in it."""
    named = ["*"] if given == "*" else as_list(given["AWS"])
    root = f"arn:aws:iam::{arn.split(':')[4]}:root"
    return any(name in {"*", arn, root} for name in named)


def meets(conditions: Policy, context: Policy) -> bool:
    """Tell whether every condition holds; a key that a request does not have fails all operators but Null."""
    return all(
        holds(operator, context.get(key), as_list(values))
        for operator, keys in conditions.items()
        for key, values in keys.items()
    )


def holds(operator: str, value: str | None, values: list[str]) -> bool:
    """Apply one operator."""
    if operator == "Null":
        return (value is None) is (values == ["true"])
    if value is None:
        return False
    match operator:
        case "Bool" | "StringEquals":
            return value in values
        case "StringLike" | "ArnLike":
            return any(like(value, pattern) for pattern in values)
    raise NotImplementedError(operator)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    gate: Gate
    port: int
    secure: bool

    def log_message(self, *_: object) -> None:
        pass

    def handle_expect_100(self) -> bool:
        super().handle_expect_100()
        self.wfile.flush()
        return True

    def asked(self) -> Asked:
        address = urllib.parse.urlsplit(self.path)
        bucket, _, key = urllib.parse.unquote(address.path).lstrip("/").partition("/")
        query = dict(urllib.parse.parse_qsl(address.query, keep_blank_values=True))
        headers = {name.lower(): value for name, value in self.headers.items()}
        return Asked(operation(self.command, key, query), bucket, key, headers, query, self.secure)

    def serve(self) -> None:
        asked = self.asked()
        access_key = re.search("Credential=([^/]+)/", self.headers.get("Authorization", ""))
        principal = self.gate.principals.get(access_key[1] if access_key else "")
        body = self.body()
        if principal is None or not self.gate.decides(asked, principal):
            self.gate.refused.append((asked.operation, asked.key))
            error = b"<Error><Code>AccessDenied</Code><Message>by a policy</Message></Error>"
            self.answer(403, [], b"" if self.command == "HEAD" else error)
            return
        self.gate.allowed.append((asked.operation, asked.key))
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            headers = {k: v for k, v in self.headers.items() if k.lower() not in {"connection", "expect"}}
            chunked = "Transfer-Encoding" in self.headers
            connection.request(
                self.command, self.path, iter([body]) if chunked else body, headers, encode_chunked=chunked
            )
            answer = connection.getresponse()
            self.answer(answer.status, answer.getheaders(), answer.read())

    def body(self) -> bytes:
        """Read the body; boto3 sends chunks where it adds a trailer with the checksum."""
        if "Transfer-Encoding" not in self.headers:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = b""
        while size := int(self.rfile.readline(100), 16):
            found += self.rfile.read(size)
            self.rfile.readline(2)
        self.rfile.readline(2)
        return found

    def answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response(status)
        given = {name.lower() for name, _ in headers}
        for name, value in headers:
            if name.lower() not in {"connection", "transfer-encoding", "date", "server"}:
                self.send_header(name, value)
        if "content-length" not in given:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = serve  # noqa: N815


@contextlib.contextmanager
def enforcing(gate: Gate, port: int, certificate: tuple[Path, Path] | None = None) -> Iterator[Gate]:
    """Run the gate in front of the server at a port, over TLS if it has a certificate and a key."""
    handler = type("Handler", (_Handler,), {"gate": gate, "port": port, "secure": certificate is not None})
    server = QuietServer(("127.0.0.1", 0), handler)
    if certificate is not None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(*certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    scheme = "http" if certificate is None else "https"
    gate.endpoint = f"{scheme}://127.0.0.1:{server.server_address[1]}"
    with answering(server):
        yield gate
