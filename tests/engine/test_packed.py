"""Several documents in a row, told apart by positions that begin anew: as plain PyTorch, in any order of batches."""

import pytest
import torch

from outsize import Pins
from tests.running import assert_same_losses, assert_same_weights, opened, train
from tests.seams import call_state
from tests.zoo import ZOO, seeded


def packed(lengths, seed):
    """Rows of documents of these lengths; `lengths` has a list per row."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    ids = torch.randint(4, 190, positions.shape, generator=generator)
    labels = torch.where(positions == 0, -100, ids)
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "use_cache": False}


# The first batch has one document per row, for which transformers makes no mask at all.
BATCHES = [
    [[12], [12], [12]],
    [[5, 7], [12], [2, 4, 6]],
    [[12], [12], [12]],
    [[6, 6], [1, 11], [12]],
    [[3, 9], [12], [12]],
]


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma3"])
@pytest.mark.parametrize("tile_rows", [1, 2, None])
def test_packed_documents_train_as_in_plain_pytorch(name, tile_rows, tmp_path):
    with seeded(0):
        plain = ZOO[name].build().train()
    batches = [packed(lengths, seed) for seed, lengths in enumerate(BATCHES)]
    model = opened(plain, disk=tmp_path, home="disk", pins=Pins(tile_rows=tile_rows))
    assert_same_losses(train(model, batches), train(plain, batches))
    assert_same_weights(model, plain)


def test_packed_documents_are_tiled_like_any_batch(tmp_path, monkeypatch):
    with seeded(0):
        plain = ZOO["llama"].build().train()
    model = opened(plain, disk=tmp_path, home="disk", pins=Pins(tile_rows=1))
    call, counts = call_state(model), set()
    tiles = call.tiles

    def counted(module, tensors, **options):
        dims, parts = tiles(module, tensors, **options)
        counts.add(len(parts))
        return dims, parts

    monkeypatch.setattr(call, "tiles", counted)
    train(model, [packed(lengths, seed) for seed, lengths in enumerate(BATCHES)])
    assert counts == {3}, "a mask that the dry run did not see makes a batch one tile"
