"""S3 servers that aren't AWS's: without conditional writes, without a feature, on another scheme.

The server is moto over HTTP; a real proxy in front of it takes away what such servers lack.
"""

from __future__ import annotations

import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.publishing.publish import publish
from pipeline.store import Store, StoreError, open_store
from tests.faults.checkpoints import check, make
from tests.faults.proxy import Fault, Proxy


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.store.s3.ATTEMPTS", 1)


@pytest.fixture
def proxy(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    proxy = Proxy(s3_endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    yield proxy
    proxy.close()


@pytest.fixture
def place(proxy: Proxy) -> Store:
    return open_store(f"s3://lab/{uuid.uuid4().hex}")


@pytest.mark.parametrize(
    ("stripped", "named"),
    [
        ({"if-none-match"}, "(If-None-Match ignored"),
        ({"if-match"}, "(If-Match ignored"),
        ({"if-match", "if-none-match"}, "(If-None-Match and If-Match ignored"),
    ],
)
def test_a_server_that_ignores_conditions_is_refused_before_a_run(
    stripped: set[str], named: str, proxy: Proxy, place: Store
) -> None:
    place.check_writable()
    proxy.stripped = stripped
    with pytest.raises(StoreError) as caught:
        place.check_writable()
    assert named in str(caught.value) and "choose a server with conditional" in str(caught.value)
    assert place.list("") == []


def test_nothing_is_published_through_such_a_server(
    proxy: Proxy, place: Store, tmp_path: Path
) -> None:
    checkpoint = make(tmp_path / "checkpoint")
    proxy.stripped = {"if-none-match"}
    with pytest.raises(StoreError, match="overwrites objects although the request forbids it"):
        publish(checkpoint, place, check)
    assert place.read("manifest.json") is None
    proxy.stripped = set()
    assert publish(checkpoint, place, check).moved == 3


@pytest.mark.parametrize(
    ("fault", "does", "named"),
    [
        (
            Fault(method="PUT", part="", status=501, code="NotImplemented"),
            "create",
            "If-None-Match",
        ),
        (Fault(method="PUT", part="", status=501, code="NotImplemented"), "put", "checksums"),
        (Fault(method="DELETE", part="", status=501, code="NotImplemented"), "delete", "If-Match"),
        (Fault(method="GET", part="x", status=501, code="NotImplemented"), "part", "Range"),
    ],
)
def test_a_501_names_what_the_server_lacks(
    fault: Fault, does: str, named: str, proxy: Proxy, place: Store, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"1")
    version = place.create("x", b"1")
    proxy.faults = [fault]
    actions = {
        "create": lambda: place.create("y", b"1"),
        "put": lambda: place.put(tmp_path / "file", "y"),
        "delete": lambda: place.delete("x", version),
        "part": lambda: place.read_part("x", 0, 1),
    }
    with pytest.raises(StoreError, match="the server doesn't support") as caught:
        actions[does]()
    assert named in str(caught.value)


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
@pytest.mark.parametrize("endpoint", ["127.0.0.1:9000", "minio", "ftp://minio:9000", "http://"])
def test_an_endpoint_that_is_no_address(
    variable: str, endpoint: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, endpoint)
    with pytest.raises(StoreError) as caught:
        open_store("s3://lab/x").check_writable()
    bare = endpoint.rpartition("://")[2]
    assert f"{variable}={endpoint} is not the address of a server; write http://{bare}" in str(
        caught.value
    )


def test_a_password_in_an_endpoint_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "ada:lovelace@minio:9000")
    with pytest.raises(StoreError, match="write http://minio:9000, or") as caught:
        open_store("s3://lab/x").check_writable()
    assert "lovelace" not in str(caught.value)


def test_https_to_a_port_that_speaks_http(
    s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = s3_endpoint.partition("://")[2]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://{there}")
    with pytest.raises(StoreError) as caught:
        open_store("s3://lab/x").check_writable()
    assert f"doesn't speak HTTPS; set AWS_ENDPOINT_URL=http://{there}" in str(caught.value)


def test_http_to_a_port_that_speaks_https(
    s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("making a certificate needs openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
         "/CN=localhost", "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    proxy = Proxy(s3_endpoint, (str(certificate), str(key)))
    there = proxy.endpoint.partition("://")[2]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{there}")
    with pytest.raises(StoreError) as caught:
        open_store("s3://lab/x").check_writable()
    proxy.close()
    assert f"set AWS_ENDPOINT_URL=https://{there}" in str(caught.value)
