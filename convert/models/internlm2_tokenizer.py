"""Tokenizers that lie beside weights: as every transformers reads them, and InternLM2's, as it was published."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..export.tokenizer_files import generation_settings
from ..storage.checkpoint import Checkpoint
from ..storage.errors import CheckpointError
from ..storage.files import hash_file, write_json


if TYPE_CHECKING:
    from tokenizers import Tokenizer

# InternLM2's own defaults, as released.
SPECIAL_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}

# Of the tokenizer's own code, or said in tokenizer.json.
NOT_OF_TOKENIZER = {
    "auto_map", "tokenizer_class", "slow_tokenizer_class", "sp_model_kwargs", "decode_with_prefix_space", "vocab_file",
    "tokenizer_file", "special_tokens_map_file", "name_or_path", "use_fast", "legacy", "add_bos_token", "add_eos_token",
    "add_prefix_space",
}  # fmt: skip

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = (
    1,
    2,
    3,
    4,
    5,
    6,
)  # types of pieces  # their numbers in sentencepiece_model.proto


@dataclass(frozen=True)
class NewTokenizer:
    """
    A tokenizer that PreTrainedTokenizerFast reads.

    Attributes:
        content: Of tokenizer.json.
        config: Of tokenizer_config.json.
        origin: The file it was made of, with its sha256.
        template: Of the chat, where it is a file of its own.
    """

    content: str = field(repr=False)
    config: dict[str, Any]
    origin: dict[str, str]
    template: str | None = None

    def write(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text(self.content, encoding="utf-8")
        write_json(folder / "tokenizer_config.json", self.config)
        if self.template is not None:
            (folder / "chat_template.jinja").write_text(self.template, encoding="utf-8")


def find_tokenizer(checkpoint: Checkpoint) -> tuple[NewTokenizer | None, str]:
    """
    The tokenizer that lies beside the weights, for a transformers without remote code, and what is to be said of it.

    Raises:
        CheckpointError: Its files are broken.
    """
    source = checkpoint.source
    file = next((name for name in ("tokenizer.json", "tokenizer.model") if name in source.files), None)
    if file is None:
        return None, "no tokenizer is written: neither tokenizer.json nor tokenizer.model lies beside the weights"
    path, config = source.path(file), _tokenizer_settings(checkpoint)
    if checkpoint.document("tokenizer.json"):
        content, note = path.read_text(encoding="utf-8"), "the tokenizer is the source's tokenizer.json"
    else:
        try:
            pieces = read_sentencepiece(path)
        except ImportError:
            return None, "no tokenizer is written: tokenizer.model is read by sentencepiece and protobuf: install both"
        if pieces.objection:
            return None, f"no tokenizer is written: tokenizer.model {pieces.objection}"
        content = build_tokenizer(pieces, _added_tokens(checkpoint), config).to_str()
        config.pop("added_tokens_decoder", None)
        note = f"the tokenizer is made of tokenizer.model: {len(pieces.texts)} pieces"
        if pieces.adds_prefix and USER_DEFINED in pieces.types:
            note += "; a space is put after those that stand for themselves, too, where sentencepiece puts none"
    kept = {key: value for key, value in config.items() if key not in NOT_OF_TOKENIZER}
    settings = {**kept, "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings = generation_settings(settings)
    template = "chat_template.jinja"
    chat = source.path(template).read_text(encoding="utf-8") if template in source.files else None
    return NewTokenizer(content, settings, {"file": file, "sha256": hash_file(path)}, chat), note


def _tokenizer_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """tokenizer_config.json, completed by the older special_tokens_map.json, and by what is InternLM2's own."""
    older, said = (checkpoint.document(file) for file in ("special_tokens_map.json", "tokenizer_config.json"))
    settings = {**SPECIAL_TOKENS, **older, **said}
    for key in SPECIAL_TOKENS:
        settings[key] = _text_of(settings[key])
    if isinstance(settings.get("additional_special_tokens"), list):
        settings["additional_special_tokens"] = [_text_of(token) for token in settings["additional_special_tokens"]]
    return settings


def _text_of(token: Any) -> Any:
    return token.get("content") if isinstance(token, Mapping) else token


def _added_tokens(checkpoint: Checkpoint) -> dict[int, tuple[str, bool]]:
    """
    Id -> text of the tokens that are added to the pieces or take the place of some, and whether they are special.

    Raises:
        CheckpointError: They are written in another form.
    """
    said = checkpoint.document("tokenizer_config.json")
    try:
        added = {index: (text, True) for text, index in checkpoint.document("added_tokens.json").items()}
        decoder = said.get("added_tokens_decoder", {}).items()
        added |= {int(index): (token["content"], bool(token.get("special", False))) for index, token in decoder}
        if all(type(index) is int and type(text) is str and text for index, (text, _) in added.items()):
            return dict(sorted(added.items()))
    except (AttributeError, KeyError, TypeError, ValueError):
        pass
    what = "the tokens in added_tokens.json or tokenizer_config.json cannot be read: correct them"
    raise CheckpointError(f"{checkpoint.source.name}: {what}")


@dataclass(frozen=True)
class SentencePieces:
    """
    What a tokenizer.model of sentencepiece holds.

    Attributes:
        texts: Of every piece.
        scores: Of every piece; the higher is merged first.
        types: NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED or BYTE, of every piece.
        adds_prefix: Whether a space is put before every text.
        falls_back: Whether a character without a piece becomes bytes.
        objection: Why a BPE of the tokenizers library would split text otherwise; None if it does not.
    """

    texts: list[str]
    scores: list[float]
    types: list[int]
    adds_prefix: bool
    falls_back: bool
    objection: str | None

    def merges(self, left_out: Iterable[int] = ()) -> list[tuple[str, str]]:
        """
        The pairs that are merged, the first first.

        Args:
            left_out: Pieces that no text is split into.
        """
        usable = {index for index, kind in enumerate(self.types) if kind == NORMAL}.difference(left_out)
        ids = {self.texts[index]: index for index in usable}
        found = [
            (-self.scores[index], ids[text[:at]], ids[text[at:]], text[:at], text[at:])
            for text, index in ids.items()
            for at in range(1, len(text))
            if text[:at] in ids and text[at:] in ids
        ]
        return [(left, right) for *_, left, right in sorted(found)]


def read_sentencepiece(path: Path) -> SentencePieces:
    """
    Raises:
        CheckpointError: It is no model of sentencepiece.
        ImportError: sentencepiece or protobuf is not installed.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise CheckpointError(f"{path}: no model of sentencepiece: copy or download it again") from error
    if not model.pieces or not model.HasField("trainer_spec"):
        raise CheckpointError(f"{path}: no model of sentencepiece: copy or download it again")
    return SentencePieces(
        texts=[piece.piece for piece in model.pieces],
        scores=[piece.score for piece in model.pieces],
        types=[piece.type for piece in model.pieces],
        adds_prefix=model.normalizer_spec.add_dummy_prefix,
        falls_back=model.trainer_spec.byte_fallback,
        objection=_objection(model),
    )


def _objection(model: Any) -> str | None:
    """Why a BPE of the tokenizers library would split text otherwise than a ModelProto; None if it does not."""
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type != trainer.BPE:
        return "is no BPE"
    if normalizer.precompiled_charsmap:
        return "rewrites characters (its charsmap), which is not converted"
    if normalizer.remove_extra_whitespaces:
        return "removes extra whitespace, which is not converted"
    if not normalizer.escape_whitespaces or trainer.treat_whitespace_as_suffix:
        return "marks spaces in a way that is not converted"
    known = {piece.piece for piece in model.pieces if piece.type in (NORMAL, UNUSED)}
    unused = (piece.piece for piece in model.pieces if piece.type == UNUSED)
    if any(text[:at] in known and text[at:] in known for text in unused for at in range(1, len(text))):
        return "splits pieces again that it does not use, which is not converted"
    return None


def build_tokenizer(
    pieces: SentencePieces, added: Mapping[int, tuple[str, bool]], settings: Mapping[str, Any]
) -> "Tokenizer":
    """
    A tokenizer that gives the ids that sentencepiece gives to what stands between special tokens.

    Args:
        added: Id -> text and whether it is special, of tokens in the place of pieces or after them.
        settings: Those of InternLM2's tokenizer: add_bos_token, add_eos_token, bos_token, eos_token.

    Raises:
        CheckpointError: The ids of what is added leave a gap, or two tokens are the same.
    """
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    texts = {**dict(enumerate(pieces.texts)), **{index: text for index, (text, _) in added.items()}}
    vocabulary = {text: index for index, text in sorted(texts.items())}
    if sorted(vocabulary.values()) != list(range(len(texts))):
        raise CheckpointError("added_tokens_decoder in tokenizer_config.json: two tokens are one, or ids leave a gap")
    unknown = next((text for text, kind in zip(pieces.texts, pieces.types, strict=True) if kind == UNKNOWN), None)
    tokenizer = Tokenizer(
        BPE(vocabulary, pieces.merges(added), unk_token=unknown, fuse_unk=True, byte_fallback=pieces.falls_back)
    )
    prefix = [normalizers.Prepend("▁")] if pieces.adds_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if pieces.adds_prefix else []
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_tokens(_whole_tokens(pieces, added))
    _add_template(tokenizer, settings)
    return tokenizer


def _whole_tokens(pieces: SentencePieces, added: Mapping[int, tuple[str, bool]]) -> list[Any]:
    """What is taken out of a text before it is split."""
    from tokenizers import AddedToken

    own = {
        index: (text, kind != USER_DEFINED)
        for index, (text, kind) in enumerate(zip(pieces.texts, pieces.types, strict=True))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    }
    tokens = sorted({**own, **added}.items())
    return [AddedToken(text, special=special, normalized=False) for _, (text, special) in tokens]


def _add_template(tokenizer: "Tokenizer", settings: Mapping[str, Any]) -> None:
    """Puts the token of the beginning before a text, and that of the end behind it, where they are wanted."""
    from tokenizers import processors

    before = [settings["bos_token"]] if settings["bos_token"] and settings.get("add_bos_token", True) else []
    after = [settings["eos_token"]] if settings["eos_token"] and settings.get("add_eos_token", False) else []
    ids = [(token, tokenizer.token_to_id(token)) for token in {*before, *after}]
    if missing := [token for token, index in ids if index is None]:
        raise CheckpointError(f"tokenizer_config.json: the tokenizer has no {missing[0]}")
    if ids:
        single, pair = [*before, "$A", *after], [*before, "$A", *after, *before, "$B:1", *after]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
