"""Arrays packed into one copy come out as they went in."""

import numpy as np
import pytest
import torch

from services.engine.run.upload import upload

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

ARRAYS = [
    np.array([True, False, True]),
    np.arange(5, dtype=np.int64),
    np.empty(0, np.int64),
    np.array([0.1, -np.inf, 1e300]),
    np.arange(14, dtype=np.float32).reshape(7, 2)[::2],
    np.array([[1, 2], [3, 4]], np.int32),
]


@pytest.mark.parametrize("arrays", [ARRAYS, ARRAYS[2:3], [], ARRAYS[::-1]])
def test_each_is_what_it_was(arrays: list[np.ndarray]) -> None:
    moved = upload(arrays, DEVICE)
    assert len(moved) == len(arrays)
    for tensor, array in zip(moved, arrays, strict=True):
        assert tensor.device.type == DEVICE.type
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 16 == 0
        np.testing.assert_array_equal(tensor.cpu().numpy(), array, strict=True)


def test_arrays_that_nobody_may_write_are_read() -> None:
    array = np.arange(3)
    array.flags.writeable = False
    assert upload([array], DEVICE)[0].tolist() == [0, 1, 2]
