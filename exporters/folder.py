# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""Convert a checkpoint to an ONNX folder, as onnx-community and transformers.js have them."""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..convert.conversion import convert_checkpoint
from ..convert.export.card import write_model_card
from ..convert.export.provenance import save_record
from ..convert.storage.errors import CheckpointError
from ..convert.storage.files import hash_file, read_json, write_json
from ..convert.storage.output_folder import final_name, new_folder, sync
from ..convert.storage.sources import PROVENANCE, check_separate
from ..convert.storage.training_run import open_checkpoint
from ..convert.verify.outputs import IMAGE
from ..encode.onnx_model import FILES, FOLDER
from .source import NEEDED_PACKAGES, check_dtypes, check_installed, check_source, load_encoder
from .verify import Reference, photograph, verify_files
from .weights import data_file, process_weights


if TYPE_CHECKING:
    from .graph import ExportedEncoder
    from .verify import Pictures

SCRATCH = "source"  # in the new folder until it is complete
# Entries of the source folder's provenance.json that are about its weights.
OF_WEIGHTS = ("versions", "files", "tensors", "verification", "dtype", "layout")
Log = Callable[[str], None]


def convert_to_onnx(
    source: str | Path,
    out: str | Path,
    *,
    dtypes: Sequence[str] = ("float32",),
    part: str | None = None,
    with_connector: bool = False,
    pictures: "Pictures" = photograph,
    overwrite: bool = False,
    verify: bool = True,
    log: Log = lambda message: None,
    **options: Any,
) -> dict[str, dict[str, Any]] | None:
    """
    Write the vision encoder of a checkpoint to a folder for onnxruntime; return what the verification found.

    Args:
        source: File, folder or name on the Hub: an AIMv2 or SAILViT encoder, or a SAIL-VL with `part`.
        out: The new folder; it is complete or does not exist.
        dtypes: Of the weights, keys of FILES; one file for each. Inputs and outputs are float32.
        part: "vision" for the vision encoder of a SAIL-VL.
        with_connector: Whether the connector of the SAIL-VL is in the files: they have image_embeds, the input of its
            language model, as third output.
        pictures: What int8 is compared on, each as one tile.
        verify: Whether to run the folder in a clean process and compare it with torch.
        log: Called with each progress message.
        options: Of convert_checkpoint: revision, base, average, from_layout, prefix, image_size, trust_pickle.

    Returns:
        File -> its bytes and figure; None if not verified.

    Raises:
        CheckpointError: Invalid source or options; nothing was written.
        VerificationError: The folder does not run, or differs from torch by more than BOUNDS; it was removed.
        ImportError: onnx, onnxscript or onnxruntime is not installed.
    """
    check_installed()
    dtypes = check_dtypes(dtypes)
    opened = {name: options[name] for name in ("revision", "base", "average", "trust_pickle") if options.get(name)}
    checkpoint = open_checkpoint(str(source), **opened)
    check_source(checkpoint, part, with_connector)
    check_separate(Path(out), checkpoint.sources)
    with new_folder(Path(out), overwrite) as folder:
        scratch = folder / SCRATCH
        with _named_as(scratch, out):
            convert_checkpoint(source, scratch, part="vision", dtype="float32", verify=verify, log=log, **options)
            if with_connector:
                connector = scratch / "connector"
                convert_checkpoint(source, connector, part="connector", dtype="float32", verify=False, **opened)
                _record_connector(scratch, connector)
            load = partial(load_encoder, scratch, checkpoint if with_connector else None)
            compared = pictures if "int8" in dtypes else None
            reference = Reference.compute(load(), scratch, compared) if verify else None
        write_files(folder / FOLDER, load, dtypes, log)
        _write_settings(folder, scratch)
        figures = verify_files(folder, reference, log) if reference else None
        _write_record(folder, {"dtype": dtypes, "part": part, "with_connector": with_connector}, figures)
        write_model_card(folder, final_name(folder), revision=None)
    return figures


@contextmanager
def _named_as(scratch: Path, out: str | Path) -> Iterator[None]:
    """Let errors about a folder that is gone afterwards name the output."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(scratch), str(out))) from error


def _record_connector(encoder: Path, connector: Path) -> None:
    """Add to provenance.json of an encoder what was read of its SAIL-VL for the connector, by that one's own."""
    record, added = (read_json(folder / PROVENANCE) for folder in (encoder, connector))
    source, others = record["source"], Counter(record["source"]["dropped"]["others"])
    others[added["source"]["prefix"].split(".")[0]] -= len(added["tensors"])
    source["dropped"]["others"] = dict(+others)
    for name, entry in added["source"]["files"].items():
        own = source["files"].get(name)
        if own and "taken" in own and "taken" in entry:  # bytes
            own["taken"] += entry["taken"]
        elif own is None or "taken" in own:
            source["files"][name] = entry
    write_json(encoder / PROVENANCE, record)


def write_files(folder: Path, load: "Callable[[], ExportedEncoder]", dtypes: Sequence[str], log: Log) -> None:
    """Write an ONNX file for every dtype into a new folder; `load` returns the encoder, in float32."""
    from .graph import write_graph

    folder.mkdir()
    full, half, small = (folder / FILES[dtype] for dtype in ("float32", "float16", "int8"))
    if "float16" in dtypes:
        write_graph(load().half(), half)
        process_weights(half)
    if {"float32", "int8"} & {*dtypes}:
        write_graph(load(), full)
        process_weights(full, small if "int8" in dtypes else None, join="float32" in dtypes)
    if full.exists() and "float32" not in dtypes:
        full.unlink()
        data_file(full).unlink()
    for path in sorted(folder.iterdir()):
        sync(path)
        log(f"{FOLDER}/{path.name}: {path.stat().st_size / 1e6:.1f} MB")


def _write_settings(folder: Path, scratch: Path) -> None:
    """Move all but the weights of the source folder; config.json says which files have external data."""
    for path in sorted(scratch.iterdir()):
        if path.is_file() and not path.name.startswith("model.safetensors"):
            path.rename(folder / path.name)
    shutil.rmtree(scratch)
    if external := [path.name.removesuffix("_data") for path in sorted((folder / FOLDER).glob("*_data"))]:
        config = read_json(folder / "config.json")
        formats = {"use_external_data_format": dict.fromkeys(external, True)}
        write_json(folder / "config.json", {**config, "transformers.js_config": formats})


def _write_record(folder: Path, options: Mapping[str, Any], figures: dict[str, dict[str, Any]] | None) -> None:
    """Write provenance.json, in place of that of the source folder, whose entries about the source it keeps."""
    from .graph import IR_VERSION, OPSET

    before = read_json(folder / PROVENANCE)
    content = {name: entry for name, entry in before.items() if name not in OF_WEIGHTS}
    graph = {
        "opset": OPSET,
        "ir_version": IR_VERSION,
        **{name: import_module(name).__version__ for name in NEEDED_PACKAGES},
    }
    content |= {
        "options": {**before["options"], "to_layout": "onnx", **options},
        "layout": "onnx",
        "dtype": options["dtype"],
        "onnx": graph,
        "verification": figures
        and {"reference": "SAILViTModel in torch, float32", "picture": IMAGE.name, "files": figures},
    }
    files = {f"{FOLDER}/{path.name}": {"sha256": hash_file(path)} for path in sorted((folder / FOLDER).iterdir())}
    save_record(folder, content, files, {})
