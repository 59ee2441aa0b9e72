"""Which dimension is the batch, and how it is cut."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outsize.engine.batch import Tile, TiledOutput, find_dims, tiles


@pytest.mark.parametrize(
    ("shapes", "others", "dims"),
    [
        ([(2, 7, 8)], [(3, 7, 8)], (0,)),
        ([(8, 1, 7)], [(12, 1, 7)], (0,)),  # heads times batch
        ([(14, 4)], [(21, 4)], (0,)),  # tokens
        ([(4, 2, 7)], [(4, 3, 7)], (1,)),  # the batch comes second
        ([(4, 7), (7,)], [(6, 7), (7,)], (0, None)),
        ([()], [()], (None,)),
        ([], [], ()),
        ([(2, 2)], [(3, 3)], None),  # two dimensions grow
        ([(7, 4)], [(7, 6)], None),  # a multiple of the batch that does not lead
        ([(2, 7)], [(2, 7, 1)], None),
        ([(2, 7)], [(3, 7), (3, 7)], None),
        ([(3, 7)], [(4, 7)], None),  # grows by one, but is no multiple
        ([(5,)], [(6,)], None),
    ],
)
def test_the_batch_is_what_grows_in_proportion(shapes, others, dims):
    assert find_dims(shapes, others, 2, 3) == dims


@given(st.integers(1, 40), st.integers(1, 45))
def test_tiles_cover_every_row_once(rows, tile_rows):
    cut = list(tiles(rows, tile_rows))
    assert [row for tile in cut for row in range(tile.start, tile.stop)] == list(range(rows))
    assert all(tile.stop - tile.start <= tile_rows and tile.rows == rows for tile in cut)
    assert cut[0].is_whole is (tile_rows >= rows)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3))
def test_what_is_cut_is_put_together_again(rows, tile_rows, multiple):
    wholes = [torch.randn(rows * multiple, 2), torch.randn(2, rows), torch.randn(3)]
    dims = (0, 1, None)
    output = TiledOutput(dims)
    for tile in tiles(rows, tile_rows):
        output.add(tile, [tile.of(whole, dim) for whole, dim in zip(wholes, dims, strict=True)])
    assert all(torch.equal(a, b) for a, b in zip(output.tensors, wholes, strict=True))


def test_a_tile_is_a_view_of_its_rows():
    tensor = torch.arange(12).view(6, 2)
    part = Tile(1, 2, 3).of(tensor, 0)
    assert part.tolist() == [[4, 5], [6, 7]] and part.data_ptr() == tensor[2:].data_ptr()
    assert Tile(0, 3, 3).of(tensor, 0) is tensor
    assert Tile(1, 2, 3).of(tensor, None) is tensor
