"""Addresses: every printable character names the same place for all that read it, or is refused."""

from __future__ import annotations

import os
import unicodedata
import uuid
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_logged_model_name, _validate_model_name

from pipeline.cluster.jobs import JobError, plan_submission
from pipeline.data.files import find, open_file
from pipeline.store import LocalStore, StoreError, check_for_runs, open_store, split
from pipeline.store.places import parse
from pipeline.tracking.address import TrackingError, chosen, database_of, default_uri
from pipeline.tracking.names import check_name, model_name
from workflows.commands.cluster.submit import DRIVER, PACKAGES
from workflows.commands.main import main
from workflows.registry import load_workflow

PRINTABLE = [chr(code) for code in range(32, 127) if chr(code) != "/"] + ["é", "日", "\u3000"]


def refused(address: str) -> bool:
    try:
        open_store(address)
    except StoreError:
        return True
    return False


@pytest.mark.parametrize("form", ["a{}b", "{}", "a{}", "{}b", "a/{}/b", "{0}{0}"])
def test_a_path_means_itself(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for character in PRINTABLE:
        name = form.format(character)
        for address in (f"{tmp_path}/{name}", name, f"./{name}"):
            if not name.strip() or (address == name and name.startswith("~")):
                continue
            store = open_store(address)
            assert store.root == str(tmp_path / name), address
            assert open_store(store.root).root == store.root


@pytest.mark.parametrize("form", ["a{}b", "a{}", "{}b", "a/{}/b", "{0}{0}"])
def test_a_file_url_is_decoded_or_refused(form: str, tmp_path: Path) -> None:
    for character in PRINTABLE:
        name = form.format(character)
        assert open_store(f"file://{tmp_path}/{quote(name)}").root == str(tmp_path / name)
        if refused(f"file://{tmp_path}/{name}"):
            assert character in "%?#"
        else:
            assert open_store(f"file://{tmp_path}/{name}").root == str(tmp_path / name)


@pytest.mark.parametrize("form", ["a{}b", "{}", "a{}", "{}b", "a/{}/b", "{0}{0}"])
def test_a_key_on_s3_means_itself_or_is_refused(form: str, s3_endpoint: str) -> None:
    left = []
    for character in PRINTABLE:
        name = f"{uuid.uuid4().hex}/{form.format(character)}"
        if refused(f"s3://lab/{name}"):
            left.append(character)
            continue
        assert open_store(f"s3://lab/{name}").root == f"s3://lab/{name}"
    assert left == ["?"]


def test_what_is_written_lies_under_that_very_key(s3_endpoint: str) -> None:
    import boto3

    own = uuid.uuid4().hex
    name = f"{own}/run#3 %20 {''.join(it for it in PRINTABLE if it != '?')}"
    open_store(f"s3://lab/{name}").create("record.json", b"1")
    listed = boto3.client("s3").list_objects_v2(Bucket="lab", Prefix=own)["Contents"]
    assert [it["Key"] for it in listed] == [f"{name}/record.json"]
    assert [it.key for it in open_store(f"s3://lab/{name}").list("")] == ["record.json"]


def test_a_run_is_refused_exactly_where_ray_train_would_go_elsewhere(
    s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.train._internal.storage import get_fs_and_path

    for character in PRINTABLE:
        if character == "?":
            continue
        store = open_store(f"s3://lab/a{character}b")
        try:
            same = get_fs_and_path(store.root)[1] == f"lab/a{character}b"
        except ValueError:
            same = False
        try:
            check_for_runs(store.root)
        except StoreError as error:
            assert "Ray Train and MLflow read it as a URI" in str(error)
            assert not same, character
        else:
            assert same, character


def test_ray_train_takes_every_local_path(tmp_path: Path) -> None:
    from ray.train._internal.storage import get_fs_and_path

    for character in PRINTABLE:
        root = open_store(f"{tmp_path}/a{character}b").root
        check_for_runs(root)
        assert get_fs_and_path(root)[1] == root


def test_mlflows_database_is_where_its_address_says_or_is_refused() -> None:
    from sqlalchemy.engine import make_url

    for middle in [*PRINTABLE, "%20", "%3F", "%zz", "100%"]:
        folder = f"/data/a{middle}b"
        try:
            uri = default_uri(folder)
        except TrackingError as error:
            assert "Choose another root" in str(error)
            assert middle in ("?", "%20", "%3F")
            continue
        assert make_url(uri).database == f"{folder}/mlflow.db"
        assert database_of(uri) == Path(f"{folder}/mlflow.db")


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("", "the address is empty"),
        ("  ", "the address is empty"),
        ("runs\n", "an invisible character"),
        ("s3://lab/a\tb", "an invisible character"),
        ("file:///a%0Ab", "an invisible character"),
        ("file:///a%2Fb", "write a % of a name as %25"),
        ("file:///a%ffb", "is not UTF-8"),
        ("file://data/x", "write file:///data/x for the absolute path, or data/x"),
        ("file://data", "has 'data' as its host"),
        ("file:data/x", "write data/x"),
        ("file:///a#b", "write %23"),
        ("file:///a?b", "write %3F"),
        ("s3:/lab/x", "write s3://bucket/prefix"),
        ("s3:lab", "write s3://bucket/prefix"),
        ("s3a://lab/x", "write s3://lab/x"),
        ("s3://lab:9000/x", "put a server's address into AWS_ENDPOINT_URL"),
        ("s3://lab/x?", "empty query"),
        ("~nosuchuserhere/x", "the home folder is unknown"),
    ],
)
def test_what_names_no_place_is_refused_with_what_to_do(address: str, says: str) -> None:
    with pytest.raises(StoreError) as caught:
        open_store(address)
    assert says in str(caught.value)


def test_short_forms_and_upper_case(tmp_path: Path) -> None:
    for address in (f"file:{tmp_path}/x", f"FILE://{tmp_path}/x", f"file://localhost{tmp_path}/x"):
        assert open_store(address).root == f"{tmp_path}/x"
    assert open_store("S3://lab//x/").root == "s3://lab/x"
    assert parse("gs://bucket/x").scheme == "gs"


def test_a_folder_of_versions_that_did_not_decode_is_not_taken_for_lost(tmp_path: Path) -> None:
    (tmp_path / "a%20b").mkdir()
    with pytest.raises(StoreError, match="which does not exist, but"):
        open_store(f"file://{tmp_path}/a%20b")
    (tmp_path / "a b").mkdir()
    assert open_store(f"file://{tmp_path}/a%20b").root == f"{tmp_path}/a b"


def test_files_are_found_under_every_kind_of_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also at the top of the file system, which is not the folder where the user stands."""
    monkeypatch.chdir(tmp_path)
    assert split("/x.png") == ("/", "x.png")
    assert split("x.png") == (str(tmp_path), "x.png")
    assert split("s3://lab/a/x.png") == ("s3://lab/a", "x.png")
    assert split("s3://lab/x.png") == ("s3://lab", "x.png")
    assert split(f"file://{tmp_path}/a%20b.png") == (str(tmp_path), "a b.png")
    with pytest.raises(StoreError, match="names no file"):
        split("s3://lab")
    for character in PRINTABLE:
        if character == "\\":
            continue
        path = tmp_path / f"x{character}.json"
        path.write_text(character)
        address = f"file://{tmp_path}/{quote(path.name)}"
        with open_file(address) as file:
            assert file.read().decode() == character
        if character not in "*?[":
            assert find(address) == [address]
    globbed = find(f"file://{tmp_path}/x*.json")
    assert len(globbed) == len(PRINTABLE) - 1
    for address in globbed:
        open_file(address).close()


def test_chat_reads_the_picture_that_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    name = f"{uuid.uuid4().hex}.png"
    (tmp_path / name).write_bytes(b"a picture of another folder")
    assert main(["chat", "nowhere", f"/{name}"]) == 2
    assert f"there is no picture '/{name}'" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["run", "demo"], ["run", "demo", "--dry-run"]])
def test_a_run_is_refused_before_anything_runs(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--root", "s3://lab/my runs"]) == 2
    assert "a space is not literal" in capsys.readouterr().err


def test_a_submission_is_refused_too() -> None:
    given = {"driver": DRIVER, "packages": PACKAGES}
    with pytest.raises(StoreError, match="is not literal"):
        plan_submission(load_workflow("demo"), [], "s3://lab/run#3", mlflow="off", **given)
    with pytest.raises(StoreError, match=r"empty, \. and \.\. parts"):
        plan_submission(load_workflow("demo"), [], "s3://lab/a//b", mlflow="off", **given)
    with pytest.raises(JobError, match="Databricks' MLflow is not supported"):
        plan_submission(
            load_workflow("demo"), [], "s3://lab/a", mlflow="databricks://prod", **given
        )


@pytest.mark.parametrize("word", ["off", "OFF", " Off "])
def test_off_in_any_spelling(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    assert chosen(word) == "off"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", word)
    assert chosen(None) == "off"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert chosen(None) is None


def test_characters_are_printable() -> None:
    assert all(unicodedata.category(it)[0] != "C" for it in PRINTABLE)
    assert isinstance(open_store("runs"), LocalStore)


@settings(max_examples=300, deadline=None)
@given(st.text(min_size=1, max_size=40))
def test_whatever_a_place_is_called_it_comes_back_or_is_refused(name: str) -> None:
    """Of a path, of a file URL and of a prefix on S3: what is read is what was written down."""
    for address in (f"/data/{name}", f"file:///data/{quote(name)}", f"s3://bucket/{name}"):
        try:
            place = parse(address)
        except StoreError:
            continue
        if place.path is not None:
            assert str(place.path) == os.path.normpath(f"/data/{name}")
            assert parse(str(place.path)).path == place.path
        else:
            assert (place.bucket, place.prefix) == ("bucket", name.strip("/"))
            assert parse(f"s3://{place.bucket}/{place.prefix}") == place


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=220))
def test_whatever_a_model_is_called_mlflow_takes_the_name_or_it_is_refused(name: str) -> None:
    try:
        check_name(name)
    except ValueError:
        return
    _validate_model_name(model_name(name))
    _validate_logged_model_name(model_name(name))
