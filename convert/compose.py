"""Build a multimodal model from a vision encoder, a new connector and a language model, as `sailvit compose` does."""

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .conversion import convert_checkpoint
from .detect import AIMV2, INTERNLM2, INTERNVIT, SAILVL, detect
from .export.image_settings import has_normalization
from .export.provenance import read_files, save_record, source_provenance
from .export.sailvl_files import build_processor, transformers_errors, write_sailvl_card, write_sailvl_files
from .export.tokenizer_files import (
    END_OF_TURN,
    TOKENIZER_FILES,
    VOCABULARIES,
    load_tokenizer,
    mark_tokenizer,
    padding_notes,
)
from .models.sailvl import verify_sailvl
from .models.sailvl_config import build_meta_model
from .plan import DTYPES, SHARD_SIZE, check_choice
from .storage.checkpoint import Checkpoint, FileCheckpoint
from .storage.errors import CheckpointError
from .storage.files import hash_file, read_json, write_json
from .storage.output_folder import check_free, new_folder
from .storage.sources import Source, check_separate, find_source, licence_of, public_name
from .storage.tensors import TORCH_DTYPES


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What from_pretrained raises for files that it cannot load.
LOADING_ERRORS = (AttributeError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError)

IMAGE_TOKEN = "<IMG_CONTEXT>"
# The special tokens of SAIL-VL's prompts, in the order in which its releases added them to Qwen2.5's tokenizer.
SPECIAL_TOKENS = (
    "<img>", "</img>", IMAGE_TOKEN, "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>",
    "<|im_start|>", END_OF_TURN,
)  # fmt: skip


@dataclass
class Composition:
    """The result of compose_model."""

    notes: list[str] = field(default_factory=list)  # messages about what was detected, added or assumed
    # Counts of tiles and placeholders of a test image, from a clean process; None if not verified.
    verification: dict[str, Any] | None = None


@dataclass
class Component:
    """A vision encoder or language model: its source, the files read from it, its config.json as written, the model."""

    checkpoint: Checkpoint
    files: list[str]
    fields: Mapping[str, Any]
    model: "PreTrainedModel"

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")


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
    log: Callable[[str], None] = lambda message: None,
) -> Composition:
    """
    Write a multimodal model with a randomly initialised connector to a folder.

    Args:
        vision: A SAILViT, AIMv2 or InternViT in any layout, a SAIL-VL, or a vision encoder of transformers: a file, a
            folder or a name on the Hub.
        language: A causal language model of transformers: a folder or a name on the Hub.
        out: The new folder; it is complete or does not exist.
        dtype: One of DTYPES; the language model's by default.
        seed: Of the connector's weights, and of new rows of the embeddings.
        max_tiles: Of an image, without its thumbnail.
        verify: Whether to load the folder in a clean process.
        log: Called with each progress message.

    Raises:
        CheckpointError: A source does not load, or does not fit the other; nothing was written.
        VerificationError: The folder does not load; it was removed.
    """
    options = {"dtype": dtype, "seed": seed, "max_tiles": max_tiles}
    check_choice("dtype", dtype, DTYPES)
    if type(seed) is not int or not 0 <= seed < 1 << 63:
        raise CheckpointError(f"seed: expected an integer from 0 on, got {seed!r}")
    out, composed = Path(out), Composition()
    check_free(out, overwrite)
    check_separate(out, [find_source(str(source))[0] for source in (vision, language)])
    with tempfile.TemporaryDirectory() as scratch:
        text = _load_language(language, dtype)
        encoder = _load_vision(vision, text.dtype, Path(scratch))
        tokenizer = _extend_tokenizer(text.checkpoint, Path(scratch, "tokenizer"), composed.notes)
        _resize_embeddings(text.model, tokenizer, seed, composed.notes)
        model = _assemble(encoder, text, tokenizer, seed)
        if not has_normalization(encoder.checkpoint):
            composed.notes.append("the vision encoder has no image_mean and image_std: ImageNet's are assumed")
        tiles = {} if max_tiles is None else {"max_tiles": max_tiles}
        processor = build_processor(tokenizer, encoder.checkpoint, model.config, "compose", **tiles)
        for note in composed.notes:
            log(note)
        with new_folder(out, overwrite) as folder:
            model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
            shutil.copytree(Path(scratch, "tokenizer"), folder, dirs_exist_ok=True)
            _write_files(folder, model.config, processor, encoder, text)
            composed.verification = verify_sailvl(folder) if verify else None
            record = {"options": options, "dtype": text.dtype, "verification": composed.verification}
            _write_provenance(folder, {"vision": encoder, "language": text}, record)
    return composed


def _open(source: str | Path) -> Checkpoint:
    return FileCheckpoint(*find_source(str(source)))


def _location(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return from_pretrained's arguments; code that comes with the model is not executed."""
    source = checkpoint.source
    name = source.name if source.revision else str(source.path(checkpoint.entry).parent)
    return {"pretrained_model_name_or_path": name, "revision": source.revision or "main", "trust_remote_code": False}


def _load(auto_class: Any, checkpoint: Checkpoint, what: str, **options: Any) -> "PreTrainedModel":
    """Load a model strictly; raises CheckpointError if that fails."""
    name = checkpoint.source.name
    with transformers_errors(f"{name}: {what} does not load", LOADING_ERRORS):
        model, report = auto_class.from_pretrained(**_location(checkpoint), output_loading_info=True, **options)
    for kind in ("missing_keys", "mismatched_keys"):
        if wrong := sorted(map(str, report.get(kind) or [])):
            raise CheckpointError(f"{name}: {what}: {kind.replace('_', ' ')}: {', '.join(wrong[:3])}")
    return model


def _component(checkpoint: Checkpoint, model: "PreTrainedModel", *files: str) -> Component:
    """A component that transformers loaded: with its own config.json, unless that is of a larger model."""
    fields = checkpoint.document("config.json")
    if fields.get("model_type") != model.config.model_type:
        fields = model.config.to_diff_dict()
    read = [file for file in ("config.json", *files) if file in checkpoint.source.files]
    return Component(checkpoint, [*checkpoint.files, *read], fields, model)


def _load_language(language: str | Path, dtype: str | None) -> Component:
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    checkpoint = _open(language)
    name, fields, found = checkpoint.source.name, checkpoint.document("config.json"), detect(checkpoint)
    if found in (SAILVL, INTERNLM2):
        fix = "run `sailvit convert SRC OUT --part language` first and give OUT"
        raise CheckpointError(f"{name}: expected a causal language model of transformers, got {found.title}: {fix}")
    if fields.get("model_type") not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        got = f"the model type {fields.get('model_type')!r}" if fields else "no config.json"
        raise CheckpointError(f"{name}: expected a causal language model of the installed transformers, got {got}")
    if not VOCABULARIES & {*checkpoint.source.files}:
        raise CheckpointError(f"{name}: no tokenizer ({', '.join(sorted(VOCABULARIES))}): put its files there")
    model = _load(AutoModelForCausalLM, checkpoint, "the language model", dtype=dtype or "auto")
    component = _component(checkpoint, model, *TOKENIZER_FILES)
    if component.dtype not in DTYPES:
        raise CheckpointError(f"{name}: the language model is {component.dtype}: choose with --dtype")
    return component


def _load_vision(vision: str | Path, dtype: str, scratch: Path) -> Component:
    """What `convert --part vision` knows is converted and loaded; anything else loads as transformers loads it."""
    from transformers import AutoConfig, AutoModel

    from ..modeling_sailvit import SAILViTModel

    checkpoint = _open(vision)
    if detect(checkpoint) is SAILVL or detect(checkpoint, "vision") in (AIMV2, INTERNVIT):
        plan = convert_checkpoint(vision, scratch / "vision", part="vision", dtype=dtype, verify=False)
        written = _open(scratch / "vision")
        fields = written.document("config.json")
        auto_class = SAILViTModel if fields["model_type"] == "sailvit" else AutoModel
        model = _load(auto_class, written, "the vision encoder", dtype=dtype)
        return Component(checkpoint, read_files(plan.checkpoint), fields, model)
    name = checkpoint.source.name
    with transformers_errors(f"{name}: not a known vision encoder", LOADING_ERRORS):
        config = AutoConfig.from_pretrained(**_location(checkpoint))
    config = getattr(config, "vision_config", config)
    if not all(hasattr(config, key) for key in ("hidden_size", "image_size", "patch_size", "num_hidden_layers")):
        raise CheckpointError(f"{name}: expected a vision encoder, or a model with one, got {config.model_type!r}")
    model = _load(AutoModel, checkpoint, "the vision encoder", dtype=dtype, config=config)
    return _component(checkpoint, model, "preprocessor_config.json")


def _extend_tokenizer(checkpoint: Checkpoint, folder: Path, notes: list[str]) -> "PreTrainedTokenizerBase":
    """Write the language model's tokenizer to a new folder, with the special tokens that it lacks."""
    from transformers import AutoTokenizer

    folder.mkdir()
    tokenizer = load_tokenizer(checkpoint, folder)
    if not (folder / "tokenizer.json").exists():
        with transformers_errors(f"{checkpoint.source.name}: the tokenizer does not load", LOADING_ERRORS):
            tokenizer.save_pretrained(folder)
            read_json(folder / "tokenizer.json")
    mark_tokenizer(folder, IMAGE_TOKEN)
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
    added = {token: index for index, token in enumerate(missing, max(vocabulary.values()) + 1)}
    if added:
        add_tokens(folder, added)
        notes.append(f"added to the tokenizer: {', '.join(f'{token} {index}' for token, index in added.items())}")
    notes += padding_notes(checkpoint)
    return AutoTokenizer.from_pretrained(folder)


def add_tokens(folder: Path, added: Mapping[str, int]) -> None:
    """
    Write special tokens and their ids into a tokenizer's files, as every release of transformers reads them. The folder
    has tokenizer.json and tokenizer_config.json.
    """
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    content = read_json(folder / "tokenizer.json")
    content["added_tokens"] += [{"id": index, "content": token, **flags} for token, index in added.items()]
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    config = read_json(folder / "tokenizer_config.json")
    decoder = {str(entry["id"]): {key: entry[key] for key in ("content", *flags)} for entry in content["added_tokens"]}
    named = config.get("additional_special_tokens") or []
    config |= {"added_tokens_decoder": decoder, "additional_special_tokens": [*named, *added]}
    config["pad_token"] = config.get("pad_token") or END_OF_TURN
    config["tokenizer_class"] = config.get("tokenizer_class") or "PreTrainedTokenizerFast"
    write_json(folder / "tokenizer_config.json", config)
    if (folder / "added_tokens.json").exists():
        write_json(folder / "added_tokens.json", {**read_json(folder / "added_tokens.json"), **added})


def _resize_embeddings(model: "PreTrainedModel", tokenizer: Any, seed: int, notes: list[str]) -> None:
    """Add rows to the embeddings if the tokenizer has more tokens than there are."""
    import torch

    rows, needed = len(model.get_input_embeddings().weight), max(tokenizer.get_vocab().values()) + 1
    if needed > rows:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model.resize_token_embeddings(needed)
        notes.append(f"embeddings: {needed - rows} new rows, {needed} now")


def _assemble(vision: Component, language: Component, tokenizer: Any, seed: int) -> "PreTrainedModel":
    """Return the two models around a connector with random weights."""
    import torch

    from ..configuration_sailvl import SAILVLConfig

    source, token = vision.checkpoint.source.name, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    with transformers_errors(source):
        config = SAILVLConfig(vision.model.config, language.model.config, image_token_id=token)
    config.initializer_range = getattr(language.model.config, "initializer_range", config.initializer_range)
    model = build_meta_model(config, source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.mlp1.to_empty(device="cpu").apply(model._init_weights).to(language.model.dtype)
    model.vision_model, model.language_model = vision.model, language.model
    return model.eval()


def _write_files(folder: Path, config: Any, processor: Any, vision: Component, language: Component) -> None:
    """Write everything but weights, tokenizer and provenance.json."""
    dtype, text = TORCH_DTYPES[language.dtype], processor.tokenizer
    fields = {**language.fields, "vocab_size": config.text_config.vocab_size}
    write_sailvl_files(folder, config, fields, vision.fields, dtype, processor)
    end = text.convert_tokens_to_ids(END_OF_TURN)
    pad = end if text.pad_token_id is None else text.pad_token_id
    write_json(folder / "generation_config.json", {"eos_token_id": end, "pad_token_id": pad})
    sources = [component.checkpoint.source for component in (vision, language)]
    encoder, model = map(public_name, sources)
    details = (
        f"\n\nThe vision encoder comes from {encoder}, the language model from {model}. "
        "The connector is randomly initialised: train it before you use the model.\n\n"
        f"Each component keeps its own licence: {_licence(sources[0])}; {_licence(sources[1])}."
    )
    write_sailvl_card(folder, sources, config, dtype, details)


def _licence(source: Source) -> str:
    card = licence_of(source)
    named = card.get("license_name") or card.get("license")
    what = f"is under {named}, as its card says" if named else "comes with a card that names no licence, or none"
    return f"{public_name(source)} {what}"


def _write_provenance(folder: Path, components: Mapping[str, Component], record: Mapping[str, Any]) -> None:
    sources = {part: source_provenance(each.checkpoint, each.files) for part, each in components.items()}
    name = " and ".join(source["name"] for source in sources.values())
    weights = {path.name: {"sha256": hash_file(path)} for path in sorted(folder.glob("*.safetensors"))}
    save_record(folder, {"source": {"name": name, "layout": "composed", **sources}, **record}, weights, {})
