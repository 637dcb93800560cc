"""Checkpoints over a network that breaks: a proxy in front of a real S3 endpoint injects faults.

    FAULT_TABLE=docs/reliability.md pytest tests/faults/test_transfer.py

writes what it saw into the table there. A request is tried twice here and a file three times,
instead of 5 times each: waiting is not tested. Silence is given up after 10 minutes, so that no
test depends on how fast the machine is; only faults that are silence are met by a client that
gives up soon, and outlive whatever else it gives up on.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline.publishing.manifest import ExportError, digest, verify_folder, write_manifest
from pipeline.publishing.publish import CLAIM, publish, pull
from pipeline.store import DiskFull, Store, StoreError, StoreUnavailable, open_store
from tests.faults.checkpoints import SIZES, WEIGHTS, export, make
from tests.faults.proxy import Fault, Proxy


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.store.s3.ATTEMPTS", 2)
    monkeypatch.setattr("pipeline.store.s3.READ_SECONDS", 600)
    monkeypatch.setattr("pipeline.publishing.publish.TRIES", 3)
    monkeypatch.setattr("pipeline.retry.random.random", lambda: 0.1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("made") / "checkpoint")


@pytest.fixture
def proxy(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    proxy = Proxy(s3_endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    yield proxy
    proxy.close()


@pytest.fixture
def place(proxy: Proxy) -> Store:
    return open_store(f"s3://lab/{uuid.uuid4().hex}")


def hasty(place: Store, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The same place; where the fault is silence, by a client that gives up after two seconds.

    On a slow machine that client gives up answers that are still arriving, too: it must have enough
    tries to come through (`goes_on`), or fail as it does of the fault (`ends_with`).
    """
    if not fault.stall:
        return place
    monkeypatch.setattr("pipeline.store.s3.READ_SECONDS", 2)
    if fault.times < math.inf:
        monkeypatch.setattr("pipeline.store.s3.ATTEMPTS", 5)
        monkeypatch.setattr("pipeline.publishing.publish.TRIES", 60)
    return open_store(place.root)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@dataclass(frozen=True)
class Row:
    """A line of the table in docs/reliability.md."""

    order: int
    fault: str
    requests: str
    outcome: str
    test: str


ROWS: list[Row] = []


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    """Writes the table between its two marks, if FAULT_TABLE is set."""
    ROWS.clear()
    yield
    if not (file := os.environ.get("FAULT_TABLE")):
        return
    lines = ["| fault | requests that met it | outcome | test |", "|---|---|---|---|"]
    for row in sorted(ROWS, key=lambda row: row.order):
        cells = (row.fault, row.requests, row.outcome, f"`-k {row.test}`")
        lines.append(f"| {' | '.join(cells)} |")
    text = Path(file).read_text()
    start, end = "<!-- transfer faults -->\n", "<!-- end -->"
    before, _, rest = text.partition(start)
    assert end in rest, f"{file} has no place for the table"
    after = rest.partition(end)[2]
    Path(file).write_text("\n".join([f"{before}{start}", *lines, "", f"{end}{after}"]))


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[..., None]:
    def add(fault: str, requests: float | str, outcome: object) -> None:
        message = re.sub(r"s3://\S+( at http\S+)?|/\S*pytest\S*?(?=[: ])", "...", str(outcome))
        message = re.sub(r"\b([0-9a-f]{8})[0-9a-f]{56}\b", r"\1...", message)
        test = request.node.originalname.removeprefix("test_")
        ROWS.append(Row(len(ROWS), fault, str(requests), message.replace("|", "/"), test))

    return add


up = partial(Fault, method="PUT", part=WEIGHTS)
down = partial(Fault, method="GET", part=WEIGHTS)
ended = partial(Fault, method="POST", part="uploadId")
listed = partial(Fault, method="GET", part="manifest.json")
GOES_ON: dict[str, Fault] = {
    "export: 500 thrice": up(times=3, status=500, code="InternalError"),
    "export: 503 five times": up(times=5, status=503, code="SlowDown"),
    "export: connection reset while sending, twice": up(times=2, drop=True),
    "export: a bit differs on arrival, twice": up(times=2, flip=True),
    "export: the end of an upload answers 500": ended(times=1, status=500, code="Internal"),
    "export: reading back breaks off, twice": down(times=2, cut=100_000),
    "pull: 503 five times": down(times=5, status=503, code="SlowDown"),
    "pull: connection reset in mid-body, five times": down(times=5, cut=100_000),
    "pull: silence in mid-body": down(times=1, cut=100_000, stall=True),
    "pull: a body that ends early and says it is whole": down(times=2, cut=100_000, end=True),
    "pull: a bit differs on arrival, twice": down(times=2, flip=True),
    "pull: the manifest breaks off": listed(times=1, cut=50),
    "pull: a bit of the manifest differs on arrival": listed(times=1, flip=True),
}


@pytest.mark.parametrize("fault", GOES_ON)
def test_goes_on(
    fault: str,
    proxy: Proxy,
    place: Store,
    checkpoint: Path,
    tmp_path: Path,
    note: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pulled = fault.startswith("pull")
    injected = GOES_ON[fault]
    injected.seen = 0
    if not pulled:
        proxy.faults = [injected]
    made = export(place, checkpoint)
    assert made.moved == 3
    if pulled:
        proxy.faults = [injected]
        place = hasty(place, injected, monkeypatch)
    pull(place, tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(checkpoint)
    assert injected.seen >= injected.times
    note(fault, f"{injected.times:g}", "tried again: done, every file verified")


STOPS: dict[str, tuple[Fault, type[Exception], str]] = {
    "export: 503 for ever": (
        Fault(method="PUT", part="config.json", status=503, code="SlowDown"),
        StoreUnavailable, r"overloaded.*tried 3 times; completed files are kept",
    ),
    "export: every byte arrives altered": (
        Fault(method="PUT", part="config.json", flip=True),
        StoreUnavailable, "the server received other data than was sent",
    ),
    "export: credentials expire in the middle": (
        Fault(method="PUT", part="partNumber=2", status=400, code="ExpiredToken"),
        StoreError, "the credentials have expired; renew them and rerun the same command",
    ),
    "export: writing is forbidden": (
        Fault(method="PUT", part=WEIGHTS, status=403, code="AccessDenied"),
        StoreError, "access is denied",
    ),
    "pull: 500 for ever": (
        Fault(method="GET", part="config.json", status=500, code="InternalError"),
        StoreUnavailable, "tried 3 times; completed files are kept",
    ),
    "pull: silence for ever": (
        Fault(method="GET", part="config.json", cut=100, stall=True),
        StoreUnavailable, "tried 3 times; completed files are kept",
    ),
    "pull: every body breaks off": (
        Fault(method="GET", part="config.json", cut=100),
        StoreUnavailable, "tried 3 times; completed files are kept",
    ),
    "pull: every byte arrives altered": (
        Fault(method="GET", part="config.json", flip=True),
        StoreError, "tried 3 times; completed files are kept",
    ),
    "pull: credentials expire in the middle": (
        Fault(method="GET", part="config.json", status=400, code="ExpiredToken"),
        StoreError, "the credentials have expired; renew them and rerun the same command",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", STOPS)
def test_ends_with_a_clear_error_and_then_goes_on(
    fault: str,
    proxy: Proxy,
    place: Store,
    checkpoint: Path,
    tmp_path: Path,
    note: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    injected, kind, says = STOPS[fault]
    injected.seen = 0
    copy = tmp_path / "copy"
    if fault.startswith("export"):
        proxy.faults = [injected]
        with pytest.raises(kind, match=says) as caught:
            export(place, checkpoint)
        proxy.faults = []
        with pytest.raises(ExportError, match="its export has not finished"):
            pull(place, copy)
        assert export(place, checkpoint).probe == {"files": 3}
    else:
        export(place, checkpoint)
        proxy.faults = [injected]
        with monkeypatch.context() as patch, pytest.raises(kind, match=says) as caught:
            pull(hasty(place, injected, patch), copy)
        assert not (copy / "manifest.json").exists()
        assert not list(copy.rglob(".tmp-*")) and not (copy / "config.json").exists()
        proxy.faults = []
    pull(place, copy)
    assert contents(copy) == contents(checkpoint)
    note(fault, injected.seen, caught.value)


def test_altered_in_the_store(
    proxy: Proxy, place: Store, checkpoint: Path, tmp_path: Path, note: Any
) -> None:
    export(place, checkpoint)
    for what, change, says in (
        ("pull: a file was altered in the store", lambda old: old[:-1] + b"x", "was altered"),
        ("pull: a file is cut short in the store", lambda old: old[:-8], "292 bytes instead of"),
    ):  # fmt: skip
        found = place.read_versioned("config.json")
        assert found and place.replace("config.json", change(found[0]), found[1])
        with pytest.raises((StoreError, ExportError), match=says) as caught:
            pull(place, tmp_path / "copy")
        assert not (tmp_path / "copy" / "config.json").exists()
        note(what, "-", caught.value)
    place.delete("config.json")
    with pytest.raises(ExportError, match=r"config\.json is missing") as caught:
        pull(place, tmp_path / "copy")
    note("pull: a file was deleted in the store", "-", caught.value)
    assert export(place, checkpoint).moved == 1  # and that repairs it
    pull(place, tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(checkpoint)


def test_an_altered_manifest_is_seen_by_its_digest(
    place: Store, checkpoint: Path, tmp_path: Path, note: Any
) -> None:
    made = export(place, checkpoint)
    other = make(tmp_path / "other")
    for name in (*SIZES, "manifest.json"):
        place.delete(name)
        place.put(other / name, name)
    with pytest.raises(ExportError, match=rf"has SHA-256 .*, not {made.digest}") as caught:
        pull(place, tmp_path / "copy", expect=made.digest)
    assert not (tmp_path / "copy").exists()
    note("pull `--expect`: files and manifest were replaced in the store", "-", caught.value)


def test_no_bucket(proxy: Proxy, checkpoint: Path, tmp_path: Path, note: Any) -> None:
    nowhere = open_store("s3://nowhere/x")
    with pytest.raises(StoreError, match="there is no bucket nowhere; create it"):
        export(nowhere, checkpoint)
    with pytest.raises(StoreError, match="there is no bucket nowhere; create it") as caught:
        pull(nowhere, tmp_path / "copy")
    note("export, pull: a bucket that is not there", "-", caught.value)


def test_killed_in_mid_export(
    proxy: Proxy, place: Store, checkpoint: Path, tmp_path: Path, note: Any
) -> None:
    """A process of its own, killed when it sends the second part; the same goes on."""
    script = (
        "import sys; from pathlib import Path; from pipeline.store import open_store;"
        "from tests.faults.checkpoints import export;"
        "export(open_store(sys.argv[1]), Path(sys.argv[2]))"
    )
    process = subprocess.Popen([sys.executable, "-c", script, place.root, str(checkpoint)])
    fault = Fault(method="PUT", part="partNumber=2", times=1, call=process.kill)
    proxy.faults = [fault]
    assert process.wait() == -9
    with pytest.raises(ExportError, match="its export has not finished"):
        pull(place, tmp_path / "copy")
    done = export(place, checkpoint)
    pull(place, tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(checkpoint)
    assert place.read(CLAIM) is None
    outcome = (
        f"nothing to be seen there; the same command sends {done.moved} of 3 files and is done"
    )
    note("export: kill -9 in mid-upload", fault.seen, outcome)


# The checkpoint fits, and not much else.
@pytest.mark.parametrize("small_disk", ["16m"], indirect=True)
def test_a_full_disk(
    proxy: Proxy, place: Store, checkpoint: Path, small_disk: Path, note: Any
) -> None:
    export(place, checkpoint)
    filler = small_disk / "filler"

    def fill() -> None:
        filler.write_bytes(bytes(8 << 20))

    fault = Fault(method="GET", part=WEIGHTS, times=1, call=fill)
    proxy.faults = [fault]
    with pytest.raises(DiskFull, match="the disk is full; free some space") as caught:
        pull(place, small_disk / "copy")
    note("pull: the disk becomes full", fault.seen, caught.value)
    before = len(proxy.requests)
    with pytest.raises(DiskFull, match=r"\d+ MiB free, but \d+ MiB are to be") as caught:
        pull(place, small_disk / "copy")
    assert not [path for _, path in proxy.requests[before:] if WEIGHTS in path]
    note("pull: the disk has too little room", "0", caught.value)
    filler.unlink()
    pull(place, small_disk / "copy")
    assert contents(small_disk / "copy") == contents(checkpoint)


def test_what_is_there_is_not_sent_or_fetched_again(
    proxy: Proxy, place: Store, checkpoint: Path, tmp_path: Path
) -> None:
    first = export(place, checkpoint)
    sent = len(proxy.requests)
    again = export(place, checkpoint)
    assert (first.moved, again.moved, again.probe) == (3, 0, {})
    assert again.digest == first.digest == digest((checkpoint / "manifest.json").read_bytes())
    assert {method for method, _ in proxy.requests[sent:]} == {"GET"}  # the listing, the manifest
    assert pull(place, tmp_path / "copy").moved == 3
    (tmp_path / "copy" / "config.json").unlink()
    (tmp_path / "copy" / ".tmp-0123").write_bytes(b"of a pull that was killed")
    assert pull(place, tmp_path / "copy").moved == 1
    assert contents(tmp_path / "copy") == contents(checkpoint)


def test_other_content_is_refused_on_both_sides(
    place: Store, checkpoint: Path, tmp_path: Path
) -> None:
    export(place, checkpoint)
    other = make(tmp_path / "other")
    with pytest.raises(ExportError, match=r"another checkpoint is published at .*choose another"):
        export(place, other)
    with pytest.raises(ExportError, match=f"{other} holds another checkpoint"):
        pull(place, other)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.json").write_text("{}")
    with pytest.raises(ExportError, match=r"config\.json has 2 bytes instead of 300"):
        pull(place, mine)
    assert (mine / "config.json").read_text() == "{}"
    pull(place, tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(checkpoint)


def test_an_unfinished_export_of_something_else_is_not_mixed_with(
    proxy: Proxy, place: Store, checkpoint: Path, tmp_path: Path
) -> None:
    proxy.faults = [Fault(method="PUT", part=WEIGHTS, status=403, code="AccessDenied")]
    with pytest.raises(StoreError, match="access is denied"):
        export(place, checkpoint)
    proxy.faults = []
    with pytest.raises(ExportError, match="an unfinished export of another checkpoint"):
        export(place, make(tmp_path / "other"))
    assert export(place, checkpoint).probe
    with pytest.raises(ExportError, match="another checkpoint is published"):
        export(place, tmp_path / "other")


def test_a_copy_that_fails_its_check_is_never_seen(place: Store, checkpoint: Path) -> None:
    def fail(copy: Path) -> dict[str, float]:
        raise ExportError("the logits differ")

    with pytest.raises(ExportError, match="the logits differ"):
        publish(checkpoint, place, fail)
    assert place.read("manifest.json") is None


def test_a_place_with_other_files_is_refused(place: Store, checkpoint: Path) -> None:
    place.create("notes.txt", b"mine")
    with pytest.raises(ExportError, match=r"holds notes\.txt, which this checkpoint does not"):
        export(place, checkpoint)


def test_folders_work_alike(checkpoint: Path, tmp_path: Path) -> None:
    place = open_store(str(tmp_path / "shared"))
    assert export(place, checkpoint).moved == 3
    verify_folder(tmp_path / "shared")
    assert export(place, checkpoint).moved == 0
    pull(place, tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(checkpoint)


def test_own_authority_over_https(
    s3_endpoint: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, note: Any
) -> None:
    certificate, key = str(tmp_path / "ca.pem"), str(tmp_path / "key.pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1",
         "-subj", "/CN=ours", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    proxy = Proxy(s3_endpoint, (certificate, key))
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    root = f"s3://lab/{uuid.uuid4().hex}"
    with pytest.raises(StoreError, match=r"certificate isn't trusted.*AWS_CA_BUNDLE") as caught:
        export(open_store(root), checkpoint)
    monkeypatch.setenv("AWS_CA_BUNDLE", certificate)
    export(open_store(root), checkpoint)
    pull(open_store(root), tmp_path / "copy")
    proxy.close()
    assert contents(tmp_path / "copy") == contents(checkpoint)
    assert all(path.startswith("/lab") for _, path in proxy.requests)  # path-style
    note("export: a certificate of an unknown authority", "-", caught.value)


@pytest.mark.slow
def test_memory_is_bounded(place: Store, tmp_path: Path) -> None:
    """A checkpoint of 256 MiB through a process that may hold 128 MiB more than its imports."""
    large = make(tmp_path / "large")
    with (large / WEIGHTS).open("wb") as file:
        file.truncate(256 << 20)
    (large / "manifest.json").unlink()
    write_manifest(large, {})
    script = (
        "import sys, resource; from pathlib import Path; import boto3;"
        "import pipeline.publishing.publish as publish;"
        "from pipeline.store import open_store; from tests.faults.checkpoints import export;"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10;"
        "place, before = open_store(sys.argv[1]), peak();"
        "export(place, Path(sys.argv[2])); publish.pull(place, Path(sys.argv[3]));"
        "print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, place.root, str(large), str(tmp_path / "copy")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 128, f"{done.stdout.strip()} MiB"


def test_encryption_and_tags(s3_endpoint: str, checkpoint: Path) -> None:
    import boto3

    prefix = uuid.uuid4().hex
    place = open_store(f"s3://lab/{prefix}", "aws:kms", "alias/ours", (("team", "vision"),))
    export(place, checkpoint)
    client = boto3.Session().client("s3")
    for name in (WEIGHTS, "config.json", "manifest.json"):
        key = {"Bucket": "lab", "Key": f"{prefix}/{name}"}
        head = client.head_object(**key)
        assert (head["ServerSideEncryption"], head["SSEKMSKeyId"]) == ("aws:kms", "alias/ours")
        assert client.get_object_tagging(**key)["TagSet"] == [{"Key": "team", "Value": "vision"}]
    plain = open_store(f"s3://lab/{uuid.uuid4().hex}")
    plain.put(checkpoint / "config.json", "config.json")
    with pytest.raises(StoreError, match=r"has encryption .*, not aws:kms"):
        open_store(plain.root, "aws:kms").holds("config.json", checkpoint / "config.json")
    with pytest.raises(StoreError, match="takes neither encryption nor tags"):
        open_store("/tmp/x", "AES256")
    with pytest.raises(StoreError, match="write AES256, or aws:kms"):
        open_store("s3://lab/x", "rot13")
