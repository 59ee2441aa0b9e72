"""Calls of the root module: each kind gets a dry run, and the very first call settles where everything lives."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, final

import torch

from outsize.config import format_bytes
from outsize.engine.arguments import Args, Kwargs
from outsize.engine.budget import Budget, free_dropped_models
from outsize.engine.current_call import ModelCall, packed_error
from outsize.engine.dry_runner import SMALL_ROWS, DryRunner, batch_shape
from outsize.engine.rng_autocast import outside_inference_mode
from outsize.engine.setup import Setup
from outsize.engine.signature import Signature, has_cache
from outsize.engine.visits import Visits
from outsize.errors import BudgetError, UsageError
from outsize.model import attention_of
from outsize.plan import Direction, Visit, memory_estimate
from outsize.plan.ledger import ACTIVATIONS
from outsize.plan.workload import BatchShape, Call, Workload
from outsize.store import memory
from outsize.tier import DeviceRegion, Region

_log = logging.getLogger(__name__)


@final
class CallTracker:
    """Follows calls of the root module: each kind gets a dry run, and the first one settles where everything lives."""

    def __init__(
        self,
        visits: Visits,
        setup: Setup,
        budget: Budget,
        dry_runner: DryRunner,
        check: Callable[[], None],
    ) -> None:
        self.uncut: list[str] = []
        """Why calls so far were not cut into tiles."""
        self._model = visits.model
        self._backing = visits.backing
        self._visits = visits
        self._call = visits.call
        self._setup = setup
        self._budget = budget
        self._dry_runner = dry_runner
        self._check = check
        self._expected: Sequence[Call] = ()
        """Calls that memory is placed for beside the first one."""
        self._needed_bytes = 0
        """By the last call without gradients."""
        self._has_read = False
        """Whether a call without gradients was made, from which it is known what such calls leave of memory."""
        self._forward_order: list[Visit] = []
        self._workloads: dict[tuple[Any, ...], Workload] = {}
        self._signature = Signature(self._model)

    @outside_inference_mode()
    def before(self, args: Args, kwargs: Kwargs) -> Any:
        """Prepare a call: make its dry run, settle if nothing is settled yet, and announce its visits.

        Returns the arguments where blocks compute. Raises UsageError, and BudgetError if the call does not fit.
        """
        if self._call.dry_answer is not None:
            return None
        if torch.compiler.is_compiling():
            raise UsageError(
                "torch.compile cannot trace a model that lives in Outsize's store",
                hint="call the model as it is: leave out torch.compile, or torch_compile of TrainingArguments",
            )
        self._check()
        call, signature, module = self._call, self._signature, self._model.module
        call.has_labels = signature.value("labels", args, kwargs) is not None
        args, kwargs, uses_cache = signature.switched(args, kwargs, has_labels=call.has_labels)
        shape = batch_shape(module, args, kwargs)
        is_row_by_row = signature.is_row_by_row(args, kwargs)
        if uses_cache and is_row_by_row and shape.rows != 1:
            raise packed_error(attention_of(module))
        if uses_cache:
            if self._backing.executor is None:
                self._settle_with_cache(args, kwargs, shape)
            self._backing.store.planes.free_pages()
            # A cache grows with every call; the order of visits is that of a call without.
            call.running = None
            self._use_what_is_left(self._budget.ledger.total(self._budget.limits.computes_in, *ACTIVATIONS))
            self._backing.running.begin(self._forward_order)
            return self._model.arguments.moved(args, kwargs)
        planned = Call(self._workload(args, kwargs, shape), shape)
        self._check_pinned_tiles(planned)
        if self._backing.executor is None:
            self._setup.settle(self._to_place(planned, args, kwargs))
        if not planned.workload.pages_bytes:
            self._backing.store.planes.free_pages()  # the call was planned with their memory
        self._begin(planned, is_row_by_row)
        return self._model.arguments.moved(args, kwargs)

    def _settle_with_cache(self, args: Args, kwargs: Kwargs, shape: BatchShape) -> None:
        """Place and allocate for a first call that fills a cache, whose layers compute all rows at once."""
        args, kwargs = self._signature.without_new_cache(args, kwargs)
        workload = replace(self._workload(args, kwargs, shape), dims={})
        calls = self._to_place(Call(workload, shape), args, kwargs)
        self._setup.settle(calls)
        self._budget.begin_call(calls[0])

    def _to_place(self, call: Call, args: Args, kwargs: Kwargs) -> list[Call]:
        """What memory is placed for: this call or, if a model that has an optimizer is evaluated first, its training; and
        calls that are expected."""
        if self._setup.rule is None or torch.is_grad_enabled() or has_cache(args, kwargs):
            return [call, *self._expected]
        args, kwargs = self._signature.without_cache(args, kwargs)
        with torch.enable_grad():
            return [Call(self._dry_run(args, kwargs, call.shape), call.shape), *self._expected]

    def _workload(self, args: Args, kwargs: Kwargs, shape: BatchShape) -> Workload:
        """The workload of calls like this one; a dry run finds it if there is none, or none of rows as long."""
        key = self._signature.of(args, kwargs)
        workload = self._workloads.get(key)
        if workload is None or shape.row_elements > workload.row_elements:
            workload = self._workloads[key] = self._dry_run(args, kwargs, shape)
            self._call.changing |= workload.changing
            if workload.uncut and workload.uncut not in self.uncut:
                self.uncut.append(workload.uncut)
                _log.warning("layers compute the whole batch at once: %s", workload.uncut)
            self._forward_order = [v for v in workload.visits if v.direction is Direction.FORWARD]
        return workload

    def _dry_run(self, args: Args, kwargs: Kwargs, shape: BatchShape) -> Workload:
        """Raises BudgetError if the device does not even have memory for that."""
        if self._backing.executor is None:
            # The dry run takes memory before any is placed; it touches those pages again that computing needs.
            memory.drop_file_pages()
            free_dropped_models()
        try:
            return self._dry_runner.workload(args, kwargs, shape)
        except torch.OutOfMemoryError as error:
            what, rows = str(error).partition(". ")[0], min(shape.rows or 1, SMALL_ROWS[-1])
            raise BudgetError(
                f"the device ran out of memory ({what}) where a block was tried with up to {rows} rows of "
                f"{shape.row_tokens} tokens; {format_bytes(self._model.device.free_bytes())} are free",
                hint="give more with device=, or use shorter sequences"
                + (", or a batch of one row" if rows > 1 else ""),
            ) from error.with_traceback(None)  # whose frames hold what did not fit

    def _check_pinned_tiles(self, call: Call) -> None:
        """Raise UsageError if smaller tiles are pinned than the batch, of which no part can be computed."""
        pinned = self._budget.settings.pins.tile_rows
        if call.workload.uncut and pinned is not None and pinned < (call.shape.rows or 1):
            raise UsageError(
                f"tile_rows={pinned} is pinned, and {call.workload.uncut}",
                hint="leave tile_rows out, or call the model with arguments whose first dimension is the batch",
            )

    def _begin(self, call: Call, is_row_by_row: bool) -> None:
        """The call runs from here on."""
        tile_rows = self._budget.begin_call(call)
        self._call.running = ModelCall(
            *call, 1 if is_row_by_row else tile_rows, self._budget.visit_bytes, is_row_by_row
        )
        if torch.is_grad_enabled():
            self._call.last_training = self._call.running
        self._use_what_is_left(self._budget.call_bytes)
        self._start(call)

    def _start(self, call: Call) -> None:
        """Announce the visits of a call, and what their backwards need."""
        self._backing.running.begin(call.workload.visits, memory_estimate.input_bytes(*call))

    def _use_what_is_left(self, needed_bytes: int) -> None:
        """If a call takes less than was planned for, or more than the last one, more or fewer weights stay in memory."""
        if self._has_read and not torch.is_grad_enabled():
            if needed_bytes < self._needed_bytes:
                memory.give_back()  # what the larger call before freed
            self._needed_bytes = needed_bytes
            self._setup.use_what_is_left(needed_bytes)

    def after(self, output: Any) -> None:
        """The forward of the call is over, whether it failed or not."""
        if self._call.dry_answer is not None:
            return
        self._call.seal_handles()
        self._call.has_labels = False
        self._model.arguments.forget()
        self._has_read |= output is not None and not torch.is_grad_enabled()

    # -- calls that are not made ---------------------------------------------------------------------------------

    def dry_run(self, kwargs: Kwargs, *, with_labels: bool = False) -> Call:
        """The workload of a call with `kwargs`, which is not made; nothing is placed."""
        shape = batch_shape(self._model.module, (), kwargs)
        if not with_labels:
            return Call(self._dry_run((), kwargs, shape), shape)
        self._call.has_labels = True
        try:
            _, kwargs = self._signature.without_cache((), kwargs)
            return Call(self._dry_run((), kwargs, shape), shape)
        finally:
            self._call.has_labels = False
            self._call.seal_handles()

    @property
    def waits_for_training(self) -> bool:
        """Whether nothing is placed because the batch that the model trains with is not known yet."""
        return self._backing.executor is None and self._setup.rule is not None

    @outside_inference_mode()
    def expect(self, calls: Iterable[Kwargs]) -> None:
        """Place memory also for calls like these when the first call is made, which may be another: passes of an engine.

        Raises BudgetError if they do not even fit without training.
        """
        expected = [self.dry_run(kwargs) for kwargs in calls]
        try:
            for call in expected:
                self._setup.decide([call])
        finally:
            self._budget.use(None)
        self._expected = expected

    @outside_inference_mode()
    def settle_for(self, kwargs: Kwargs) -> None:
        """Place and allocate for calls like this one, which is not made, or admit them beside what is placed.

        Raises BudgetError, having changed nothing, if they do not fit.
        """
        is_placed = self._backing.executor is not None
        try:
            if is_placed:
                shape = batch_shape(self._model.module, (), kwargs)
                self._budget.admit(Call(self._workload((), kwargs, shape), shape))
            else:
                self.before((), kwargs)
        except BudgetError:
            self._workloads.clear()  # they hold the arguments
            self._setup.forget_costs()
            raise
        finally:
            self.after(None)

    def take_pages(self, num_bytes: int) -> Region | DeviceRegion:
        """Allocate the KV pages that the next calls read, until a call does not read them or `step` changes weights."""
        self._use_what_is_left(num_bytes + self._budget.call_bytes)
        return self._backing.store.planes.take_pages(num_bytes)

    def before_encoder(self, args: Args, kwargs: Kwargs) -> None:
        """Settle for the whole model if `generate` runs the encoder alone before the model was ever called.

        The dry run is of the call that follows: the encoder's arguments, and one token for the decoder.
        """
        is_settled = self._backing.executor is not None or self._call.dry_answer is not None
        if is_settled or args or torch.is_grad_enabled():
            return
        rows = next((value.shape[0] for value in kwargs.values() if isinstance(value, torch.Tensor)), 1)
        first = torch.zeros(rows, 1, dtype=torch.long, device=self._model.torch_device)
        self.settle_for({**kwargs, "decoder_input_ids": first, "use_cache": False})

    def read_ahead(self) -> None:
        """Start reading what a call like the last one needs first, beside what its caller does meanwhile."""
        if self._backing.executor is not None and self._call.running is not None:
            self._start(Call(self._call.running.workload, self._call.running.shape))

    def walk(self, kwargs: Kwargs) -> None:
        """Run the model's own forward, every layer once, on weights of zero. Nothing is read or placed."""
        self._dry_runner.walk(kwargs)
