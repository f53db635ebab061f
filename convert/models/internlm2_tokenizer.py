"""InternLM2's tokenizer, a sentencepiece BPE with remote code, as one that PreTrainedTokenizerFast reads."""

from collections.abc import Container, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..export.tokenizer_files import generation_settings
from ..storage.checkpoint import Checkpoint
from ..storage.errors import CheckpointError
from ..storage.files import hash_file


if TYPE_CHECKING:
    from tokenizers import Tokenizer

    Added = Mapping[int, tuple[str, bool]]  # id -> text, and whether the token is special

# InternLM2's own defaults, as released.
SPECIAL_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}

# Of the remote code, or stored in tokenizer.json.
UNUSED_SETTINGS = {
    "auto_map", "tokenizer_class", "slow_tokenizer_class", "sp_model_kwargs", "decode_with_prefix_space", "vocab_file",
    "tokenizer_file", "special_tokens_map_file", "name_or_path", "use_fast", "legacy", "add_bos_token", "add_eos_token",
    "add_prefix_space",
}  # fmt: skip

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of pieces in sentencepiece_model.proto


def find_tokenizer(checkpoint: Checkpoint) -> tuple[dict[str, str | dict[str, Any]], dict[str, str] | None, str]:
    """
    Return the checkpoint's tokenizer for a transformers without remote code: the files to write and their content (none
    if there is no such tokenizer), the source's file and its sha256, and a message. Raises CheckpointError for broken
    files.
    """
    source, template = checkpoint.source, "chat_template.jinja"
    file = next((name for name in ("tokenizer.json", "tokenizer.model") if name in source.files), None)
    if file is None:
        return {}, None, "no tokenizer is written: neither tokenizer.json nor tokenizer.model is in the source"
    path, settings = source.path(file), _tokenizer_settings(checkpoint)
    if checkpoint.document("tokenizer.json"):
        content, note = path.read_text(encoding="utf-8"), "the tokenizer is the source's tokenizer.json"
    else:
        content, note = _convert_sentencepiece(path, checkpoint, settings)
        settings.pop("added_tokens_decoder", None)
    if content is None:
        return {}, None, f"no tokenizer is written: {note}"
    kept = {key: value for key, value in settings.items() if key not in UNUSED_SETTINGS}
    kept |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    files = {"tokenizer.json": content, "tokenizer_config.json": generation_settings(kept)}
    if template in source.files:
        files[template] = source.path(template).read_text(encoding="utf-8")
    return files, {"file": file, "sha256": hash_file(path)}, note


def _convert_sentencepiece(path: Path, checkpoint: Checkpoint, settings: Mapping[str, Any]) -> tuple[str | None, str]:
    """Return the content of tokenizer.json, None if the model is not supported, and a message."""
    try:
        model = read_sentencepiece(path)
    except ImportError:
        return None, "tokenizer.model needs sentencepiece and protobuf: install both"
    if reason := _unsupported_reason(model):
        return None, f"tokenizer.model {reason}"
    content = build_tokenizer(model, _added_tokens(checkpoint), settings).to_str()
    note = f"the tokenizer is converted from tokenizer.model: {len(model.pieces)} pieces"
    if model.normalizer_spec.add_dummy_prefix and any(piece.type == USER_DEFINED for piece in model.pieces):
        note += "; unlike in sentencepiece, a space is added after user-defined pieces, too"
    return content, note


def _tokenizer_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return tokenizer_config.json, completed by the older special_tokens_map.json and InternLM2's defaults."""
    older, newer = map(checkpoint.document, ("special_tokens_map.json", "tokenizer_config.json"))
    settings = {**SPECIAL_TOKENS, **older, **newer}
    settings |= {key: _text_of(settings[key]) for key in SPECIAL_TOKENS}
    if isinstance(settings.get("additional_special_tokens"), list):
        settings["additional_special_tokens"] = [*map(_text_of, settings["additional_special_tokens"])]
    return settings


def _text_of(token: Any) -> Any:
    return token.get("content") if isinstance(token, Mapping) else token


def _added_tokens(checkpoint: Checkpoint) -> "Added":
    """Return the tokens that are added to the pieces, or replace some; raise CheckpointError for another format."""
    config = checkpoint.document("tokenizer_config.json")
    with suppress(AttributeError, KeyError, TypeError, ValueError):
        added = {index: (text, True) for text, index in checkpoint.document("added_tokens.json").items()}
        decoder = config.get("added_tokens_decoder", {}).items()
        added |= {int(index): (token["content"], bool(token.get("special", False))) for index, token in decoder}
        if all(type(index) is int and type(text) is str and text for index, (text, _) in added.items()):
            return dict(sorted(added.items()))
    where = f"{checkpoint.source.name}: added_tokens.json or added_tokens_decoder in tokenizer_config.json"
    raise CheckpointError(f"{where}: expected ids and texts of tokens: fix it")


def read_sentencepiece(path: Path) -> Any:
    """Return the ModelProto of a tokenizer.model; raise CheckpointError if it is none, or ImportError."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    with suppress(DecodeError):
        model.ParseFromString(path.read_bytes())
        if model.pieces and model.HasField("trainer_spec"):
            return model
    raise CheckpointError(f"{path}: not a sentencepiece model: the file is truncated or corrupt; re-download it")


def _unsupported_reason(model: Any) -> str | None:
    """Return why the BPE of the tokenizers library would split text differently; None if it does not."""
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    known = {piece.piece for piece in model.pieces if piece.type in (NORMAL, UNUSED)}
    unused = (piece.piece for piece in model.pieces if piece.type == UNUSED)
    reasons = {
        "is no BPE": trainer.model_type != trainer.BPE,
        "normalizes characters (charsmap), which is not supported": normalizer.precompiled_charsmap,
        "removes extra whitespace, which is not supported": normalizer.remove_extra_whitespaces,
        "marks spaces in an unsupported way": not normalizer.escape_whitespaces or trainer.treat_whitespace_as_suffix,
        "splits unused pieces again, which is not supported": any(
            text[:at] in known and text[at:] in known for text in unused for at in range(1, len(text))
        ),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def build_tokenizer(model: Any, added: "Added", settings: Mapping[str, Any]) -> "Tokenizer":
    """
    Return a tokenizer with the ids of sentencepiece for text between special tokens.

    Args:
        model: A ModelProto of sentencepiece.
        added: Tokens that replace pieces or follow them; CheckpointError if ids leave a gap, or two tokens are equal.
        settings: add_bos_token, add_eos_token, bos_token, eos_token of InternLM2's tokenizer.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    pieces, has_prefix = dict(enumerate(model.pieces)), model.normalizer_spec.add_dummy_prefix
    texts = {index: piece.piece for index, piece in pieces.items()}
    texts |= {index: text for index, (text, _) in added.items()}
    vocabulary = {text: index for index, text in sorted(texts.items())}
    if sorted(vocabulary.values()) != list(range(len(texts))):
        what = "two tokens are equal, or ids leave a gap"
        raise CheckpointError(f"added_tokens_decoder in tokenizer_config.json: {what}")
    whole = {index: piece for index, piece in pieces.items() if piece.type in (UNKNOWN, CONTROL, USER_DEFINED)}
    unsplit = {**{index: (piece.piece, piece.type != USER_DEFINED) for index, piece in whole.items()}, **added}
    unknown = next((piece.piece for piece in whole.values() if piece.type == UNKNOWN), None)
    options = {"unk_token": unknown, "fuse_unk": True, "byte_fallback": model.trainer_spec.byte_fallback}
    tokenizer = Tokenizer(BPE(vocabulary, _merges(model, added), **options))
    prefix, strip = ([normalizers.Prepend("▁")], [decoders.Strip(" ", 1, 0)]) if has_prefix else ([], [])
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(steps)
    in_order = (token for _, token in sorted(unsplit.items()))
    tokenizer.add_tokens([AddedToken(text, special=special, normalized=False) for text, special in in_order])
    _add_template(tokenizer, settings)
    return tokenizer


def _merges(model: Any, replaced: Container[int]) -> list[tuple[str, str]]:
    """Return the pairs to merge: those of the piece with the highest score first, then by their ids."""
    pieces = enumerate(model.pieces)
    normal = {index: piece for index, piece in pieces if piece.type == NORMAL and index not in replaced}
    ids = {piece.piece: index for index, piece in normal.items()}
    merges = [
        (-normal[index].score, ids[text[:at]], ids[text[at:]], text[:at], text[at:])
        for text, index in ids.items()
        for at in range(1, len(text))
        if text[:at] in ids and text[at:] in ids
    ]
    return [(left, right) for *_, left, right in sorted(merges)]


def _add_template(tokenizer: "Tokenizer", settings: Mapping[str, Any]) -> None:
    """Add bos_token before and eos_token after a text, as the settings have it."""
    from tokenizers import processors

    before = [settings["bos_token"]] if settings["bos_token"] and settings.get("add_bos_token", True) else []
    after = [settings["eos_token"]] if settings["eos_token"] and settings.get("add_eos_token", False) else []
    ids = [(token, tokenizer.token_to_id(token)) for token in {*before, *after}]
    if missing := [token for token, index in ids if index is None]:
        raise CheckpointError(f"tokenizer_config.json: expected special tokens of the vocabulary, got {missing[0]}")
    if ids:
        single, pair = [*before, "$A", *after], [*before, "$A", *after, *before, "$B:1", *after]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
