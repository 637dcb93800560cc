"""`adsc doctor`: what is missing is named with what to do, on this machine and on every node."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from pipeline.cluster.doctor import Finding, examine, examine_driver, examine_nodes
from workflows.commands.main import main


def by_name(found: list[Finding]) -> dict[str, Finding]:
    return {one.what: one for one in found}


def test_a_machine_that_is_fit(tmp_path: Path) -> None:
    found = by_name(examine(str(tmp_path / "store"), ""))
    assert found["store"].state == found["packages"].state == found["Python"].state == "ok"
    assert {"GPU", "memory", "cache", "temporary files"} <= found.keys()
    left = [path.name for path in (tmp_path / "store").iterdir()]
    assert left == [".lock"], "the object that was written is deleted"


def test_what_is_missing_is_named_with_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    words = ["doctor", "--root", str(file / "store"), "--mlflow", "http://127.0.0.1:9"]
    assert main([*words, "--address", "127.0.0.1:9", "--cluster", "--json"]) == 1
    (found,) = json.loads(capsys.readouterr().out).values()  # no node is checked without a cluster
    missing = {one["what"]: one for one in found if one["state"] == "missing"}
    assert missing.keys() == {"store", "Ray", "MLflow"}
    assert all(one["way_out"] for one in missing.values())
    assert str(file) in missing["store"]["found"] and "127.0.0.1:9" in missing["Ray"]["found"]
    assert main(words) == 1
    assert "missing: see the last column" in capsys.readouterr().out


def test_a_server_that_wants_credentials_is_there(tmp_path: Path) -> None:
    class Closed(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(401 if self.path == "/health" else 404)
            self.end_headers()

    server = HTTPServer(("127.0.0.1", 0), Closed)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://user:secret@127.0.0.1:{server.server_port}"
        other = f"http://127.0.0.1:{server.server_port}/other"
        found = by_name(examine_driver(None, address, None))["MLflow"]
        assert by_name(examine_driver(None, other, None))["MLflow"].state == "missing"
    finally:
        server.shutdown()
    assert found.state == "ok" and "secret" not in found.found


@pytest.mark.usefixtures("ray_address")
def test_every_node_is_examined(tmp_path: Path) -> None:
    import ray

    found = examine_nodes(str(tmp_path), "")
    assert len(found) == sum(node["Alive"] for node in ray.nodes())
    assert all(by_name(each)["store"].state == "ok" for each in found.values())


def test_the_version_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("adsc 0.")
