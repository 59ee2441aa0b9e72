"""The device: where blocks compute, the memory beside it, and the two ways between that memory and the host's.

On a machine without an accelerator the device is the host: their memory is one, and nothing is copied. Elsewhere copies
run on two streams of their own, one up and one down, ordered against computing by events, so that no copy ever holds
computing up or is held up by it unless one needs the other's bytes.

    device.start_copy(Way.UP, slot, plane, after=[...])   on the upward stream, when all of `after` is done
    transfer.follow()                                     what computes from here on comes after the copy
    device.mark()                                         what was given to the device so far, as a transfer
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch

from outsize.block import align
from outsize.config import Home, format_bytes
from outsize.errors import BudgetError, DeviceError
from outsize.tier.base import Transfer
from outsize.tier.transfer import DoneTransfer, Listener, Moment, at

WORKSPACE_BYTES = 64 << 20
"""What libraries keep of a device, on Hopper; a quarter elsewhere: cuBLAS has a workspace for each thread, and one thread
computes forwards, one of autograd's backwards."""


class Way(StrEnum):
    """The direction of a copy."""

    UP = "up"
    """From the host to the device."""
    DOWN = "down"
    """From the device to the host."""


@dataclass(frozen=True, slots=True)
class LinkStats:
    """Bytes that were copied each way since the device was opened."""

    bytes_up: int = 0
    bytes_down: int = 0


class Device(ABC):
    """What computes. `torch_device` is where its tensors are; `is_host` says that its memory is the host's.

    `is_host` is for this room alone: others ask for what follows from it.
    """

    torch_device: torch.device
    is_host: bool = False

    @property
    def host(self) -> Home:
        """The home that is the host's memory, as in a placement."""
        return Home.DEVICE if self.is_host else Home.HOST

    @property
    def own_memory(self) -> tuple[int, int] | None:
        """Bytes free and bytes taken of memory of its own; None where it has none."""
        return None if self.is_host else (self.free_bytes(), self.taken_bytes())

    @property
    def product_copies(self) -> int:
        """Copies that a product in fp32 makes of its result: the processor's makes one."""
        return int(self.is_host)

    @abstractmethod
    def start_copy(
        self,
        way: Way,
        target: torch.Tensor,
        source: torch.Tensor,
        *,
        after: Sequence[Transfer] = (),
        label: str,
    ) -> Transfer:
        """Start copying `source` into `target` (alike in type and size, one of them in the host's memory).

        The copy waits for `after` and for earlier copies of the same way. Both tensors must be left alone until it is over,
        and be kept until what computes follows it: their memory is given away in the order of computing.
        """

    @abstractmethod
    def mark(self) -> Transfer:
        """What this thread has given to the device to compute so far; over when that is computed."""

    @abstractmethod
    def zeros(self, num_bytes: int, name: str) -> torch.Tensor:
        """Memory beside the device, `[num_bytes]` uint8, zero for all that comes after, copies too.

        Raises BudgetError where there is no such room.
        """

    def pin(self, address: int, num_bytes: int, name: str) -> None:
        """Make pages of host memory fit for copies that nobody waits for; undone by `unpin` before they are unmapped."""
        return None

    def unpin(self, address: int) -> None:
        """Undo `pin`, when no copy uses the pages any more."""
        return None

    def free_bytes(self) -> int:
        """Memory beside the device that could be taken now."""
        return 1 << 60

    def taken_bytes(self) -> int:
        """Memory beside the device that is in use: by libraries' workspaces, by tensors of others, by our own."""
        return 0

    def links(self) -> LinkStats:
        """What was copied so far."""
        return LinkStats()

    def listen(self, listener: Listener | None) -> None:
        """Tell `listener` of each copy from now on; None: nobody. Waits for the device; not to be called inside a step."""
        return None

    def moment(self) -> Moment:
        """When what this thread has given to the device so far is computed. Only while there is a listener."""
        return at(time.perf_counter())

    def rng_state(self) -> torch.Tensor | None:
        """The state of the device's own random numbers; None where the host's serve."""
        return None

    def set_rng_state(self, state: torch.Tensor) -> None:
        """Put a state from `rng_state` back."""
        raise AssertionError("this device has no random numbers of its own")

    def finish(self) -> None:
        """Wait for all copies that were started."""
        return None


class HostDevice(Device):
    """The processor itself: its memory is the host's, and there is nothing to copy."""

    torch_device = torch.device("cpu")
    is_host = True

    def start_copy(
        self,
        way: Way,
        target: torch.Tensor,
        source: torch.Tensor,
        *,
        after: Sequence[Transfer] = (),
        label: str,
    ) -> Transfer:
        """Within one memory: done at once, by the thread that asks and no other."""
        for transfer in after:
            transfer.wait()
        np.copyto(target.view(torch.uint8).numpy(), source.view(torch.uint8).numpy())
        return DoneTransfer()

    def mark(self) -> Transfer:
        """Over already: the processor computes as it is told."""
        return DoneTransfer()

    def zeros(self, num_bytes: int, name: str) -> torch.Tensor:
        """Never called: the host's arena serves."""
        raise AssertionError(f"{name}: the host's memory is the device's")


class PaperDevice(Device):
    """A device that is not there: its tensors have shapes and no values (torch's meta device), to plan with."""

    torch_device = torch.device("meta")

    def __init__(self, num_bytes: int | None) -> None:
        """A device with `num_bytes` of its own, or a host (None)."""
        self.is_host = num_bytes is None
        self._num_bytes = num_bytes or 0

    def start_copy(
        self,
        way: Way,
        target: torch.Tensor,
        source: torch.Tensor,
        *,
        after: Sequence[Transfer] = (),
        label: str,
    ) -> Transfer:
        """Never called: there is nothing to copy."""
        raise AssertionError(f"{label}: nothing is copied on paper")

    def mark(self) -> Transfer:
        """Over already: nothing is computed."""
        return DoneTransfer()

    def zeros(self, num_bytes: int, name: str) -> torch.Tensor:
        """Never called: nothing is placed."""
        raise AssertionError(f"{name}: nothing is placed on paper")

    def free_bytes(self) -> int:
        """All of it but for libraries' workspaces."""
        return max(0, self._num_bytes - self.taken_bytes())

    def taken_bytes(self) -> int:
        """What libraries take at most."""
        return 0 if self.is_host else WORKSPACE_BYTES


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`. What comes from the host is pinned and sent ahead, and nothing waits for it."""
    if tensor.device.type == device.type:
        return tensor
    is_pinned = device.type == "cuda" and tensor.device.type == "cpu"
    return (tensor.pin_memory() if is_pinned else tensor).to(device, non_blocking=True)


class DeviceRegion:
    """Memory of a device; made by `DeviceArena.allocate`, reads as zero at first."""

    def __init__(self, arena: DeviceArena, name: str, contents: torch.Tensor) -> None:
        self.name = name
        self.num_bytes = contents.numel()
        self._arena = arena
        self._contents: torch.Tensor | None = contents

    def tensor(self, dtype: torch.dtype, num_elements: int, byte_offset: int = 0) -> torch.Tensor:
        """A one-dimensional tensor of `num_elements` from `byte_offset` that shares the region's bytes."""
        assert self._contents is not None, f"{self.name}: the region was freed"
        end = byte_offset + num_elements * dtype.itemsize
        assert byte_offset >= 0 and end <= self.num_bytes, (
            f"{self.name}: bytes {byte_offset} to {end} lie outside a region of {self.num_bytes}"
        )
        return self._contents[byte_offset:end].view(dtype)

    def free(self) -> None:
        """Give the memory back; it goes when the last tensor on it is gone."""
        assert self._contents is not None, f"{self.name}: the region was freed"
        self._contents = None
        self._arena.in_use_bytes -= self.num_bytes


class DeviceArena:
    """At most `limit_bytes` beside a device."""

    def __init__(self, device: Device, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.in_use_bytes = 0
        self._device = device

    def allocate(self, num_bytes: int, name: str) -> DeviceRegion:
        """A region of `num_bytes` rounded up to whole pages, zero. Raises BudgetError where it would exceed the limit."""
        size = align(num_bytes)
        if self.in_use_bytes + size > self.limit_bytes:
            raise BudgetError(
                f"device memory: {name} needs {format_bytes(size)}, but {format_bytes(self.in_use_bytes)} of the "
                f"{format_bytes(self.limit_bytes)} allowed are in use",
                hint=f"allow at least {self.in_use_bytes + size} bytes",
            )
        region = DeviceRegion(self, name, self._device.zeros(size, name))
        self.in_use_bytes += size
        return region

    def check_books(self, expected_bytes: int = 0) -> None:
        """Raise AssertionError unless exactly `expected_bytes` are in use."""
        assert self.in_use_bytes == expected_bytes, f"{self.in_use_bytes} bytes of the device are in use"


class CudaDevice(Device):
    """A CUDA device. Raises DeviceError where it cannot be used.

    `limit_bytes` is made a limit of torch's allocator too, so that activations cannot pass it either.
    """

    def __init__(self, limit_bytes: int | None = None, index: int | None = None) -> None:
        try:
            number = torch.cuda.current_device() if index is None else index
            self.torch_device = torch.device("cuda", number)
            total = torch.cuda.get_device_properties(number).total_memory
            torch.cuda.memory._set_allocator_settings("expandable_segments:True")
            if limit_bytes is not None and limit_bytes < total:
                torch.cuda.set_per_process_memory_fraction(limit_bytes / total, number)
            self._streams = {way: torch.cuda.Stream(number) for way in Way}
            _take_workspaces(self.torch_device)
        except torch.cuda.OutOfMemoryError as error:
            raise BudgetError(
                "device memory: the libraries that compute have no room for their workspaces",
                hint="give more with device=, or end what else runs on the device",
            ) from error
        except RuntimeError as error:
            raise DeviceError(
                f"the CUDA device cannot be used: {error}", hint="look at nvidia-smi, or leave device= out"
            ) from error
        self._limit_bytes = limit_bytes
        self._moved = dict.fromkeys(Way, 0)
        self._listener: Listener | None = None
        self._clock: tuple[torch.cuda.Event, float] | None = None
        """An event, and when on the host's clock it was."""

    def start_copy(
        self,
        way: Way,
        target: torch.Tensor,
        source: torch.Tensor,
        *,
        after: Sequence[Transfer] = (),
        label: str,
    ) -> Transfer:
        """A copy on the stream of its way."""
        stream, listener = self._streams[way], self._listener
        try:
            with torch.cuda.stream(stream):
                for transfer in after:
                    transfer.follow()
                begun = self._moment_on(stream) if listener is not None else None
                target.copy_(source, non_blocking=True)
                event = torch.cuda.Event(blocking=True)  # threads that wait leave their core to updates
                event.record(stream)
        except RuntimeError as error:
            raise DeviceError(
                f"{label} cannot be copied {way}: {error}", hint="the device may be lost: see nvidia-smi"
            ) from error
        self._moved[way] += target.nbytes
        if listener is not None and begun is not None:
            listener(way, label, target.nbytes, begun, self._moment_on(stream))
        return _CudaTransfer(event, label)

    def mark(self) -> Transfer:
        """An event on the stream that computes."""
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self.torch_device))
        return _CudaTransfer(event, "computing")

    def zeros(self, num_bytes: int, name: str) -> torch.Tensor:
        """Memory of torch's allocator. Waits: copies on other streams would be overwritten with zeros."""
        try:
            contents = torch.zeros(num_bytes, dtype=torch.uint8, device=self.torch_device)
            torch.cuda.current_stream(self.torch_device).synchronize()
            return contents
        except torch.cuda.OutOfMemoryError as error:
            raise BudgetError(
                f"device memory: {name} needs {format_bytes(num_bytes)}, {format_bytes(self.free_bytes())} are free",
                hint="give less with device=, or end what else runs on the device",
            ) from error

    def pin(self, address: int, num_bytes: int, name: str) -> None:
        """`cudaHostRegister`: exactly these pages, where torch's own pinning rounds up to powers of two."""
        status = torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0)
        if int(status) != 0:
            raise DeviceError(
                f"{name}: {format_bytes(num_bytes)} of host memory cannot be pinned (CUDA error {int(status)})",
                hint="raise the limit of locked memory (ulimit -l unlimited), or give less with host=",
            )

    def unpin(self, address: int) -> None:
        """`cudaHostUnregister`."""
        self.finish()
        torch.cuda.cudart().cudaHostUnregister(address)

    def free_bytes(self) -> int:
        """What the driver has free and torch's allocator keeps, within what the limit leaves beside other tensors."""
        free, _ = torch.cuda.mem_get_info(self.torch_device)
        allocated = torch.cuda.memory_allocated(self.torch_device)
        kept = torch.cuda.memory_reserved(self.torch_device) - allocated
        within = free + kept if self._limit_bytes is None else self._limit_bytes - allocated
        return int(max(0, min(free + kept, within)))

    def taken_bytes(self) -> int:
        """What tensors take now."""
        return int(torch.cuda.memory_allocated(self.torch_device))

    def links(self) -> LinkStats:
        """What was copied so far."""
        return LinkStats(self._moved[Way.UP], self._moved[Way.DOWN])

    def listen(self, listener: Listener | None) -> None:
        """Tell `listener` of each copy when it is given to the device; its times are those of the device."""
        if listener is not None:
            torch.cuda.synchronize(self.torch_device)
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.torch_device))
            event.synchronize()
            self._clock = event, time.perf_counter()
        self._listener = listener

    def moment(self) -> Moment:
        """When the stream that computes has come this far."""
        return self._moment_on(torch.cuda.current_stream(self.torch_device))

    def _moment_on(self, stream: torch.cuda.Stream) -> Moment:
        assert self._clock is not None, "nobody listens"
        first, first_s = self._clock
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record(stream)

        def seconds() -> float:
            event.synchronize()
            return first_s + float(first.elapsed_time(event)) / 1e3

        return seconds

    def rng_state(self) -> torch.Tensor | None:
        """The state of CUDA's generator; kept by the host, so that nothing is waited for."""
        return torch.cuda.get_rng_state(self.torch_device)

    def set_rng_state(self, state: torch.Tensor) -> None:
        """Put a state from `rng_state` back."""
        torch.cuda.set_rng_state(state, self.torch_device)

    def finish(self) -> None:
        """Wait for both streams."""
        for stream in self._streams.values():
            stream.synchronize()


def _take_workspaces(device: torch.device) -> None:
    """Let libraries take what they keep from their first product on, so that what is free from here on stays free."""
    with torch.inference_mode(False), torch.enable_grad():
        value = torch.ones(8, 8, device=device, requires_grad=True, dtype=torch.float32)
        (value @ value).sum().backward()


class _CudaTransfer:
    """Work on a stream, as the event that follows it."""

    def __init__(self, event: torch.cuda.Event, label: str) -> None:
        self._event = event
        self._label = label

    def wait(self) -> None:
        """Block this thread, without the interpreter's lock, until the event."""
        try:
            self._event.synchronize()
        except RuntimeError as error:
            raise DeviceError(
                f"{self._label}: the device failed: {error}", hint="the device may be lost: see nvidia-smi"
            ) from error

    def follow(self) -> None:
        """Let this thread's current stream go on after the event."""
        torch.cuda.current_stream().wait_event(self._event)

    def is_done(self) -> bool:
        """Whether the event has passed."""
        return bool(self._event.query())
