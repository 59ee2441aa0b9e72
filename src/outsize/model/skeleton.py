"""Opening a model without its weights: parameters on meta, buffers for real.

A model class is built as its own code says, while parameters are sent to the meta device. Buffers hold
constants that no checkpoint has (rotary frequencies, position ids, attention masks), so they are computed,
unlike with `torch.device("meta")`. Two things keep this cheap: torch's and the model's own random
initialisation do nothing, and a large `torch.empty` goes to meta before it is allocated. Where a model fills
such a tensor to make a buffer of it, the model is built once more with those allocations left alone: memory
that is never written costs address space only.

The idea of moving parameters while they are registered is from accelerate's `init_empty_weights`.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from transformers.initialization import no_init_weights

from outsize.errors import ModelError
from outsize.model.attention import choose
from outsize.model.names import full_precision_names
from outsize.model.quantized import is_ours, restore

_LARGE = 1 << 16
"""Elements from which `torch.empty` is sent to meta."""

_COMPUTED = (torch.float32, torch.bfloat16)

_CONSTRUCTED: weakref.WeakKeyDictionary[nn.Module, dict[str, torch.Tensor]] = weakref.WeakKeyDictionary()


_constructing = threading.RLock()


@contextmanager
def plain_defaults() -> Iterator[None]:
    """Inside, new tensors are fp32 and in the host's memory unless the code says otherwise, as in a new process.

    The default type is the whole process's, and transformers changes it too, with torch's init functions, while it
    constructs a model. So one thread at a time is inside: for code that constructs models, not for code that runs them.
    """
    with _constructing, torch.device("cpu"):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def resolve_folder(path: str | Path) -> Path:
    """The local folder of a model: `path` itself, or the cached files of the hub id `path`. Never uses the
    network.

    Raises ModelError where there is no such folder, no such id in the cache, or no `config.json` in it.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if folder.exists():
            raise ModelError(
                f"{path} is a file, expected a folder", hint="pass the folder that holds config.json"
            )
        folder = _cached_snapshot(str(path))
    if not (folder / "config.json").is_file():
        raise ModelError(f"no config.json in {folder}", hint="pass a folder written by save_pretrained")
    return folder


def constructed_values(module: nn.Module) -> Mapping[str, torch.Tensor]:
    """Values that constructors gave to small parameters of a skeleton, by the parameters' first names.

    Most are constants (a scale of ones); a few activations and gates start from values that no
    `_init_weights` sets again.
    """
    return _CONSTRUCTED.get(module, {})


def _cached_snapshot(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError, ValueError):
        raise ModelError(
            f"no folder {name}, and no model of that name in the local cache",
            hint=f"pass an existing folder, or fetch the model first: hf download {name}",
        ) from None


def open_skeleton(
    path_or_config: str | Path | transformers.PreTrainedConfig,
    dtype: torch.dtype,
    *,
    trust_remote_code: bool = False,
    attention: str | None = None,
) -> nn.Module:
    """Build the model that a folder, a cached hub id, or a config describes: parameters on meta, buffers
    real.

    All parameters have type `dtype`, tied ones are one object, the model is in eval mode, and has the
    folder's generation settings. Random numbers are neither drawn nor reset. Code that comes with the model
    runs only with `trust_remote_code`; `attention` names an implementation (None: see `attention`). Raises ModelError
    where the model cannot be found, is unknown, or quantised by others, ConfigError for an attention that cannot be used.
    """
    folder: Path | None = None
    if isinstance(path_or_config, transformers.PreTrainedConfig):
        config = copy.deepcopy(path_or_config)
    else:
        folder = resolve_folder(path_or_config)
        config = _read_config(folder, trust_remote_code)
    settings = getattr(config, "quantization_config", None)
    if settings is not None:
        if not is_ours(settings):
            raise ModelError(
                f"{config.model_type}: the checkpoint is quantised, in a way that is not known here",
                hint='use the original checkpoint of this model, to generate with weights="int4" or "int8"',
            )
        del config.quantization_config
    model_class = _model_class(config, folder, trust_remote_code)
    choose(config, model_class, dtype, attention)
    module = _build(model_class, config, dtype)
    if settings is not None:
        restore(module, settings)
    if folder is not None and module.can_generate() and (folder / "generation_config.json").is_file():
        module.generation_config = transformers.GenerationConfig.from_pretrained(
            folder, local_files_only=True
        )
    if folder is not None:
        module.config.name_or_path = str(folder)
    result: nn.Module = module.eval()
    return result


def longest_sequence(module: nn.Module) -> int | None:
    """How many positions `module` has for text; None where its config tells of no end."""
    config: Any = module.config
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else None


def _read_config(folder: Path, trust_remote_code: bool) -> transformers.PreTrainedConfig:
    try:
        return transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        first_line = str(error).strip().split("\n")[0]
        hint = "this release knows the models of the installed transformers"
        if "trust_remote_code" in str(error):
            hint = "if you trust the code in that folder, pass trust_remote_code=True"
        elif "valid JSON" in first_line:
            hint = "the file is damaged or cut off: copy it again"
        raise ModelError(f"cannot read {folder / 'config.json'}: {first_line}", hint=hint) from error


def _model_class(config: transformers.PreTrainedConfig, folder: Path | None, trust_remote_code: bool) -> Any:
    names = config.architectures or []
    remote = getattr(config, "auto_map", None) or {}
    if trust_remote_code and folder is not None:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        for reference in remote.values():
            reference = reference[0] if isinstance(reference, list) else reference
            if names and reference.rpartition(".")[2] == names[0]:
                return get_class_from_dynamic_module(reference, folder, local_files_only=True)
    if names:
        found = getattr(transformers, names[0], None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
        raise ModelError(
            f"unknown architecture {names[0]!r} (model type {config.model_type!r})",
            hint="if the folder brings its own code and you trust it, pass trust_remote_code=True"
            if remote
            else f"transformers {transformers.__version__} does not have it; another version may",
        )
    mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in mapping:
        raise ModelError(
            f"the config names no architecture, and {config.model_type!r} is no causal language model",
            hint='set "architectures" in config.json to the name of the model class',
        )
    found = mapping[type(config)]
    return found[0] if isinstance(found, (list, tuple)) else found


def _build(model_class: Any, config: transformers.PreTrainedConfig, dtype: torch.dtype) -> Any:
    try:
        module = _construct(model_class, config, dtype, large_on_meta=True)
        again = bool(_meta_buffers(module))
    except (RuntimeError, NotImplementedError):
        again = True
    if again:
        try:
            module = _construct(model_class, config, dtype, large_on_meta=False)
        except Exception as error:
            raise ModelError(f"{model_class.__name__} cannot be built from its config: {error}") from error
    if names := _meta_buffers(module):
        raise ModelError(f"{model_class.__name__}: buffer {names[0]} cannot be computed without the weights")
    return module


def _construct(
    model_class: Any, config: transformers.PreTrainedConfig, dtype: torch.dtype, *, large_on_meta: bool
) -> Any:
    config = copy.deepcopy(config)
    with ExitStack() as stack:
        stack.enter_context(plain_defaults())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(no_init_weights())
        construction = stack.enter_context(_parameters_on_meta(dtype))
        stack.enter_context(_EmptyIsUnset(large_on_meta))
        module = model_class._from_config(config, dtype=dtype)
    _keep_full_precision(module, construction)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        _initialise_buffers(module)
        module.tie_weights()
    values = construction.values
    _CONSTRUCTED[module] = {
        name: values[parameter] for name, parameter in module.named_parameters() if parameter in values
    }
    return module


def _keep_full_precision(module: nn.Module, construction: _Construction) -> None:
    """Give parameters and buffers that stay in fp32 that type. Raises ModelError for a type that nothing computes in."""
    for name, parameter in module.named_parameters():
        if parameter in construction.unknown:
            raise ModelError(
                f"{type(module).__name__}: parameter {name} is made in {construction.unknown[parameter]}",
                hint="Outsize computes in float32 and bfloat16: this model cannot be loaded",
            )
    names = full_precision_names(module)
    found: dict[nn.Parameter, nn.Parameter] = {}
    for path, inner in module.named_modules(remove_duplicate=False):
        for name, owned in inner._parameters.items():
            if owned is not None and owned.is_floating_point() and owned.dtype is not torch.float32:
                if owned not in found and (f"{path}.{name}" if path else name) in names:
                    found[owned] = _as_fp32(owned)
                    if owned in construction.values:
                        construction.values[found[owned]] = construction.values.pop(owned)
                inner._parameters[name] = found.get(owned, owned)
        for name, buffer in inner._buffers.items():
            if (
                buffer is not None
                and buffer.is_floating_point()
                and (f"{path}.{name}" if path else name) in names
            ):
                inner._buffers[name] = buffer.float()


def _as_fp32(parameter: nn.Parameter) -> nn.Parameter:
    wide = nn.Parameter(parameter.data.float(), requires_grad=parameter.requires_grad)
    vars(wide).update(vars(parameter))
    return wide


def _meta_buffers(module: nn.Module) -> list[str]:
    return [name for name, buffer in module.named_buffers() if buffer.is_meta]


def _initialise_buffers(module: Any) -> None:
    """Run the models' own `_init_weights`: some buffers get their values there. On a meta parameter it does
    nothing."""

    def visit(current: nn.Module, initialise: Any) -> None:
        if isinstance(current, transformers.PreTrainedModel):
            initialise = current._init_weights
        for child in current.children():
            visit(child, initialise)
        try:
            initialise(current)
        except Exception as error:
            # A module without buffers only wanted its parameters, which a Source fills later.
            if any(True for _ in current.buffers(recurse=False)):
                raise ModelError(
                    f"{type(module).__name__}: "
                    f"the buffers of {type(current).__name__} cannot be computed: {error}"
                ) from error

    visit(module, module._init_weights)


class _Construction:
    """What is known of the parameters that one thread is constructing: they go to meta, in `dtype`.

    One that a constructor makes in fp32 itself stays fp32, as it does in transformers.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.values: dict[nn.Parameter, torch.Tensor] = {}
        """Of small parameters, the values that they were given."""
        self.unknown: dict[nn.Parameter, torch.dtype] = {}
        """Parameters of a type that blocks do not compute in."""

    def moved(self, parameter: nn.Parameter) -> nn.Parameter | None:
        """What takes the place of `parameter`; None where it stays as it is."""
        kept = not parameter.is_floating_point() or parameter.dtype is torch.float32
        dtype = parameter.dtype if kept else self.dtype
        if parameter.is_meta and parameter.dtype == dtype:
            return None
        data = torch.empty_like(parameter.data, device="meta", dtype=dtype)
        moved = nn.Parameter(data, requires_grad=parameter.requires_grad)
        vars(moved).update(vars(parameter))
        if parameter.is_floating_point() and parameter.dtype not in (self.dtype, *_COMPUTED):
            self.unknown[moved] = parameter.dtype
        if not parameter.is_meta and 0 < parameter.numel() < _LARGE and not bool(parameter.isnan().any()):
            first = parameter.detach().flatten()[:1]
            constant = bool((parameter == first).all())
            value = first[0].clone().expand(parameter.shape) if constant else parameter.detach().clone()
            self.values[moved] = value
        return moved


_current = threading.local()


def _register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    construction: _Construction | None = getattr(_current, "construction", None)
    return construction.moved(parameter) if construction is not None and parameter is not None else None


# Registered once and never removed: torch iterates over its hooks in every thread that constructs a module. It does
# nothing in a thread that is not inside `_parameters_on_meta`.
register_module_parameter_registration_hook(_register)  # type: ignore[arg-type]  # torch says None


@contextmanager
def _parameters_on_meta(dtype: torch.dtype) -> Iterator[_Construction]:
    """Parameters that this thread registers go to meta."""
    _current.construction = construction = _Construction(dtype)
    try:
        yield construction
    finally:
        _current.construction = None


class _EmptyIsUnset(TorchFunctionMode):
    """`torch.empty` gives NaN, so that what is never set shows; large ones go to meta before they are
    allocated."""

    def __init__(self, large_on_meta: bool) -> None:
        super().__init__()
        self.large_on_meta = large_on_meta

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not torch.empty or kwargs.get("device") is not None:
            return func(*args, **kwargs)
        size = kwargs.get("size", args[0] if args and not isinstance(args[0], int) else args)
        if torch.Size((size,) if isinstance(size, int) else size).numel() >= _LARGE:
            return func(*args, **kwargs | ({"device": "meta"} if self.large_on_meta else {}))
        value = func(*args, **kwargs)
        return value.fill_(float("nan")) if value.is_floating_point() else value
