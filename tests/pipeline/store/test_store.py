"""One contract for both kinds of store: a folder, and S3 over HTTP."""

from __future__ import annotations

import os
import pickle
import socket
import uuid
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from pipeline.store import Entry, Store, StoreError, open_store
from pipeline.store.interface import appearing


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, s3_endpoint: str) -> Store:
    """With the endpoint in the environment for both: processes forked later keep what they see."""
    if request.param == "local":
        return open_store(str(tmp_path / "runs"))
    return open_store(f"s3://lab/{uuid.uuid4().hex}")


def test_create_read_replace_delete(store: Store) -> None:
    assert store.read("a/b.json") is None
    first = store.create("a/b.json", b"1")
    assert first
    assert store.create("a/b.json", b"2") is None
    assert store.read_versioned("a/b.json") == (b"1", first)
    assert store.replace("a/b.json", b"3", "another version") is None
    second = store.replace("a/b.json", b"3", first)
    assert second not in (None, first)
    assert store.replace("a/b.json", b"4", first) is None
    assert store.read("a/b.json") == b"3"
    assert not store.delete("a/b.json", first)
    assert store.delete("a/b.json", second)
    assert not store.delete("a/b.json")
    assert store.replace("a/b.json", b"5", second or "") is None
    assert store.read("a/b.json") is None


def test_list_is_by_folder(store: Store) -> None:
    for key in ("a/2", "a/deep/1", "ab/3", "c"):
        store.create(key, key.encode())
    assert store.list("a") == [Entry(key="a/2", size=3), Entry(key="a/deep/1", size=8)]
    assert [entry.key for entry in store.list("")] == ["a/2", "a/deep/1", "ab/3", "c"]
    assert store.list("nothing") == []


def test_a_listing_tells_that_an_object_of_the_same_size_was_written_again(store: Store) -> None:
    version = store.create("a", b"1")
    before = store.list("")[0].version
    assert store.list("")[0].version == before != ""
    assert store.replace("a", b"2", version or "")
    assert store.list("")[0].version != before


def test_a_listing_through_fsspec_tells_it_too(tmp_path: Path) -> None:
    versions = set()
    for text, changed in (("1", 100), ("2", 200)):
        (tmp_path / "a").write_text(text)
        os.utime(tmp_path / "a", (changed, changed))
        versions.add(open_store(f"local://{tmp_path}").list("")[0].version)
    assert len(versions) == 2


def test_more_than_one_page(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.store.s3._PAGE", 3)
    for number in range(8):
        store.create(f"many/{number}", b"")
    assert [entry.key for entry in store.list("many")] == [f"many/{i}" for i in range(8)]


def test_folders_go_up_and_down(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "weights.bin").write_bytes(os.urandom(9 << 20))
    (source / "empty").write_bytes(b"")
    store.upload(source, "stage/attempts/1")
    store.download("stage/attempts/1", tmp_path / "copy")
    found = {
        path.relative_to(tmp_path / "copy").as_posix(): path.read_bytes()
        for path in (tmp_path / "copy").rglob("*")
        if path.is_file()
    }
    assert found == {
        "deep/weights.bin": (source / "deep" / "weights.bin").read_bytes(),
        "empty": b"",
    }


@pytest.mark.parametrize("size", [5, 9 << 20])
@pytest.mark.parametrize("checksums", [True, False])
def test_an_upload_that_arrives_altered_is_refused(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, checksums: bool
) -> None:
    """Same size, one bit of difference: seen by the server's checksum, or by reading back."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "weights.bin").write_bytes(bytes(size))
    put = type(store)._put

    def alter(self: Store, path: Path, key: str, progress: object = None) -> None:
        other = tmp_path / "other"
        other.write_bytes(path.read_bytes()[:-1] + b"\1")
        put(self, other, key)
        if not checksums and store.root.startswith("s3:"):
            # A server that keeps none: what put_object without an algorithm leaves in moto.
            store.delete(key)
            store.create(key, other.read_bytes())

    monkeypatch.setattr(type(store), "_put", alter)
    with pytest.raises(StoreError, match=r"weights.bin is not what was sent \(its checksum"):
        store.upload(source, "stage/attempts/1")


@pytest.mark.parametrize("size", [0, 5, 8 << 20, 9 << 20])
def test_the_servers_checksum_spares_the_reading_back(
    s3_endpoint: str, tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "weights.bin").write_bytes(os.urandom(size))
    store = open_store(f"s3://lab/{uuid.uuid4().hex}")
    requests: list[str] = []
    call = type(store)._call
    monkeypatch.setattr(
        type(store),
        "_call",
        lambda self, name, *a, **k: requests.append(name) or call(self, name, *a, **k),
    )
    store.upload(tmp_path / "source", "a")
    assert requests == ["upload_file", "head_object"]


def test_nothing_to_download(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is nothing at"):
        store.download("not/there", tmp_path / "copy")


def test_no_path_leaves_the_folder(store: Store, tmp_path: Path) -> None:
    for key in ("../x", "/x", "a/../../x", "", "a//b", "./a"):
        with pytest.raises(StoreError, match="stay inside"):
            store.create(key, b"")
    source = tmp_path / "source"
    source.mkdir()
    (source / "link").symlink_to(tmp_path)
    with pytest.raises(StoreError, match="leads out of"):
        store.upload(source, "a")


def _race(job: tuple[str, int]) -> list[bool]:
    root, first = job
    racing = open_store(root)

    def create(racer: int) -> bool:
        return racing.create("record.json", f"racer {racer}".encode()) is not None

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(create, range(first, first + 4)))


def test_sixteen_racers_in_four_processes_and_one_wins(store: Store) -> None:
    processes = get_context("forkserver")
    processes.set_forkserver_preload(["pipeline.store", "boto3"])
    with processes.Pool(4) as pool:
        jobs = [(store.root, first) for first in (0, 4, 8, 12)]
        won = [one for some in pool.map(_race, jobs, chunksize=1) for one in some]
    assert won.count(True) == 1
    assert store.read("record.json") == f"racer {won.index(True)}".encode()


def test_racers_replace_one_after_the_other(store: Store) -> None:
    version = store.create("lease.json", b"0")
    assert version

    def replace(racer: int) -> bool:
        return store.replace("lease.json", f"{racer}".encode(), version) is not None

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(replace, range(1, 17)))
    assert won.count(True) == 1
    assert store.read("lease.json") == f"{won.index(True) + 1}".encode()


def test_addresses(store: Store) -> None:
    assert store.uri("a/b") == f"{store.root}/a/b"
    store.create("a/b", b"1")
    assert open_store(store.uri("a")).read("b") == b"1"
    assert pickle.loads(pickle.dumps(store)).read("a/b") == b"1"
    local = store.local("a/b")
    assert local is None if store.root.startswith("s3://") else local and local.is_file()


def test_check_writable_leaves_nothing(store: Store) -> None:
    store.check_writable()
    assert store.list("") == []


def test_local_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_store("runs").root == str(tmp_path / "runs")
    assert open_store(f"file://{tmp_path}/runs").root == str(tmp_path / "runs")


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("s3://", "names no bucket"),
        ("gs://bucket/x", "install gcsfs"),
        ("nowhere://x", "not a kind of store"),
        ("s3://key:secret@bucket/x", "put them into the environment"),
        ("s3://bucket/x?access_key=1", "put them into the environment"),
    ],
)
def test_addresses_that_cannot_be_used(root: str, message: str) -> None:
    with pytest.raises(StoreError, match=message) as error:
        open_store(root)
    assert "secret" not in str(error.value)


def test_unwritable_places(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="a part of that path is a file; choose another root"):
        open_store(str(tmp_path / "file" / "runs")).check_writable()
    (tmp_path / "closed").mkdir(mode=0o500)
    if os.access(tmp_path / "closed", os.W_OK):  # the superuser may write anywhere
        root = "/proc/runs"
        message = "can't use /proc/runs"
    else:
        root, message = str(tmp_path / "closed"), "this user may not write there"
    with pytest.raises(StoreError, match=message):
        open_store(root).check_writable()


def test_a_full_disk(tmp_path: Path) -> None:
    with (
        pytest.raises(StoreError, match="the disk is full; free some space or choose another"),
        appearing(tmp_path / "file"),
        Path("/dev/full").open("w") as full,
    ):
        full.write("x")
    assert not list(tmp_path.iterdir())


def test_no_bucket(s3_endpoint: str) -> None:
    with pytest.raises(StoreError, match="there is no bucket nowhere; create it"):
        open_store("s3://nowhere/x").check_writable()


def test_no_credentials(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    with pytest.raises(StoreError, match="there are no credentials; set AWS_ACCESS_KEY_ID"):
        open_store("s3://lab/x").check_writable()


def test_nothing_answers(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(StoreError, match="nothing answers; check the network and AWS_ENDPOINT_URL"):
        open_store("s3://lab/x").check_writable()
