"""Whatever the bytes: only WeftError escapes, and what we accept the safetensors library accepts."""

import json
import struct

import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.checkpoints.safetensors import read_header
from weft.checkpoints.sources import MemorySource
from weft.errors import WeftError


def agree(data: bytes) -> bool:
    try:
        read_header(MemorySource("fuzz", data))
    except WeftError:
        return False
    safetensors.deserialize(data)
    return True


lengths = st.sampled_from([0, 1, 2, 4, 8, -1, 2**40, 2**63, 2**64, 1.0, None, True, "4"]) | st.integers(0, 16)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "U8", "BOOL", "F4", "f32", 3, None]),
        "shape": st.lists(lengths, max_size=4) | lengths,
        "data_offsets": st.lists(lengths, min_size=1, max_size=3) | lengths,
    },
    optional={"more": lengths},
)
names = st.sampled_from(["a", "b", "", "../x", "é", "\ud800", "__metadata__", "x\0"]) | st.text(max_size=5)
values = entries | st.dictionaries(st.text(max_size=3), st.text(max_size=3) | lengths, max_size=2) | lengths


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 2**64 - 1) | st.integers(0, 200))
def test_any_bytes(data, length):
    agree(data)
    agree(struct.pack("<Q", length) + data)


@settings(max_examples=800, deadline=None)
@given(
    st.dictionaries(names, values, max_size=4),
    st.binary(max_size=20),
    st.sampled_from([b"", b" ", b"\n", b"x"]),
)
def test_any_header(header, data, tail):
    raw = json.dumps(header).encode() + tail
    agree(struct.pack("<Q", len(raw)) + raw + data)


@st.composite
def nearly_valid(draw):
    """A right file with at most one number wrong."""
    header, at = {}, 0
    for i in range(draw(st.integers(1, 4))):
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        size = 4
        for n in shape:
            size *= n
        header[f"t{i}"] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    right = draw(st.booleans())
    if not right:
        entry = header[draw(st.sampled_from(sorted(header)))]
        target = draw(st.sampled_from([entry["shape"], entry["data_offsets"]]))
        if target:
            target[draw(st.integers(0, len(target) - 1))] = draw(lengths)
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(at), right


@settings(max_examples=400, deadline=None)
@given(nearly_valid())
def test_near_misses(case):
    data, right = case
    assert agree(data) or not right


def test_minus_zero_is_no_length():
    raw = b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'
    assert not agree(struct.pack("<Q", len(raw)) + raw)
