"""Reading over HTTP: only the bytes asked for move, and a server without ranges is found out."""

import functools
import http.server
import json
import re
import threading

import pytest
import torch
from safetensors.torch import save_file

from weft.checkpoints import remote
from weft.checkpoints.limits import Limits
from weft.checkpoints.load import load
from weft.checkpoints.remote import RemoteSource
from weft.errors import DataError

pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")


class Handler(http.server.SimpleHTTPRequestHandler):
    """Static files with byte ranges, counting what is sent; failing on demand."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def list_directory(self, path):
        self.send_error(404)

    def do_GET(self):
        server = self.server
        if server.failures:
            server.failures -= 1
            return self.send_error(503)
        path = self.translate_path(self.path)
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError:
            return self.send_error(404)
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if match and server.ranges:
            first, last = int(match[1]), min(int(match[2]), len(data) - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            data = data[first : last + 1]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        server.sent += len(data)
        try:
            self.wfile.write(data)
        except OSError:
            self.close_connection = True


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    handler = functools.partial(Handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.sent, server.ranges, server.failures, server.daemon_threads = 0, True, 0, True
        server.handle_error = lambda *args: None  # clients may hang up
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def tensors(tmp_path):
    tensors = {"big": torch.randn(300_000), "small": torch.randn(10, 10)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "toy"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    return tensors


def test_one_tensor_moves_few_bytes(server, tensors):
    file = load(f"{server.url}/model.safetensors")
    assert torch.equal(file.tensor("small"), tensors["small"])
    assert torch.equal(file.read("big", 1000, 2000), tensors["big"][1000:2000])
    assert server.sent < 10_000 < file.nbytes
    assert [f.path for f in file.files] == [f"{server.url}/model.safetensors"] and file.files[
        0
    ].digest is None


def test_folder(server, tensors):
    model = load(f"{server.url}/")
    assert model.config == {"model_type": "toy"}
    assert [(a.name, a.read()) for a in model.assets] == [("tokenizer.json", b"{}")]
    assert torch.equal(model.tensor("big"), tensors["big"])


def test_sharded_folder(server, tmp_path):
    for i in range(2):
        save_file({f"t{i}": torch.full((4,), float(i))}, tmp_path / f"model-{i}.safetensors")
    index = {"weight_map": {f"t{i}": f"model-{i}.safetensors" for i in range(2)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load(server.url).read("t1", 1, 3).tolist() == [1.0, 1.0]
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(DataError, match=r"model-1\.safetensors is missing"):
        load(server.url)


def test_torch_files_too(server, tmp_path):
    torch.save({"w": torch.randn(100_000), "v": torch.arange(5)}, tmp_path / "m.pt")
    file = load(f"{server.url}/m.pt")
    assert file.tensor("v").tolist() == [0, 1, 2, 3, 4]
    assert server.sent < 100_000


def test_read_ahead_moves_each_byte_once(server, tensors, monkeypatch):
    monkeypatch.setattr(remote, "PIECE", 100_000)
    file = load(f"{server.url}/model.safetensors")
    before = server.sent
    file.prefetch("big")
    parts = [file.read("big", i, i + 7_500) for i in range(0, 300_000, 7_500)]
    assert torch.equal(torch.cat(parts), tensors["big"])
    assert server.sent - before == 1_200_000


def test_read_ahead_stays_within_its_bounds(server, tensors, monkeypatch):
    monkeypatch.setattr(remote, "PIECE", 10_000)
    monkeypatch.setattr(remote, "AHEAD", 50_000)
    source = RemoteSource(f"{server.url}/model.safetensors")
    whole = source.read(0, source.size)
    for offset in (900_000, 0, 500_000):
        source.prefetch(offset, 200_000)
        assert sum(size for _, size in source._flying) <= 50_000
    assert source.read(600_000, 45_000) == whole[600_000:645_000]  # stale guesses make room


def test_many_threads(server, tensors):
    file = load(f"{server.url}/model.safetensors")
    wrong = []

    def read(i):
        if not torch.equal(
            file.read("big", i * 1000, i * 1000 + 5000), tensors["big"][i * 1000 : i * 1000 + 5000]
        ):
            wrong.append(i)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_server_without_ranges(server, tensors):
    server.ranges = False
    file = load(f"{server.url}/model.safetensors")
    assert torch.equal(file.tensor("small"), tensors["small"])  # small enough to be held
    with pytest.raises(DataError, match="ignores ranges"):
        load(f"{server.url}/model.safetensors", limits=Limits(whole_remote_bytes=1000))


def test_hiccups_are_retried_and_failures_reported(server, tensors, monkeypatch):
    file = load(f"{server.url}/model.safetensors")
    monkeypatch.setattr(remote.time, "sleep", lambda s: None)
    server.failures = 2
    assert torch.equal(file.tensor("small"), tensors["small"])
    server.failures = 100
    with pytest.raises(DataError, match="cannot be read"):
        file.tensor("small")
    server.failures = 0
    with pytest.raises(DataError, match="does not exist"):
        load(f"{server.url}/other.safetensors")


def test_object_stores_by_their_listing(tensors, tmp_path):
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.put(str(tmp_path / "model.safetensors"), "/bucket/toy/model.safetensors")
    fs.pipe("/bucket/toy/config.json", b"{}")
    try:
        model = load("memory://bucket/toy")
        assert torch.equal(model.read("big", 5, 9), tensors["big"][5:9]) and model.config == {}
    finally:
        fs.rm("/bucket", recursive=True)
