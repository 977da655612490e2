"""Rows survive storage bit for bit, and padding is zero."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cosmos_posttrain.text.rows import STORED_DTYPES, pack_rows, pad_rows, unpack_rows


@pytest.mark.parametrize("dtype", STORED_DTYPES)
def test_rows_come_back_bit_for_bit(dtype: str) -> None:
    rows = (torch.randn(7, 12) * 10.0 ** torch.arange(-6, 6)).to(getattr(torch, dtype))
    stored = pack_rows(rows, dtype)
    assert stored.shape == (84,) and stored.dtype == np.dtype(STORED_DTYPES[dtype])
    back = unpack_rows(stored.copy(), 12, dtype)
    assert back.dtype == rows.dtype and torch.equal(back, rows)


def test_float32_is_rounded_to_the_nearest_bfloat16() -> None:
    rows = torch.randn(3, 4)
    back = unpack_rows(pack_rows(rows, "bfloat16"), 4, "bfloat16")
    assert torch.equal(back, rows.bfloat16())


def test_padding_is_zero_and_no_rows_are_the_null_context() -> None:
    rows = [torch.ones(2, 3), torch.empty(0, 3), torch.full((4, 3), 2.0)]
    padded = pad_rows(rows, 4)
    assert padded.shape == (3, 4, 3)
    assert padded[0].tolist() == [[1.0] * 3] * 2 + [[0.0] * 3] * 2
    assert not padded[1].any() and (padded[2] == 2).all()
