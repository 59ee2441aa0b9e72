"""Where nothing trains, rows of an embedding come one by one: from where the table stays, or from the files."""

import pytest
import torch
import transformers

import outsize
from outsize import Pins
from outsize.config import Home
from tests.running import opened
from tests.seams import dry_runs_of, placement_of, row_blocks

VOCABULARY = 3000


def build(**changes):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=7,
        **changes,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def plain(request):
    return build(tie_word_embeddings=request.param)


@pytest.fixture(scope="module")
def folder(plain, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "llama"
    plain.save_pretrained(path)
    return path


def ids():
    some = torch.randint(0, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(2))
    some[0, :4] = torch.tensor([0, 1, 2, VOCABULARY - 1])
    some[1, :3] = 7
    return some


def logits_of(model, what=None):
    with torch.no_grad():
        return model(input_ids=ids() if what is None else what).logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("home", ["host", "disk"])
def test_bits_are_those_of_a_visit(folder, tmp_path, dtype, home):
    options = {"dtype": dtype, "home": home, "disk": tmp_path}
    visited = outsize.load(folder, **options)
    expected = logits_of(visited)  # whose parameters may train
    model = outsize.load(folder, **options).requires_grad_(False)
    assert torch.equal(logits_of(model), expected)
    tables = [block for block, _, _ in row_blocks(model, "model.embed_tokens.weight")]
    assert len(tables) > 2
    seen = {visit.block for workload in dry_runs_of(model) for visit in workload.visits}
    assert seen.isdisjoint(tables) is not model.config.tie_word_embeddings
    assert not outsize.report(model).off_plan


def test_only_their_bytes_are_read(folder, plain, tmp_path):
    model = outsize.load(folder, dtype="float32", home="disk", disk=tmp_path).requires_grad_(False)
    logits_of(model)

    def read(what):
        before = outsize.report(model).bytes_read
        logits_of(model, what)
        return outsize.report(model).bytes_read - before

    row_bytes = 48 * 4
    few, more = read(torch.tensor([[5, 5, 5]])), read(torch.tensor([[5, 9, 1000]]))
    assert more - few == 2 * row_bytes
    table_bytes = VOCABULARY * row_bytes
    others = sum(parameter.numel() for parameter in model.parameters()) * 4
    others -= 0 if model.config.tie_word_embeddings else table_bytes
    assert few <= others + row_bytes


def test_tables_stay_last(folder, tmp_path):
    """Of memory that is not enough for everything, a table that no visit needs takes nothing."""
    model = outsize.load(
        folder, dtype="float32", disk=tmp_path, pins=Pins(resident_bytes=200_000)
    ).requires_grad_(False)
    logits_of(model)
    placement = placement_of(model)
    tables = {block for block, _, _ in row_blocks(model, "model.embed_tokens.weight")}
    stay = {block for block, _ in placement.at(Home.DEVICE)}
    assert stay and (model.config.tie_word_embeddings or stay.isdisjoint(tables))


def test_what_was_trained_is_looked_up_where_it_is(plain, tmp_path):
    before = logits_of(opened(plain, dtype="float32", home="disk", disk=tmp_path).requires_grad_(False))
    again = opened(plain, dtype="float32", home="disk", disk=tmp_path)
    optimizer = outsize.AdamW(again, lr=0.1)
    again(input_ids=ids(), labels=ids()).loss.backward()
    optimizer.step()
    updated = logits_of(again)
    assert not torch.equal(updated, before)
    again.requires_grad_(False)
    assert torch.equal(logits_of(again), updated), "rows come from the store, not from where they came from"
    weight = again.get_input_embeddings().weight
    assert not torch.equal(torch.as_tensor(weight.detach()), plain.get_input_embeddings().weight)


def test_an_id_without_a_row_is_refused(folder):
    model = outsize.load(folder, dtype="float32").requires_grad_(False)
    with pytest.raises(outsize.errors.UsageError, match="rows 0 to 2999"):
        logits_of(model, torch.tensor([[1, VOCABULARY]]))


def test_a_table_that_is_computed_is_visited(folder, tmp_path):
    """Weights from nothing depend on how a table is cut: its rows are those of its blocks."""
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    trains, reads = (outsize.load(tmp_path, dtype="float32", from_scratch=True, seed=1) for _ in range(2))
    assert torch.equal(logits_of(reads.requires_grad_(False)), logits_of(trains))
