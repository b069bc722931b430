"""The columns that a kernel draws by, from what requests ask for."""

import numpy as np
import torch

from nanoflow_compiler.engine.draw import Draw
from nanoflow_compiler.engine.draw_columns import DrawColumns, draw_columns
from nanoflow_compiler.engine.noise import row_keys
from nanoflow_compiler.upload import upload
from sampling_rows import make_batch, row

ROWS = [
    row(temperature=0),
    row(temperature=0.5, top_k=3, seed=7, output=[1, 2]),
    row(top_p=0.9, min_p=0.25),
    row(top_k=-1),
    row(top_k=10**9),
    row(top_k=1),
]


def test_columns():
    batch, _ = make_batch(ROWS)
    columns = draw_columns(batch, 50)
    assert columns.temperature.tolist() == [0, 0.5, 1, 1, 1, 1]
    assert columns.limit.tolist() == [50, 3, 50, 50, 50, 1]
    np.testing.assert_allclose(np.exp(columns.least), [0, 0, 0.25, 0, 0, 0])
    assert columns.top_p.tolist() == [1, 1, float(np.float32(0.9)), 1, 1, 1]
    low, high = row_keys(np.array([7], dtype=np.uint64), np.array([2], dtype=np.uint64))
    assert (columns.key_low[1], columns.key_high[1]) == (low[0], high[0])


def test_uploaded_arrays_are_the_fields_of_a_draw():
    batch, _ = make_batch(ROWS)
    columns = draw_columns(batch, 50)
    settings = Draw(*upload(columns.arrays, device=torch.device("cpu")))
    for name in Draw.__slots__:
        assert getattr(settings, name).tolist() == getattr(columns, name).tolist()
    dtypes = [torch.float32, torch.float32, torch.int64, torch.float64, torch.int32, torch.int32]
    assert [getattr(settings, name).dtype for name in Draw.__slots__] == dtypes


def test_rows_that_fill_up_are_greedy():
    batch, _ = make_batch(ROWS)
    columns = draw_columns(batch, 50)
    padded = columns.padded(len(ROWS) + 3)
    for before, after in zip(columns.arrays, padded.arrays, strict=True):
        assert after.dtype == before.dtype
        assert after[: len(ROWS)].tolist() == before.tolist()
    assert padded.temperature[len(ROWS) :].tolist() == [0, 0, 0]
    assert padded.limit[len(ROWS) :].tolist() == [1, 1, 1]
    for before, after in zip(padded.arrays, padded.padded(len(ROWS) + 3).arrays, strict=True):
        assert after.tolist() == before.tolist()


def test_columns_of_no_row():
    batch, _ = make_batch(ROWS)
    for none, some in zip(DrawColumns.none().arrays, draw_columns(batch, 50).arrays, strict=True):
        assert none.shape == (0,)
        assert none.dtype == some.dtype
