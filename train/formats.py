# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
Records of users' data sets -> samples: messages as `SAILVLProcessor.apply_chat_template` takes them.

The keys of a record that are not None decide its format:

    conversations       LLaVA, InternVL, LLaMA-Factory: [{"from": "human", "value": "<image>\\nWhy?"}, ...]
    messages            OpenAI, TRL, ms-swift, LLaMA-Factory: [{"role": "user", "content": a string or parts}, ...]
    prompt, completion  TRL: two lists of messages
    texts               FineVision, The Cauldron: [{"user": "Why?", "assistant": "So."}, ...]; also with a `kind` each

with the images in `image` or `images` and the videos in `video` or `videos`, each one or a list. `<image>` and
`<video>` in a user's text mark where they are; in a record without marks they are put before the first user's text, as
`SAILVLChat.chat` does. If a record has image or video parts, these alone count, and `<image>` in a text is text. So it
is in a content that is a list of parts, if the record has neither images nor videos.

The chat template writes a newline after every image and video, and `Image-1: ` before each of several images of a
message. Where the text has these around a mark, they are left to the template; all other text is unchanged. A record
whose text contains a token of the prompt format, such as `<|im_end|>`, is a bad sample.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

from ..chat_sailvl import END_OF_TURN, IMAGE, MEDIA_KEYS, VIDEO
from .media import BadSample, ImageRoot, group_videos, list_keys, load_image, load_video, shorten


ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
MARKS = {IMAGE: "image", VIDEO: "video"}
MARK = re.compile("|".join(MARKS))
RESERVED_TOKENS = ("<|im_start|>", END_OF_TURN, "<|endoftext|>", "<img>", "</img>", "<IMG_CONTEXT>", VIDEO)
RESERVED = re.compile("|".join(map(re.escape, RESERVED_TOKENS)))
# Keys of records and messages that other frameworks train with.
UNSUPPORTED = ("objects", "tools", "tool_calls", "reasoning_content")
FORMATS = (("messages",), ("conversations",), ("prompt", "completion"), ("texts",))
# Per-turn ratings of FineVision: relevance_ratings, ...
RATINGS = ("relevance", "visual_dependency", "image_correspondence", "formatting")
UNKNOWN = "unknown"  # the kind of samples and turns whose kind neither their record nor corpus.yaml names
JOINT = "+"  # between the kinds of a sample whose independent turns are of several kinds

Part = dict[str, Any]


class FilteredSample(ValueError):  # noqa: N818
    """A sample that the options filter out; it is not faulty."""


@dataclass(frozen=True)
class Sample:
    """
    A conversation with its images and videos.

    Attributes:
        messages: A system message or none, then user and assistant in turn; every content is a list of parts,
            {"type": "text", "text": str}, {"type": "image", "image": X} or {"type": "video", "video": X}, where X is a
            path or URL, a PIL image, or a list of these, the frames of a video.
        kind: caption, ocr, ...; None if unknown; "caption+ocr" if its independent turns are of several kinds.
        options: Options of the processor for this sample: max_tiles, num_frames, ...
        independent_turns: Every question is asked without the turns before it; images are in the first one only.
        share_prompt: The tokens up to the last image, which independent turns have in common, are there once.
        turn_kinds: The kinds of independent turns, if they are of several kinds.
    """

    messages: list[dict[str, Any]]
    kind: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    independent_turns: bool = False
    share_prompt: bool = False
    turn_kinds: tuple[str, ...] = ()

    @property
    def conversations(self) -> list[list[dict[str, Any]]]:
        """The messages; of independent turns a conversation for each question, all with the images of the first."""
        if not self.independent_turns:
            return [self.messages]
        system = [message for message in self.messages if message["role"] == "system"]
        first, *turns = self.messages[len(system) :]
        media = [part for part in first["content"] if part["type"] != "text"]
        questions = [first, *({**turn, "content": [*media, *turn["content"]]} for turn in turns[1::2])]
        return [[*system, question, answer] for question, answer in zip(questions, turns[::2], strict=True)]


@dataclass(frozen=True)
class FormatOptions:
    """
    How the records of a data set are read.

    Attributes:
        image_root: The folder that paths are relative to, and that files must be in.
        allow_outside: Accept files outside of `image_root`.
        min_rating: Drop the turns of rated `texts` with a rating below this number, or below the number given for a
            rating, {"relevance": 4}. A turn whose rating is None is kept.
        num_frames: Take at most this many frames of a video that is a list of frames.
        independent_turns: Read the turns of a record as questions about the same images that do not depend on each
            other.
        share_prompt: Let independent turns share the tokens up to the last image, if their first question starts with
            its images: for attention that can keep them apart, see attention.py.

    Raises:
        ValueError: min_rating names an unknown rating, or num_frames is below 1.
    """

    image_root: Path | None = None
    allow_outside: bool = False
    min_rating: float | Mapping[str, float] | None = None
    num_frames: int | None = None
    independent_turns: bool = False
    share_prompt: bool = False

    def __post_init__(self) -> None:
        names = self.min_rating if isinstance(self.min_rating, Mapping) else ()
        if unknown := [name for name in names if name not in RATINGS]:
            raise ValueError(f"min_rating: expected the ratings {', '.join(RATINGS)}, got {unknown[0]!r}")
        if self.num_frames is not None and self.num_frames < 1:
            raise ValueError(f"num_frames: expected a positive number, got {self.num_frames}")

    @cached_property
    def root(self) -> ImageRoot:
        return ImageRoot(self.image_root, self.allow_outside)


class Turn(NamedTuple):
    """
    A turn of a record.

    Attributes:
        location: Its name in error messages, as in `messages[2]`.
        is_list: Whether its content is a list of parts.
        kind: As in a record; read from `texts` only.
    """

    role: str
    content: list[Part]
    location: str
    is_list: bool = False
    kind: str | None = None


def parse_record(record: Mapping[str, Any], options: FormatOptions) -> Sample:
    """
    Return the sample of a record in any of the formats.

    Raises:
        BadSample: The record is faulty, or in none of the formats; the message is the reason.
        FilteredSample: No turn of the record has the ratings that the options require.
    """
    if not isinstance(record, Mapping):
        raise BadSample(f"expected a record with keys (a JSON object), got {type(record).__name__}")
    fields = {key: value for key, value in record.items() if value is not None}
    turns = _read_turns(fields, options)
    _check_order(turns)
    images, videos = _read_media(fields, "image"), _read_media(fields, "video")
    if all(part["type"] == "text" for turn in turns for part in turn.content):
        marked = [turn for turn in turns if images or videos or not turn.is_list]
        _replace_marks(marked, is_video_only=bool(videos) and not images)
    _place(turns, "video", videos, options)
    _place(turns, "image", images, options)
    _check_reserved(turns)
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    if not options.independent_turns:
        return Sample(messages, _kind_of(fields))
    _check_independent(turns)
    kind, turn_kinds = _kinds_of_turns(turns, _kind_of(fields))
    share_prompt = options.share_prompt and _starts_with_media(turns)
    return Sample(messages, kind, independent_turns=True, share_prompt=share_prompt, turn_kinds=turn_kinds)


def _kind_of(fields: Mapping[str, Any], location: str = "") -> str | None:
    kind = fields.get("kind") or fields.get("channel")
    return _text_part(kind, f"{location}kind")["text"] if kind else None


def _kinds_of_turns(turns: list[Turn], kind: str | None) -> tuple[str | None, tuple[str, ...]]:
    """Return the kind of a sample of independent turns, and those of its turns if they are several."""
    answers = [turn for turn in turns if turn.role == "assistant"]
    if not any(turn.kind for turn in answers):
        return kind, ()
    kinds = tuple(turn.kind or kind or UNKNOWN for turn in answers)
    different = sorted({*kinds})
    return JOINT.join(different), kinds if len(different) > 1 else ()


# Turns


def _read_turns(fields: Mapping[str, Any], options: FormatOptions) -> list[Turn]:
    formats = [keys for keys in FORMATS if fields.keys() >= set(keys)]
    if len(formats) != 1:
        known = ", ".join(map(" + ".join, FORMATS))
        what = "several formats" if formats else "unknown format"
        raise BadSample(f"{what}: expected the keys of one of {known}; got {list_keys(fields)}")
    (keys,) = formats
    _refuse(fields, UNSUPPORTED, "the record")
    if keys == ("texts",):
        return _read_texts(fields, options)
    if options.min_rating is not None:
        raise BadSample(f"min_rating: only texts have ratings, the record has {' + '.join(keys)}")
    turns = [turn for key in keys for turn in _read_messages(fields[key], key, options)]
    return [*_read_system(fields), *turns]


def _refuse(fields: Mapping[str, Any], keys: Iterable[str], location: str) -> None:
    """Raise BadSample for keys that other frameworks train with and this one would silently leave out."""
    if found := [key for key in keys if fields.get(key)]:
        raise BadSample(f"{location}: {found[0]} is not supported: write it into the texts, or remove it")


def _read_system(fields: Mapping[str, Any]) -> list[Turn]:
    """Return the system message that LLaMA-Factory and ms-swift store outside of the messages."""
    system = fields.get("system")
    return [Turn("system", [_text_part(system, "system")], "system")] if system else []


def _read_messages(messages: Any, key: str, options: FormatOptions) -> list[Turn]:
    if not isinstance(messages, (list, tuple)):
        raise BadSample(f"{key}: expected a list of messages, got {type(messages).__name__}")
    turns = []
    for index, message in enumerate(messages):
        location = f"{key}[{index}]"
        if not isinstance(message, Mapping):
            raise BadSample(f"{location}: expected a message with role and content, got {type(message).__name__}")
        name, content = _first_of(message, "from", "role"), _first_of(message, "value", "content")
        role = ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            raise BadSample(f"{location}: expected one of the roles {', '.join(ROLES)}, got {shorten(str(name))}")
        _refuse(message, UNSUPPORTED, location)
        if role == "assistant" and (message.get("loss") is False or message.get("weight") == 0):
            raise BadSample(f"{location}: loss: false (or weight: 0) is not supported: every answer is trained")
        turns.append(
            Turn(role, _read_content(content, role, location, options), location, not isinstance(content, str))
        )
    return turns


def _first_of(message: Mapping[str, Any], *keys: str) -> Any:
    """Return the value of the first of some keys that is not None."""
    return next((message[key] for key in keys if message.get(key) is not None), None)


def _read_content(content: Any, role: str, location: str, options: FormatOptions) -> list[Part]:
    if isinstance(content, str):
        return [_text_part(content, location)]
    if not isinstance(content, (list, tuple)):
        raise BadSample(f"{location}: content: expected a string or a list of parts, got {type(content).__name__}")
    parts = [_read_part(part, f"{location}, part {index}", options) for index, part in enumerate(content)]
    types = {part["type"] for part in parts} - {"text"}
    if types and role != "user":
        raise BadSample(f"{location}: {role}: expected text only, got {types.pop()}: move it to a user message")
    return parts


def _read_part(part: Any, location: str, options: FormatOptions) -> Part:
    """Return a part of one of the three types of a sample; an image or video may be missing."""
    fields = {key: value for key, value in part.items() if value is not None} if isinstance(part, Mapping) else {}
    part_type = fields.get("type")
    if part_type == "text":
        return _text_part(fields.get("text"), location)
    if part_type == "image_url":
        url = fields.get("image_url")
        return {"type": "image", "image": load_image(_url_of(url), f"{location}, image_url", options.root)}
    if part_type not in ("image", "video"):
        got = shorten(str(part_type)) if fields else type(part).__name__
        raise BadSample(f"{location}: expected a part of the type text, image, image_url or video, got {got}")
    media = next((fields[key] for key in MEDIA_KEYS[part_type] if key in fields), None)
    if media is None:
        return {"type": part_type}
    return {"type": part_type, part_type: _load(media, part_type, f"{location}, {part_type}", options)}


def _url_of(image_url: Any) -> Any:
    return image_url.get("url") if isinstance(image_url, Mapping) else image_url


def _text_part(text: Any, location: str) -> Part:
    if not isinstance(text, str):
        raise BadSample(f"{location}: expected a string as text, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadSample(f"{location}: the text is not valid Unicode: {error}") from error
    return {"type": "text", "text": text}


def _check_order(turns: list[Turn]) -> None:
    """Check that an optional system message is followed by user and assistant in turn, and that answers have text."""
    if all(turn.role != "assistant" for turn in turns):
        raise BadSample("the record has no assistant turn: expected at least one answer")
    dialogue = turns[1:] if turns[0].role == "system" else turns
    for index, turn in enumerate(dialogue):
        expected = ("user", "assistant")[index % 2]
        if turn.role != expected:
            raise BadSample(f"{turn.location}: expected {expected}, got {turn.role}: user and assistant must alternate")
        if turn.role == "assistant" and not "".join(part["text"] for part in turn.content).strip():
            raise BadSample(f"{turn.location}: the answer is empty")
    if dialogue[-1].role == "user":
        raise BadSample(f"{dialogue[-1].location}: the last user turn has no answer")


def _check_independent(turns: list[Turn]) -> None:
    """Check that images and videos are in the first question, which all independent turns then show."""
    first = next(turn for turn in turns if turn.role == "user")
    for turn in turns:
        media = [part["type"] for part in turn.content if part["type"] != "text"]
        if media and turn is not first:
            raise BadSample(
                f"{turn.location}: independent_turns: expected images and videos in the first question only, got "
                f"{media[0]}: move it there, or leave independent_turns out"
            )


def _starts_with_media(turns: list[Turn]) -> bool:
    """Return whether the first question has images or videos, and no text before or between them."""
    first = next(turn for turn in turns if turn.role == "user")
    is_text = [part["type"] == "text" for part in first.content]
    return not is_text[0] and is_text == sorted(is_text)


def _check_reserved(turns: list[Turn]) -> None:
    """Check that no text contains a token that would end a turn, or that the processor replaces."""
    for turn in turns:
        for part in turn.content:
            if part["type"] == "text" and (match := RESERVED.search(part["text"])):
                raise BadSample(
                    f"{turn.location}: the text contains {match[0]}, a token of the prompt format: remove it"
                )


# Rated turns


def _read_texts(fields: Mapping[str, Any], options: FormatOptions) -> list[Turn]:
    texts = fields["texts"]
    if not isinstance(texts, (list, tuple)):
        raise BadSample(f"texts: expected a list of user and assistant texts, got {type(texts).__name__}")
    kept = _sufficiently_rated(fields, len(texts), options.min_rating)
    if texts and not kept:
        raise FilteredSample(f"all {len(texts)} turns have a rating below min_rating {options.min_rating}")
    turns = []
    for index in kept:
        if not isinstance(texts[index], Mapping):
            raise BadSample(f"texts[{index}]: expected user and assistant, got {type(texts[index]).__name__}")
        kind = _kind_of(texts[index], f"texts[{index}].")
        if kind and JOINT in kind:
            raise BadSample(f"texts[{index}].kind: expected a name without {JOINT}, got {shorten(kind)}")
        for role in ("user", "assistant"):
            location = f"texts[{index}].{role}"
            turns.append(Turn(role, [_text_part(texts[index].get(role), location)], location, kind=kind))
    return turns


def _sufficiently_rated(
    fields: Mapping[str, Any], count: int, min_rating: float | Mapping[str, float] | None
) -> list[int]:
    """Return the indices of the turns without a rating below the minimum."""
    if min_rating is None:
        return list(range(count))
    rated = [name for name in RATINGS if f"{name}_ratings" in fields]
    minima = min_rating if isinstance(min_rating, Mapping) else dict.fromkeys(rated, min_rating)
    if missing := [name for name in minima or RATINGS if name not in rated]:
        raise BadSample(f"min_rating: the record has no {missing[0]}_ratings")
    columns = [(_read_ratings(fields, name, count), minimum) for name, minimum in minima.items()]
    return [
        index
        for index in range(count)
        if not any(column[index] is not None and column[index] < minimum for column, minimum in columns)
    ]


def _read_ratings(fields: Mapping[str, Any], name: str, count: int) -> list[float | None]:
    key = f"{name}_ratings"
    ratings = fields[key]
    if not isinstance(ratings, (list, tuple)) or len(ratings) != count:
        got = f"{len(ratings)} ratings" if isinstance(ratings, (list, tuple)) else type(ratings).__name__
        raise BadSample(f"{key}: expected a list of {count} ratings, one for each of the texts, got {got}")
    if wrong := [rating for rating in ratings if not isinstance(rating, (Real, type(None)))]:
        raise BadSample(f"{key}: expected numbers, got {type(wrong[0]).__name__}")
    return list(ratings)


# Images and videos


def _read_media(fields: Mapping[str, Any], media_type: str) -> list[tuple[Any, str]]:
    """Return the images or videos of the record outside of its messages, each with its name for error messages."""
    given = [key for key in (media_type, f"{media_type}s") if key in fields and not _is_empty(fields[key])]
    if len(given) > 1:
        raise BadSample(f"expected {given[0]} or {given[1]}, got both")
    if not given:
        return []
    media = fields[given[0]]
    if media_type == "video":
        media = group_videos(media)
    elif not isinstance(media, (list, tuple)):
        media = [media]
    return [(entry, f"{given[0]}[{index}]" if len(media) > 1 else given[0]) for index, entry in enumerate(media)]


def _is_empty(media: Any) -> bool:
    return isinstance(media, (str, list, tuple)) and not media


def _load(media: Any, media_type: str, name: str, options: FormatOptions) -> Any:
    if media_type == "video":
        return load_video(media, name, options.root, options.num_frames)
    return load_image(media, name, options.root)


def _replace_marks(turns: list[Turn], is_video_only: bool) -> None:
    """Replace the `<image>` and `<video>` in the texts of users by image and video parts without image or video."""
    users = [turn for turn in turns if turn.role == "user"]
    marks = MARKS
    if is_video_only and not any(VIDEO in part["text"] for turn in users for part in turn.content):
        marks = {IMAGE: "video"}  # LLaVA-Video
    for turn in users:
        parts = [piece for part in turn.content for piece in _split_at_marks(part["text"], marks)]
        _drop_numbers(parts)
        turn.content[:] = [part for part in parts if part != {"type": "text", "text": ""}] or parts[:1]


def _split_at_marks(text: str, marks: Mapping[str, str]) -> list[Part]:
    """Return texts and marks in turn, a text first and last; one newline after a mark is left to the template."""
    parts, end = [], 0
    for match in MARK.finditer(text):
        parts += [{"type": "text", "text": text[end : match.start()]}, {"type": marks[match[0]]}]
        end = match.end() + text.startswith("\n", match.end())
    return [*parts, {"type": "text", "text": text[end:]}]


def _drop_numbers(parts: list[Part]) -> None:
    """Leave the `Image-1: ` before each of several images to the template."""
    images = [index for index, part in enumerate(parts) if part["type"] == "image"]
    for number, index in enumerate(images if len(images) > 1 else [], 1):
        parts[index - 1]["text"] = parts[index - 1]["text"].removesuffix(f"Image-{number}: ")


def _place(turns: list[Turn], media_type: str, media: list[tuple[Any, str]], options: FormatOptions) -> None:
    """Load media into the parts that have none yet; if there are no parts, put them before the first user text."""
    parts = [part for turn in turns for part in turn.content if part["type"] == media_type]
    empty = [part for part in parts if media_type not in part]
    if media and not parts:
        empty = [{"type": media_type} for _ in media]
        next(turn for turn in turns if turn.role == "user").content[:0] = empty
    if len(empty) != len(media):
        raise BadSample(
            f"{len(empty)} <{media_type}> in the messages, {len(media)} {media_type}s: expected one for each"
        )
    for part, (entry, name) in zip(empty, media, strict=True):
        part[media_type] = _load(entry, media_type, name, options)


__all__ = ["BadSample", "FilteredSample", "FormatOptions", "Sample", "parse_record"]
