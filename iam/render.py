#!/usr/bin/env python3
"""Print a policy of this folder for your bucket, account and region; several files become one policy.

usage: iam/render.py NAME... --bucket BUCKET --region REGION [--prefix PREFIX] [--account ID] [--key KEY-ID]
                     [--tenant NAME] [--oidc ID] [--role NAME]                (Python 3.11, no packages)

NAME is a file of iam/ without .json: iam/render.py write-only kms --bucket b --region us-gov-west-1 ...
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from typing import Any

FOLDER = os.path.dirname(os.path.abspath(__file__))
PARTITIONS = (
    ("cn-", "aws-cn", "amazonaws.com.cn"),
    ("us-gov-", "aws-us-gov", "amazonaws.com"),
    ("us-isob-", "aws-iso-b", "sc2s.sgov.gov"),
    ("us-isof-", "aws-iso-f", "csp.hci.ic.gov"),
    ("us-iso-", "aws-iso", "c2s.ic.gov"),
    ("eu-isoe-", "aws-iso-e", "cloud.adc-e.uk"),
    ("eusc-", "aws-eusc", "amazonaws.eu"),
    ("", "aws", "amazonaws.com"),
)
"""How a region's name begins, its partition, and the domain of its services (botocore's partitions.json)."""
PLACES = {  # example in the files, the option that replaces it, and the pattern of its values
    "my-core-dumps": ("bucket", "[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"),
    "eu-central-1": ("region", "[a-z]{2,}(-[a-z0-9]+)+"),
    "111122223333": ("account", "[0-9]{12}"),
    "00000000-0000-0000-0000-000000000000": ("key", "[a-z0-9-]{1,64}"),
    "EXAMPLED539D4633E53DE1B71EXAMPLE": ("oidc", "[A-Za-z0-9]{1,64}"),
    "my-tenant": ("tenant", "[A-Za-z0-9._-]{1,63}"),
    "role/core-dump-collector": ("role", "[A-Za-z0-9+=,.@_/-]{1,512}"),
}
PREFIX = r"[A-Za-z0-9!_.*'()=+-]+(/[A-Za-z0-9!_.*'()=+-]+)*"


def partition_of(region: str) -> tuple[str, str]:
    """Return the partition of a region and the domain of its services."""
    return next((name, domain) for begin, name, domain in PARTITIONS if region.startswith(begin))


def render(names: list[str], given: dict[str, str]) -> str:
    """Return one policy of the files with these names.

    Raises:
        ValueError: an option is missing or wrong, or the files are not of one kind.
    """
    merged: dict[str, Any] = {}
    for name in names:
        for key, value in below_prefix(json.loads(replaced(read(name), given)), given).items():
            merged[key] = merged.get(key, []) + value if isinstance(value, list) else value
    if len(merged.keys() - {"Version"}) != 1:
        raise ValueError("a lifecycle rule and a policy are two documents: print them one at a time")
    return json.dumps(merged, indent=2)


def read(name: str) -> str:
    """Return the text of a file of this folder."""
    known = sorted(entry[:-5] for entry in os.listdir(FOLDER) if entry.endswith(".json"))
    if name not in known:
        raise ValueError(f"{name}: takes {', '.join(known)}")
    with open(os.path.join(FOLDER, f"{name}.json"), encoding="utf-8") as file:
        return file.read()


def replaced(text: str, given: dict[str, str]) -> str:
    """Put the values of the options into a text, in one pass: a bucket's name may contain that of a region."""
    partition, domain = partition_of(given["region"])

    def value(found: re.Match[str]) -> str:
        option, pattern = PLACES[found[0]]
        if option == "role" and not given["role"]:
            return found[0]
        check(option, given[option], pattern)
        return f"role/{given['role']}" if option == "role" else given[option]

    text = re.sub("|".join(map(re.escape, PLACES)), value, text)
    text = text.replace("arn:aws:", f"arn:{partition}:")
    return re.sub(rf"((?:s3|oidc\.eks)\.{re.escape(given['region'])})\.amazonaws\.com", rf"\1.{domain}", text)


def below_prefix(value: Any, given: dict[str, str], key: str = "") -> Any:  # noqa: ANN401  any part of JSON
    """Return the document with the prefix before each key of an object."""
    if not given["prefix"]:
        return value
    check("prefix", given["prefix"], PREFIX)
    if isinstance(value, dict):
        return {name: below_prefix(inner, given, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [below_prefix(inner, given, key) for inner in value]
    if key in {"Prefix", "s3:prefix"}:
        return f"{given['prefix']}/{value}"
    bucket = f":s3:::{given['bucket']}/"
    return value.replace(bucket, f"{bucket}{given['prefix']}/") if isinstance(value, str) else value


def check(option: str, value: str, pattern: str) -> None:
    """Raise ValueError if the value of an option does not match its pattern."""
    if not re.fullmatch(pattern, value):
        raise ValueError(f"--{option} {value!r}: this policy needs it as {pattern}")


def main() -> int:
    """Print the policy that the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(usage=(__doc__ or "").partition("usage: ")[2], allow_abbrev=False)
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.add_argument("--prefix", default="")
    for option, _ in PLACES.values():
        parser.add_argument(f"--{option}", default="", required=option == "region")
    options = vars(parser.parse_args())
    try:
        sys.stdout.write(render(options.pop("names"), options) + "\n")
    except ValueError as error:
        sys.stderr.write(f"iam/render.py: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
