"""Exactly so many, the smallest, of equals the first: against a stable sort in double precision."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from afina.compress.smallest import all_but, smallest


@st.composite
def scores(draw) -> torch.Tensor:
    """Few different values, so that there are ties; zero, subnormal and huge ones among them."""
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 24))
    values = st.sampled_from([0.0, 1e-45, 1e-38, 0.25, 0.25, 1.0, 3.0, 3e38]) | st.floats(0, 9, width=32)
    found = draw(st.lists(values, min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(found, dtype=torch.float32).reshape(rows, columns)


def sorted_out(found: torch.Tensor, count: int) -> np.ndarray:
    """The same by sorting each row."""
    order = np.argsort(found.double().numpy(), axis=1, kind="stable")[:, :count]
    marks = np.zeros(found.shape, bool)
    np.put_along_axis(marks, order, True, axis=1)
    return marks


@given(scores(), st.data())
def test_the_smallest_of_each_row_are_those_that_sorting_finds(found, data):
    count = data.draw(st.integers(0, found.shape[1]))
    (marks,) = smallest([found], count)
    assert (marks.sum(1) == count).all()
    assert np.array_equal(marks.numpy(), sorted_out(found, count))


@given(scores(), st.data())
def test_groups_over_several_parts_are_as_over_one(found, data):
    count, cut = data.draw(st.integers(0, found.shape[1])), data.draw(st.integers(0, found.shape[1]))
    marks = smallest([found[:, :cut], found[:, cut:]], count)
    assert np.array_equal(torch.cat(marks, 1).numpy(), sorted_out(found, count))


@given(st.sampled_from([(2, 4), (1, 4), (4, 8), (1, 2), (3, 5)]), st.integers(1, 4), st.integers(1, 5), st.data())
def test_of_m_neighbours_the_n_largest_stay(pattern, rows, blocks, data):
    kept, of = pattern
    values = data.draw(st.lists(st.sampled_from([0.0, 0.5, 0.5, 2.0]), min_size=rows * blocks * of, max_size=200))
    found = torch.tensor(values[: rows * blocks * of]).reshape(rows, blocks * of)
    marks = all_but(found, kept, of)
    stay = (~marks).reshape(rows, blocks, of)
    assert (stay.sum(-1) == kept).all()
    tops = found.reshape(rows, blocks, of).sort(-1, descending=True).values[..., :kept]
    assert torch.equal(
        torch.where(stay, found.reshape(stay.shape), -1).sort(-1, descending=True).values[..., :kept], tops
    )


@pytest.mark.parametrize("size", [1, 2, 1000])
def test_all_equal_goes_from_the_first_on(size):
    (marks,) = smallest([torch.full((3, size), 0.5)], size // 2)
    assert marks[:, : size // 2].all() and not marks[:, size // 2 :].any()
