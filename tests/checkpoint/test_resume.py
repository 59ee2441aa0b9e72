"""A run that goes on from a commit is the run that was never interrupted, bit by bit."""

import dataclasses
import warnings

import pytest
import torch
from safetensors.torch import load_file

import outsize
from outsize import Pins
from outsize.checkpoint.files import commit_path
from outsize.checkpoint.store import Store
from outsize.errors import StorageError, UsageError
from outsize.plan import Copy
from tests.checkpoint.runs import Run, batches, check_store, manifests
from tests.running import adamw, values_of
from tests.seams import (
    plan_ahead,
    plan_executed,
    read_ahead,
    records_of,
    snapshots_of,
    tile_rows_of,
    with_twin,
)

PLACES = {
    "disk": {"home": "disk"},
    "host": {"home": "host"},
    "one slot": {"home": "disk", "pins": Pins(weight_slots=1, gradient_slots=1)},
    "mixed": {"home": None, "pins": Pins(resident=(1, 2, 1))},
    "bf16 disk": {"home": "disk", "dtype": "bfloat16"},
    "bf16 mixed": {"home": None, "dtype": "bfloat16", "pins": Pins(resident=(2, 1, 2))},
}

OPTIMIZERS = {
    "AdamW": adamw,
    "AdamW8bit": lambda model: outsize.AdamW8bit(model, lr=1e-3),
    "Lion": lambda model: outsize.Lion(model, lr=1e-3),
    "Adan": lambda model: outsize.Adan(model, lr=1e-3),
    "SGD": lambda model: outsize.SGD(model, lr=1e-3),
    "SGDSaI": lambda model: outsize.SGDSaI(model, lr=1e-3),
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The losses and weights of a run without interruption, on disk: they have the same bits wherever a run is placed."""
    done = {}

    def run_once(count=6, *, name="llama", dtype=None, kind="AdamW"):
        key = count, name, dtype, kind
        if key not in done:
            folder = tmp_path_factory.mktemp("reference")
            run = Run(folder, name=name, dtype=dtype, optimizer=OPTIMIZERS[kind])
            done[key] = run.go(batches(count, name), every=0), values_of(run.model)
            run.end(finish=False)
        return done[key]

    return run_once


def interrupted(folder, before, after=None, *, at=3, count=6):
    """The losses of a run that ended after `at` steps and of the one that went on, and that one."""
    name = before.get("name", "llama")
    first = Run(folder, **before)
    losses = first.go(batches(at, name))
    first.end()
    second = Run(folder, **(before if after is None else after))
    assert second.resumed.step == at
    return losses + second.go(batches(count - at, name, first=at)), second


def assert_equal(values, expected):
    assert values.keys() == expected.keys()
    for name, value in values.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "albert"])
def test_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted(place, name, uninterrupted, tmp_path):
    options = {"name": name, **PLACES[place]}
    expected, weights = uninterrupted(name=name, dtype=options.get("dtype"))
    losses, second = interrupted(tmp_path, options)
    assert losses == expected
    assert_equal(values_of(second.model), weights)
    second.finish()
    second.versions.check_books()
    check_store(second.path)


@pytest.mark.parametrize(("before", "after"), [("disk", "host"), ("host", "disk"), ("mixed", "one slot")])
def test_placement_may_change(before, after, uninterrupted, tmp_path):
    expected, weights = uninterrupted()
    losses, second = interrupted(tmp_path, PLACES[before], PLACES[after])
    assert losses == expected
    assert_equal(values_of(second.model), weights)


def assert_goes_on(folder, home, dtype, uninterrupted):
    """On a device with memory of its own; where no home is named, some of the blocks stay there."""
    pins = Pins(resident_bytes=300_000) if home is None else Pins()
    options = {"home": home, "dtype": dtype, "pins": pins}
    expected, weights = uninterrupted(dtype=dtype)
    losses, second = interrupted(folder, options)
    assert losses == expected
    assert_equal(values_of(second.model), weights)
    second.finish()
    second.versions.check_books()


@pytest.mark.parametrize("home", ["device", "host", "disk", None])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_device_with_memory_of_its_own_goes_on_too(home, dtype, uninterrupted, tmp_path, monkeypatch):
    """What lives on the device is copied down for a commit, in the order of computing, and up again."""
    delays = iter(range(1 << 30))
    with_twin(monkeypatch, lambda way, label: 0.002 * (next(delays) % 3))
    assert_goes_on(tmp_path, home, dtype, uninterrupted)


def test_what_comes_after_the_last_commit_is_done_again(uninterrupted, tmp_path):
    expected, weights = uninterrupted()
    first = Run(tmp_path)
    first.go(batches(5), every=4)
    first.end(finish=False)
    second = Run(tmp_path)
    assert second.resumed.step == 4
    assert second.go(batches(2, first=4)) == expected[4:]
    assert_equal(values_of(second.model), weights)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_those_of_the_commit_before_the_first_call(dtype, tmp_path):
    first = Run(tmp_path, dtype=dtype)
    first.go(batches(3))
    first.finish()
    weights = values_of(first.model)
    first.end()
    second = Run(tmp_path, dtype=dtype)
    assert_equal(values_of(second.model), weights)
    outsize.save(second.model, tmp_path / "saved")
    second.go(batches(1, first=3))
    third = load_file(tmp_path / "saved" / "model.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in third.items())


def test_a_commit_is_not_durable_before_its_updates_are_applied(tmp_path):
    run = Run(tmp_path)
    run.go(batches(3))
    # Step 3 was declared; nothing has visited the blocks since.
    assert not commit_path(run.path, 3).exists()
    assert run.finish().step == 3
    assert [manifest.step for manifest in manifests(run.path)] == [3]


@pytest.mark.parametrize("home", ["disk", "host"])
def test_the_plan_after_a_commit_adds_each_block_to_it(home, tmp_path):
    """A block joins where it is waited for; what lives in memory is copied, and the disk's planes stay where they are."""
    run = Run(tmp_path, home=home)
    run.go(batches(2))
    plan, executed = plan_ahead(run.model), plan_executed(run.model)
    assert list(plan) == executed
    copied = {op.block: op.num_bytes for op in executed if isinstance(op, Copy)}
    assert copied.keys() == records_of(run.model).keys()
    assert all(num_bytes > 0 for num_bytes in copied.values()) if home == "host" else not any(copied.values())
    for index, op in enumerate(executed):
        if isinstance(op, Copy):
            assert str(executed[index - 1]) == f"wait {op.block}.weight"
    run.go(batches(1, first=2), every=0)
    assert not snapshots_of(run.model).waiting and run.finish().step == 2
    run.go(batches(1, first=3), every=0)
    assert not [op for op in plan_executed(run.model) if isinstance(op, Copy)]


def test_a_commit_that_begins_in_mid_plan_is_in_what_is_left_of_it(tmp_path):
    run = Run(tmp_path)
    run.go(batches(2), every=0)
    read_ahead(run.model)
    outsize.checkpoint.commit(run.model, run.optimizer, run.path)
    waiting = snapshots_of(run.model).waiting
    copied = [op.block for op in plan_ahead(run.model) if isinstance(op, Copy)]
    assert waiting and sorted(copied) == sorted(waiting)
    assert run.finish().step == 2
    expected = values_of(run.model)
    run.end()
    assert_equal(values_of(Run(tmp_path).model), expected)


def test_dropout_goes_on_where_it_was(tmp_path):
    def with_dropout(model):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.3

    torch.manual_seed(3)
    whole = Run(tmp_path, "reference", name="gpt2", prepare=with_dropout)
    expected = whole.go(batches(6, "gpt2"), every=0)
    whole.end(finish=False)
    torch.manual_seed(3)
    first = Run(tmp_path, name="gpt2", prepare=with_dropout)
    losses = first.go(batches(3, "gpt2"))
    first.end()
    torch.manual_seed(99)
    second = Run(tmp_path, name="gpt2", prepare=with_dropout)
    losses += second.go(batches(3, "gpt2", first=3))
    assert losses == expected
    plain = Run(tmp_path, "plain", name="gpt2")
    assert plain.go(batches(6, "gpt2"), every=0) != expected, "there is no dropout to speak of"


@pytest.mark.parametrize("kind", [kind for kind in OPTIMIZERS if kind != "AdamW"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_optimizer_goes_on(kind, dtype, uninterrupted, tmp_path):
    expected, weights = uninterrupted(4, dtype=dtype, kind=kind)
    losses, second = interrupted(tmp_path, {"optimizer": OPTIMIZERS[kind], "dtype": dtype}, at=2, count=4)
    assert losses == expected
    assert_equal(values_of(second.model), weights)


def test_the_learning_rate_and_step_counts_go_on(tmp_path):
    first = Run(tmp_path)
    first.go(batches(2), every=0)
    first.optimizer.param_groups[0]["lr"] = 0.0123
    losses = first.go(batches(1, first=2))
    first.end()
    second = Run(tmp_path)
    assert second.optimizer.param_groups[0]["lr"] == 0.0123
    assert set(second.optimizer.state_dict()["outsize"]["num_steps"].values()) == {3}
    assert second.resumed.extra == {"losses": losses}


@pytest.mark.parametrize(("before", "after"), [("float32", "bfloat16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("kind", ["AdamW", "AdamW8bit"])
def test_the_compute_type_may_change_and_masters_and_moments_stay_exact(before, after, kind, tmp_path):
    def make(model):
        return getattr(outsize, kind)(model, lr=1e-3)

    first = Run(tmp_path, dtype=before, optimizer=make)
    first.go(batches(4))
    first.end()
    there = exact_state(first.path)
    with pytest.warns(RuntimeWarning, match="compute type"):
        second = Run(tmp_path, dtype=after, optimizer=make)
    second.model(**batches(1)[0])  # lays out, and brings every block into its new form
    second.optimizer.num_updates += 1  # as if an update had changed nothing
    outsize.checkpoint.commit(second.model, second.optimizer, second.path)
    assert second.finish().step == 5
    here = exact_state(second.path)
    assert here.keys() == there.keys()
    for key, value in here.items():
        assert torch.equal(value, there[key]), key
    second.end()
    with pytest.warns(RuntimeWarning, match="compute type"):
        third = Run(tmp_path, dtype=before, optimizer=make)
    third.go(batches(1, first=4))
    third.end()


def exact_state(store):
    """Masters and moments of the last commit by parameter and rows, in natural order."""
    from outsize.block import Plane
    from outsize.checkpoint.export import open_commit

    found = {}
    with open_commit(store) as reader:
        for block in reader.manifest.blocks:
            for entry in block.record.entries:
                key = entry.piece.parameter, entry.piece.row_start
                found[(*key, "master")] = reader.master(block, entry)
                for plane in block.record.state:
                    if plane is not Plane.REMAINDER and entry.trainable:
                        moment = reader.moment(block, entry, plane)
                        # Of codes the padding after an entry is anything.
                        if moment.dim() == 2:
                            rest = entry.piece.num_elements % 64
                            if rest:
                                moment[-1, rest:64] = 0
                        found[(*key, plane)] = moment
    return found


def test_other_parameters_may_be_frozen(tmp_path):
    def freeze(names):
        def prepare(model):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(not any(part in name for part in names))

        return prepare

    first = Run(tmp_path, prepare=freeze(["layers.0", "embed"]))
    first.go(batches(4))
    first.end()
    before = exact_state(first.path)
    second = Run(tmp_path, prepare=freeze(["layers.1.mlp"]))
    losses = second.go(batches(3, first=4))
    assert len(set(losses)) == 3
    counts = second.optimizer.state_dict()["outsize"]["num_steps"]
    assert counts["model.layers.0.self_attn.q_proj.weight"] == 3, "it began to train"
    assert counts["model.layers.2.self_attn.q_proj.weight"] == 7
    frozen = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(
        dict(second.model.named_parameters())[frozen].detach().clone().view(-1),
        before[frozen, None, "master"],
    )
    second.end()
    check_store(second.path)


def test_parameters_stay_in_their_groups(tmp_path):
    def groups(order=1, frozen=None):
        def make(model):
            dict(model.named_parameters()).get(frozen, torch.nn.Parameter()).requires_grad_(False)
            return outsize.AdamW(model, outsize.decay_groups(model, 0.5)[::order], lr=1e-3)

        return make

    first = Run(tmp_path, optimizer=groups(frozen="model.norm.weight"))
    first.go(batches(2))
    first.end()
    with pytest.raises(UsageError, match=r"weight is in parameter group 0, and was in group 1") as caught:
        Run(tmp_path, optimizer=groups(-1))
    assert "same groups" in caught.value.hint
    second = Run(tmp_path, optimizer=groups(frozen="model.layers.0.mlp.up_proj.weight"))
    assert second.resumed.step == 2
    assert [group["betas"] for group in second.optimizer.param_groups] == [(0.9, 0.999)] * 2
    assert [group["weight_decay"] for group in second.optimizer.param_groups] == [0.5, 0.0]
    second.go(batches(1, first=2))


def test_frozen_parameters_go_on_with_the_same_bits(tmp_path):
    def prepare(model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layers.1" in name)

    whole = Run(tmp_path, "reference", prepare=prepare)
    expected = whole.go(batches(6), every=0)
    weights = values_of(whole.model)
    whole.end(finish=False)
    losses, second = interrupted(tmp_path, {"prepare": prepare})
    assert losses == expected
    assert_equal(values_of(second.model), weights)


@pytest.mark.parametrize("keep", [1, 3])
def test_so_many_commits_are_kept_and_the_space_is_that_of_so_many(keep, tmp_path):
    run = Run(tmp_path, keep=keep)
    run.go(batches(6))
    run.finish()
    assert [manifest.step for manifest in manifests(run.path)] == list(range(7 - keep, 7))
    each = manifests(run.path)[0].num_bytes
    gradients = sum(record.gradient_extent.num_bytes for record in records_of(run.model).values())
    assert (run.path / "data").stat().st_size == (1 + keep) * each + gradients
    run.versions.check_books()
    check_store(run.path)


def test_a_kill_before_the_older_commit_was_removed_leaves_room(tmp_path, monkeypatch):
    first = Run(tmp_path)
    first.go(batches(2))
    with monkeypatch.context() as patch:
        patch.setattr(Store, "_remove_old", lambda store: None)
        first.finish()
    first.end(finish=False)
    assert [manifest.step for manifest in manifests(first.path)] == [1, 2]
    second = Run(tmp_path)
    second.go(batches(3, first=2))
    second.finish()
    second.versions.check_books()
    assert [manifest.step for manifest in manifests(first.path)] == [5]


def test_another_number_of_commits_may_be_kept_later(tmp_path):
    first = Run(tmp_path, keep=1)
    first.go(batches(3))
    first.end()
    second = Run(tmp_path, keep=3)
    second.go(batches(4, first=3))
    second.end()
    assert len(manifests(second.path)) == 3
    third = Run(tmp_path, keep=1)
    third.go(batches(2, first=7))
    third.finish()
    assert [manifest.step for manifest in manifests(third.path)] == [9]
    third.versions.check_books()


def test_a_tile_is_kept_unless_a_pin_says_otherwise(tmp_path):
    first = Run(tmp_path, pins=Pins(tile_rows=1))
    losses = first.go(batches(3))
    first.end()
    second = Run(tmp_path)
    second.go(batches(1, first=3))
    assert manifests(first.path)[-1].run["tile_rows"] == 1

    assert tile_rows_of(second.model) == 1
    second.end()
    with pytest.warns(RuntimeWarning, match="rows at once"):
        third = Run(tmp_path, pins=Pins(tile_rows=2))
    assert third.resumed.notes
    assert losses


def test_commit_without_resume_begins_a_store_before_the_first_call_only(tmp_path):
    from tests.running import opened
    from tests.zoo import ZOO

    model = opened(ZOO["llama"].build().train(), disk=str(tmp_path))
    optimizer = adamw(model)
    model(**batches(1)[0])
    with pytest.raises(UsageError, match="before it had a store") as caught:
        outsize.checkpoint.commit(model, optimizer, tmp_path / "run")
    assert "resume" in caught.value.hint


def test_commits_of_an_earlier_run_are_not_overwritten(tmp_path):
    first = Run(tmp_path)
    first.go(batches(2))
    first.end()
    from tests.running import opened
    from tests.zoo import ZOO

    model = opened(ZOO["llama"].build().train(), disk=str(tmp_path))
    with pytest.raises(UsageError, match="earlier run"):
        outsize.checkpoint.commit(model, adamw(model), first.path)
    again = Run(tmp_path)
    assert again.resumed.step == 2


def test_another_model_and_another_optimizer_are_refused(tmp_path):
    first = Run(tmp_path)
    first.go(batches(2))
    first.end()
    with pytest.raises(UsageError, match="AdamW"):
        Run(tmp_path, optimizer=lambda model: outsize.Lion(model, lr=1e-3))
    other = Run(tmp_path, name="gpt2")
    with pytest.raises(StorageError, match="not the same"):
        other.go(batches(1, "gpt2"))
    assert manifests(first.path)[-1].step == 2


def test_a_plain_optimizer_is_refused(tmp_path):
    from tests.running import opened
    from tests.zoo import ZOO

    model = opened(ZOO["llama"].build().train(), disk=str(tmp_path))
    with pytest.raises(UsageError, match="no optimizer of Outsize"):
        outsize.checkpoint.resume(
            model, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), tmp_path / "run"
        )


def test_a_step_is_committed_once(tmp_path):
    run = Run(tmp_path)
    run.go(batches(2))
    for _ in range(3):
        outsize.checkpoint.commit(run.model, run.optimizer, run.path)
    run.optimizer.step()  # there is no gradient: nothing changes
    outsize.checkpoint.commit(run.model, run.optimizer, run.path)
    run.finish()
    run.versions.check_books()
    run.end()
    again = Run(tmp_path)
    assert again.resumed.step == 2
    again.model(**batches(1)[0])
    outsize.checkpoint.commit(again.model, again.optimizer, again.path)
    again.go(batches(1, first=2))
    again.finish()
    again.versions.check_books()
    assert [manifest.step for manifest in manifests(again.path)] == [3]


def test_what_json_cannot_hold_is_refused_and_training_goes_on(tmp_path):
    run = Run(tmp_path)
    run.go(batches(1))
    with pytest.raises(StorageError, match="extra"):
        outsize.checkpoint.commit(run.model, run.optimizer, run.path, extra={"tensor": torch.zeros(1)})
    run.go(batches(1, first=1))
    assert run.finish().step == 2


def test_a_resumed_run_is_as_quiet_as_a_new_one(tmp_path):
    first = Run(tmp_path)
    first.go(batches(1))
    first.end()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dataclasses.asdict(Run(tmp_path).resumed)["notes"] == ()
