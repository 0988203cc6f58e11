"""Find the user's network by name, and load its weights.

Six forms: "package.module:function", "path/to/file.py:function", "timm:resnet18", "torchvision:resnet18", "hf:name" or
"hf:path/to/folder" for an image classifier of Hugging Face with its weights, and "onnx:path/to/file.onnx" with its weights.
Weights come as safetensors, or as torch saves state dicts; nothing in a file is run.
"""

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from bitscape.errors import BitscapeError, nearest
from bitscape.files import write_atomic
from bitscape.models.saved import read_weights, renamed

_FORMS = '"package.module:function", "path/to/file.py:function", "timm:name", "torchvision:name", "hf:name" or "onnx:file"'
_NMS_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
# A library's operators vanish when the object that declared them does.
_declared: list[torch.library.Library] = []


def find_model(name: str, **kwargs: Any) -> nn.Module:
    """Return the network that `name` builds; `kwargs` go to the function that builds it.

    The working directory is importable meanwhile. Raises BitscapeError when nothing of that name exists, its import
    fails, or it returns no nn.Module; an error inside the building function itself passes through.
    """
    source, _, model = name.partition(":")
    if source in _ZOOS and model:
        return _built(name, _ZOOS[source](model, kwargs))
    module, _, function = name.rpartition(":")
    if not module or not function:
        raise BitscapeError(f"name: {name!r} names no network; write {_FORMS}")
    with _importable(Path.cwd()):
        build = _builder(_user_module(module), function)
        _check_arguments(name, build, kwargs)
        return _built(name, build(**kwargs))


def import_torchvision() -> ModuleType:
    """Return torchvision, also where its compiled part cannot load; timm must be imported after it.

    The published wheel is linked to CUDA. Beside a CPU-only torch its operators stay undeclared and the import fails
    on two missing schemas; declaring these is all that classification networks need. `torchvision.ops.nms` stays
    unusable there. Raises BitscapeError when torchvision is not installed.
    """
    try:
        return _optional("torchvision")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    for module in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[module]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(operator + _NMS_SCHEMA)
    _declared.append(library)
    return _optional("torchvision")


def save_weights(state: Mapping[str, Tensor], path: Path) -> None:
    """Write a state dict as a safetensors file, as `load_weights` reads it; what shares memory is written twice."""
    write_atomic(path, save({name: value.detach().cpu().contiguous().clone() for name, value in state.items()}))


def load_weights(model: nn.Module, path: Path | str) -> None:
    """Copy the tensors of a file into `model`, by name: safetensors, or a state dict that torch saved, also within a training checkpoint.

    A prefix that all names share, such as "module.", may be too many. Only `num_batches_tracked` counters may be absent or too
    many, and a tensor shared by several names may be stored under one. Raises BitscapeError for an unreadable file, missing or
    unexpected names and wrong shapes; what fits may have been copied by then.
    """
    state = model.state_dict(keep_vars=True)
    weights = renamed(read_weights(Path(path)), state)
    other = [text for name in weights if name in state for text in _other_kind(name, weights[name], state[name])]
    _complain(path, "of another kind", other)
    try:
        result = load_state(model, weights, strict=False)
    except RuntimeError as error:
        raise BitscapeError(f"path: {str(path)!r} does not fit the network; {' '.join(str(error).split())}") from error
    loaded = {id(state[key]) for key in state.keys() - set(result.missing_keys)}
    missing = [key for key in result.missing_keys if id(state[key]) not in loaded]
    _complain(path, "missing in the file", _uncounted(missing), result.unexpected_keys)
    _complain(path, "not in the network", _uncounted(result.unexpected_keys), state)


def load_state(model: nn.Module, weights: Mapping[str, Tensor], *, strict: bool = True) -> Any:
    """`model.load_state_dict` for weights from a file; buffers that are expanded views get memory of their own.

    Files keep no version, and some modules ask which one a state dict has: it is the network's own.
    """
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and any(stride == 0 and size > 1 for stride, size in zip(buffer.stride(), buffer.shape, strict=True)):
                module._buffers[name] = buffer.clone()  # torch writes no element that stands for several
    versioned = OrderedDict(weights)
    versioned._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]  # how torch keeps versions
    return model.load_state_dict(versioned, strict=strict)


def _check_arguments(name: str, build: Callable[..., Any], kwargs: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(build)
    except ValueError:  # some built-in functions tell of none
        return
    try:
        signature.bind(**kwargs)
    except TypeError as error:
        raise BitscapeError(f"name: {name!r} cannot be called: {error}; name a function that builds the network by itself") from None


def _timm(model: str, kwargs: dict[str, Any]) -> Any:
    import_torchvision()
    timm = _optional("timm")
    on_hub = ":" in model or "/" in model
    if not on_hub and not timm.is_model(model):
        raise BitscapeError(f"name: timm has no model {model!r}{nearest(model, timm.list_models())}")
    return timm.create_model(model, **kwargs)


def _torchvision(model: str, kwargs: dict[str, Any]) -> Any:
    models = import_torchvision().models
    if model not in (known := models.list_models()):
        raise BitscapeError(f"name: torchvision has no model {model!r}{nearest(model, known)}")
    # Some builders download weights of a backbone unless they are told not to.
    options = inspect.signature(models.get_model_builder(model)).parameters
    kwargs = {**{name: None for name in ("weights", "weights_backbone") if name in options}, **kwargs}
    return models.get_model(model, **kwargs)


def _huggingface(model: str, kwargs: dict[str, Any]) -> Any:
    with suppress(BitscapeError):  # need not be there; where it is, transformers imports it
        import_torchvision()
    transformers = _optional("transformers", "huggingface")
    try:
        network = transformers.AutoModelForImageClassification.from_pretrained(
            model, use_safetensors=True, trust_remote_code=False, local_files_only=Path(model).is_dir(), **kwargs
        )
    except (OSError, ValueError) as error:
        raise BitscapeError(
            f"name: transformers cannot load hf:{model}; it must be an image classifier with safetensors weights: {error}"
        ) from error
    return _with_logits_alone(network)


def _with_logits_alone(network: nn.Module) -> nn.Module:
    """Make the network return its logits as every other does. Its class changes, not its layers: a wrapper would rename them."""
    kind = type(network)

    def forward(self: nn.Module, pixel_values: Tensor) -> Tensor:
        logits: Tensor = kind.forward(self, pixel_values).logits
        return logits

    network.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    return network


def _onnx(path: str, kwargs: dict[str, Any]) -> Any:
    from bitscape.models.onnx_input import read_onnx

    if kwargs:
        raise BitscapeError(f"name: onnx:{path} is read as it is; leave out {', '.join(kwargs)}")
    return read_onnx(path)


_ZOOS: dict[str, Callable[[str, dict[str, Any]], Any]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "hf": _huggingface,
    "onnx": _onnx,
}


def _optional(package: str, extra: str = "vision") -> ModuleType:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise BitscapeError(f"name: {package} is not installed; run `pip install 'bitscape[{extra}]'`") from None


def _built(name: str, model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise BitscapeError(f"name: {name!r} returned {type(model).__name__}; it must return an nn.Module")
    return model


def _builder(module: ModuleType, function: str) -> Callable[..., Any]:
    found = getattr(module, function, None)
    if found is None:
        public = [known for known in vars(module) if not known.startswith("_")]
        raise BitscapeError(f"name: module {module.__name__!r} has no {function!r}{nearest(function, public)}")
    if isinstance(found, nn.Module) or not callable(found):
        kind = type(found).__name__
        raise BitscapeError(f"name: {function!r} is a {kind}; name a function or class that returns the network")
    return found  # type: ignore[no-any-return]  # a module's attributes are untyped


def _user_module(where: str) -> ModuleType:
    is_file = where.endswith(".py")
    if is_file and not Path(where).is_file():
        raise BitscapeError(f"name: no file {where!r} in {Path.cwd()}; write {_FORMS}")
    try:
        return _module_of_file(Path(where).resolve()) if is_file else importlib.import_module(where)
    except (ImportError, SyntaxError, ValueError) as error:
        hint = "" if is_file else "; the working directory and installed packages were searched"
        raise BitscapeError(f"name: {where!r} cannot be imported: {error}{hint}") from error


def _module_of_file(path: Path) -> ModuleType:
    """Import a file that may lie outside any package, with its folder importable for its neighbours."""
    # The path's hash keeps two files of one name apart; dataclasses and pickle look the module up in sys.modules.
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with _importable(path.parent):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    before = sys.path.copy()
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = before


def _other_kind(name: str, found: Tensor, own: Tensor) -> list[str]:
    """What torch copies without a word: whole numbers for fractions and back; what modules keep beside tensors, in any shape."""
    extra = name.rpartition(".")[2] == "_extra_state" and found.shape != own.shape
    if not extra and found.is_floating_point() == own.is_floating_point():
        return []
    kinds = [f"{value.dtype} of shape {tuple(value.shape)}" for value in (found, own)]
    return [f"{name} is {kinds[0]}, in the network {kinds[1]}"]


def _uncounted(names: list[str]) -> list[str]:
    """The names that are no counters."""
    return [name for name in names if not name.endswith("num_batches_tracked")]


def _complain(path: Path | str, what: str, items: list[str], options: Iterable[str] = ()) -> None:
    """Raise BitscapeError if there are items; the first are named, each with the nearest of the options."""
    if items:
        named = ", ".join(item + nearest(item, options) for item in items[:5])
        more = f", and {len(items) - 5} more" if len(items) > 5 else ""
        raise BitscapeError(f"path: {str(path)!r} does not fit the network; {what}: {named}{more}")
