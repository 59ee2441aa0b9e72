"""The embedding: only the rows that are looked up, whatever the subclass does with them."""

import pytest
import torch
from torch import nn

import outsize
from outsize import Pins
from tests.running import adamw, assert_same_weights, opened, train
from tests.seams import plan_executed
from tests.zoo import ZOO


class Tagger(nn.Module):
    """A table with padding, its rows looked up in two places, and layers."""

    def __init__(self, table):
        super().__init__()
        self.table = table
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3))

    def get_input_embeddings(self):
        return self.table

    def forward(self, ids, labels=None):
        x = self.table(ids)
        for layer in self.layers:
            x = x + layer(x)
        return (x - self.table(ids.flip(1))).square().mean()


class Scaled(nn.Embedding):
    """As in Gemma: the output is scaled."""

    def forward(self, input):
        return super().forward(input) * 4


@pytest.mark.parametrize(
    "kind", ["plain", "padding", "scaled", "padding that is not used", "negative padding"]
)
def test_tables_train_as_in_plain_pytorch(kind, tmp_path):
    torch.manual_seed(0)
    table = {
        "plain": lambda: nn.Embedding(600, 16),
        "padding": lambda: nn.Embedding(600, 16, padding_idx=3),
        "scaled": lambda: Scaled(600, 16),
        "padding that is not used": lambda: nn.Embedding(600, 16, padding_idx=599),
        "negative padding": lambda: nn.Embedding(600, 16, padding_idx=-1),
    }[kind]()
    plain = Tagger(table)
    model = opened(plain, disk=tmp_path, home="disk", pins=Pins(weight_slots=1, gradient_slots=1))
    data = [{"ids": torch.randint(0, 550, (3, 9))} for _ in range(4)]
    for batch in data:
        batch["ids"][:, 2:4] = 3
    for subject in (model, plain):
        train(subject, data)
    assert_same_weights(model, plain)
    assert model.table.padding_idx == plain.table.padding_idx


@pytest.mark.parametrize("options", [{"max_norm": 0.5}, {"scale_grad_by_freq": True}])
def test_tables_that_do_more_than_looking_up(options, tmp_path):
    """`max_norm` changes the table in its forward: refused, or right."""
    torch.manual_seed(0)
    plain = Tagger(nn.Embedding(60, 16, **options))
    try:
        model = opened(plain, disk=tmp_path, home="disk")
        data = [{"ids": torch.randint(0, 60, (3, 9))} for _ in range(2)]
        for subject in (model, plain):
            train(subject, data)
    except outsize.errors.OutsizeError:
        return
    assert_same_weights(model, plain)


def test_backward_of_a_table_reads_no_weights(tmp_path):
    """An embedding is linear in its table."""
    model = opened(ZOO["llama"].build().train(), disk=tmp_path, home="disk", pins=Pins(weight_slots=1))
    optimizer = adamw(model)
    train(model, [ZOO["llama"].batch()], optimizer)
    model(**ZOO["llama"].batch()).loss.backward()
    reads = [str(op) for op in plan_executed(model) if op.verb == "read"]
    assert sum(read.startswith("read E00.weight") for read in reads) == 1
    assert sum(read.startswith("read L00.weight") for read in reads) >= 1


def test_a_batch_of_no_rows_is_empty():
    model, plain = opened(ZOO["llama"].build()), ZOO["llama"].build()
    ids = torch.zeros(0, 4, dtype=torch.long)
    with torch.no_grad():
        model(**ZOO["llama"].batch())
        assert model.model.embed_tokens(ids).shape == plain.model.embed_tokens(ids).shape
