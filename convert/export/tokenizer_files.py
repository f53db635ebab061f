"""The tokenizer's files, so that every supported transformers reads them without remote code."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..storage.checkpoint import Checkpoint
from ..storage.errors import CheckpointError
from ..storage.files import first_line, read_json, write_json


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...configuration_sailvl import SAILVLConfig

TOKENIZER_FILES = (
    "added_tokens.json", "merges.txt", "special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json", "vocab.json", "vocab.txt",
)  # fmt: skip

VOCABULARIES = {"tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt"}
END_OF_TURN = "<|im_end|>"


def copy_tokenizer(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """
    Copy the source's tokenizer, without code of its own, for a model that generates; return the names of its files.

    Raises:
        CheckpointError: It cannot be loaded without that code.
    """
    files = [file for file in TOKENIZER_FILES if file in checkpoint.source.files]
    for file in files:
        shutil.copyfile(checkpoint.source.path(file), folder / file)
    if "auto_map" in checkpoint.document("tokenizer_config.json") and "tokenizer.json" not in files:
        what = "the tokenizer is custom code (auto_map in tokenizer_config.json): add a tokenizer.json"
        raise CheckpointError(f"{checkpoint.source.name}: {what}")
    if VOCABULARIES & {*files}:
        mark_tokenizer(folder)
    return files


def load_tokenizer(checkpoint: Checkpoint, folder: Path) -> "PreTrainedTokenizerBase":
    """
    Copy the source's tokenizer to a folder and load it there: without the source's config.json, so without its code.

    Raises:
        CheckpointError: It does not load.
    """
    from transformers import AutoTokenizer

    copy_tokenizer(checkpoint, folder)
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises Exception itself
        raise CheckpointError(f"{checkpoint.source.name}: the tokenizer does not load: {first_line(error)}") from error


def generation_settings(settings: Mapping[str, Any], image_token: str | None = None) -> dict[str, Any]:
    """
    Return tokenizer_config.json for a model that generates: without code, padding left, so that an answer follows its
    prompt, and with the placeholder as `image_token`, as transformers' own multimodal tokenizers do. No id changes.

    Args:
        settings: As any release of transformers wrote them.
        image_token: The placeholder of a visual token, if there is one.
    """
    new = {key: value for key, value in settings.items() if key != "auto_map"}
    if "auto_map" in settings or new.get("tokenizer_class") == "TokenizersBackend":  # its name in transformers >= 5
        new["tokenizer_class"] = "PreTrainedTokenizerFast"
    new["padding_side"] = "left"
    named, extra = dict(new.pop("model_specific_special_tokens", None) or {}), new.pop("extra_special_tokens", None)
    if isinstance(extra, list):  # transformers >= 5, and no other reads it
        listed = list(new.get("additional_special_tokens") or [])
        new["additional_special_tokens"] = [*listed, *(token for token in extra if token not in listed)]
    elif isinstance(extra, Mapping):
        named |= extra
    if image_token is not None:
        new["image_token"] = named["image_token"] = image_token
    if named:
        new["extra_special_tokens"] = named
    return new


def mark_tokenizer(folder: Path, image_token: str | None = None) -> None:
    """Apply generation_settings to the tokenizer in a folder."""
    file = folder / "tokenizer_config.json"
    old = read_json(file) if file.exists() else {}
    if not old and (folder / "tokenizer.json").exists():
        old = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if (new := generation_settings(old, image_token)) != old:
        write_json(file, new)


def padding_notes(checkpoint: Checkpoint) -> list[str]:
    note = "the source's tokenizer pads right, the output's pads left, as batched generation requires"
    return [note] if checkpoint.document("tokenizer_config.json").get("padding_side") == "right" else []


def _token_ids(checkpoint: Checkpoint) -> dict[str, int]:
    """Return the ids of special and added tokens; raise CheckpointError if there is no tokenizer, or an invalid one."""
    name = checkpoint.source.name
    if not VOCABULARIES & {*checkpoint.source.files}:
        files = ", ".join(sorted(VOCABULARIES))
        raise CheckpointError(f"{name}: no tokenizer ({files}): give the folder, with the tokenizer's files in it")
    try:
        added = checkpoint.document("tokenizer.json").get("added_tokens", [])
        decoder = checkpoint.document("tokenizer_config.json").get("added_tokens_decoder", {})
        ids = {**checkpoint.document("added_tokens.json"), **{entry["content"]: entry["id"] for entry in added}}
        return ids | {entry["content"]: int(index) for index, entry in decoder.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{name}: the tokenizer's added tokens cannot be read: {error}") from error


def find_image_token(checkpoint: Checkpoint, config: "SAILVLConfig") -> int:
    """
    Return the id of the placeholder.

    Raises:
        CheckpointError: The tokenizer lacks one of the tokens of an image, or the language model a row for it.
    """
    name, tokens, rows = checkpoint.source.name, _token_ids(checkpoint), config.text_config.vocab_size
    for token in config.special_tokens:
        if token not in tokens:
            fix = "use the one that was published with the model; `sailvit compose` extends one for a new model"
            raise CheckpointError(f"{name}: the tokenizer has no {token}: {fix}")
        if tokens[token] >= rows:
            what = f"{token} has the id {tokens[token]}, the language model {rows} rows"
            raise CheckpointError(f"{name}: {what}: this is another model's tokenizer")
    return tokens[config.image_token]


def write_generation_config(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the source's generation_config.json; without one, end of turn and padding as the tokenizer has them."""
    config = checkpoint.document("generation_config.json")
    if not config:
        tokens, pad = _token_ids(checkpoint), checkpoint.document("tokenizer_config.json").get("pad_token")
        pad = pad.get("content") if isinstance(pad, Mapping) else pad
        config = {"eos_token_id": tokens.get(END_OF_TURN), "pad_token_id": tokens.get(pad, tokens.get(END_OF_TURN))}
        config = {key: value for key, value in config.items() if value is not None}
    write_json(folder / "generation_config.json", config)
