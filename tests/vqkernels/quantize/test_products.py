import pytest
import torch

from tests.vqkernels.quantize.hessians import normal
from vqkernels.quantize.products import all_threads, one_thread, product


@pytest.mark.parametrize("rows", [1, 512, 1300])
def test_pieces_make_the_whole_product(threads, rows):
    left, right = normal(rows, 40).double(), normal(40, 30, seed=1).double()
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(product(left, right))
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], (left[:, :, None] * right).sum(1))


def test_threads_that_are_held_back_are_there_for_large_steps(threads):
    torch.set_num_threads(3)
    with one_thread():
        assert torch.get_num_threads() == 1
        with one_thread(), all_threads() as count:
            assert torch.get_num_threads() == count == 3
            with one_thread():
                assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3
    with all_threads() as count:
        assert torch.get_num_threads() == count == 3


def test_threads_come_back_after_an_error(threads):
    torch.set_num_threads(2)
    with pytest.raises(RuntimeError), one_thread():
        product(normal(3, 4), normal(3, 4))
    assert torch.get_num_threads() == 2
    with all_threads() as count:
        assert count == 2
