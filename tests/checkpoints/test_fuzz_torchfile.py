"""Torch files with bytes changed, and pickles made of any opcodes: only WeftError may escape."""

import contextlib
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.checkpoints.pickles import read_pickle
from weft.checkpoints.sources import MemorySource
from weft.checkpoints.torchfile import TorchFile
from weft.errors import WeftError


def saved(zipped: bool) -> bytes:
    buffer = io.BytesIO()
    state = {
        "a": torch.ones(3, 2).T,
        "b": torch.nn.Parameter(torch.ones(2)),
        "n": {"c": torch.ones(1).bfloat16()},
    }
    torch.save(state, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


FILES = {True: saved(True), False: saved(False)}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_changed_bytes(zipped):
    data = FILES[zipped]
    places = st.integers(0, len(data) - 1) | st.integers(0, 600)

    @settings(max_examples=300, deadline=None, database=None)
    @given(st.lists(st.tuples(places, st.integers(0, 255)), max_size=4), st.integers(0, 40))
    def run(changes, cut):
        changed = bytearray(data)
        for place, byte in changes:
            changed[place] = byte
        if cut < 20:
            del changed[len(changed) - cut :]
        try:
            file = TorchFile(MemorySource("fuzz.pt", bytes(changed)))
            for name in file:
                file.tensor(name)
        except WeftError:
            pass

    run()


pieces = st.sampled_from(
    [
        *(bytes([c]) for c in b"()}]tusaeRbQN.\x85\x86\x87\x93"),
        b"q\x00", b"h\x00", b"K\x01", b"J\xff\xff\xff\xff", b"X\x01\x00\x00\x00k",
        b"X\x07\x00\x00\x00storage", b"ctorch\nFloatStorage\n", b"ctorch\nSize\n", b"cos\nsystem\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n",
        b"ctorch.nn.parameter\nParameter\n",
    ]
)  # fmt: skip


@settings(max_examples=1500, deadline=None)
@given(st.lists(pieces, max_size=14))
def test_any_opcodes(parts):
    with contextlib.suppress(WeftError):
        read_pickle(b"\x80\x02" + b"".join(parts) + b".", "fuzz", alone=False)
