"""What a commit holds of a module beside its parameters: persistent buffers, and what `get_extra_state` gives.

Buffers and tensors of extra state are one safetensors file beside the manifest, which holds its digest; other extra state
is JSON in the manifest. They are those of the moment at which the commit is declared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from outsize.checkpoint.files import to_jsonable
from outsize.errors import CorruptionError, StorageError
from outsize.model.names import persistent_buffers

_EXTRA = "_extra_state"
"""Under which torch's `state_dict` has it, after the module's name."""


@dataclass(frozen=True)
class ModuleState:
    """Tensors by their names in a `state_dict`, and the extra state of modules that JSON can hold."""

    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, module: nn.Module) -> ModuleState:
        """Copies, in the host's memory. Raises StorageError naming a buffer or extra state that cannot be written."""
        tensors = {name: _copied(name, buffer) for name, buffer in persistent_buffers(module).items()}
        extra: dict[str, Any] = {}
        for name, inner in _with_extra_state(module):
            value = inner.get_extra_state()
            if isinstance(value, torch.Tensor):
                tensors[name] = _copied(name, value)
                continue
            extra[name] = to_jsonable(value, f"{name}, the extra state of {type(inner).__name__},")
            if extra[name] != value:
                raise StorageError(
                    f"{name}, the extra state of {type(inner).__name__}, would be read back as another value",
                    hint="return a tensor, or numbers, texts, lists and mappings with texts as keys",
                )
        return cls(tensors, extra)

    def dumps(self) -> bytes:
        """The tensors as a safetensors file."""
        return save(dict(self.tensors))

    @classmethod
    def loads(cls, data: bytes, extra: Mapping[str, Any], path: object) -> ModuleState:
        """The inverse. Raises CorruptionError naming `path`."""
        try:
            return cls(load(data), extra)
        except (SafetensorError, ValueError, KeyError) as error:
            raise CorruptionError(f"{path} is not a safetensors file: {error}") from error

    def check(self, module: nn.Module, what: str) -> None:
        """Raise StorageError where `module` has other buffers, or another shape of one, than `what` holds."""
        wanted = persistent_buffers(module)
        found = {name: value for name, value in self.tensors.items() if not name.endswith(_EXTRA)}
        for name in sorted(wanted.keys() | found.keys()):
            shapes = [None if name not in each else list(each[name].shape) for each in (found, wanted)]
            if shapes[0] != shapes[1]:
                raise StorageError(
                    f"{what} has buffer {name} of shape {shapes[0]}, the model has {shapes[1]}",
                    hint="pass the model that the commit was made of",
                )

    def restore(self, module: nn.Module) -> None:
        """Put all of it into `module`, which `check` has passed, in the types and places that its buffers have."""
        with torch.no_grad():
            for name, buffer in persistent_buffers(module).items():
                buffer.copy_(self.tensors[name])
        for name, inner in _with_extra_state(module):
            value = self.tensors.get(name, self.extra.get(name))
            if value is not None:
                inner.set_extra_state(value)


def digest_of(data: bytes) -> str:
    """As a manifest says it."""
    return xxhash.xxh3_128_hexdigest(data)


def _copied(name: str, value: torch.Tensor) -> torch.Tensor:
    if value.layout is not torch.strided or value.is_quantized:
        raise StorageError(
            f"{name} is a {value.layout} tensor: safetensors holds dense ones",
            hint="register it with persistent=False, or as a dense tensor",
        )
    return value.detach().to("cpu", copy=True).contiguous()


def _with_extra_state(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, inner in module.named_modules():
        if type(inner).get_extra_state is not nn.Module.get_extra_state:
            yield f"{path}.{_EXTRA}" if path else _EXTRA, inner
