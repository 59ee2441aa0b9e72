"""Opening and saving models: what a user calls first and last."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from enum import StrEnum
from pathlib import Path
from typing import ParamSpec, TypedDict, TypeVar, Unpack

import torch
from torch import nn

from outsize.config import (
    HOME_CHOICES,
    Budgets,
    ComputeType,
    Disk,
    Home,
    OnDeviceFull,
    Pins,
    Settings,
    format_bytes,
)
from outsize.engine.methods import take_methods_over, write_model
from outsize.engine.placeholder import OffloadedParameter
from outsize.engine.rng_autocast import outside_inference_mode
from outsize.engine.runtime import Runtime, runtime_of
from outsize.errors import ConfigError, ModelError, UsageError
from outsize.model import (
    Existing,
    InitSource,
    SafetensorsSource,
    Source,
    TensorSource,
    cut,
    encoded,
    find_weights,
    main_dtype,
    open_skeleton,
    parse_weights,
    plain_defaults,
    resolve_folder,
    stored_weights,
)
from outsize.native import native_compute_type
from outsize.plan.profile import Profile
from outsize.store import memory
from outsize.store.planes import DTYPES
from outsize.store.scratch import packed_places
from outsize.tier import CudaDevice, Device, HostDevice

P = ParamSpec("P")
R = TypeVar("R")
E = TypeVar("E", bound=StrEnum)


class Options(TypedDict, total=False):
    """Keywords that every function that opens a model takes; `settings_of` parses them."""

    device: str | int | None
    host: str | int | None
    disk: Disk | None
    home: str | None
    dtype: str | torch.dtype | None
    pins: Pins | None
    on_device_full: str
    compile: bool | None


def settings_of(
    default: ComputeType | None = None,
    *,
    device: str | int | None = None,
    host: str | int | None = None,
    disk: Disk | None = None,
    home: str | None = None,
    dtype: str | torch.dtype | None = None,
    pins: Pins | None = None,
    on_device_full: str = "error",
    compile: bool | None = None,
) -> Settings:
    """Parse the options of a function that opens a model: the only place where they become `Settings`.

    Without `dtype` the compute type is `default`, else the one that this machine computes fastest. Raises ConfigError
    naming an option that is malformed or contradicts another.
    """
    pins = pins or Pins()
    for text, needs_folder in (
        ('home="disk"', home == Home.DISK),
        ('Pins(inputs="disk")', pins.inputs == Home.DISK),
    ):
        if needs_folder and disk is None:
            raise ConfigError(f"{text} without a folder", hint='give one with disk="/path/on/an/ssd"')
    if dtype is None:
        compute_type = default or native_compute_type()
    else:
        compute_type = _one_of(list(ComputeType), "dtype", str(dtype).removeprefix("torch."), given=dtype)
    return Settings(
        Budgets.parse(device, host, disk),
        None if home is None else _one_of(HOME_CHOICES, "home", home),
        compute_type,
        pins,
        on_device_full=_one_of(list(OnDeviceFull), "on_device_full", on_device_full),
        compile=compile,
    )


def _one_of(choices: Collection[E], name: str, value: str, given: object = None) -> E:
    for choice in choices:
        if choice == value:
            return choice
    raise ConfigError(f"{name}={(value if given is None else given)!r}", hint=f"one of {', '.join(choices)}")


def settings_for_folder(
    options: Options, *, is_quantized: bool, default: ComputeType | None = None
) -> Settings:
    """As `settings_of`; quantized weights compute in bfloat16. Raises ConfigError for any other type."""
    settings = settings_of(ComputeType.BFLOAT16 if is_quantized else default, **options)
    if is_quantized and settings.compute_type is not ComputeType.BFLOAT16:
        raise ConfigError(
            f'dtype="{settings.compute_type}" with weights in few bits',
            hint="leave dtype= out: they are multiplied in bfloat16",
        )
    return settings


def check_machine(settings: Settings) -> None:
    """Raise ConfigError if `settings` name a device or a folder that this machine does not have."""
    num_bytes = settings.budgets.device_bytes
    if num_bytes is not None and not torch.cuda.is_available():
        raise ConfigError(
            f"device={format_bytes(num_bytes)}: this machine has no CUDA device", hint="leave device= out"
        )
    settings.budgets.check_folders()


def spells_out(
    source: Callable[..., object], *, without: Collection[str] = ()
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let `inspect.signature` and `help()` show the keywords of `source` in the place of a function's `**options`."""
    keywords = [
        each
        for each in inspect.signature(source).parameters.values()
        if each.kind is each.KEYWORD_ONLY and each.name not in without
    ]

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
        shown = sorted([*own, *keywords], key=lambda each: each.kind)
        function.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
        return function

    return decorate


@spells_out(settings_of)
@plain_defaults()
@outside_inference_mode()
def load(
    path: str | Path,
    *,
    weights: str | None = None,
    attention: str | None = None,
    profile: Profile | None = None,
    from_scratch: bool = False,
    seed: int = 0,
    trust_remote_code: bool = False,
    **options: Unpack[Options],
) -> nn.Module:
    """Open the Hugging Face model in folder `path` without reading its weights.

    `host` is a ceiling on the whole process, such as "3GiB"; `disk` a folder on an SSD, optionally with a size
    ("/scratch:200GiB"), or a list of folders on several drives, which are used side by side; without budgets, what is
    free now is used. `home` pins where weights and state live, `dtype` the compute type, `pins` anything else. With a
    `profile` of the machine (`outsize.hardware.kept`) the fastest of the plans that fit is taken, which takes a few
    seconds at the first call. With `on_device_full="retry"` a call that runs out of the device's memory goes on by
    itself: what failed is computed again in less. `compile=True` runs layers through `torch.compile`, one compilation
    for all that are alike; None: as the run did that is resumed, or else not. `attention` names an implementation of
    transformers, such as "flash_attention_2"; None: that of the model's config, or else torch's own.

    `from_scratch=True` reads no weights: the model that `config.json` describes gets random ones by its own rules, drawn
    from `seed`. Otherwise a folder without weights in safetensors is refused.

    `weights="int4"` or "int8" packs the matrices of layers, for generating text. They are encoded once: as they are read
    where all stay in memory, else at the first call, into a cache (`outsize-packed` in `disk`, or
    `$OUTSIZE_CACHE/packed` with at most `$OUTSIZE_CACHE_LIMIT`). Nothing in such a model trains.

    Raises ModelError, WeightsError or ConfigError before anything is read.
    """
    folder = resolve_folder(path)
    wanted, stored = parse_weights(weights), stored_weights(folder)
    if not from_scratch:
        find_weights(folder)
    elif stored is not None:
        raise ConfigError(
            f"from_scratch=True, and the weights of {folder} are in {stored}",
            hint="pass the folder of the original model",
        )
    settings = settings_for_folder(options, is_quantized=wanted is not None or stored is not None)
    check_machine(settings)
    module = open_skeleton(
        folder, DTYPES[settings.compute_type], trust_remote_code=trust_remote_code, attention=attention
    )
    source: Source = InitSource(module, seed) if from_scratch else SafetensorsSource(folder, module)
    if wanted is not None and wanted is not stored:
        if stored is not None:
            raise ConfigError(
                f'weights="{wanted}", and those of {folder} are in {stored} already',
                hint="leave weights= out",
            )
        source = encoded(module, source, wanted, packed_places(settings))
    return _take_over(module, source, settings, profile)


@spells_out(settings_of)
@plain_defaults()
@outside_inference_mode()
def wrap(
    module: nn.Module, *, profile: Profile | None = None, seed: int = 0, **options: Unpack[Options]
) -> nn.Module:
    """Put any module with repeated blocks under Outsize, in place, and return it.

    Its parameters' values are taken over (initialised from `seed` where all are on meta). They must be fp32 or bf16; in
    a module with both, those in fp32 stay in fp32 whatever `dtype` is. Budgets as in `load`.

    Raises ModelError, UsageError or ConfigError, naming the parameter, before anything is changed.
    """
    _check_types(module)
    is_bfloat16 = main_dtype(module) is torch.bfloat16
    settings = settings_of(ComputeType.BFLOAT16 if is_bfloat16 else ComputeType.FLOAT32, **options)
    check_machine(settings)
    parameters = dict(module.named_parameters())
    if any(isinstance(parameter, OffloadedParameter) for parameter in parameters.values()):
        raise UsageError(f"{type(module).__name__} is under Outsize already", hint="wrap a module once")
    on_meta = [name for name, parameter in parameters.items() if parameter.is_meta]
    if on_meta and len(on_meta) < len(parameters):
        raise ModelError(
            f"{len(on_meta)} of {len(parameters)} parameters are on meta, such as {on_meta[0]}",
            hint="give all parameters values, or none",
        )
    if any(parameter.is_meta for parameter in parameters.values()):
        return _take_over(module, InitSource(module, seed), settings, profile)
    values = {name: parameter.detach() for name, parameter in parameters.items()}
    return _take_over(module, TensorSource(values), settings, profile)


def _check_types(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if parameter.dtype not in DTYPES.values():
            raise ModelError(
                f"parameter {name} has type {parameter.dtype}, expected float32 or bfloat16",
                hint="convert the module first: module.float() or module.bfloat16()",
            )


@outside_inference_mode()
def save(
    model: nn.Module,
    path: str | Path,
    *,
    overwrite: bool = False,
    tokenizer_from: str | Path | None = None,
    watch: Callable[[int, int], object] | None = None,
) -> None:
    """Write `model` as an ordinary Hugging Face folder, up to date with every `step()`, in memory of about a block.

    A model whose weights are packed is written so, for `load` to open. Of a model that peft wrapped the adapters are
    written, as peft does, for `PeftModel.from_pretrained`. With `overwrite` the folder may hold an earlier model, whose
    files are replaced; other files in it stay. `watch` is called with the number of each block as it begins, from 1, and
    how many there are.

    Raises UsageError where the folder is not empty, or a part of the model was replaced since it was opened;
    StorageError and StorageFullError where the disk fails, and then an earlier model in the folder is whole.
    """
    write_model(
        runtime_of(model),
        Path(path),
        existing=Existing.UPDATE if overwrite else Existing.REFUSE,
        tokenizer_from=tokenizer_from,
        watch=watch,
    )


def _take_over(module: nn.Module, source: Source, settings: Settings, profile: Profile | None) -> nn.Module:
    memory.keep_freed_memory()
    memory.bound_kernel_caches()
    Runtime(module, cut(module), source, settings, open_device(settings), profile)
    take_methods_over(module)
    return module


def open_device(settings: Settings) -> Device:
    """Where blocks compute: the first CUDA device where there is one, else the host. Raises DeviceError."""
    return CudaDevice(settings.budgets.device_bytes) if torch.cuda.is_available() else HostDevice()
