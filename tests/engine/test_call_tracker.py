"""Calls that fill a cache or another object, and calls of parts: as without Outsize, or refused by name."""

import copy
from dataclasses import dataclass, field, replace

import pytest
import torch
import transformers
from torch import nn
from torch.utils._pytree import tree_flatten

import outsize
from outsize import Pins
from outsize.errors import UsageError
from tests.running import opened
from tests.seams import count_dry_runs, dry_run, foresee_costs, has_memory, set_cost_measuring
from tests.zoo import ZOO

ROWS, LENGTH = 5, 12


def batch_of(name, rows=ROWS):
    batch = {
        key: value for key, value in ZOO[name].batch(rows=rows, length=LENGTH).items() if key != "labels"
    }
    if name == "t5":
        batch["decoder_input_ids"] = batch["input_ids"][:, :9]
    return batch


def cache_of(output):
    cache = output.get("past_key_values")
    return cache if cache is not None else output.get("cache_params")


def tensors_of(cache):
    if isinstance(cache, transformers.EncoderDecoderCache):
        return [*tensors_of(cache.self_attention_cache), *tensors_of(cache.cross_attention_cache)]
    return [
        value
        for layer in cache.layers
        for value in tree_flatten(dict(sorted(vars(layer).items())))[0]
        if isinstance(value, torch.Tensor)
    ]


def assert_same_cache(cache, expected):
    ours, theirs = tensors_of(cache), tensors_of(expected)
    assert ours and len(ours) == len(theirs)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("use_cache", [None, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "mixtral", "gemma3", "bloom", "mamba", "t5"])
def test_the_first_call_fills_a_cache_as_transformers_does(name, use_cache):
    plain = ZOO[name].build()
    model = opened(plain, pins=Pins(tile_rows=2))
    batch = batch_of(name) | ({} if use_cache is None else {"use_cache": use_cache})
    with torch.no_grad():
        for _ in range(2):
            expected, output = plain(**batch), model(**batch)
            torch.testing.assert_close(output.logits, expected.logits)
            assert_same_cache(cache_of(output), cache_of(expected))


@pytest.mark.parametrize("by", ["keyword", "position"])
@pytest.mark.parametrize("kind", ["dynamic", "static", "filled"])
def test_a_cache_of_the_caller_is_filled_once(kind, by):
    plain = ZOO["llama"].build()
    model = opened(plain, pins=Pins(tile_rows=2))
    batch = batch_of("llama")

    def outcome(some):
        if kind == "static":
            cache = transformers.StaticCache(config=plain.config, max_cache_len=2 * LENGTH)
        else:
            cache = transformers.DynamicCache(config=plain.config)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        if kind == "filled":
            plain(input_ids=ids.flip(1), past_key_values=cache)
            mask = torch.cat([torch.ones_like(mask), mask], 1)
        if by == "keyword":
            return some(input_ids=ids, attention_mask=mask, past_key_values=cache).logits, cache
        return some(ids, mask, None, cache).logits, cache

    with torch.no_grad():
        (expected, theirs), (logits, ours) = outcome(plain), outcome(model)
    torch.testing.assert_close(logits, expected)
    assert_same_cache(ours, theirs)


def test_arguments_by_position_are_understood():
    plain = ZOO["llama"].build()
    model = opened(plain, pins=Pins(tile_rows=2))
    batch = ZOO["llama"].batch(rows=ROWS)
    args = (batch["input_ids"], batch["attention_mask"], None, None, None, batch["labels"], True)
    loss = model(*args).loss
    torch.testing.assert_close(loss, plain(*args).loss)
    loss.backward()


@dataclass
class Recorder:
    """A cache of a user's own: what each layer was given."""

    seen: list[torch.Tensor] = field(default_factory=list)


class Recorded(nn.Module):
    """Layers that note their input in an object, a list or a dict which they are given."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Noting() for _ in range(3))

    def forward(self, x, notes=None, nested=None):
        for layer in self.layers:
            x = layer(x, notes if nested is None else nested["notes"])
        return x.square().mean() if torch.is_grad_enabled() else x


class Noting(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x, notes):
        match notes:
            case Recorder():
                notes.seen.append(x.detach().clone())
            case list():
                notes.append(x)
            case dict():
                notes["x"] = x
        return x + self.linear(x)


@pytest.mark.parametrize("is_nested", [False, True])
def test_an_object_of_the_caller_sees_the_call_alone(is_nested):
    torch.manual_seed(0)
    plain = Recorded()
    model = opened(plain, pins=Pins(tile_rows=2))
    x = torch.randn(ROWS, 8)

    def outcome(some):
        recorder = Recorder()
        return some(x, **({"nested": {"notes": recorder}} if is_nested else {"notes": recorder})), recorder

    with torch.no_grad():
        for _ in range(2):
            (expected, theirs), (output, ours) = outcome(plain), outcome(model)
            torch.testing.assert_close(output, expected)
            assert [each.shape for each in ours.seen] == [each.shape for each in theirs.seen]
            torch.testing.assert_close(ours.seen, theirs.seen)


def test_an_object_that_a_recomputation_would_change_again_is_refused():
    model, recorder = opened(Recorded(), pins=Pins(tile_rows=2)), Recorder()
    with pytest.raises(UsageError, match=r"layers\.0 changes an object"):
        model(torch.randn(ROWS, 8), recorder)
    assert not recorder.seen and not has_memory(model)


@pytest.mark.parametrize("notes", [list, dict])
def test_a_change_of_a_list_or_dict_is_refused(notes):
    given, model = notes(), opened(Recorded())
    with torch.no_grad(), pytest.raises(UsageError, match=r"layers\.0 changes a list or dict"):
        model(torch.randn(ROWS, 8), given)
    assert not given and not has_memory(model)


def test_an_object_that_cannot_be_copied_is_refused():
    class Fixed(Recorder):
        def __deepcopy__(self, memo):
            raise TypeError("never")

    model, recorder = opened(Recorded()), Fixed()
    with torch.no_grad(), pytest.raises(UsageError, match="Fixed cannot be copied"):
        model(torch.randn(ROWS, 8), recorder)
    assert not recorder.seen


def test_generation_of_several_rows_is_that_of_transformers(tmp_path):
    plain = ZOO["llama"].build()
    plain.save_pretrained(tmp_path)
    model = outsize.load(tmp_path, dtype="float32", pins=Pins(tile_rows=2))
    ids = copy.copy(batch_of("llama")["input_ids"])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))


def changed(name, place, value):
    return lambda batch: batch[name].__setitem__(place, value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param(changed("input_ids", (1, 3), 0), 1, id="token 0"),
        pytest.param(changed("labels", (1, 3), 0), 1, id="label 0"),
        pytest.param(lambda batch: batch.update(token_type_ids=batch["token_type_ids"] * 0), 1, id="types"),
        pytest.param(lambda batch: batch.update(num_items_in_batch=19), 1, id="count"),
        pytest.param(
            lambda batch: batch.update(attention_mask=batch["attention_mask"].fill_(1)), 2, id="mask"
        ),
        pytest.param(lambda batch: batch.update(output_hidden_states=True), 2, id="flag"),
    ],
)
def test_calls_are_told_apart_by_what_models_branch_on(change, expected, monkeypatch):
    """A dry run in the middle of training takes memory that is no longer planned."""

    class Typed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = ZOO["llama"].build()

        def forward(self, token_type_ids=None, **kwargs):
            return self.inner(**kwargs)

    model, counts = opened(Typed()), count_dry_runs(monkeypatch)
    for number in range(2):
        batch = {**ZOO["llama"].batch(rows=ROWS), "num_items_in_batch": 17, "output_hidden_states": False}
        batch["token_type_ids"] = torch.ones_like(batch["input_ids"])
        if number:
            change(batch)
        model(**batch).loss.backward()
    assert len(counts) == expected


def test_an_object_of_another_identity_is_no_other_kind_of_call(monkeypatch):
    model, counts = opened(Recorded()), count_dry_runs(monkeypatch)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(ROWS, 8), Recorder())
    assert len(counts) == 1


def test_costs_belong_to_the_rehearsal_they_were_measured_with(monkeypatch):
    """One that is gone gives its id to another, whose costs are other ones."""
    model = opened(ZOO["llama"].build())
    batch = ZOO["llama"].batch(rows=ROWS)
    measured = []
    set_cost_measuring(monkeypatch, lambda *args: measured.append(1))
    workload = dry_run(model, batch)
    for _ in range(100):
        foresee_costs(model, replace(workload), batch, 1)
    assert len(measured) == 100


class Paired(nn.Module):
    """Rows belong together in twos: three of them cannot be computed."""

    def __init__(self, error=ValueError):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.error = error

    def forward(self, x):
        if x.shape[0] % 2:
            raise self.error("an odd number of rows")
        for layer in self.layers:
            x = x + layer(x)
        first, second = x[::2], x[1::2]
        return (first - second).square().mean()


def test_why_a_batch_is_not_cut_is_said(caplog):
    plain, x = Paired(), torch.randn(4, 8)
    model = opened(plain)
    loss = model(x)
    torch.testing.assert_close(loss, plain(x))
    loss.backward()
    model(x)
    (reason,) = outsize.report(model).uncut
    assert "3 of its 4 rows (ValueError: an odd number of rows)" in reason
    assert reason in str(outsize.report(model)) and caplog.text.count(reason) == 1


class Counting(nn.Module):
    """Layers that count their calls in a buffer, of which one has a part to hang hooks on."""

    def __init__(self, counts):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(3))
        for layer, does in zip(self.layers, counts, strict=True):
            if does:
                layer.append(nn.BatchNorm1d(8))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x.square().mean()


@pytest.mark.parametrize(
    ("counts", "hooked", "expected"),
    [
        ((False, False, False), (), ()),
        ((False, True, True), (), ("layers.1 (and 1 more) changes its own state in its forward",)),
        ((False, False, False), (2,), ("layers.2 has hooks inside",)),
        (
            (True, False, False),
            (0, 1),
            ("layers.0 changes its own state in its forward", "layers.0 (and 1 more) has hooks inside"),
        ),
    ],
    ids=["neither", "state", "hooks", "both"],
)
def test_layers_that_are_not_cut_are_reported_with_the_reason(counts, hooked, expected):
    model = opened(Counting(counts)).train()
    for index in hooked:
        model.layers[index][0].register_forward_hook(lambda *_: None)
    model(torch.randn(4, 8)).backward()
    told = outsize.report(model)
    assert told.uncut == expected
    assert all(f"layers compute the whole batch at once: {reason}" in str(told) for reason in expected)


def test_pinned_tiles_that_cannot_be_are_refused():
    model = opened(Paired(), pins=Pins(tile_rows=1))
    with pytest.raises(
        UsageError, match="tile_rows=1 is pinned, and the model cannot compute 3 of its 4 rows"
    ):
        model(torch.randn(4, 8))
    assert not has_memory(model)


@pytest.mark.parametrize("error", [OSError, MemoryError, UsageError])
def test_a_failure_is_not_taken_for_a_batch_that_cannot_be_cut(error):
    model = opened(Paired(error))
    with pytest.raises(error, match="odd number"):
        model(torch.randn(4, 8))


def test_a_part_that_is_called_alone_fills_a_cache_once():
    """The last call of the whole model was cut into tiles."""
    plain = ZOO["llama"].build()
    model = opened(plain, pins=Pins(tile_rows=2))
    model(**ZOO["llama"].batch(rows=ROWS)).loss.backward()
    batch = batch_of("llama")
    with torch.no_grad():
        output, expected = model.model(**batch), plain.model(**batch)
        torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state)
        assert_same_cache(cache_of(output), cache_of(expected))
        torch.testing.assert_close(
            model.lm_head(output.last_hidden_state), plain.lm_head(expected.last_hidden_state)
        )


def test_a_part_that_is_called_first_is_refused():
    model, batch = opened(ZOO["llama"].build()), batch_of("llama")
    with torch.no_grad(), pytest.raises(UsageError, match="a part of the model runs before"):
        model.model(**batch)
    with torch.no_grad(), pytest.raises(UsageError, match="a part of the model runs before"):
        model.lm_head(torch.randn(2, 32))
