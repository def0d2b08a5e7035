import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqkernels.quantize.layout import block, join, split
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import set_index, unblock


def numbered(n, k):
    return torch.arange(1.0, n * k + 1).reshape(n, k)


def make(axis="in", **fields):
    return CodebookSpec(stages=(4,), **{"vector_length": 4, "vector_axis": axis, **fields})


def test_vectors_along_in_and_out():
    matrix = numbered(4, 8)
    assert block(make(), matrix)[1, 1].tolist() == matrix[1, 4:].tolist()
    assert block(make("out"), matrix)[0, 5].tolist() == matrix[:, 5].tolist()


def test_stride_takes_every_other_element():
    matrix = numbered(2, 16)
    cells = block(make(stride=2), matrix)
    assert cells[0, 0].tolist() == matrix[0, 0:8:2].tolist()
    assert cells[0, 1].tolist() == matrix[0, 1:8:2].tolist()
    assert cells[1, 2].tolist() == matrix[1, 8:16:2].tolist()


def test_wide_vectors_take_rows_one_after_the_other():
    matrix = numbered(4, 8)
    cells = block(make(vector_width=2), matrix)
    assert cells[1, 1].tolist() == [*matrix[2, 4:].tolist(), *matrix[3, 4:].tolist()]


@given(
    axis=st.sampled_from(["in", "out"]),
    n=st.integers(1, 20),
    k=st.integers(1, 20),
    length=st.integers(1, 6),
    stride=st.integers(1, 3),
    width=st.integers(1, 3),
)
@settings(deadline=None, derandomize=True)
def test_block_is_the_inverse_of_unblock(axis, n, k, length, stride, width):
    width = width if axis == "in" else 1
    spec = make(axis, vector_length=length, stride=stride, vector_width=width)
    matrix = numbered(n, k)
    back = unblock(spec, block(spec, matrix))
    assert torch.equal(back[:n, :k], matrix)
    assert back[n:].abs().sum() + back[:, k:].abs().sum() == 0


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("subspaces", [1, 3])
@pytest.mark.parametrize("groups", [("tensor", 0), ("row", 8), ("column", 8)])
def test_every_cell_is_in_its_book_once(axis, subspaces, groups):
    group_axis, group_size = groups
    spec = make(axis, subspaces=subspaces, group_axis=group_axis, group_size=group_size)
    n, k = 28, 20  # neither whole groups nor whole rounds of the subspaces
    matrix = numbered(n, k)
    vectors = split(spec, matrix, None)
    cells = block(spec, matrix)
    which = set_index(spec, n, k).expand(cells.shape[:2]).reshape(-1)
    flat = cells.reshape(-1, 4)
    members = vectors.cells[vectors.cells >= 0]
    assert sorted(members.tolist()) == list(range(len(flat)))
    for book, of_book in enumerate(vectors.cells):
        real = of_book >= 0
        assert (which[of_book[real]] == book).all()
        assert torch.equal(vectors.points[book][real], flat[of_book[real]])
        if vectors.weights is not None:
            assert (vectors.weights[book][real] == 1).all()
            assert (vectors.weights[book][~real] == 0).all()


@pytest.mark.parametrize("axis", ["in", "out"])
def test_padding_weighs_nothing(axis):
    matrix = numbered(6, 6)
    vectors = split(make(axis), matrix, None)
    assert vectors.weights is not None
    assert vectors.weights.shape == vectors.points.shape
    assert torch.equal(vectors.weights > 0, vectors.points > 0)


def test_weights_follow_their_elements():
    matrix = numbered(6, 8)
    vectors = split(make(), matrix, 2 * matrix)
    assert torch.equal(vectors.weights, 2 * vectors.points)
    whole = split(make(), matrix, torch.arange(6.0)[:, None].expand(6, 8))
    assert whole.weights.tolist() == [[0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]]
    assert split(make(), matrix, None).weights is None


def test_join_puts_codes_back():
    spec = make(subspaces=2, group_axis="row", group_size=3)
    vectors = split(spec, numbered(7, 12), None)
    # as many codes as cells, so each shows where it went
    grid = join(spec, 7, 12, vectors.cells, [vectors.cells.clamp(min=0)])
    assert grid.dtype == torch.uint8
    assert grid.flatten().tolist() == list(range(21))


def test_groups_and_cells_of_the_main_columns():
    # two side columns lie before them: groups are counted without
    spec = make(group_axis="column", group_size=8, outlier_columns=2)
    vectors = split(spec, numbered(4, 24), None)
    assert vectors.points.shape == (3, 8, 4)
    assert vectors.points[2, 0].tolist() == [17, 18, 19, 20]
    assert join(spec, 4, 26, vectors.cells, [vectors.cells]).shape == (4, 6, 1)
