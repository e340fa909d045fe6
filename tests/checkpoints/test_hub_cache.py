"""Hub ids without a network, from a cache laid out by hand."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import save_file

from weft.checkpoints.load import load
from weft.errors import DataError, MissingExtra, UnsafeFile, UsageError

SHA = "0123456789abcdef" * 4
COMMIT = "c0ffee" * 6 + "c0ff"


@pytest.fixture
def repo(tmp_path, monkeypatch):
    """org/toy with one commit on main; every weight file is a link to a blob."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    repo = tmp_path / "hub" / "models--org--toy"
    snapshot = repo / "snapshots" / COMMIT
    for folder in (repo / "refs", repo / "blobs", snapshot):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    save_file({"w": torch.ones(2)}, repo / "blobs" / SHA)
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{SHA}")
    (repo / "blobs" / "config").write_text('{"model_type": "toy"}')
    (snapshot / "config.json").symlink_to("../../blobs/config")
    return repo


@pytest.mark.parametrize("reference", ["org/toy", "org/toy@main", f"org/toy@{COMMIT}"])
def test_offline(repo, reference):
    model = load(reference)
    assert model.tensor("w").tolist() == [1, 1] and model.config == {"model_type": "toy"}
    assert model.origin.startswith("org/toy")
    assert model.files[0].digest() == SHA  # the blob's name is its digest: nothing is hashed


def test_what_the_cache_lacks(repo):
    with pytest.raises(DataError, match="HF_HUB_OFFLINE"):
        load("org/other")
    with pytest.raises(DataError, match="HF_HUB_OFFLINE"):
        load("org/toy@v2")
    with pytest.raises(UsageError, match="no revision"):
        load("org/toy@../../x")


def test_a_local_folder_of_that_name_comes_first(repo, tmp_path):
    (tmp_path / "org" / "toy").mkdir(parents=True)
    save_file({"w": torch.zeros(2)}, tmp_path / "org" / "toy" / "model.safetensors")
    assert load("org/toy").tensor("w").tolist() == [0, 0]


def test_a_link_out_of_the_repository_is_refused(repo, tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "outside.safetensors")
    link = repo / "snapshots" / COMMIT / "model.safetensors"
    link.unlink()
    link.symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(UnsafeFile) as caught:
        load("org/toy")
    assert caught.value.code == "symlink"
    (repo / "blobs" / SHA).unlink()
    (repo / "blobs" / SHA).symlink_to(tmp_path / "outside.safetensors")
    link.unlink()
    link.symlink_to(f"../../blobs/{SHA}")
    with pytest.raises(UnsafeFile):
        load("org/toy")


def test_without_the_library(repo, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert load("org/toy").tensor("w").tolist() == [1, 1]
    with pytest.raises(MissingExtra, match=r"weft\[hub\]"):
        load("org/other")


def test_the_hub_out_of_reach(repo, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.delenv("HF_HUB_OFFLINE")

    def fail(*args, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(hub.HfApi, "model_info", fail)
    assert load("org/toy").tensor("w").tolist() == [1, 1]
    with pytest.raises(DataError, match="no route"):
        load("org/other")


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub's interface as reading a model takes."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        folder = self.server.folder
        if "/tree/" in self.path:
            lfs = {"oid": SHA, "size": 0, "pointerSize": 1}
            files = [
                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "a" * 40}
                for p in folder.iterdir()
            ]
            self.send(json.dumps([f | ({"lfs": lfs} if "safe" in f["path"] else {}) for f in files]).encode())
        elif self.path.startswith("/api/"):
            self.send(json.dumps({"id": "org/far", "modelId": "org/far", "sha": COMMIT, "tags": []}).encode())
        else:
            data = (folder / self.path.rpartition("/")[2]).read_bytes()
            first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
            self.server.sent += last + 1 - first
            self.send(data[first : last + 1], 206)

    def send(self, data, status=200):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def test_by_range_reads_from_a_hub(tmp_path):
    pytest.importorskip("huggingface_hub")
    pytest.importorskip("fsspec")
    folder = tmp_path / "far"
    folder.mkdir()
    save_file({"w": torch.arange(3), "big": torch.ones(100_000)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "toy"}')
    code = (
        "from weft.checkpoints.load import load; m = load('org/far@main');"
        "print(m.tensor('w').tolist(), m.config, m.files[0].digest())"
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.folder, server.sent = folder, 0
        threading.Thread(target=server.serve_forever, daemon=True).start()
        # the library reads its variables once, when it is imported
        changed = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home")}
        dropped = ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN")
        kept = {k: v for k, v in os.environ.items() if k not in dropped}
        environment = kept | changed | {"NO_PROXY": "127.0.0.1", "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        server.shutdown()
    assert done.stdout.strip() == f"[0, 1, 2] {{'model_type': 'toy'}} {SHA}", done.stderr
    assert server.sent < 1000
    assert not (tmp_path / "home" / "hub").exists()  # nothing was downloaded
