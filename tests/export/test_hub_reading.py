"""An interrupted merge of models on a Hub goes on without fetching again what it has."""

import http.server
import json
import re
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

import weft

pytest.importorskip("huggingface_hub")
pytest.importorskip("fsspec")
constants = pytest.importorskip("huggingface_hub.constants")
COMMIT = "c0ffee" * 6 + "c0ff"


class Hub(http.server.BaseHTTPRequestHandler):
    """Listings and byte ranges of the models in a folder; fails on demand."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        if server.failures and "Range" in self.headers:
            server.failures -= 1
            return self.send(b"{}", 503)
        folder = server.folder / re.search(r"org/(\w+)", self.path)[1]
        if "/tree/" in self.path:
            files = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "a" * 40}
                     for p in folder.iterdir()]  # fmt: skip
            self.send(json.dumps(files).encode())
        elif self.path.startswith("/api/"):
            name = f"org/{folder.name}"
            self.send(json.dumps({"id": name, "modelId": name, "sha": COMMIT, "tags": []}).encode())
        else:
            data = (folder / self.path.rpartition("/")[2]).read_bytes()
            first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
            server.sent += len(data[first : last + 1])
            self.send(data[first : last + 1], 206)

    def send(self, data, status=200):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server(tmp_path, monkeypatch):
    import huggingface_hub

    for variable in ("HF_HUB_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    huggingface_hub.HfFileSystem.clear_instance_cache()
    for seed, name in enumerate(("left", "right")):
        (tmp_path / "far" / name).mkdir(parents=True)
        generator = torch.Generator().manual_seed(seed)
        tensors = {f"layers.{i}.weight": torch.randn(64, 256, generator=generator) for i in range(8)}
        save_file(tensors, tmp_path / "far" / name / "model.safetensors", {"format": "pt"})
        (tmp_path / "far" / name / "README.md").write_text("---\nlicense: mit\n---\n")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.folder, server.sent, server.failures, server.daemon_threads = tmp_path / "far", 0, 0, True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server
        server.shutdown()
        huggingface_hub.HfFileSystem.clear_instance_cache()


class Stopped(Exception):
    pass


def test_an_interrupted_merge_fetches_only_the_rest(server, tmp_path):
    finished = []

    def stop(event):
        if event["event"] == "tensor":
            finished.append(event["name"])
            if len(finished) == 6:
                raise Stopped

    merge = weft.merge(["org/left", "org/right"], "linear")
    whole = merge.nbytes * 2
    with pytest.raises(Stopped):
        weft.save(merge, tmp_path / "out", threads=1, on_event=stop)
    assert not (tmp_path / "out").exists()
    before, server.failures = server.sent, 2  # and the Hub stumbles meanwhile
    saved = weft.save(weft.merge(["org/left", "org/right"], "linear"), tmp_path / "out", threads=1)
    assert saved.resumed >= 5
    assert server.failures == 0 and server.sent - before < whole / 2
    local = [tmp_path / "far" / n for n in ("left", "right")]
    weft.save(weft.merge(local, "linear"), tmp_path / "near")
    near = load_file(tmp_path / "near" / "model.safetensors")
    far = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(far[n], t) for n, t in near.items()) and far.keys() == near.keys()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model:\n- org/left\n- org/right\n" in card and "license: mit\n" in card
    assert not (tmp_path / "cache").exists()  # nothing went into the cache
