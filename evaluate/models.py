"""
Vision models of transformers and timm, and those in multimodal models, whose language models are not read.

Weights that tokens depend on have to be there; what else a checkpoint has is reported.
"""

import importlib.util
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from ..configuration_sailvit import SAILViTConfig
from ..configuration_sailvl import SAILVLConfig
from ..convert.storage.files import first_line, read_json
from ..convert.storage.names import strip_wrapper_prefixes
from ..convert.storage.sources import check_name, find_source
from ..convert.storage.tensors import StoredTensor, load_float32, torch_name
from ..convert.storage.training_run import open_checkpoint


TIMM = "timm:"
TIMM_FILES = ("model.safetensors", "pytorch_model.bin")  # on the Hub
# Segments of the names under which multimodal models keep their vision encoder: "vision_model.", "model.vision_tower.".
VISION_PREFIX = re.compile(r"((?:\w+\.)*?(?:vision_model|vision_tower|vision_encoder)\.)")
UNUSED = re.compile(r"(^|[._])(classifier|head|pooler|mask_token)([._]|$)")  # names of weights that tokens do without
Log = Callable[[str], None]


def is_timm(name: str) -> bool:
    """Return whether a name is `timm:NAME` or a local folder whose config.json is timm's."""
    config = Path(name, "config.json")
    if name.startswith(TIMM) or not config.is_file():
        return name.startswith(TIMM)
    content = read_json(config)
    return "architecture" in content and "model_type" not in content


def check_model(name: str) -> None:
    """Raise ValueError if there is no such vision model, from its configuration alone."""
    if not is_timm(name):
        read_config(name)
    elif name.startswith(TIMM) and ":" not in name.removeprefix(TIMM):
        _check_timm(name, name.removeprefix(TIMM))


def _check_timm(name: str, model: str) -> None:
    """Check, with one request, that timm has a model with weights; timm itself would retry for a minute."""
    timm = import_timm()
    if not timm.is_model(model.split(".")[0]):
        raise ValueError(f"{name}: timm has no such model: `timm.list_models()` lists them")
    with explained_errors(name, "timm has no such weights, `timm.list_models(pretrained=True)` lists them"):
        config = timm.get_pretrained_cfg(model)
    if config is None or not config.has_weights:
        raise ValueError(
            f"{name}: timm has no weights of it: `timm.list_models(pretrained=True)` lists those with weights"
        )
    source = config.hf_hub_id
    if source and not any(isinstance(try_to_load_from_cache(source, file), str) for file in TIMM_FILES):
        with explained_errors(name, "timm has it, but its weights cannot be downloaded"):
            find_source(source)


def check_source(name: str) -> None:
    """Raise ValueError unless a name is a model folder or a name on the Hub."""
    check_name(name)
    if Path(name).is_file():
        raise ValueError(f"{name}: expected a folder, a name on the Hub or timm:NAME, got a file")
    if not Path(name).exists():
        find_source(name)  # one request; transformers would retry for half a minute if the Hub is unreachable
    elif not Path(name, "config.json").is_file():
        raise ValueError(f"{name}: no config.json, so this is no model folder: `sailvit convert` writes one")


@contextmanager
def explained_errors(name: str, what: str) -> Iterator[None]:
    """Turn what a library raises about a model into a ValueError of one line."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{name}: the weights are truncated or corrupt, download them again: {error}") from error
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{name}: {what}: {first_line(error)}") from error


# timm


def import_timm() -> Any:
    """Return timm. Raises ImportError with what installs it."""
    if not importlib.util.find_spec("timm"):
        raise ImportError('timm is not installed: pip install "sailvit[evaluate]"')
    import timm

    return timm


def timm_name(name: str) -> str:
    """Return what timm calls a model."""
    return name.removeprefix(TIMM) if name.startswith(TIMM) else f"local-dir:{name}"


def load_timm(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """Return a model of timm without its classifier, and what its tokens depend on besides weights."""
    with explained_errors(name, "timm cannot load it, or its weights cannot be downloaded"):
        model = import_timm().create_model(timm_name(name), pretrained=True, num_classes=0)
    folder = Path(timm_name(name).removeprefix("local-dir:"))
    arguments = read_json(folder / "config.json").get("model_args") if folder.is_dir() else None
    return model, {"timm": model.pretrained_cfg.get("architecture"), "model_args": arguments, "modules": repr(model)}


# transformers


def read_config(name: str) -> PretrainedConfig:
    """
    Return the config of a vision model, or of a multimodal model, which has a `vision_config`.

    Raises:
        ValueError: There is no such folder or name, or transformers does not know its model_type.
    """
    check_source(name)
    fields, _ = PretrainedConfig.get_config_dict(name)
    model_type = fields.get("model_type")
    if model_type == "internvl_chat":  # of SAIL-VL releases
        return SAILVLConfig.from_dict(fields)
    if model_type == "aimv2" and "vision_config" not in fields:  # as Apple publishes it
        return SAILViTConfig.from_dict(fields)
    with explained_errors(name, f"transformers has no image encoder of model_type {model_type!r}"):
        return AutoConfig.from_pretrained(name)


def load_transformers(name: str, config: PretrainedConfig, log: Log = lambda line: None) -> PreTrainedModel:
    """
    Return the vision model of a folder or Hub name, on the CPU in its stored dtype.

    Args:
        name: The folder, or the name on the Hub.
        config: Of the folder, as `read_config` returns it.
        log: Called with a line if the vision model was taken from a multimodal model, or tensors are not used.

    Raises:
        ValueError: It is no vision model, or weights are missing or of another shape; the message names them.
    """
    if hasattr(config, "vision_config"):
        model, report = _load_part(name, config.vision_config)
        log(f"the vision part of {name}")
    else:
        with explained_errors(name, "transformers cannot load it as an image encoder"):
            model, report = AutoModel.from_pretrained(
                name, config=config, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
            )
    if "pixel_values" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"{name}: expected an image encoder, got a {type(model).__name__}: name a vision model")
    _check_report(name, report, log)
    return model


def _load_part(name: str, config: PretrainedConfig) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the vision encoder of a multimodal model, and transformers' report; only its tensors are read."""
    tensors, dtype = _read_part(name)
    with explained_errors(name, f"transformers has no image encoder of model_type {config.model_type!r}"):
        model_class = AutoModel._model_mapping[type(config)]
        with torch.device("meta"):
            expected = model_class(config).state_dict().keys()
    # In transformers < 5 the encoder of CLIP and SigLIP alone has this segment in its names, too.
    if any(f"vision_model.{key}" in expected for key in tensors):
        tensors = {f"vision_model.{key}": tensor for key, tensor in tensors.items()}
    with explained_errors(name, "transformers cannot load its image encoder"):
        return model_class.from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )


def _read_part(name: str) -> tuple[dict[str, torch.Tensor], torch.dtype]:
    """Return the tensors of the vision encoder in a multimodal model, without their prefix, and their dtype."""
    checkpoint = open_checkpoint(name)
    stored_names = {strip_wrapper_prefixes(stored): stored for stored in checkpoint.weight_map}
    prefixes = {match[1] for key in stored_names if (match := VISION_PREFIX.match(key))}
    if len(prefixes) != 1:
        found = ", ".join(sorted(prefixes)) or "none"
        raise ValueError(f"{name}: expected the tensors of one vision encoder (vision_model.*, ...), got {found}")
    (prefix,) = prefixes
    own: dict[str, StoredTensor] = {
        key.removeprefix(prefix): checkpoint[stored] for key, stored in stored_names.items() if key.startswith(prefix)
    }
    dtypes = {getattr(torch, torch_name(stored.dtype)) for stored in own.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return {key: load_float32(stored).to(dtype) for key, stored in own.items()}, dtype


def _check_report(name: str, report: Mapping[str, Any], log: Log) -> None:
    """Check that the checkpoint has all weights that tokens depend on; tell what else it has."""
    for kind in ("missing", "mismatched"):
        if wrong := needed_names(report[f"{kind}_keys"]):
            what = f"{len(wrong)} {kind} keys in the weights, such as {wrong[0]}"
            raise ValueError(f"{name}: {what}: convert or download again")
    if extra := needed_names(report["unexpected_keys"]):
        log(f"{name}: {len(extra)} tensors are not of the encoder and are not used, such as {extra[0]}")


def needed_names(keys: Iterable[Any]) -> list[str]:
    """
    Return the names of weights that tokens depend on, not those of heads, in order.

    Args:
        keys: Names, or tuples that begin with one: transformers reports mismatched ones with their shapes.
    """
    names = sorted(key if isinstance(key, str) else key[0] for key in keys)
    return [key for key in names if not UNUSED.search(key)]
