"""A device that runs out of memory: with `on_device_full="retry"` the call goes on, and nothing is lost or counted twice.

The device is a twin of the host. Memory runs out where a test says: for tiles of too many rows, as on a device that is too
small, or once, at the n-th operation that takes memory, for many n.
"""

import re
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import outsize
from outsize import Pins
from outsize.config import Home
from outsize.errors import BudgetError, ConfigError
from tests.pairs import pairwise
from tests.running import around_forward, opened, values_of
from tests.seams import (
    around_backwards_of_layers,
    around_parts_of_visits,
    around_tiles_of_layers,
    close,
    fill_host,
    loss_tile,
    model_of,
    move_small_inputs,
    placement_of,
    set_loss_tile,
    set_loss_tiles,
    tile_rows_of,
    visits_off_plan,
    with_twin,
)
from tests.zoo import ZOO, plain_batch, plain_stack, seeded

STEPS = 3


def full():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def holds_tiles_of(rows, monkeypatch, *, forwards=True):
    """Layers have no memory for more rows than that, in their forwards and backwards, or in backwards only."""
    directions = ["forward"]

    def limited(run, layer, tile):
        graph = run()  # it fails late
        if tile.stop - tile.start > rows and (forwards or directions[-1] == "backward"):
            full()
        return graph

    def noted(run, layer):
        directions.append("backward")
        try:
            return run()
        finally:
            directions.pop()

    around_tiles_of_layers(monkeypatch, limited)
    around_backwards_of_layers(monkeypatch, noted)


def trained(name="llama", *, tile_rows=None, retry=True, kept_blocks=None, dtype="float32", **options):
    """Losses, gradients of the last step, weights, and the report, of some steps on a twin."""
    changes = options.pop("changes", {})
    pins = Pins(tile_rows=tile_rows, kept_blocks=kept_blocks)
    policy = "retry" if retry else "error"
    model = opened(
        ZOO[name].build(**changes).train(), dtype=dtype, pins=pins, on_device_full=policy, **options
    )
    optimizer = outsize.AdamW(model, lr=1e-3, eps=1e-4, max_grad_norm=0.5)
    torch.manual_seed(0)
    losses = []
    for step in range(STEPS):
        loss = model(**ZOO[name].batch(rows=6, length=10, seed=step)).loss
        loss.backward()
        losses.append(loss.detach().clone())
        if step == STEPS - 1:
            gradients = {key: value.grad.clone() for key, value in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    result = losses, gradients, values_of(model), outsize.report(model)
    close(model)
    return result


def assert_same(one, other):
    for mine, yours in zip(one[0], other[0], strict=True):
        assert torch.equal(mine, yours)
    for mine, yours in zip(one[1:3], other[1:3], strict=True):
        assert all(torch.equal(mine[name], yours[name]) for name in yours)


def assert_close(one, other):
    """What rounding in smaller tiles leaves; a tile that is lost or added twice is far beyond."""
    assert torch.allclose(torch.stack(one[0]), torch.stack(other[0]), rtol=1e-5, atol=0)
    for mine, yours in zip(one[1:3], other[1:3], strict=True):
        for name, value in yours.items():
            assert float((mine[name] - value).norm()) <= 1e-4 * float(value.norm()) + 1e-6, name


@pytest.mark.parametrize("home", ["device", "host", "disk"])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_device_that_is_too_small_gives_the_bits_of_smaller_tiles(rows, home, tmp_path, monkeypatch):
    with_twin(monkeypatch)
    expected = trained(tile_rows=rows, retry=False, home=home, disk=tmp_path)
    holds_tiles_of(rows, monkeypatch)
    with pytest.warns(RuntimeWarning, match=f"compute {rows} rows at once instead of 6") as said:
        result = trained(home=home, disk=tmp_path)
    assert_same(result, expected)
    assert len(said) == 1, "it is said once, and the tiles stay small"
    assert len(result[3].stepped_down) == 1 and "ran out of memory" in str(result[3])
    assert not expected[3].stepped_down


def test_random_numbers_are_those_of_smaller_tiles(tmp_path, monkeypatch):
    with_twin(monkeypatch)
    options = {"name": "gpt2", "home": "host", "changes": {"resid_pdrop": 0.2}}
    expected = trained(tile_rows=3, retry=False, **options)
    holds_tiles_of(3, monkeypatch)
    with pytest.warns(RuntimeWarning, match="3 rows"):
        assert_same(trained(**options), expected)


@pytest.mark.parametrize(("name", "tile_rows"), [("llama", None), ("mixtral", None), ("t5", 3)])
def test_a_backward_alone_that_runs_out(name, tile_rows, monkeypatch):
    """Its tiles are smaller than those of the forward, and what earlier tiles added stays."""
    with_twin(monkeypatch)
    expected = trained(name, retry=False, home="host", tile_rows=tile_rows)
    holds_tiles_of(2, monkeypatch, forwards=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_close(trained(name, home="host", tile_rows=tile_rows), expected)


def test_outputs_without_a_batch_that_no_two_tiles_agreed_on(monkeypatch):
    """They may depend on the whole batch: half of it could have another gradient."""
    with_twin(monkeypatch)
    holds_tiles_of(2, monkeypatch, forwards=False)
    with warnings.catch_warnings(), pytest.raises(BudgetError, match="ran out of memory"):
        warnings.simplefilter("ignore")
        trained("t5", home="host")


def test_a_backward_that_drew_random_numbers_is_an_error(monkeypatch):
    """In other tiles it would draw others: a gradient of another function."""
    with_twin(monkeypatch)
    holds_tiles_of(2, monkeypatch, forwards=False)
    with warnings.catch_warnings(), pytest.raises(BudgetError, match="ran out of memory"):
        warnings.simplefilter("ignore")  # the last norm draws none, and goes back in smaller tiles
        trained("gpt2", home="host", changes={"resid_pdrop": 0.2})


def test_without_being_asked_nothing_is_repeated(monkeypatch):
    with_twin(monkeypatch)
    holds_tiles_of(2, monkeypatch)
    with pytest.raises(BudgetError, match="ran out of memory") as caught:
        trained(home="host", retry=False)
    assert 'on_device_full="retry"' in str(caught.value.hint)


def test_a_device_that_holds_no_row_is_an_error_that_names_what_fits(monkeypatch):
    with_twin(monkeypatch)
    holds_tiles_of(0, monkeypatch)
    with pytest.raises(BudgetError, match="ran out of memory") as caught:
        trained(home="host")
    assert "on_device_full" not in str(caught.value.hint)


def test_a_word_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="on_device_full='maybe'"):
        opened(ZOO["llama"].build(), on_device_full="maybe")


def test_activations_that_were_kept_go_first_and_change_no_bit(monkeypatch):
    with_twin(monkeypatch)
    expected = trained(retry=False, home="device", kept_blocks=2)
    calls = []

    def once(run, layer, tile):
        calls.append(layer)
        if len(calls) == 4:
            full()  # in the norm, when two layers have kept theirs
        return run()

    around_tiles_of_layers(monkeypatch, once)
    with pytest.warns(RuntimeWarning, match="keeps its activations") as said:
        result = trained(home="device", kept_blocks=2)
    assert_same(result, expected)
    assert len(said) == 1


def resident_of(model):
    return {block for block, _ in placement_of(model).at(Home.DEVICE)}


def holds_blocks(count, monkeypatch, *, from_call=0):
    """Layers have no memory while more than so many blocks stay on the device; from a call of a layer on."""
    calls = []

    def limited(run, layer, tile):
        calls.append(layer)
        graph = run()
        if len(calls) > from_call and len(resident_of(model_of(layer))) > count:
            full()
        return graph

    around_tiles_of_layers(monkeypatch, limited)


@pairwise(from_call=[0, 6, 11], count=[2, 5], dtype=["float32", "bfloat16"])
def test_blocks_leave_a_device_that_is_too_small_for_a_row(count, from_call, dtype, tmp_path, monkeypatch):
    """In the forward or the backward of any step, with gradients, moments and updates that are pending."""
    with_twin(monkeypatch, lambda way, label: 0.001)
    options = {"name": "llama_tied", "dtype": dtype, "tile_rows": 1, "home": "device"}
    expected = trained(retry=False, **options)
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        holds_blocks(count, patch, from_call=from_call * 6)
        result = trained(**options)
    assert_same(result, expected)  # the twin updates as the host does
    moved = [note for note in result[3].stepped_down if "stays in the host's memory" in note]
    rows = {(row.tier, row.what): row.num_bytes for row in result[3].rows}
    assert moved and rows["host", "weights"] > 0 and result[3].bytes_down > 0
    assert result[3].off_plan == ()


def test_blocks_stay_where_the_host_has_no_room_for_them(monkeypatch):
    with_twin(monkeypatch)
    holds_blocks(2, monkeypatch)
    fill_host(monkeypatch)
    with pytest.raises(BudgetError, match="ran out of memory"):
        trained(tile_rows=1, home="device")


def test_a_commit_holds_blocks_that_left_the_device(tmp_path, monkeypatch):
    with_twin(monkeypatch, lambda way, label: 0.001)

    def run(leaves):
        store = tmp_path / f"store-{leaves}"

        def start(**options):
            options = {"pins": Pins(tile_rows=1), "home": "device", **options}
            model = opened(ZOO["llama"].build().train(), disk=tmp_path, dtype="float32", **options)
            optimizer = outsize.AdamW(model, lr=1e-3)
            outsize.checkpoint.resume(model, optimizer, store)
            return model, optimizer

        def step(model, optimizer, seed):
            model(**ZOO["llama"].batch(rows=3, seed=seed)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            outsize.checkpoint.commit(model, optimizer, store)

        model, optimizer = start(on_device_full="retry")
        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if leaves:
                holds_blocks(3, patch, from_call=20)
            for seed in range(3):
                step(model, optimizer, seed)
        assert bool(outsize.report(model).stepped_down) is leaves
        outsize.checkpoint.finish(model)
        outsize.checkpoint.close(model)
        model, optimizer = start()
        step(model, optimizer, 3)
        values = values_of(model)
        outsize.checkpoint.close(model)
        return values

    expected, result = run(False), run(True)
    assert all(torch.equal(result[name], expected[name]) for name in expected)


class Short(TorchDispatchMode):
    """Memory that runs out once, at the n-th operation that takes any."""

    def __init__(self, at):
        super().__init__()
        self.at = at
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_view = any(each.alias_info is not None for each in func._schema.returns)
        if not func._schema.is_mutable and not is_view:
            self.count += 1
            if self.count == self.at:
                full()
        return func(*args, **(kwargs or {}))


def in_short_memory(monkeypatch, at):
    """All is counted that parts of visits take, where there are smaller ones."""
    short = Short(at)

    def counted(attempt, part, may_cut):
        with short if may_cut else nullcontext():
            attempt(part)

    around_parts_of_visits(monkeypatch, counted)
    return short


@pytest.mark.parametrize(("name", "kept_blocks"), [("llama_tied", None), ("llama", 2), ("mixtral", None)])
def test_wherever_memory_runs_out_nothing_is_lost_or_counted_twice(name, kept_blocks, monkeypatch):
    with_twin(monkeypatch)
    move_small_inputs(monkeypatch)
    set_loss_tiles(monkeypatch, 2000)

    def run(at):
        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            short = in_short_memory(patch, at)
            return trained(name, home="device", kept_blocks=kept_blocks), short

    expected, short = run(0)
    step = short.count // STEPS
    assert step > 400
    last = 2 * step  # the last step, whose gradients are compared
    notes = set()
    for at in [*range(last + 1, last + step, 23), last + step]:
        result, _ = run(at)
        assert_close(result, expected)
        notes |= {re.sub(r"\d+", "n", note) for note in result[3].stepped_down}
    assert len(notes) == 2, (
        notes
    )  # layers and the loss in smaller tiles; or layers, after activations were let go of


class Twice(torch.nn.Module):
    """A layer that uses its weight in two checkpoints: each adds to the weight's gradient by itself."""

    def __init__(self, width):
        super().__init__()
        self.linear = torch.nn.Linear(width, width, bias=False)
        self.before_part = lambda: None

    def forward(self, x):
        weight = self.linear.weight

        def part(x):
            if torch.is_grad_enabled():
                self.before_part()
            return torch.tanh(torch.nn.functional.linear(x, weight))

        return checkpoint(part, checkpoint(part, x, use_reentrant=True), use_reentrant=True)


@pytest.mark.parametrize("full_at", [None, 1, 2])
def test_each_of_several_additions_to_one_gradient_counts_once(full_at, monkeypatch):
    """Memory runs out nowhere, before the first addition of a tile, or between its two."""
    with_twin(monkeypatch)
    plain = plain_stack().train()
    plain.layers = torch.nn.ModuleList(Twice(16) for _ in range(3))
    model = opened(plain, home="host", on_device_full="retry" if full_at else "error")
    batch = plain_batch(rows=4)
    with seeded(0):
        plain(**batch).backward()
    loss = model(**batch)
    parts = []

    def before_part():
        parts.append(1)
        if len(parts) == full_at:
            full()

    model.layers[1].before_part = before_part
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        loss.backward()
    for name, parameter in model.named_parameters():
        expected = plain.get_parameter(name).grad
        assert torch.allclose(parameter.grad.clone(), expected, rtol=1e-4, atol=1e-7), name
    assert len(parts) > (full_at or 1)
    close(model)


def test_generating_with_a_cache_is_not_repeated(monkeypatch):
    """A layer that failed after it filled the cache would fill it twice."""
    with_twin(monkeypatch)
    model = opened(ZOO["llama"].build(), home="host", on_device_full="retry")
    ids = ZOO["llama"].batch()["input_ids"]
    with torch.no_grad():
        first = model(input_ids=ids, use_cache=True)
    handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: full())
    with pytest.raises(BudgetError), torch.no_grad():
        model(input_ids=ids[:, :1], past_key_values=first.past_key_values)
    handle.remove()
    close(model)


def test_a_forward_without_gradients_goes_on_too(monkeypatch):
    with_twin(monkeypatch)
    model = opened(ZOO["llama"].build(), home="host", on_device_full="retry")
    batch = ZOO["llama"].batch(rows=4)
    with torch.no_grad():
        expected = model(**batch).loss

        def limited(x):
            if x.shape[0] > 1:
                full()

        with (
            around_forward(model.model.layers[1].mlp, before=limited),
            pytest.warns(RuntimeWarning, match="1 rows"),
        ):
            loss = model(**batch).loss
    assert torch.allclose(loss, expected, rtol=1e-6)
    assert visits_off_plan(model) == {}
    close(model)


def test_smaller_tiles_outlive_the_process(tmp_path, monkeypatch):
    """A commit says how many rows were computed at once, and a run that resumes goes on with them."""
    with_twin(monkeypatch)
    store = tmp_path / "store"

    def start(**options):
        model = opened(ZOO["llama"].build().train(), disk=tmp_path, dtype="float32", **options)
        optimizer = outsize.AdamW(model, lr=1e-3)
        outsize.checkpoint.resume(model, optimizer, store)
        return model, optimizer

    def step(model, optimizer):
        loss = model(**ZOO["llama"].batch(rows=4)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        outsize.checkpoint.commit(model, optimizer, store)
        outsize.checkpoint.finish(model)

    model, optimizer = start(on_device_full="retry")
    with monkeypatch.context() as patch, pytest.warns(RuntimeWarning):
        holds_tiles_of(1, patch)
        step(model, optimizer)
    set_loss_tile(model, 398)
    step(model, optimizer)
    outsize.checkpoint.close(model)
    model, optimizer = start()
    step(model, optimizer)
    assert tile_rows_of(model) == 1 and loss_tile(model) == 398
    outsize.checkpoint.close(model)
