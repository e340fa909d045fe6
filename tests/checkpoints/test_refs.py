"""The notation `path[@revision][+adapter[@revision]]` and its escapes."""

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from weft.checkpoints.refs import Kind, Ref, parse_ref
from weft.errors import UsageError


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("org/name", Ref("org/name")),
        ("org/name@main", Ref("org/name", "main")),
        ("org/name@v1+org/lora@v2", Ref("org/name", "v1", Ref("org/lora", "v2"))),
        ("org/name+./lora", Ref("org/name", None, Ref("./lora"))),
        ("/data/exp@@v2/model", Ref("/data/exp@v2/model")),
        ("/data/c++++/model", Ref("/data/c++/model")),
        ("a+++b", Ref("a+", None, Ref("b"))),
        ("https://user@host.org/m@@1.safetensors", Ref("https://user@host.org/m@1.safetensors")),
        ("s3://bucket/x+s3://bucket/y", Ref("s3://bucket/x", None, Ref("s3://bucket/y"))),
    ],
)
def test_parse(text, ref):
    assert parse_ref(text) == ref
    assert parse_ref(str(ref)) == ref


@pytest.mark.parametrize("text", ["", "a+", "+a", "a@", "@a", "a@b@c", "a+b+c", "a\0b", "a+b@"])
def test_refused(text):
    with pytest.raises(UsageError):
        parse_ref(text)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("org/name", Kind.HUB),
        ("org/na.me-1_b", Kind.HUB),
        ("./org/name", Kind.LOCAL),
        ("/org/name", Kind.LOCAL),
        ("../name", Kind.LOCAL),
        ("a/b/c", Kind.LOCAL),
        ("~/x", Kind.LOCAL),
        (r"C:\models\x", Kind.LOCAL),
        ("C://models/x", Kind.LOCAL),
        ("C:/models/x", Kind.LOCAL),
        ("https://host/x", Kind.URL),
        ("s3://bucket/x", Kind.URL),
    ],
)
def test_kinds(path, kind):
    assert Ref(path).kind is kind


def test_an_existing_path_is_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run+1@best").mkdir()
    assert parse_ref("run+1@best") == Ref("run+1@best")
    assert parse_ref("run+1@worst") == Ref("run", None, Ref("1", "worst"))


words = st.text("ab@+/.: ", min_size=1, max_size=8)
revisions = st.none() | words.filter(lambda r: not r.startswith("@"))


@given(words, revisions, st.none() | st.builds(Ref, words, revisions))
def test_round_trip(path, revision, lora):
    # an @ behind a bare host would be its user's: a URL that names a model goes on behind the host
    assume(not any(re.search("[a-z+.]://[^/]*$", p) for p in ("q" + path, lora.path if lora else "")))
    ref = Ref("q" + path, revision, lora)
    assert parse_ref(str(ref)) == ref


def test_an_adapter_may_lie_at_a_url():
    url = Ref("git+ssh://me@host/x", "v1")
    assert parse_ref("org/model+git+ssh://me@host/x@v1") == Ref("org/model", None, url)
    assert parse_ref("git+ssh://me@host/x@v1") == url
    # what could be read as one URL is written so that it is not
    assert parse_ref(str(Ref("git", None, Ref("ssh://host/x")))) == Ref("./git", None, Ref("ssh://host/x"))
