"""Terraform and Ray's cluster file for AWS: parsed, against Ray's own schema, and against rules."""

import json
import re
from pathlib import Path
from typing import Any

import hcl2
import jsonschema
import pytest

from tests.infra.documents import INFRA, read_json, read_yaml

TERRAFORM = INFRA / "aws" / "terraform"


def terraform(kind: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Blocks of a kind by type and name."""
    found = {}
    for path in sorted(TERRAFORM.glob("*.tf")):
        with path.open() as file:
            for block in hcl2.load(file).get(kind, ()):
                for type_, named in block.items():
                    for name, body in named.items():
                        if isinstance(body, dict):
                            key = type_.strip('"'), name.strip('"')
                            assert key not in found, f"{key} stands twice"
                            found[key] = body
    return found


def test_every_reference_of_terraform_has_its_block() -> None:
    text = "\n".join(path.read_text() for path in TERRAFORM.glob("*.tf"))
    text = re.sub(r"#.*", "", text)
    resources, data = terraform("resource"), terraform("data")
    for type_, name in re.findall(r"(?<![.\w\"])(aws_\w+)\.(\w+)", text):
        assert (type_, name) in resources, f"{type_}.{name}"
    for type_, name in re.findall(r"\bdata\.(aws_\w+)\.(\w+)", text):
        assert (type_, name) in data, f"data.{type_}.{name}"
    variables = set(re.findall(r'^variable "(\w+)"', text, re.M))
    assert set(re.findall(r"\bvar\.(\w+)", text)) == variables


def test_the_bucket_is_private_encrypted_and_over_tls() -> None:
    found = terraform("resource")
    block = found["aws_s3_bucket_public_access_block", "store"]
    for name in ("block_public_acls", "block_public_policy", "ignore_public_acls",
                 "restrict_public_buckets"):  # fmt: skip
        assert block[name] is True
    assert ("aws_s3_bucket_server_side_encryption_configuration", "store") in found
    assert "aws:SecureTransport" in json.dumps(
        terraform("data")["aws_iam_policy_document", "tls_only"]
    )
    repository = found["aws_ecr_repository", "image"]
    assert repository["image_tag_mutability"].strip('"') == "IMMUTABLE"


def test_roles_allow_no_action_on_everything_unless_it_has_no_resource() -> None:
    """Wildcards in actions are refused; `*` as resource needs a condition or a reason beside it."""
    policy = read_json(INFRA / "aws" / "store-policy.json")
    for statement in policy["Statement"]:
        assert not [action for action in statement["Action"] if "*" in action]
        assert statement["Resource"].startswith("arn:aws:s3:::${bucket}")
    text = (TERRAFORM / "roles.tf").read_text()
    assert not re.search(r'"[a-z0-9]+:[A-Za-z]*\*"', text)
    for statement in re.findall(r"statement \{.*?\n  \}", text, re.S):
        if re.search(r'resources\s*=\s*\["\*"\]', statement):
            assert "no resource" in statement or "condition {" in statement, statement


def test_the_cluster_file_follows_rays_schema() -> None:
    import ray

    schema = read_json(Path(ray.__file__).parent / "autoscaler" / "ray-schema.json")
    cluster = read_yaml(INFRA / "aws" / "cluster.yaml")[0]
    jsonschema.validate(cluster, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**cluster, "max_worker": 3}, schema)
    types = cluster["available_node_types"]
    assert sum(it.get("max_workers", 0) for it in types.values()) == cluster["max_workers"]
    for name, node in types.items():
        config = node["node_config"]
        assert config["MetadataOptions"]["HttpTokens"] == "required", name
        assert all(it["Ebs"]["Encrypted"] for it in config["BlockDeviceMappings"])
        assert (
            f"adsc-ray-{'head' if name == 'head' else 'worker'}"
            == (config["IamInstanceProfile"]["Name"])
        )
    assert types["head"]["resources"] == {"CPU": 0}
    assert types["gpu-spot"]["min_workers"] == 0
    assert types["gpu-spot"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "--dashboard-host=127.0.0.1" in " ".join(cluster["head_start_ray_commands"])
    words = json.dumps(cluster)
    assert not re.search(r"AKIA|aws_secret|password=", words) and "RAY_AUTH_TOKEN=" not in words
