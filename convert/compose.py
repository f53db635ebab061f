"""A new multimodal model of a tower, a fresh connector and a language model: `sailvit compose`."""

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .conversion import convert_checkpoint, keep_apart
from .export.card import write_conversion_card
from .export.code_files import copy_code
from .export.image_settings import has_normalization
from .export.provenance import save_record
from .export.sailvl_files import (
    PROCESSOR_FILES,
    new_processor,
    sailvl_image_settings,
    write_config,
    write_processor,
)
from .export.tokenizer_files import (
    END_OF_TURN,
    TOKENIZER_FILES,
    VOCABULARIES,
    copy_tokenizer,
    generation_settings,
    mark_tokenizer,
    padding_notes,
)
from .models.aimv2_names import match_aimv2
from .models.internlm2 import is_internlm2
from .models.internvit import is_internvit
from .models.sailvl import build_empty, describe_all, is_sailvl, verify_all
from .plan import DTYPES
from .storage.checkpoint import Checkpoint, FileCheckpoint
from .storage.errors import CheckpointError
from .storage.files import first_line, hash_file, read_json, write_json
from .storage.output_folder import check_free, new_folder
from .storage.sources import find_source, licence_of, public_name
from .storage.tensors import TORCH_DTYPES


if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..configuration_sailvl import SAILVLConfig

IMAGE_TOKEN = "<IMG_CONTEXT>"
# What the prompts of SAIL-VL are made of, in the order in which its releases added them to Qwen2.5's tokenizer.
SPECIAL_TOKENS = (
    "<img>", "</img>", IMAGE_TOKEN, "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>",
    "<|im_start|>", END_OF_TURN,
)  # fmt: skip
LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, AttributeError, TypeError)


@dataclass
class Composition:
    """
    What was composed.

    Attributes:
        notes: What was found, added or assumed, line by line.
        verification: Tiles and placeholders of a picture, in a fresh process; None if that was not asked for.
    """

    notes: list[str] = field(default_factory=list)
    verification: dict[str, Any] | None = None


@dataclass
class Part:
    """A component: where it came from, the files that were read, its config.json as written, and the model."""

    checkpoint: Checkpoint
    files: list[str]
    fields: Mapping[str, Any]
    model: "PreTrainedModel"

    def record(self) -> dict[str, Any]:
        source = self.checkpoint.source
        files = {file: {"sha256": hash_file(source.path(file))} for file in self.files}
        return {"name": public_name(source), "revision": source.revision, **licence_of(source), "files": files}

    def licence(self) -> str:
        """A sentence for the card."""
        said = licence_of(self.checkpoint.source)
        named = said.get("license_name") or said.get("license")
        what = f"is under {named}, as its card says" if named else "comes with a card that names no licence, or none"
        return f"{public_name(self.checkpoint.source)} {what}"


def compose_model(
    vision: str | Path,
    language: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    seed: int = 0,
    max_tiles: int | None = None,
    overwrite: bool = False,
    verify: bool = True,
    log: Callable[[str], None] = lambda line: None,
) -> Composition:
    """
    Writes a multimodal model, its connector not yet trained, to a folder; whole or not at all.

    Args:
        vision: A SAILViT, AIMv2 or InternViT in any layout, a SAIL-VL, or a tower of transformers: a file, a folder or
            a name on the Hub.
        language: A causal language model of transformers: a folder or a name on the Hub.
        out: The folder to be.
        dtype: One of job.DTYPES; the language model's if not given.
        seed: Of the connector's weights, and of new rows of the embeddings.
        max_tiles: Of an image, its thumbnail not counted.
        overwrite: Whether `out` may be there already.
        verify: Whether the folder is loaded in a fresh process.
        log: Called with each progress message.

    Raises:
        CheckpointError: A source that does not load, or that does not fit the other; nothing was written.
        VerificationError: The folder does not load; nothing is left of it.
    """
    _check_arguments(dtype, seed)
    out, done = Path(out), Composition()
    check_free(out, overwrite)
    for source in (vision, language):
        keep_apart(find_source(str(source))[0], out)
    with tempfile.TemporaryDirectory() as scratch:
        text = _load_language(language, dtype)
        tower = _load_tower(vision, str(text.model.dtype).removeprefix("torch."), Path(scratch))
        tokenizer = _extend_tokenizer(text.checkpoint, Path(scratch), done.notes)
        _make_room(text.model, tokenizer, seed, done.notes)
        model = _assemble(tower, text, tokenizer, seed)
        settings = {} if max_tiles is None else {"max_tiles": max_tiles}
        options = {**sailvl_image_settings(tower.checkpoint, model.config), **settings}
        processor = new_processor(tokenizer, model.config, options, None, "compose")
        if not has_normalization(tower.checkpoint):
            done.notes.append("the tower does not say how pictures are normalised: ImageNet's mean and std, assumed")
        for line in done.notes:
            log(line)
        with new_folder(out, overwrite) as folder:
            _write_model(folder, model, tower, text)
            copy_files(Path(scratch) / "tokenizer", folder)
            write_processor(processor, folder)
            _write_generation_config(folder, tokenizer)
            _write_card(folder, model.config, tower, text)
            done.verification = verify_all(folder) if verify else None
            asked = {"dtype": dtype, "seed": seed, "max_tiles": max_tiles}
            _write_provenance(folder, asked, tower, text, done.verification)
    return done


def _check_arguments(dtype: str | None, seed: int) -> None:
    if dtype not in (None, *DTYPES):
        raise CheckpointError(f"dtype {dtype!r}: one of {', '.join(DTYPES)} is wanted")
    if type(seed) is not int or not 0 <= seed < 1 << 63:
        raise CheckpointError(f"seed {seed!r}: a whole number from 0 on is wanted")


def _open(source: str | Path) -> Checkpoint:
    origin, entry = find_source(str(source))
    return FileCheckpoint(origin, entry)


def _place(checkpoint: Checkpoint) -> dict[str, Any]:
    """Where from_pretrained finds it; code that comes with it is not run."""
    source = checkpoint.source
    name = source.name if source.revision else str(source.path(checkpoint.entry).parent)
    return {"pretrained_model_name_or_path": name, "revision": source.revision or "main", "trust_remote_code": False}


def _load(auto: Any, checkpoint: Checkpoint, what: str, **options: Any) -> "PreTrainedModel":
    """
    Raises:
        CheckpointError: It does not load, or not strictly.
    """
    name = checkpoint.source.name
    try:
        model, report = auto.from_pretrained(**_place(checkpoint), output_loading_info=True, **options)
    except LOADING_ERRORS as error:
        raise CheckpointError(f"{name}: {what} does not load: {first_line(error)}") from error
    for kind in ("missing_keys", "mismatched_keys"):
        if wrong := sorted(map(str, report.get(kind) or [])):
            raise CheckpointError(f"{name}: {what} is not whole: {kind.replace('_', ' ')}: {', '.join(wrong[:3])}")
    return model


def _load_language(language: str | Path, dtype: str | None) -> Part:
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    checkpoint = _open(language)
    name, fields = checkpoint.source.name, checkpoint.document("config.json")
    if is_internlm2(checkpoint.weight_map) or is_sailvl(checkpoint):
        raise CheckpointError(
            f"{name}: {'a multimodal model' if is_sailvl(checkpoint) else 'an InternLM2'}: run `sailvit convert "
            "SRC OUT --part language` first and give OUT"
        )
    if fields.get("model_type") not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        what = f"config.json names the model type {fields.get('model_type')!r}" if fields else "there is no config.json"
        raise CheckpointError(f"{name}: {what}: a causal language model of the installed transformers is wanted")
    if not VOCABULARIES & {*checkpoint.source.files}:
        raise CheckpointError(f"{name}: no tokenizer ({', '.join(sorted(VOCABULARIES))}): put its files there")
    model = _load(AutoModelForCausalLM, checkpoint, "the language model", dtype=_torch_dtype(dtype))
    if model.dtype not in {_torch_dtype(kind) for kind in DTYPES}:
        raise CheckpointError(f"{name}: the language model is {model.dtype}: choose with --dtype")
    files = [*checkpoint.files, *_there(checkpoint, ("config.json", *TOKENIZER_FILES))]
    return Part(checkpoint, files, _said_config(fields, model), model)


def _torch_dtype(dtype: str | None) -> Any:
    import torch

    return getattr(torch, dtype) if dtype else "auto"


def _there(checkpoint: Checkpoint, files: tuple[str, ...]) -> list[str]:
    return [file for file in files if file in checkpoint.source.files]


def _said_config(fields: Mapping[str, Any], model: "PreTrainedModel") -> Mapping[str, Any]:
    """config.json as it was written, unless it is of a larger model."""
    return fields if fields.get("model_type") == model.config.model_type else model.config.to_diff_dict()


def _load_tower(vision: str | Path, dtype: str, scratch: Path) -> Part:
    """A tower that convert knows by way of convert, any other as transformers loads it."""
    from transformers import AutoConfig, AutoModel

    from ..modeling_sailvit import SAILViTModel

    checkpoint = _open(vision)
    if _is_known(checkpoint):
        done = convert_checkpoint(vision, scratch / "tower", part="vision", dtype=dtype, verify=False)
        files = [*done.checkpoint.opened, *_there(done.checkpoint, tuple(done.checkpoint.documents))]
        written = _open(scratch / "tower")
        fields = written.document("config.json")
        auto = SAILViTModel if fields["model_type"] == "sailvit" else AutoModel
        model = _load(auto, written, "the tower", dtype=_torch_dtype(dtype))
        return Part(checkpoint, files, fields, model)
    try:
        config = AutoConfig.from_pretrained(**_place(checkpoint))
    except LOADING_ERRORS as error:
        raise CheckpointError(f"{checkpoint.source.name}: no tower that is known: {first_line(error)}") from error
    config = getattr(config, "vision_config", config)
    if not all(hasattr(config, key) for key in ("hidden_size", "image_size", "patch_size", "num_hidden_layers")):
        what = f"config.json is that of a {config.model_type!r}, which is no vision tower"
        raise CheckpointError(f"{checkpoint.source.name}: {what}: give a tower, or a model that has one")
    model = _load(AutoModel, checkpoint, "the tower", dtype=_torch_dtype(dtype), config=config)
    files = [*checkpoint.files, *_there(checkpoint, ("config.json", "preprocessor_config.json"))]
    return Part(checkpoint, files, _said_config(checkpoint.document("config.json"), model), model)


def _is_known(checkpoint: Checkpoint) -> bool:
    """Whether there is a tower that `convert --part vision` takes out."""
    if is_internvit(checkpoint.weight_map) or is_sailvl(checkpoint):
        return True
    try:
        return bool(match_aimv2(checkpoint.weight_map))
    except CheckpointError as error:
        if "more than one tower" in str(error):
            raise
        return False


def _extend_tokenizer(checkpoint: Checkpoint, scratch: Path, notes: list[str]) -> "PreTrainedTokenizerBase":
    """The language model's tokenizer with the special tokens that it lacks, as files in scratch/tokenizer."""
    from transformers import AutoTokenizer

    folder = scratch / "tokenizer"
    folder.mkdir()
    copy_tokenizer(checkpoint, folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if not (folder / "tokenizer.json").exists():
            tokenizer.save_pretrained(folder)
            read_json(folder / "tokenizer.json")
    except LOADING_ERRORS as error:
        raise CheckpointError(f"{checkpoint.source.name}: the tokenizer does not load: {first_line(error)}") from error
    vocabulary = tokenizer.get_vocab()
    first = max(vocabulary.values()) + 1
    added = {token: first + i for i, token in enumerate(token for token in SPECIAL_TOKENS if token not in vocabulary)}
    if added:
        add_tokens(folder, added)
        notes.append(f"added to the tokenizer: {', '.join(f'{token} {index}' for token, index in added.items())}")
    notes += padding_notes(checkpoint)
    mark_tokenizer(folder, IMAGE_TOKEN)
    return AutoTokenizer.from_pretrained(folder)


def add_tokens(folder: Path, added: Mapping[str, int]) -> None:
    """Writes special tokens and their ids into a tokenizer's files, as every release of transformers reads them."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    content = read_json(folder / "tokenizer.json")
    content["added_tokens"] += [{"id": index, "content": token, **flags} for token, index in added.items()]
    text = json.dumps(content, ensure_ascii=False, indent=2)
    (folder / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    decoder = {str(entry["id"]): {key: entry[key] for key in ("content", *flags)} for entry in content["added_tokens"]}
    config = generation_settings(config)
    named = config.get("additional_special_tokens") or []
    config |= {"added_tokens_decoder": decoder, "additional_special_tokens": [*named, *added]}
    config["pad_token"] = config.get("pad_token") or END_OF_TURN
    config["tokenizer_class"] = config.get("tokenizer_class") or "PreTrainedTokenizerFast"
    write_json(folder / "tokenizer_config.json", config)
    if (folder / "added_tokens.json").exists():
        write_json(folder / "added_tokens.json", {**read_json(folder / "added_tokens.json"), **added})


def _make_room(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", seed: int, notes: list[str]) -> None:
    """More rows of embeddings, if the tokenizer has more tokens than there are."""
    import torch

    rows, wanted = len(model.get_input_embeddings().weight), max(tokenizer.get_vocab().values()) + 1
    if wanted <= rows:
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.resize_token_embeddings(wanted)
    notes.append(f"embeddings: {wanted - rows} new rows, {wanted} now")


def _assemble(tower: Part, text: Part, tokenizer: "PreTrainedTokenizerBase", seed: int) -> "nn.Module":
    from ..configuration_sailvl import SAILVLConfig

    try:
        config = SAILVLConfig(
            vision_config=tower.model.config,
            text_config=text.model.config,
            image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{tower.checkpoint.source.name}: {first_line(error)}") from error
    model = build_empty(config, tower.checkpoint.source.name)
    model.mlp1 = _fresh_connector(model.mlp1, config.initializer_range, seed).to(text.model.dtype)
    model.vision_model, model.language_model = tower.model, text.model
    return model.eval()


def _fresh_connector(empty: "nn.Module", deviation: float, seed: int) -> "nn.Module":
    import torch

    generator, connector = torch.Generator().manual_seed(seed), empty.to_empty(device="cpu")
    with torch.no_grad():
        for layer in connector:
            if isinstance(layer, torch.nn.Linear):
                layer.weight.normal_(std=deviation, generator=generator)
                layer.bias.zero_()
            elif isinstance(layer, torch.nn.LayerNorm):
                layer.reset_parameters()
    return connector


def _write_model(folder: Path, model: "nn.Module", tower: Part, text: Part) -> None:
    dtype = TORCH_DTYPES[str(text.model.dtype).removeprefix("torch.")]
    model.save_pretrained(folder, max_shard_size="5GB")
    copy_code(folder)
    rows = model.config.text_config.vocab_size
    write_config(folder, model.config, {**text.fields, "vocab_size": rows}, tower.fields, dtype)


def copy_files(source: Path, target: Path) -> None:
    for path in source.iterdir():
        if path.name not in PROCESSOR_FILES:
            (target / path.name).write_bytes(path.read_bytes())


def _write_generation_config(folder: Path, tokenizer: "PreTrainedTokenizerBase") -> None:
    end, pad = tokenizer.convert_tokens_to_ids(END_OF_TURN), tokenizer.pad_token_id
    write_json(folder / "generation_config.json", {"eos_token_id": end, "pad_token_id": end if pad is None else pad})


def _write_card(folder: Path, config: "SAILVLConfig", tower: Part, text: Part) -> None:
    parts = [part.checkpoint.source for part in (tower, text)]
    paragraphs = [
        describe_all(config, TORCH_DTYPES[str(text.model.dtype).removeprefix("torch.")]),
        f"The vision encoder is that of {public_name(parts[0])}, the language model is {public_name(parts[1])}. The "
        "connector is randomly initialised: train it before you use the model.",
        f"Each component keeps its own licence: {tower.licence()}; {text.licence()}.",
    ]
    write_conversion_card(folder, parts, "\n\n".join(paragraphs), ["sailvl", "custom_code", "conversational"])


def _write_provenance(
    folder: Path, asked: Mapping[str, Any], tower: Part, text: Part, verification: dict[str, Any] | None
) -> None:
    sources = {"vision": tower.record(), "language": text.record()}
    name = " and ".join(source["name"] for source in sources.values())
    content = {
        "source": {"name": name, "layout": "composed", **sources},
        "options": asked,
        "dtype": str(text.model.dtype).removeprefix("torch."),
        "verification": verification,
    }
    weights = {path.name: {"sha256": hash_file(path)} for path in sorted(folder.glob("*.safetensors"))}
    save_record(folder, content, weights, {})
