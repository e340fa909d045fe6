"""Each of the reader's rules once broken, once barely kept. Nothing here may run code, hang or swell."""

import io
import json
import os
import pickle
import pickletools
import struct
import time
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from weft.checkpoints.limits import Limits, file_name_problem
from weft.checkpoints.load import load
from weft.errors import DataError, UnsafeFile, UsageError


def write(path, header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(*offsets, dtype="F32", shape=None):
    shape = [(offsets[1] - offsets[0]) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


def refused(source, code, limits=None):
    start = time.monotonic()
    with pytest.raises(UnsafeFile) as caught:
        load(source, limits=limits or Limits())
    assert caught.value.code == code, str(caught.value)
    assert caught.value.exit_status == 1 and "\n" not in str(caught.value)
    assert time.monotonic() - start < 2


ONE = {"a": entry(0, 8)}
HEADERS = {  # code of the attack, its header and data, and the nearest thing that is fine
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, 12, {"a": entry(0, 8), "b": entry(8, 12)}, 12),
    "hole": ({"a": entry(0, 8), "b": entry(12, 16)}, 16, {"a": entry(0, 8), "b": entry(8, 8)}, 8),
    "trailing-bytes": (ONE, 9, ONE, 8),
    "truncated": (ONE, 7, ONE, 8),
    "shape": ({"a": entry(0, 8, shape=[2**62, 0])}, 8, {"a": entry(0, 0, shape=[2**40, 0])}, 0),
    "offsets": ({"a": entry(8, 0, shape=[2])}, 8, {"a": entry(0, 8, shape=[2])}, 8),
    "dtype": ({"a": entry(0, 8, dtype="F4")}, 8, {"a": entry(0, 8, dtype="I32")}, 8),
    "tensor-name": ({"../../x": entry(0, 8)}, 8, {"a/x..y": entry(0, 8)}, 8),
    "metadata": ({"__metadata__": {"a": "x" * 2**20}, **ONE}, 8, {"__metadata__": {"a": "x"}, **ONE}, 8),
    "duplicate-key": (b'{"a":%s,"a":%s}' % ((json.dumps(ONE["a"]).encode(),) * 2), 8, ONE, 8),
    "header-json": (b" " + json.dumps(ONE).encode(), 8, json.dumps(ONE).encode() + b" ", 8),
}  # fmt: skip


@pytest.mark.parametrize("code", HEADERS)
def test_headers(tmp_path, code):
    attack, size, benign, benign_size = HEADERS[code]
    refused(write(tmp_path / "x.safetensors", attack, bytes(size)), code)
    assert len(load(write(tmp_path / "y.safetensors", benign, bytes(benign_size)))) >= 1


SHAPES = [
    [2**63, 2],
    [-1, -2],
    [2.0],
    ["2"],
    [True, 2],
    None,
    [0, 2**40, 2**40],
    [2**32, 2**32],
    [1] * 65 + [2],
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_impossible_shapes(tmp_path, shape):
    header = {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 8]}}
    refused(write(tmp_path / "x.safetensors", header, bytes(8)), "shape")


@pytest.mark.parametrize(
    "name", ["", "a\0b", "a\nb", "\x1b[2J", "/etc/x", "a/../b", "\\\\host", "x" * 513, "\ud800"]
)
def test_impossible_names(tmp_path, name):
    refused(write(tmp_path / "x.safetensors", {name: entry(0, 8)}, bytes(8)), "tensor-name")


def test_other_header_attacks(tmp_path):
    path = tmp_path / "x.safetensors"
    refused(write(path, ONE, bytes(8), length=2**63), "header-size")
    refused(write(path, ONE, bytes(8), length=1 << 20), "truncated")
    refused(write(path, b'{"a":' + b"[" * 100_000, length=100_005), "header-json")
    refused(write(path, b"{}" + b" " * 26_000_000), "header-size")
    refused(write(path, b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}'), "header-json")
    refused(write(path, {"a": entry(0, 8) | {"more": 1}}, bytes(8)), "header-json")
    path.write_bytes(b"short")
    refused(path, "truncated")
    many = ",".join(
        '"t' + str(i) + '":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' for i in range(300_000)
    )
    refused(write(path, b"{" + many.encode() + b"}"), "too-many-tensors")
    with pytest.raises(UsageError):
        Limits(header_bytes=200_000_000)


def index_folder(tmp_path, weight_map, files=("m.safetensors",), total=None):
    folder = tmp_path / "model"
    folder.mkdir(parents=True, exist_ok=True)
    for name in files:
        save_file({"a": torch.ones(2)}, folder / name)
    index = {"metadata": {"total_size": total} if total else {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


BAD_NAMES = [
    "../m.safetensors", "/etc/m.safetensors", "C:\\m.safetensors", "C:m.safetensors",
    "\\\\host\\m.safetensors",
    "a\\..\\m.safetensors", "a//m.safetensors", "./m.safetensors", "nul.safetensors", "CON.x.safetensors",
    "m\n.safetensors", "m\u202e.safetensors", "e\u0301.safetensors", "x" * 256 + ".safetensors", "",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_index_with_a_name_that_is_no_file_name(tmp_path, name):
    refused(index_folder(tmp_path, {"a": name}), "path")


def test_index_rules(tmp_path):
    assert len(load(index_folder(tmp_path / "ok", {"a": "m.safetensors"}, total=8))) == 1
    refused(index_folder(tmp_path / "1", {"a": "m.bin"}), "extension")
    refused(index_folder(tmp_path / "2", {"a": "m.safetensors"}, total=9), "total-size")
    refused(index_folder(tmp_path / "3", {"a": "m.safetensors", "b": "m.safetensors"}), "index")
    refused(index_folder(tmp_path / "4", {"b": "m.safetensors"}), "index")
    refused(index_folder(tmp_path / "5", {}), "index")
    two = ("m.safetensors", "n.safetensors")
    refused(index_folder(tmp_path / "6", {"a": "m.safetensors", "b": "n.safetensors"}, two), "index")
    refused(index_folder(tmp_path / "7", {"a": "m.safetensors", "b": "M.safetensors"}), "path")
    folder = index_folder(tmp_path / "8", {"a": "m.safetensors"})
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map":{"a":"m.safetensors","a":"m.safetensors"}}'
    )
    refused(folder, "duplicate-key")
    refused(index_folder(tmp_path / "9", {"a": "m.safetensors"}), "index-size", Limits(index_bytes=10))


def test_links_and_special_files(tmp_path):
    outside = tmp_path / "secret.safetensors"
    save_file({"a": torch.ones(2)}, outside)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(outside)
    refused(folder, "symlink")
    assert len(load(folder / "model.safetensors")) == 1  # named by the user, not by the folder
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    refused(folder, "not-regular")
    refused(folder / "model.safetensors", "not-regular")
    (folder / "model.safetensors").unlink()
    save_file({"a": torch.ones(2)}, folder / "model.safetensors")
    (folder / "tokenizer.json").symlink_to(outside)
    refused(folder, "symlink")


def test_config_attacks(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    config = tmp_path / "config.json"
    config.write_text('{"a":' * 100 + "1" + "}" * 100)
    refused(tmp_path, "config-json")
    config.write_text('{"a":1,"a":2}')
    refused(tmp_path, "duplicate-key")
    config.write_text('{"a":"' + "x" * (4 << 20) + '"}')
    refused(tmp_path, "config-size")
    config.write_text('{"a":' * 60 + "1" + "}" * 60)
    assert load(tmp_path).config


def test_windows_names_are_refused_everywhere():
    assert file_name_problem("model-00001-of-00002.safetensors", (".safetensors",)) is None
    assert file_name_problem("sub/m.safetensors") is None
    for name in ("aux", "COM1.txt", "a.", "a ", "lpt¹"):
        assert file_name_problem(name)


class Payload:
    """Unpickled by a real unpickler, this creates the marker."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def torch_zip(path, data, extra=(), **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("m/data.pkl", data)
        archive.writestr("m/byteorder", "little")
        for name, content in extra:
            archive.writestr(name, content)
    return path


def test_pickles_with_code(tmp_path):
    marker = tmp_path / "marker"
    for data in (pickle.dumps({"w": Payload(marker)}, protocol=p) for p in (2, 4)):
        refused(torch_zip(tmp_path / "a.pt", data), "pickle-global")
    (tmp_path / "bare.bin").write_bytes(pickle.dumps(Payload(marker)))
    refused(tmp_path / "bare.bin", "pickle-global")
    torch.save({"w": Payload(marker)}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    refused(tmp_path / "legacy.pt", "pickle-global")
    assert not marker.exists()
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()  # the payload is a real one


def test_every_refused_global_is_named(tmp_path):
    data = pickle.dumps([os.getcwd, pickletools.dis, time.sleep])
    with pytest.raises(UnsafeFile, match=r"posix.getcwd.*pickletools.dis.*time.sleep"):
        load(torch_zip(tmp_path / "a.pt", data))


def test_pickle_opcodes(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(2)}, path)
    with zipfile.ZipFile(path) as archive:
        good = archive.read("a/data.pkl")
    refused(torch_zip(path, good + b"\x80\x02}."), "pickle-opcode")  # a second pickle
    refused(torch_zip(path, b"\x80\x02\x82\x01."), "pickle-opcode")  # EXT1
    refused(torch_zip(path, b"\x80\x02(cposix\nsystem\no."), "pickle-opcode")  # OBJ
    refused(torch_zip(path, b"(iposix\nsystem\n."), "pickle-opcode")  # INST
    refused(torch_zip(path, b"\x80\x04}\x8c\x06system\x93."), "pickle-opcode")  # name from no literal
    refused(torch_zip(path, b"\x80\x02}"), "pickle-opcode")  # no end
    refused(torch_zip(path, b"\x80\x02" + b"N0" * 600_000 + b"."), "pickle-opcode")  # POP
    refused(
        torch_zip(path, b"\x80\x02]" + b"N" * 30_000 + b"."), "pickle-size", Limits(pickle_opcodes=20_000)
    )
    refused(torch_zip(path, b"\x80\x02)" + b"2\x86" * 100 + b"N\x85}."), "pickle-opcode")  # DUP
    nest = b"\x80\x02)" + b"q\x00h\x00\x86" * 60  # a tuple with 2^60 leaves
    refused(torch_zip(path, nest + b"q\x01}h\x01Ns."), "pickle-opcode")
    cycle = b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s."  # a dict that holds itself
    refused(torch_zip(path, cycle), "pickle-opcode")
    twice = {"x": 1}
    for _ in range(28):
        twice = {"a": twice, "b": twice}  # 2^28 paths to one leaf
    refused(torch_zip(path, pickle.dumps(twice, 2)), "too-many-tensors")


def test_zip_attacks(tmp_path):
    path = tmp_path / "a.pt"
    data = b"\x80\x02}."
    refused(torch_zip(path, data + bytes(100_000), compression=zipfile.ZIP_DEFLATED), "zip")
    with pytest.warns(UserWarning):
        torch_zip(path, data, extra=[("m/data/0", b"x"), ("m/data/0", b"y")])
    refused(path, "zip")
    refused(torch_zip(path, data, extra=[("../x", b"")]), "path")
    refused(torch_zip(path, data, extra=[("/x", b"")]), "path")
    refused(torch_zip(path, data, extra=[("n/data.pkl", data)]), "zip")
    refused(torch_zip(path, data), "zip", Limits(zip_entries=1))
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(1000):
            archive.writestr(f"m/{'x' * 100}{i}", b"")
    refused(path, "zip", Limits(zip_entries=1001))  # by the size of the directory, before it is read
    torch.save({"w": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:3000])
    refused(path, "zip")
    torch.save({"w": torch.ones(5)}, path)
    with zipfile.ZipFile(path) as archive:
        good = archive.read("a/data.pkl")
    refused(torch_zip(path, good), "zip")  # its storage is not there
    broken = bytearray(torch_zip(path, good, extra=[("m/data/0", bytes(20))]).read_bytes())
    assert len(load(path)) == 1
    broken[broken.index(good) + len(good) - 3] ^= 1
    path.write_bytes(broken)
    refused(path, "zip")  # checksum of the pickle


def test_stride_bombs(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"w": torch.zeros(1).as_strided((10**6, 10**6), (0, 0))}, path)
    assert path.stat().st_size < 4000
    refused(path, "stride")
    torch.save({"w": torch.zeros(1).expand(2)}, path)
    refused(path, "stride")
    torch.save({"w": torch.zeros(6).as_strided((3, 2), (1, 3))}, path)
    assert len(load(path)) == 1


def test_not_weights_at_all(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"hello")
    with pytest.raises(DataError, match=r"no file of torch\.save"):
        load(tmp_path / "x.bin")
    buffer = io.BytesIO()
    buffer.write(bytes(257) + b"ustar" + bytes(300))
    (tmp_path / "x.bin").write_bytes(buffer.getvalue())
    refused(tmp_path / "x.bin", "legacy-tar")
    (tmp_path / "x.txt").write_text("hi")
    with pytest.raises(UsageError, match="no weight file"):
        load(tmp_path / "x.txt")
