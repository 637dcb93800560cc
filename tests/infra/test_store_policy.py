"""The IAM policy in infra/aws: enough for all that the pipeline does on S3, and nothing too much.

A moto server of its own checks every request's signature and policy. Operations are the store's
and, for Ray Train's checkpoints, those of pyarrow's file system.
"""

import io
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pyarrow.fs
import pytest
from botocore.exceptions import ClientError

from pipeline.publishing.manifest import verify_folder, write_manifest
from pipeline.publishing.publish import publish, pull
from pipeline.store import StoreError, open_store
from tests.infra.documents import INFRA
from tests.pipeline.cluster.ray_cluster import free_ports

BUCKET = "least"
POLICY = json.loads((INFRA / "aws" / "store-policy.json").read_text().replace("${bucket}", BUCKET))
ACTIONS = [action for statement in POLICY["Statement"] for action in statement["Action"]]


class Guarded:
    """A moto server that refuses what the policy of its one user doesn't allow."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self._switch("inf")
        iam, s3 = self._client("iam"), self._client("s3")
        s3.create_bucket(Bucket=BUCKET)
        s3.create_bucket(Bucket="other")
        iam.create_user(UserName="node")
        self.key = iam.create_access_key(UserName="node")["AccessKey"]
        self._iam = iam

    def _client(self, service: str) -> Any:
        return boto3.client(
            service, endpoint_url=self.endpoint, region_name="us-east-1",
            aws_access_key_id="setup-key", aws_secret_access_key="setup",
        )  # fmt: skip

    def _switch(self, unchecked: str) -> None:
        """How many requests from now on aren't checked."""
        request = urllib.request.Request(
            f"{self.endpoint}/moto-api/reset-auth",
            data=unchecked.encode(),
            headers={"Content-Type": "text/plain"},
        )
        urllib.request.urlopen(request, timeout=10).close()

    def allow(self, without: str = "") -> None:
        """The policy, less one action."""
        document = json.loads(json.dumps(POLICY))
        for statement in document["Statement"]:
            statement["Action"] = [it for it in statement["Action"] if it != without]
            if "s3:ListBucket" in statement["Action"]:
                # Of moto alone: AWS has no such action, there ListBucket allows HeadBucket; and it
                # asks about the objects that one request deletes, not about their bucket.
                statement["Action"].append("s3:HeadBucket")
                if without != "s3:DeleteObject":
                    statement["Action"].append("s3:DeleteObject")
        document["Statement"] = [it for it in document["Statement"] if it["Action"]]
        self._switch("inf")
        self._iam.put_user_policy(
            UserName="node", PolicyName="store", PolicyDocument=json.dumps(document)
        )
        self._switch("0")

    def unfinished(self) -> int:
        """Uploads of which only parts are there."""
        self._switch("inf")
        return len(self._client("s3").list_multipart_uploads(Bucket=BUCKET).get("Uploads", ()))


@pytest.fixture(scope="module")
def guarded() -> Iterator[Guarded]:
    port = free_ports(1)[0]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    endpoint = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 120
    try:
        while True:
            try:
                urllib.request.urlopen(f"{endpoint}/moto-api/data.json", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline
                time.sleep(0.2)
        yield Guarded(endpoint)
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def as_node(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> Guarded:
    monkeypatch.setenv("AWS_ENDPOINT_URL", guarded.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", guarded.key["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", guarded.key["SecretAccessKey"])
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return guarded


def place(folder: Path) -> str:
    """A prefix for each test, since nothing can be cleaned up where deleting is refused."""
    return f"s3://{BUCKET}/{folder.parent.name}"


def lease_and_record(folder: Path) -> None:
    store = open_store(place(folder))
    version = store.create("stage/lease.json", b"1")
    assert version and store.create("stage/lease.json", b"2") is None
    newer = store.replace("stage/lease.json", b"3", version)
    assert newer and store.read("stage/lease.json") == b"3"
    assert store.delete("stage/lease.json", newer)
    assert store.read("stage/lease.json") is None


def files_up_and_down(folder: Path) -> None:
    """One file small, one that goes up in parts."""
    (folder / "up" / "deep").mkdir(parents=True)
    (folder / "up" / "small.txt").write_text("small")
    (folder / "up" / "deep" / "large.bin").write_bytes(os.urandom(9 * 2**20))
    store = open_store(place(folder))
    store.upload(folder / "up", "stage/attempts/1")
    store.upload(folder / "up", "stage/attempts/1")
    store.download("stage/attempts/1", folder / "down")
    for entry in store.list("stage"):
        assert store.delete(entry.key)


def checkpoint_published_and_pulled(folder: Path) -> None:
    """`adsc export` and `adsc pull`, in parts."""
    (folder / "made").mkdir(parents=True)
    (folder / "made" / "model.safetensors").write_bytes(os.urandom(9 * 2**20))
    write_manifest(folder / "made", {})
    store = open_store(f"{place(folder)}/published")
    made = publish(folder / "made", store, lambda copy: {"files": len(verify_folder(copy))})
    assert pull(store, folder / "copy").digest == made.digest


def checkpoints_of_ray_train(folder: Path) -> None:
    system, root = pyarrow.fs.FileSystem.from_uri(f"{place(folder)}/train/run")
    system.create_dir(f"{root}/step-1")
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "checkpoint" / "weights.bin").write_bytes(os.urandom(12 * 2**20))
    pyarrow.fs.copy_files(
        str(folder / "checkpoint"), f"{root}/step-1", destination_filesystem=system,
        source_filesystem=pyarrow.fs.LocalFileSystem(),
    )  # fmt: skip
    found = system.get_file_info(pyarrow.fs.FileSelector(root, recursive=True))
    assert any(it.path.endswith("weights.bin") for it in found)
    assert len(system.open_input_file(f"{root}/step-1/weights.bin").read()) == 12 * 2**20
    system.delete_dir(root)


def upload_that_ends_in_the_middle(folder: Path) -> None:
    """boto3 gives the parts back, with an action of its own."""

    class Broken(io.BytesIO):
        """Ends with an error in the second part."""

        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > 8 * 2**20:
                raise ConnectionError("the disk was removed")
            return super().read(size)

    client = open_store(f"s3://{BUCKET}/runs")._connected()  # type: ignore[attr-defined]
    with pytest.raises(ConnectionError):
        client.upload_fileobj(Broken(os.urandom(20 * 2**20)), BUCKET, "runs/broken.bin")


OPERATIONS: list[Callable[[Path], None]] = [
    lease_and_record,
    files_up_and_down,
    checkpoint_published_and_pulled,
    checkpoints_of_ray_train,
]


def test_the_policy_is_enough(as_node: Guarded, tmp_path: Path) -> None:
    as_node.allow()
    for operation in OPERATIONS:
        operation(tmp_path / operation.__name__)
    upload_that_ends_in_the_middle(tmp_path)
    assert as_node.unfinished() == 0


@pytest.mark.parametrize("action", ACTIONS)
def test_every_action_is_needed(action: str, as_node: Guarded, tmp_path: Path) -> None:
    as_node.allow(without=action)
    if action == "s3:AbortMultipartUpload":
        upload_that_ends_in_the_middle(tmp_path)
        assert as_node.unfinished() == 1, "parts stay, and are paid for"
        return
    refused = []
    for operation in OPERATIONS:
        try:
            operation(tmp_path / operation.__name__)
        except (StoreError, OSError) as error:
            refused.append(str(error))
    assert refused and any("denied" in text.lower() or "403" in text for text in refused), refused


def test_other_buckets_are_out_of_reach(as_node: Guarded) -> None:
    as_node.allow()
    with pytest.raises(StoreError, match="access is denied"):
        open_store("s3://other/runs").create("record.json", b"{}")
    with pytest.raises(ClientError, match="AccessDenied"):
        # Of a session of its own: the default one keeps the credentials that it saw first.
        boto3.Session().client("s3").put_bucket_policy(Bucket=BUCKET, Policy="{}")
