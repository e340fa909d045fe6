"""Uploading to a small Hub on this machine, and the model card that goes there."""

import base64
import hashlib
import http.server
import json
import sys
import threading
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import weft
from weft.cli.main import main
from weft.engine.card import hub_id, model_card, with_evaluation
from weft.errors import DataError, DataProblems, MissingExtra, UsageError
from weft.export.hub import push, to_upload

hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")
COMMIT = "c0ffee" * 6 + "c0ff"


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as writing a model takes: repositories, large objects, commits."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def send(self, data, status=200):
        text = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self):
        server = self.server
        server.log.append(("GET", self.path))
        self.send({"id": "org/m", "modelId": "org/m", "sha": COMMIT, "tags": [], "private": server.private})

    def do_PUT(self):
        server, data = self.server, self.body()
        if server.failures:
            server.failures -= 1
            return self.send({"error": "the disk is full"}, 507)
        server.objects[self.path.rpartition("/")[2]] = data
        server.sent += len(data)
        self.send({})

    def do_POST(self):
        server, data = self.server, self.body()
        server.log.append(("POST", self.path))
        server.tokens.add(self.headers.get("Authorization"))
        if server.status != 200:
            return self.send({"error": "Invalid username or password."}, server.status)
        if self.path == "/api/repos/create":
            server.created = json.loads(data)
            self.send({"url": f"{server.url}/org/m"}, 409 if server.exists else 200)
        elif self.path == "/api/validate-yaml":
            self.send({"warnings": [], "errors": []})
        elif "/branch/" in self.path:
            self.send({})
        elif "/preupload/" in self.path:
            names = [f["path"] for f in json.loads(data)["files"]]
            modes = {n: "lfs" if n.endswith(server.large) else "regular" for n in names}
            self.send(
                {"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]}
            )
        elif self.path.endswith("/info/lfs/objects/batch"):
            self.send({"transfer": "basic", "objects": [self.place(o) for o in json.loads(data)["objects"]]})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in data.splitlines()]
            server.commits.append((self.path, lines))
            told = {"commitUrl": f"{server.url}/org/m/commit/{COMMIT}", "commitOid": COMMIT}
            self.send(told | {"pullRequestUrl": f"{server.url}/org/m/discussions/1"})

    def place(self, wanted):
        """Where to send an object; nothing to do for one that is there."""
        if wanted["oid"] in self.server.objects:
            return wanted
        href = f"{self.server.url}/store/{wanted['oid']}"
        return wanted | {"actions": {"upload": {"href": href}}}


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.url = f"http://127.0.0.1:{server.server_port}"
        server.objects, server.commits, server.log, server.tokens = {}, [], [], set()
        server.sent, server.failures, server.status = 0, 0, 200
        server.exists = server.private = False
        server.large = ".safetensors"
        server.created, server.daemon_threads = {}, True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # the Xet protocol needs a service of its own; large objects go the older way
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield server
        server.shutdown()


def write_model(folder: Path, seed=0, card=None):
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"layers.{i}.weight": torch.randn(8, 8, generator=generator) for i in range(3)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    if card is not None:
        (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n# A model\n")
    return folder


@pytest.fixture
def merged(tmp_path):
    """A finished output in two shards, with company that must stay at home."""
    parents = [write_model(tmp_path / n, seed) for seed, n in enumerate("ab")]
    out = tmp_path / "out"
    weft.save(weft.merge(parents, "linear"), out, shard_size=600, recipe_text="method: linear\n")
    (out / ".cache").mkdir()
    (out / ".cache" / "x.json").write_text("{}")
    (out / "half.json.tmp").write_text("{")
    (out / "1_Pooling").mkdir()
    (out / "1_Pooling" / "config [1].json").write_text("{}")
    (tmp_path / "secret.txt").write_text("secret")
    (out / "link.txt").symlink_to(tmp_path / "secret.txt")
    (out / "linked").symlink_to(tmp_path / "a")
    return out


def committed(server):
    """Path → bytes of the last commit."""
    found = {}
    for line in server.commits[-1][1]:
        value = line["value"]
        if line["key"] == "file":
            found[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            found[value["path"]] = server.objects[value["oid"]]
    return found


def test_push_uploads_the_model_and_nothing_else(server, merged):
    done = push(merged, "org/m", message="first")
    left = [".cache/x.json", "half.json.tmp", "link.txt", "linked"]
    assert list(done.left_out) == left
    there = committed(server)
    assert set(there) == set(done.files) and "1_Pooling/config [1].json" in there
    assert sum(name.endswith(".safetensors") for name in there) > 1
    for name, data in there.items():
        assert data == (merged / name).read_bytes()
        if name.endswith(".safetensors"):
            assert hashlib.sha256(data).hexdigest() in server.objects
    header = server.commits[-1][1][0]
    assert header["key"] == "header" and header["value"]["summary"] == "first"
    assert server.created["name"] == "m" and server.created["organization"] == "org"
    assert server.tokens == {"Bearer hf_secret"}
    assert done.commit == COMMIT and done.url == f"{server.url}/org/m"


def test_the_way_uploads_go_by_default(server, merged, monkeypatch):
    """With hf_xet the library commits in batches; here every file is small enough to go into the commit."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    server.large = ".huge"
    done = push(merged, "org/m", message="first")
    there = committed(server)
    assert set(there) == set(done.files) and done.commit == COMMIT
    assert all(data == (merged / name).read_bytes() for name, data in there.items())


def test_what_is_there_is_not_sent_again(server, merged):
    push(merged, "org/m")
    before = server.sent
    server.exists = True
    push(merged, "org/m")
    assert before > 700 and server.sent == before and len(server.commits) == 2


def test_an_upload_that_failed_goes_on(server, merged, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    sizes = [(merged / n).stat().st_size for n in to_upload(merged)[0] if n.endswith(".safetensors")]
    server.failures = 1
    with pytest.raises(DataError, match="org/m could not be written to"):
        push(merged, "org/m")
    first = server.sent
    assert not server.commits
    push(merged, "org/m")
    assert server.sent == sum(sizes) and len(server.commits) == 1 and first < sum(sizes)


def test_branches_and_pull_requests(server, merged):
    push(merged, "org/m", revision="wide merge")
    assert any(path.endswith("/branch/wide%20merge") for _, path in server.log)
    assert "/commit/wide%20merge" in server.commits[-1][0]
    done = push(merged, "org/m", create_pr=True)
    assert "create_pr=1" in server.commits[-1][0] and done.url.endswith("/discussions/1")
    with pytest.raises(UsageError, match="pull request"):
        push(merged, "org/m", revision="x", create_pr=True)


def test_private_means_private(server, merged):
    server.private = True
    push(merged, "org/m", private=True)
    assert server.created.get("private") or server.created.get("visibility") == "private"
    server.private, server.exists, before = False, True, len(server.commits)
    with pytest.raises(UsageError, match="exists and is public"):
        push(merged, "org/m", private=True)
    assert len(server.commits) == before


@pytest.mark.parametrize(("status", "remedy"), [(401, "hf auth login"), (403, "write access")])
def test_a_refused_token(server, merged, status, remedy):
    server.status = status
    with pytest.raises(DataError, match=f"org/m could not be written to.*{remedy}") as caught:
        push(merged, "org/m")
    assert "hf_secret" not in str(caught.value)


# -- what is refused without a network ------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch):
    def fail(*args, **options):
        raise AssertionError("the network was used")

    monkeypatch.setattr(hub.HfApi, "create_repo", fail)


def test_folders_that_are_no_finished_model(no_network, merged, tmp_path):
    with pytest.raises(UsageError, match="is no folder"):
        push(tmp_path / "none", "org/m")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no weights"):
        push(tmp_path / "empty", "org/m")
    (tmp_path / ".out.weft-partial" / "files").mkdir(parents=True)
    for name in ("", "files"):
        with pytest.raises(UsageError, match="unfinished merge"):
            push(tmp_path / ".out.weft-partial" / name, "org/m")
    shard = next(p for p in sorted(merged.iterdir()) if p.suffix == ".safetensors")
    data = shard.read_bytes()
    shard.write_bytes(data + b" ")
    with pytest.raises(DataError):
        push(merged, "org/m")
    shard.unlink()
    with pytest.raises(DataError, match=shard.name):
        push(merged, "org/m")


def test_weights_other_than_weft_wrote(no_network, tmp_path):
    weft.save(weft.load(write_model(tmp_path / "a")), tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    save_file({n: t for n, t in tensors.items() if "0" not in n}, path)
    with pytest.raises(DataProblems, match=r"not as weft-manifest\.json has it") as caught:
        push(tmp_path / "out", "org/m")
    assert "'model.safetensors' has" in caught.value.problems[0]


@pytest.mark.parametrize("repo", ["name", "org/name@v1", "https://x.y/org/name", "org/name/more", "../x"])
def test_names_that_are_no_repository(no_network, merged, repo):
    with pytest.raises(UsageError, match="is no repository"):
        push(merged, repo)


def test_offline_and_without_the_library(no_network, merged, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE is set"):
        push(merged, "org/m")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtra, match=r"weft\[hub\]"):
        push(merged, "org/m")


def test_on_the_command_line(server, merged, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["weft", "push", str(merged), "org/m", "--dry-run", "--json"])
    main()
    told = json.loads(capsys.readouterr().out)
    assert "config.json" in told["files"] and "link.txt" in told["left_out"] and not server.log
    monkeypatch.setattr(sys, "argv", ["weft", "push", str(merged), "org/m"])
    main()
    said = capsys.readouterr()
    assert said.out == f"{server.url}/org/m: {len(told['files'])} files\n"
    assert "note: not uploaded: link.txt" in said.err and len(server.commits) == 1


# -- the card -------------------------------------------------------------------------------------------------


def card_of(tmp_path, *cards):
    sources = [weft.load(write_model(tmp_path / f"m{i}", i, card)) for i, card in enumerate(cards)]
    for i, source in enumerate(sources):
        source.origin = f"org/parent-{i}@v{i}"
    text = model_card(weft.merge(sources, "linear"), "method: linear\n")
    return text, hub.ModelCard(text)


def test_card_is_what_the_hub_reads(tmp_path):
    text, card = card_of(tmp_path, {"license": "apache-2.0"}, {"license": "apache-2.0", "tags": ["x"]})
    data = card.data.to_dict()
    assert data == {
        "base_model": ["org/parent-0", "org/parent-1"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "tags": ["merge", "weft"],
    }
    assert "`org/parent-0@v0`" in text and "```yaml\nmethod: linear\n```" in text
    assert "state one licence" not in text


OTHER = {"license": "other", "license_name": "mine", "license_link": "https://a.b/LICENSE"}


@pytest.mark.parametrize(
    ("cards", "stated", "told"),
    [
        (({"license": "mit"}, {"license": "apache-2.0"}), None, ["`mit`", "`apache-2.0`"]),
        (({"license": "mit"}, None), None, ["`mit`", "none stated"]),
        ((None, None), None, []),
        ((OTHER, OTHER), "other", []),
        (({"license": "other"}, {"license": "other"}), None, ["`other`"]),
        (({"license": ["mit"]}, {"license": ["mit"]}), None, []),
    ],
)
def test_licences(tmp_path, cards, stated, told):
    text, card = card_of(tmp_path, *cards)
    assert card.data.license == stated
    assert ("do not all state one licence" in text) == bool(told)
    assert all(part in text for part in told)
    if stated:
        assert card.data.license_link == OTHER["license_link"] and card.data.license_name == "mine"


@pytest.mark.parametrize("front", ["a: &x [1]\nb: *x\n", "license: [", "- 1\n", "license: mit\n" * 2, "\x00"])
def test_cards_that_cannot_be_read_state_nothing(tmp_path, front):
    folder = write_model(tmp_path / "m")
    (folder / "README.md").write_text(f"---\n{front}---\n")
    assert hub.ModelCard(model_card(weft.load(folder), None)).data.license is None


def test_evaluation_in_the_card(tmp_path):
    parent = {"model": "a|b`c", "finite": True, "perplexity": 7.25}
    found = {"text": "some text", "tokens": 99, "problems": [], "parents": [parent],
             "result": {"finite": True, "perplexity": 6.5}}  # fmt: skip
    plain, _ = card_of(tmp_path, None)
    text = with_evaluation(plain, "my-merge", found)
    card = hub.ModelCard(text)
    (result,) = card.data.eval_results
    assert (result.task_type, result.dataset_name) == ("text-generation", "some text")
    assert (result.metric_type, result.metric_value) == ("perplexity", 6.5)
    assert "| this model | finite | 6.5 |" in text and "| a?b?c | finite | 7.25 |" in text
    assert text.startswith(plain.partition("tags:")[0])  # what was there stays
    collapsed = found | {"result": {"finite": False, "perplexity": None}, "problems": ["it has collapsed"]}
    again = with_evaluation(text, "my-merge", collapsed)
    assert hub.ModelCard(again).data.eval_results is None
    assert again.count("## Evaluation") == 1 and "Problem: it has collapsed" in again
    assert with_evaluation(again, "my-merge", found) == text


def test_hub_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "local").mkdir(parents=True)
    assert hub_id("org/name") == "org/name" and hub_id("org/name@v1") == "org/name"
    assert hub_id("hf://org/name@c0ffee") == "org/name" and hub_id("hf://org/local@x") == "org/local"
    for other in (
        "org/local",
        "hf://datasets/org/name",
        "./org/name",
        "/a/b",
        "name",
        "https://a.b/c",
        "state dict",
        "",
    ):
        assert hub_id(other) is None, other
