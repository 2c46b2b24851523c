"""Resolves a template of ours as CloudFormation does, with the functions that ours use."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

ABSENT = object()
"""AWS::NoValue."""


def load(path: Path) -> dict[str, Any]:
    """Return a template as cfn-lint reads it."""
    decode = pytest.importorskip("cfnlint.decode")
    template, problems = decode.decode(str(path))
    assert problems == []
    return dict(template)


class Stack:
    """A template with values for its parameters, in a region of a partition."""

    def __init__(
        self, path: Path, parameters: Mapping[str, str], region: str, partition: str, suffix: str
    ) -> None:
        """Take the parameters that have no default, and those that differ from theirs."""
        self.template = load(path)
        self.values: dict[str, Any] = {
            "AWS::Region": region,
            "AWS::Partition": partition,
            "AWS::URLSuffix": suffix,
            "AWS::AccountId": "111122223333",
            "AWS::NoValue": ABSENT,
        }
        for name, parameter in self.template["Parameters"].items():
            value = str(parameters[name] if name in parameters else parameter["Default"])
            pattern = parameter.get("AllowedPattern", ".*")
            assert re.fullmatch(pattern, value), f"{name}={value}: takes {pattern}"
            self.values[name] = value
        assert set(parameters) <= set(self.template["Parameters"])
        self.resources = {
            name: self.resolve(resource["Properties"])
            for name, resource in self.template["Resources"].items()
            if "Condition" not in resource or self.holds(resource["Condition"])
        }
        self.outputs = {name: self.resolve(out["Value"]) for name, out in self.template["Outputs"].items()}

    def holds(self, name: str) -> bool:
        """Tell whether a condition of the template holds."""
        return bool(self.resolve(self.template["Conditions"][name]))

    def resolve(self, value: Any) -> Any:
        """Return a value with its functions applied."""
        if isinstance(value, dict):
            if len(value) == 1:
                ((name, argument),) = value.items()
                if name == "Ref" or name.startswith("Fn::"):
                    return self.apply(name, argument)
            found = {key: self.resolve(inner) for key, inner in value.items()}
            return {key: inner for key, inner in found.items() if inner is not ABSENT}
        if isinstance(value, list):
            return [inner for inner in map(self.resolve, value) if inner is not ABSENT]
        return value

    def apply(self, name: str, argument: Any) -> Any:
        """Return the result of one function."""
        match name:
            case "Ref":
                return self.values.get(argument, f"the-{argument.lower()}")
            case "Fn::GetAtt":
                names = argument.split(".") if isinstance(argument, str) else argument
                return self.attribute(*names)
            case "Fn::If":
                return self.resolve(argument[1 if self.holds(argument[0]) else 2])
            case "Fn::Equals":
                first, second = map(self.resolve, argument)
                return first == second
            case "Fn::Not":
                return not self.resolve(argument[0])
            case "Fn::Sub":
                text, more = (argument, {}) if isinstance(argument, str) else argument
                return re.sub(r"\$\{([^}]*)\}", lambda found: self.named(found[1], more), text)
        raise NotImplementedError(name)

    def attribute(self, resource: str, name: str) -> str:
        """Return an attribute of a resource."""
        kind = self.template["Resources"][resource]["Type"].split("::")[1].lower()
        owner = "" if kind == "s3" else "111122223333"
        assert name == "Arn"
        role, partition = "role/" * (kind == "iam"), self.values["AWS::Partition"]
        return f"arn:{partition}:{kind}::{owner}:{role}{self.apply('Ref', resource)}"

    def named(self, name: str, more: Mapping[str, Any]) -> str:
        """Return the value of a name in a Sub."""
        if name in more:
            return str(self.resolve(more[name]))
        if "." in name:
            return self.attribute(*name.split("."))
        return str(self.apply("Ref", name))
