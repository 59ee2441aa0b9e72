"""Visits inside others, on null tiers: experts inside their layers, hinted and unforeseen."""

from contextlib import ExitStack

import pytest
import torch

from outsize.block import Block, Group, Piece, Record
from outsize.config import ComputeType, Home
from outsize.engine import executor as executor_module
from outsize.engine.executor import Executor
from outsize.errors import StorageError, UsageError
from outsize.optim import ADAMW, compile_rule
from outsize.plan import Backward, Direction, Forward, Update, Visit
from outsize.plan.place import GROUPS, lay_out
from outsize.store.blocks import BlockStore
from outsize.store.update_job import Pending
from outsize.tier import HostDevice
from tests.doubles import NullTier
from tests.hypers import hyper

FLOAT32 = ComputeType.FLOAT32
NUM_EXPERTS = 8


class Numbers:
    """A source whose every parameter has one value."""

    bytes_read = 0

    def __init__(self, names):
        self.values = {name: float(index + 1) for index, name in enumerate(names)}

    def read(self, block, targets):
        for piece, target in zip(block.pieces, targets, strict=True):
            target.fill_(self.values[piece.parameter])

    def stored_dtype(self, piece):
        return torch.float32

    def conversion_bytes(self, piece):
        return 0

    def gives_rows(self, parameter):
        return False

    def close(self):
        """Nothing to close."""


def layer(index):
    return f"L{index:02}"


def experts(index):
    return [f"L{index:02}.E{expert}" for expert in range(NUM_EXPERTS)]


class Moe:
    """Layers, each of which visits experts inside its own visit; an executor, and what its plans took to make."""

    def __init__(self, monkeypatch, num_layers, slots=(3, 2), expert_elements=64):
        sizes = {layer(index): 4096 for index in range(num_layers)}
        sizes |= {name: expert_elements for index in range(num_layers) for name in experts(index)}
        element_bytes, state = ADAMW.element_bytes(FLOAT32), ADAMW.state(FLOAT32)
        records = [
            Record.lay_out(Block(name, (Piece(f"{name}.w", (size,)),)), [True], state, element_bytes)
            for name, size in sizes.items()
        ]
        placement = lay_out(records, {(r.name, g): Home.DISK for r in records for g in GROUPS}, slots)
        kernel = compile_rule(ADAMW, FLOAT32, eager=True)
        self.source = Numbers([f"{name}.w" for name in sizes])
        self.disk = NullTier(placement.disk_bytes)
        self.store = BlockStore(
            records,
            placement,
            device=HostDevice(),
            disk=self.disk,
            source=self.source,
            rule=ADAMW,
            kernel=lambda kind: kernel,
            device_kernel=None,
        )
        self.num_layers = num_layers
        self.executor = Executor(self.store)
        self.planned = 0
        """Visits, records and operations of all plans that were made."""
        make_plan = executor_module.make_plan

        def counted(context, passes):
            plan = make_plan(context, passes)
            occupancy = context.occupancy
            known = (*occupancy.held, *occupancy.pending, *occupancy.accumulated, *occupancy.summing)
            self.planned += len(context.visits) + len(context.records) + len(known) + len(plan)
            return plan

        monkeypatch.setattr(executor_module, "make_plan", counted)

    def call(self, chosen, hinted, backward=False, twice=()):
        """Forward, and backward; each layer visits the experts `chosen(index)`."""
        order = [Visit(layer(index), Direction.FORWARD) for index in range(self.num_layers)]
        if backward:
            order += [
                Visit(layer(index), Direction.BACKWARD, trains=True)
                for index in reversed(range(self.num_layers))
            ]
        self.executor.begin(order)
        for outer in order:
            index = int(outer.block[1:])
            inner = [Visit(name, outer.direction, trains=outer.trains) for name in (*chosen(index), *twice)]
            with self.executor.visit([outer]) as states:
                self.check(states)
                if hinted and inner:
                    self.executor.hint(inner)
                for visit in inner:
                    with self.executor.visit([visit]) as own:
                        self.check(own)
                        self.check(states)
                        self.add_gradient(visit)
                self.check(states)
                self.add_gradient(outer)

    def add_gradient(self, visit):
        if visit.trains:
            state = self.store[visit.block]
            self.store.gradients.add(state, 0, torch.full(state.record.entries[0].piece.shape, 1.0))

    def check(self, states):
        """The weights in memory are those of the blocks that are visited."""
        for state in states:
            [weights] = state.planes.pieces()
            assert (weights == self.source.values[f"{state.name}.w"]).all(), state.name

    def computed(self):
        return [(op.verb, op.block) for op in self.executor.executed if isinstance(op, Forward | Backward)]


@pytest.fixture
def moe(monkeypatch):
    with ExitStack() as stack:

        def make(*args, **options):
            made = Moe(monkeypatch, *args, **options)
            stack.callback(made.executor.close)
            return made

        yield make


def expected_order(num_layers, backward):
    forward = [("forward", name) for index in range(num_layers) for name in (layer(index), *experts(index))]
    if not backward:
        return forward
    order = reversed(range(num_layers))
    return forward + [("backward", name) for index in order for name in (layer(index), *experts(index))]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("hinted", [True, False], ids=["hinted", "unforeseen"])
@pytest.mark.parametrize(
    ("slots", "size"),
    [((1, 1), 64), ((3, 2), 64), ((2, 2), 4096), ((3, 3), 4096)],
    ids=["one slot", "slots", "shared slots", "more shared slots"],
)
def test_experts_are_visited_inside_their_layers(slots, size, hinted, backward, moe):
    """Experts as large as layers pass through the slots of these."""
    model = moe(4, slots, size)
    model.call(experts, hinted, backward)
    assert model.computed() == expected_order(4, backward)
    visits = len(expected_order(4, backward))
    inner = visits * NUM_EXPERTS // (NUM_EXPERTS + 1)
    assert sum(model.executor.off_plan.values()) == (0 if hinted else inner)
    model.store.gradients.settle_norms()
    sums = [gradient.sum_of_squares for state in model.store for gradient in state.gradient.entries]
    sizes = [state.record.entries[0].piece.num_elements for state in model.store]
    assert sums == [float(size) if backward else 0.0 for size in sizes]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("hinted", [True, False], ids=["hinted", "unforeseen"])
def test_the_cost_of_nested_visits_is_linear(hinted, backward, moe):
    """Four times the layers take four times the planning and the operations, in a call of 432 or 864 visits too."""
    few, many = moe(12), moe(48)
    few.call(experts, hinted, backward)
    many.call(experts, hinted, backward)
    assert many.computed() == expected_order(48, backward)
    assert many.planned <= 4.2 * few.planned
    assert len(many.executor.executed) <= 4.2 * len(few.executor.executed)
    visits = len(many.computed())
    assert many.planned <= 30 * visits and len(many.executor.executed) <= 12 * visits


def test_hinted_experts_are_read_ahead(moe):
    model = moe(2, (3, 2))
    model.executor.begin([Visit(layer(index), Direction.FORWARD) for index in range(2)])
    with model.executor.visit([Visit(layer(0), Direction.FORWARD)]):
        model.executor.hint([Visit(name, Direction.FORWARD) for name in experts(0)[:3]])
        held = {state.name for state in model.store if state.planes.weight_slot is not None}
        assert held >= set(experts(0)[:3])


def test_experts_that_were_hinted_and_not_visited_change_nothing(moe):
    model = moe(3, (1, 1))
    order = [Visit(layer(index), Direction.FORWARD) for index in range(3)]
    model.executor.begin(order)
    for outer in order:
        with model.executor.visit([outer]) as states:
            some = experts(int(outer.block[1:]))
            model.executor.hint([Visit(name, Direction.FORWARD) for name in some])
            for name in (some[0], some[3]):
                with model.executor.visit([Visit(name, Direction.FORWARD)]) as own:
                    model.check(own)
            model.check(states)
    assert model.computed() == [
        ("forward", name)
        for outer in order
        for name in (outer.block, *(experts(int(outer.block[1:]))[i] for i in (0, 3)))
    ]


@pytest.mark.parametrize("hinted", [True, False])
def test_an_expert_that_others_share_sums_its_gradient(hinted, moe):
    """It is visited inside every layer; each visit adds to the sum of those before."""
    model = moe(3)
    model.call(lambda index: experts(0)[:1], hinted, backward=True)
    model.store.gradients.settle_norms()
    [gradient] = model.store[experts(0)[0]].gradient.entries
    assert gradient.sum_of_squares == 64 * 3.0**2


def test_a_block_of_the_call_itself_may_be_visited_inside_another(moe):
    """What is left of the call is planned again: the sum of that block has begun."""
    model = moe(3)
    model.call(lambda index: [layer(0)] if index == 2 else [], hinted=False, backward=True)
    model.store.gradients.settle_norms()
    [gradient] = model.store[layer(0)].gradient.entries
    assert gradient.sum_of_squares == 4096 * 2.0**2


def test_an_update_that_a_visit_inside_applies_is_not_applied_again(moe):
    model = moe(8)
    model.call(lambda index: [], hinted=False, backward=True)
    for state in model.store:
        if state.gradient.exists:
            state.update.freeze(Pending((hyper(lr=1e-3),)), 1)
    order = [Visit(layer(index), Direction.FORWARD) for index in range(8)]
    model.executor.begin(order)
    for outer in order:
        with model.executor.visit([outer]):
            if outer is order[0]:
                assert model.store[layer(7)].update.pending is not None
                with model.executor.visit([order[7]]):
                    assert model.store[layer(7)].update.pending is None
    updates = sorted(op.block for op in model.executor.executed if isinstance(op, Update))
    assert updates == [layer(index) for index in range(8)]


def test_a_visit_without_a_slot_left_is_refused(moe):
    """One slot for blocks of this size, which the visit around holds."""
    model = moe(2, (1, 1), expert_elements=4096)
    with pytest.raises(UsageError, match=r"L00\.E0 is visited inside L00, which hold all slots") as caught:
        model.call(experts, hinted=False)
    assert "weight_slots" in caught.value.hint
    model.call(lambda index: [], hinted=False)


def test_an_error_of_an_expert_is_the_callers(moe, monkeypatch):
    """It leaves everything usable, and may not be caught between."""
    model = moe(2)

    def broken(block, targets):
        raise StorageError("injected")

    real = model.source.read
    monkeypatch.setattr(
        model.source, "read", lambda block, targets: (broken if "E1" in block.name else real)(block, targets)
    )
    with pytest.raises(StorageError, match="injected"):
        model.call(experts, hinted=True)
    model.executor.begin([Visit(layer(0), Direction.FORWARD)])
    with (
        pytest.raises(UsageError, match="caught an error"),
        model.executor.visit([Visit(layer(0), Direction.FORWARD)]),
        pytest.raises(StorageError),
        model.executor.visit([Visit(experts(0)[1], Direction.FORWARD)]),
    ):
        pass
    monkeypatch.undo()
    model.call(experts, hinted=True)


def test_the_outer_block_keeps_its_weights(moe):
    """Two levels: inside an expert, another is visited, and both are whole afterwards."""
    model = moe(2, (3, 2))
    model.executor.begin([Visit(layer(0), Direction.FORWARD)])
    one, other = (Visit(name, Direction.FORWARD) for name in experts(0)[:2])
    with model.executor.visit([Visit(layer(0), Direction.FORWARD)]) as outer:
        model.executor.hint([one, other])
        with model.executor.visit([one]) as middle, model.executor.visit([other]) as inner:
            for states in (inner, middle, outer):
                model.check(states)
        model.check(outer)
    groups = {group: model.store.placement.slots[group] for group in (Group.WEIGHT, Group.GRADIENT)}
    assert groups and model.store[layer(0)].planes.weight_slot is not None
