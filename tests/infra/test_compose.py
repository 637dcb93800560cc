"""Compose: the specification's schema, and rules of our own."""

import json
import re
import subprocess
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.infra.documents import INFRA, read_yaml

FOLDER = INFRA / "compose"


def compose() -> dict[str, Any]:
    return read_yaml(FOLDER / "compose.yaml")[0]


SERVICES = compose()["services"]


def test_it_follows_the_specification() -> None:
    vendored = resources.files("check_jsonschema.builtin_schemas.vendor")
    schema = json.loads(vendored.joinpath("compose-spec.json").read_text())
    jsonschema.validate(compose(), schema)
    wrong = compose()
    wrong["services"]["head"]["comand"] = "x"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema)


@pytest.mark.parametrize("name", SERVICES)
def test_services_are_bounded_unprivileged_and_on_loopback(name: str) -> None:
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not re.match(r"^(root|0)\b", service["user"])
    assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory"}
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    assert service["networks"]
    defaults = dict(
        line.split("=", 1)
        for line in (FOLDER / "env.example").read_text().splitlines()
        if line and not line.startswith("#")
    )
    variable = re.fullmatch(r"\$\{(\w+):\?see env.example\}", service["image"])
    assert variable, service["image"]
    image = defaults[variable[1]]
    assert re.search(r"(:[\w.-]+|@sha256:[0-9a-f]{64})$", image) and "latest" not in image


def test_secrets_are_files_that_are_made_and_never_committed(tmp_path: Path) -> None:
    for name, service in SERVICES.items():
        for key, value in (service.get("environment") or {}).items():
            if re.search("PASSWORD|SECRET|TOKEN|CREDENTIAL", key):
                assert value.startswith("/run/secrets/"), f"{name}: {key}"
        assert set(service.get("secrets", ())) <= set(compose()["secrets"])
    for file in ("prepare.sh", "env.example", ".gitignore"):
        (tmp_path / file).write_text((FOLDER / file).read_text())
    for _ in range(2):  # twice: what is there stays
        subprocess.run(["bash", tmp_path / "prepare.sh"], check=True)
        made = {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}
    assert {f"./secrets/{name}" for name in made} == {
        secret["file"] for secret in compose()["secrets"].values()
    }
    assert len(made["ray_token"]) == 64 and len(set(made.values())) == len(made)
    assert made["store_secret_key"] in made["store_credentials"]
    ignored = (FOLDER / ".gitignore").read_text().splitlines()
    assert {"/secrets/", "/data/", "/.env"} <= set(ignored)


def test_ray_authenticates_by_token_and_all_mounted_files_exist() -> None:
    for name in ("head", "worker"):
        assert SERVICES[name]["environment"]["RAY_AUTH_MODE"] == "token"
    for service in SERVICES.values():
        for volume in service.get("volumes", ()):
            if volume.startswith("../"):
                assert (FOLDER / volume.split(":")[0]).is_file(), volume
