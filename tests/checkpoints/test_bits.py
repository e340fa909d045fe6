"""Values as bits and as tensors are the same memory; dtypes are told by torch's objects and by name."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from weft.checkpoints.base import TensorInfo
from weft.checkpoints.bits import Bits, join
from weft.checkpoints.dtypes import BF16, DTYPES, DType, floating
from weft.errors import UsageError

MORE = [torch.complex128, torch.float8_e4m3fnuz]


@pytest.mark.parametrize("dtype", [*(d.torch for d in DTYPES.values()), *MORE], ids=str)
def test_there_and_back_without_a_copy(dtype: torch.dtype) -> None:
    bytes_ = torch.arange(3 * 16, dtype=torch.uint8) % (2 if dtype == torch.bool else 120)
    values = bytes_.view(dtype)
    bits = Bits.of(values)
    assert len(bits) == values.numel() and bits.dtype == DType.of(dtype) and bits.dtype.torch == dtype
    again = bits.tensor()
    assert again.dtype == dtype and again.data_ptr() == values.data_ptr()
    assert bytes(bits.memory) == bytes(bytes_.numpy())
    both = join([bits[:1], bits[1:]])
    assert torch.equal(both.tensor().view(torch.uint8), bytes_)
    empty = Bits.empty(0, bits.dtype)
    assert empty.tensor().dtype == dtype and empty.tensor().numel() == 0


def test_memory_is_there_to_be_filled() -> None:
    bits = Bits.empty(2, BF16)
    bits.memory[:] = bytes([0x80, 0x3F, 0x00, 0xC0])
    assert bits.tensor().tolist() == [1.0, -2.0]
    assert bits.array.dtype == np.uint16


def test_a_dtype_by_any_name() -> None:
    assert DType.of(torch.bfloat16) is DType.of("bf16") is DType.of(BF16) is BF16
    assert pickle.loads(pickle.dumps(BF16)) == BF16
    assert floating("fp16").torch is torch.float16
    for wrong in ("int8", torch.int64, torch.bool, torch.complex64, torch.float8_e8m0fnu):
        with pytest.raises(UsageError, match="dtype"):
            floating(wrong)


def test_what_is_known_of_a_tensor() -> None:
    info = TensorInfo((2, 3), torch.bfloat16)
    assert info.dtype is torch.bfloat16 and info.kind is BF16 and info.nbytes == 12
    assert info == TensorInfo((2, 3), "bf16") and hash(info) == hash(TensorInfo((2, 3), BF16))
    assert replace(info, shape=(4,)) == TensorInfo((4,), BF16)
    assert pickle.loads(pickle.dumps(info)) == info
