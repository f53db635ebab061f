# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
Processor of SAIL-VL: turns text, images and videos into the inputs of the model.

Every placeholder in a prompt is expanded to the placeholders of its visual tokens:

    <IMG_CONTEXT>  ->  <img>, N times <IMG_CONTEXT> for every tile of the image, </img>
    <video>        ->  one line per frame: Frame-1: and the same with one tile

Shapes: B prompts, S tokens of a prompt, N visual tokens of a tile, n tiles of all images and frames together, h and w
the height and width of a tile in pixels.
"""

import difflib
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from inspect import signature
from itertools import accumulate, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin, TextKwargs, Unpack
from transformers.utils.chat_template_utils import render_jinja_template

from .chat_sailvl import (
    CHAT_TEMPLATE,
    MEDIA_KEYS,
    VIDEO,
    as_dict,
    check_conversations,
    split_batch,
    token_id,
)
from .image_processing_sailvit import SAILViTImageProcessorKwargs
from .video_sailvl import (
    Frames,
    SAILVLVideosKwargs,
    check_video_options,
    count_frames,
    flatten_videos,
    group_frames,
    read_clips,
)


TRANSFORMERS_VERSION = tuple(int(number) for number in version("transformers").split(".")[:2])
IS_V4 = TRANSFORMERS_VERSION < (5,)
# Older versions of ProcessorMixin.apply_chat_template build a wrong assistant mask and have no processor_kwargs.
HAS_OLD_CHAT_TEMPLATES = TRANSFORMERS_VERSION < (5, 23)
try:
    from transformers.utils.chat_template_utils import (
        _CONTROL_TOKEN_START as ESCAPE,
    )  # marks special tokens in user text
except ImportError:  # transformers < 5.23
    ESCAPE = ""
NOT_ESCAPED = f"(?<!{ESCAPE})" if ESCAPE else ""

# Options that apply to images only: a video frame is always one tile.
TILING_OPTIONS = {"do_tile", "min_tiles", "max_tiles", "use_thumbnail", "msac"}


class SAILVLTextKwargs(TextKwargs, total=False):
    """Options of the tokenizer, including those that older transformers versions do not list."""

    return_token_type_ids: bool | None
    return_mm_token_type_ids: bool | None
    return_text_replacement_offsets: bool | None
    return_tile_indices: bool | None
    return_tensors: str | None


class SAILVLProcessorKwargs(ProcessingKwargs, total=False):
    """Options of SAILVLProcessor.__call__, grouped by modality; all of them may also be passed as plain arguments."""

    text_kwargs: SAILVLTextKwargs
    images_kwargs: SAILViTImageProcessorKwargs
    videos_kwargs: SAILVLVideosKwargs


class TokenCounts(NamedTuple):
    """
    What a conversation is to the model.

    Attributes:
        tokens: Tokens S, visual tokens included.
        answers: Tokens of the assistant's answers and their ends of turn, which `return_assistant_tokens_mask` marks.
        tiles: Tiles n of all images and frames.
        prefix: Tokens up to the end of the last image or frame; 0 without any.
    """

    tokens: int
    answers: int
    tiles: int
    prefix: int = 0


class SAILVLProcessor(ProcessorMixin):
    r"""
    Image processor and tokenizer of SAIL-VL. `apply_chat_template` renders the prompt format of the releases.

    The tokenizer pads on the left, as generation requires, unless `tokenizer_config.json` or `from_pretrained`
    specifies a padding side, or it is set on `processor.tokenizer`.

    Args:
        image_processor: A SAILViTImageProcessor.
        tokenizer: A tokenizer with `image_token`, `image_start_token` and `image_end_token` as special tokens.
        image_seq_length: Visual tokens N per tile; `config.image_seq_length` of the model.
        image_token, image_start_token, image_end_token: As in the model's config.
        chat_template: Default: that of the releases.

    Attributes:
        video_token: Placeholder of a video, `<video>`. It is not in the vocabulary and has no id: the frames of a video
            become `image_token`s.
        image_token_id, image_token_ids: The id of `image_token`; the ids of the three image tokens.
        num_image_token: `image_seq_length`, under its name in ms-swift.

    Raises:
        ValueError: The tokenizer lacks one of the three image tokens.
    """

    valid_processor_kwargs = SAILVLProcessorKwargs
    video_token = VIDEO
    if IS_V4:
        attributes = ["image_processor", "tokenizer"]
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_seq_length: int = 256,
        image_token: str = "<IMG_CONTEXT>",
        image_start_token: str = "<img>",
        image_end_token: str = "</img>",
        chat_template: str | dict[str, str] | None = None,
        **kwargs: Any,
    ):
        self.image_seq_length = image_seq_length
        self.image_token = image_token
        self.image_start_token = image_start_token
        self.image_end_token = image_end_token
        template = CHAT_TEMPLATE if chat_template is None else chat_template
        super().__init__(image_processor, tokenizer, chat_template=template, **kwargs)
        self.image_token_id = token_id(tokenizer, image_token)
        self._image_ids = [self.image_token_id, *(token_id(tokenizer, t) for t in (image_start_token, image_end_token))]
        if "padding_side" not in tokenizer.init_kwargs:  # init_kwargs are what the tokenizer saves
            tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, "pixel_values"]

    @property
    def image_token_ids(self) -> list[int]:
        return self._image_ids

    @property
    def num_image_token(self) -> int:
        return self.image_seq_length

    def encode(self, *args: Any, **kwargs: Any) -> list[int]:
        """Call `encode` of the tokenizer."""
        return self.tokenizer.encode(*args, **kwargs)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        **kwargs: Unpack[SAILVLProcessorKwargs],
    ) -> BatchFeature:
        """
        Args:
            images: One image or nested lists of images of any type that the image processor takes, in the order of
                their placeholders.
            text: One or several prompts, with an `image_token` for every image and a `<video>` for every video.
            videos: One video or a list of videos, each a path or URL (http, https, file, data) of a video file or an
                animated image, or its frames: a list of images, or an array or tensor of 4 dimensions. A single image
                is a video of one frame. Every frame is one tile.
            kwargs: Options of the image processor (max_tiles, ...), the tokenizer (padding, truncation, max_length,
                return_tensors, ...) and videos, as plain arguments or in `images_kwargs`, `text_kwargs`,
                `videos_kwargs`; plain image options apply to images and frames. Video options:

                num_frames: Sample at most this many frames, evenly spaced. Default: 8 of a file, all frames of a list.
                fps: Sample this many frames per second instead, at most all frames. A list of frames needs its frame
                    rate in `video_metadata`.
                do_sample_frames: False keeps every frame and ignores `num_frames` and `fps`; True samples lists, too.
                video_metadata: Metadata of each video: a VideoMetadata or a dict, `{"fps": 25}`, or a list of them;
                    overrides the metadata in the file.
                return_metadata: Return a VideoMetadata for each video.

        Returns:
            input_ids, attention_mask (B, S); with images, pixel_values (n, 3, h, w) in the order of the prompts. On
            request mm_token_type_ids (B, S), 1 for the tokens of images and frames including start and end tokens;
            text_replacement_offsets, the spans of every placeholder and of its replacement; video_metadata;
            tile_indices (m,), then pixel_values has the tiles of an image only once that is given several times, as
            the same object or path: for every tile that the prompts show, in their order, its index in pixel_values.

        Raises:
            ValueError: The placeholders do not match the images or videos; a video cannot be decoded, or its frame rate
                is needed and unknown; an option is out of range or given twice; truncation would cut visual tokens.
            FileNotFoundError: A video does not exist.
            ImportError: A video file is given and PyAV is not installed.
            TypeError: An unknown option, or audio.
        """
        prompts = [text] if isinstance(text, str) else list(text or [])
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"text must be a prompt or a list of prompts, with a {self.image_token} for every image")
        options = self._sort_options(kwargs)
        videos = group_frames(videos)
        self._check_counts(prompts, images, videos)
        clips = read_clips(flatten_videos(videos), options.videos)
        replacements = {
            self.image_token: self._replace_images(_flatten_images(images), options.images),
            self.video_token: self._replace_videos([clip.frames for clip in clips], options.frames),
        }
        prompts, offsets, tiles = self._expand(prompts, replacements)
        extra = {}
        if options.text.pop("return_text_replacement_offsets", None):
            extra["text_replacement_offsets"] = offsets
        if options.videos.return_metadata and clips:
            extra["video_metadata"] = [clip.metadata for clip in clips]
        return self._tokenize(prompts, tiles, options, extra)

    # Options

    def _option_names(self) -> dict[str, set[str]]:
        """Return the option names of `text_kwargs`, `images_kwargs` and `videos_kwargs`."""
        images = self.image_processor.valid_kwargs.__annotations__.keys() | {"return_tensors"}
        return {
            "text_kwargs": set(SAILVLTextKwargs.__annotations__),
            "images_kwargs": set(images),
            "videos_kwargs": SAILVLVideosKwargs.__annotations__.keys() | (images - TILING_OPTIONS),
        }

    def _sort_options(self, kwargs: Mapping[str, Any]) -> SimpleNamespace:
        """Return the options of a call, validated: text, images and frames as dicts, videos as a namespace."""
        names = self._option_names()
        self._check_no_audio(kwargs)
        for group in {*names, "common_kwargs"} & kwargs.keys():
            _check_mapping(kwargs[group], group)
        nested = {group: dict(kwargs.get(group) or {}) for group in names}
        groups = {*names, "common_kwargs", "audio_kwargs", "audio", "audios"}
        plain = {key: value for key, value in kwargs.items() if key not in groups}
        common = dict(kwargs.get("common_kwargs") or {})
        self._check_known([*plain, *common])
        sorted_options = {}
        for group, known in names.items():
            self._check_known(nested[group], group)
            _check_not_given_twice(nested[group], plain, group)
            defaults = {key: value for key, value in {**common, **plain}.items() if key in known}
            sorted_options[group] = defaults | nested[group]
        text, images, frames = sorted_options.values()
        videos = check_video_options({key: frames.pop(key, None) for key in SAILVLVideosKwargs.__annotations__})
        return SimpleNamespace(text={**self._tokenizer_options(), **text}, images=images, frames=frames, videos=videos)

    def _check_known(self, keys: Iterable[str], group: str | None = None, others: Iterable[str] = ()) -> None:
        """Raise a TypeError for a key that is neither an option (of `group`, if given) nor one of `others`."""
        names = self._option_names()
        known = names[group] if group else set().union(names, others, *names.values())
        for key in keys:
            if key in known:
                continue
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
            valid_groups = [name for name, options in names.items() if key in options]
            hint = f"; did you mean {close[0]}?" if close else ""
            hint = f"; it belongs in {' or '.join(valid_groups)}" if valid_groups else hint
            if key in vars(GenerationConfig()):
                hint = ": pass it to generate, or to a pipeline in generate_kwargs={...}"
            prefix = f"{group}: " if group else ""
            raise TypeError(f"{prefix}{type(self).__name__} has no option {str(key)[:80]!r}{hint}")

    def _check_no_audio(self, kwargs: Mapping[str, Any]) -> None:
        for key in ("audio", "audios"):
            if not _is_empty(kwargs.get(key)):
                raise TypeError(f"{type(self).__name__} takes images and videos, not {key}")
        if kwargs.get("audio_kwargs"):
            raise TypeError(f"{type(self).__name__} takes no audio and no audio_kwargs")

    def _tokenizer_options(self) -> dict[str, Any]:
        """
        Return the call options that the tokenizer was loaded with, as the processors of transformers use them.

        token_type_ids are returned only if the tokenizer's files list `model_input_names`: some tokenizer classes
        return them by default, and causal language models do not take them.
        """
        saved = self.tokenizer.init_kwargs
        names = SAILVLTextKwargs.__annotations__.keys() - {"padding_side"}  # read from the tokenizer itself
        options = {key: getattr(self.tokenizer, key, saved[key]) for key in saved.keys() & names}
        return options if "model_input_names" in saved else {"return_token_type_ids": False, **options}

    # Placeholders

    def _check_counts(self, prompts: list[str], images: Any, videos: Any) -> None:
        """Compare placeholders with images and videos, per prompt if these are nested per prompt."""
        self._check_count(prompts, self.image_token, "images", _by_prompt(images, _flatten_images))
        is_flat = isinstance(videos, (list, tuple)) and any(isinstance(video, Frames) for video in videos)
        by_prompt = [flatten_videos(videos)] if is_flat else _by_prompt(videos, flatten_videos)
        self._check_count(prompts, self.video_token, "videos", by_prompt)

    def _check_count(self, prompts: list[str], token: str, what: str, by_prompt: list[list[Any]]) -> None:
        found, counts = [_count(token, prompt) for prompt in prompts], [len(entries) for entries in by_prompt]
        if found != counts if len(found) == len(counts) else sum(found) != sum(counts):
            raise ValueError(
                f"{_sum_of(found)} {token} in the text, {_sum_of(counts)} {what}: the number of {token} tokens in the "
                f"prompts should be the same as the number of {what}"
            )

    def _replace_images(self, images: list[Any], options: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the replacement text of each image and its tiles (tiles, 3, h, w): one tensor of equal images."""
        if not images:
            return
        keys = [image if isinstance(image, str) else id(image) for image in images]
        different = dict(zip(keys, images, strict=True))
        inputs = self.image_processor([*different.values()], **{**options, "return_tensors": "pt"})
        tiles = inputs["pixel_values"].split(inputs["num_tiles"].tolist())
        indices = {key: index for index, key in enumerate(different)}
        for key in keys:
            yield self.replace_image_token(inputs, indices[key]), tiles[indices[key]]

    def _replace_videos(self, clips: list[list[Any]], options: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the replacement text of each video and its frames, one tile each, (frames, 3, h, w)."""
        if not clips:
            return
        inputs = self.image_processor(clips, **{**options, "do_tile": False, "return_tensors": "pt"})
        inputs["num_frames"] = [len(frames) for frames in clips]
        for index, tiles in enumerate(inputs["pixel_values"].split(inputs["num_frames"])):
            yield self.replace_video_token(inputs, index), tiles

    def replace_image_token(self, image_inputs: Mapping[str, Any], image_idx: int, **kwargs: Any) -> str:
        """Return the text that replaces an image placeholder, from `num_tiles` of `image_inputs`."""
        context = self.image_token * (self.image_seq_length * int(image_inputs["num_tiles"][image_idx]))
        return f"{self.image_start_token}{context}{self.image_end_token}"

    def replace_video_token(self, video_inputs: Mapping[str, Any], video_idx: int, **kwargs: Any) -> str:
        """Return the text that replaces a video placeholder, from `num_frames` of `video_inputs`."""
        return _number_frames(self.replace_image_token({"num_tiles": [1]}, 0), video_inputs["num_frames"][video_idx])

    def _expand(
        self, prompts: list[str], replacements: Mapping[str, Iterator[tuple[str, torch.Tensor]]]
    ) -> tuple[list[str], list[list[dict[str, Any]]], list[torch.Tensor]]:
        """Replace every placeholder; return the prompts, the replacement offsets and the tiles in prompt order."""
        modalities = {self.image_token: "image", self.video_token: "video"}
        pattern = NOT_ESCAPED + f"({'|'.join(map(re.escape, modalities))})"
        expanded, offsets, tiles = [], [], []
        for prompt in prompts:
            text, end, replaced = "", 0, []
            for match in re.finditer(pattern, prompt):
                replacement, visual_tiles = next(replacements[match[0]])
                text, end = text + prompt[end : match.start()], match.end()
                span = {"span": match.span(), "new_span": (len(text), len(text) + len(replacement))}
                replaced.append({"type": modalities[match[0]], **span, "text": match[0], "replacement": replacement})
                text += replacement
                tiles.append(visual_tiles)
            expanded.append(text + prompt[end:])
            offsets.append(replaced)
        return expanded, offsets, tiles

    # Tokens

    def _tokenize(
        self, prompts: list[str], tiles: list[torch.Tensor], options: SimpleNamespace, extra: dict[str, Any]
    ) -> BatchFeature:
        tensor_type = options.text.pop("return_tensors", None)
        with_token_types = options.text.pop("return_mm_token_type_ids", None)
        with_tile_indices = options.text.pop("return_tile_indices", None)
        data = dict(self.tokenizer(prompts, **options.text))
        self._check_image_tokens(prompts, data["input_ids"], options.text.get("max_length"))
        if with_token_types:
            data["mm_token_type_ids"] = [
                [int(token in self.image_token_ids) for token in ids] for ids in data["input_ids"]
            ]
        batch = BatchFeature(data=data, tensor_type=tensor_type)
        if tiles and with_tile_indices:
            tiles, tile_indices = _without_repetitions(tiles)
            batch.update(BatchFeature({"tile_indices": tile_indices}, tensor_type=tensor_type))
        if tiles:
            batch.update(_pixel_values(tiles, options, tensor_type))
        batch.update(extra)
        batch.skip_tensor_conversion = list(extra)  # apply_chat_template converts the keys that it adds
        return batch

    def _check_image_tokens(self, prompts: list[str], rows: list[list[int]], max_length: int | None) -> None:
        if len(rows) != len(prompts):
            raise ValueError(f"expected one row of tokens per prompt, got {len(rows)} rows for {len(prompts)} prompts")
        names = (self.image_token, self.image_start_token, self.image_end_token)
        for prompt, ids in zip(prompts, rows, strict=True):
            expected = sum(_count(name, prompt) for name in names)
            kept = sum(map(list(ids).count, self.image_token_ids))
            if kept != expected:
                raise ValueError(
                    f"expected {expected} image tokens in a prompt, got {kept} with max_length {max_length}: "
                    "truncation would cut through an image; raise max_length or lower max_tiles"
                )

    # Chat

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """
        Render one or several conversations; with `tokenize=True` also process their text, images and videos.

        Behaves as in transformers 5.24 on every supported version.

        Args:
            kwargs: Options of `__call__`, here or in `processor_kwargs`; other names are variables of the template.
                `return_assistant_tokens_mask` adds assistant_masks (B, S), 1 for the tokens of every answer and its
                end of turn.

        Raises:
            ValueError: A conversation is empty, a message lacks its role or content, an image or video part lacks its
                image or video; an option is given twice; a mask is requested without tokenize and return_dict.
            TypeError: An option that neither `__call__` nor the template has, or an unknown key of a message part.
        """
        processor_kwargs = kwargs.pop("processor_kwargs", None)
        _check_mapping(processor_kwargs, "processor_kwargs")
        options = dict(processor_kwargs or {})
        names = self._option_names()
        names = {*names, "common_kwargs", "audio_kwargs"}.union(*names.values())
        names -= signature(ProcessorMixin.apply_chat_template).parameters.keys()
        plain = {key: kwargs.pop(key) for key in names & kwargs.keys()}
        _check_not_given_twice(plain, options, "processor_kwargs")
        options |= plain
        media = {"images", "videos"}  # newer versions take them in processor_kwargs
        self._sort_options({key: value for key, value in options.items() if key not in media})
        apply = self._apply_chat_template if HAS_OLD_CHAT_TEMPLATES else super().apply_chat_template
        self._check_template_variables(self._get_template(chat_template), kwargs, signature(apply).parameters)
        returns_mask = kwargs.get("tokenize") and kwargs.get("return_dict")
        if kwargs.get("return_assistant_tokens_mask") and not returns_mask:
            raise ValueError("return_assistant_tokens_mask needs tokenize=True and return_dict=True")
        required = [name for name in MEDIA_KEYS if kwargs.get("tokenize") and not options.get(f"{name}s")]
        check_conversations(conversation, required)
        chats, is_batch = split_batch(conversation)
        chats = [getattr(chat, "messages", chat) for chat in chats]
        conversation = chats if is_batch else chats[0]
        result = apply(conversation, chat_template, processor_kwargs=options, **kwargs)
        if isinstance(result, BatchFeature) and "assistant_masks" in result:
            tensor_type = {torch.Tensor: "pt", list: None}.get(type(result["input_ids"]), "np")
            result.update(BatchFeature({"assistant_masks": result["assistant_masks"]}, tensor_type=tensor_type))
        return result

    def _apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None,
        processor_kwargs: dict[str, Any],
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        return_assistant_tokens_mask: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Do what ProcessorMixin.apply_chat_template of transformers >= 5.23 does, for older versions."""
        template = self._get_template(chat_template)
        if kwargs.get("continue_final_message") and (
            return_assistant_tokens_mask or kwargs.get("add_generation_prompt")
        ):
            raise ValueError(
                "continue_final_message excludes add_generation_prompt and return_assistant_tokens_mask: pass one"
            )
        chats, is_batch = split_batch(conversation)
        chats = [_normalize_messages(chat) for chat in chats]
        prompts, spans = render_jinja_template(
            conversations=chats,
            chat_template=template,
            return_assistant_tokens_mask=return_assistant_tokens_mask,
            **{**self.tokenizer.special_tokens_map, **kwargs},
        )
        if not tokenize:
            return prompts if is_batch else prompts[0]
        if return_tensors is not None:
            processor_kwargs["return_tensors"] = return_tensors
        if self.tokenizer.bos_token is not None and prompts[0].startswith(self.tokenizer.bos_token):
            processor_kwargs["add_special_tokens"] = False
        if return_assistant_tokens_mask:
            processor_kwargs |= {"return_offsets_mapping": True, "return_text_replacement_offsets": True}
        images, videos = ([_collect_media(chat, name) for chat in chats] for name in ("image", "video"))
        batch = self(images, prompts, videos, **processor_kwargs)
        if return_assistant_tokens_mask:
            offsets = zip(batch.pop("offset_mapping"), batch.pop("text_replacement_offsets"), spans, strict=True)
            batch["assistant_masks"] = [_assistant_mask(*row) for row in offsets]
        return batch if return_dict else batch["input_ids"]

    def count_tokens(
        self, conversation: Any, chat_template: str | None = None, **kwargs: Any
    ) -> TokenCounts | list[TokenCounts]:
        """
        Count the tokens and tiles that `apply_chat_template(..., tokenize=True)` returns, without decoding pixels.

        Of an image only the header is read; a video file is decoded only if its header does not suffice.

        Args:
            conversation: One or several conversations, with their images and videos.
            kwargs: Options of `__call__`: max_tiles, num_frames, ...

        Returns:
            The counts of the conversation, or a list for several.

        Raises:
            ValueError, TypeError, FileNotFoundError, ImportError: As in `apply_chat_template`; but a file whose header
                is valid is not known to be whole.
        """
        options = self._sort_options(kwargs)
        check_conversations(conversation, required=MEDIA_KEYS)
        chats, is_batch = split_batch(conversation)
        chats = [_normalize_messages(getattr(chat, "messages", chat)) for chat in chats]
        prompts, spans = render_jinja_template(
            conversations=chats,
            chat_template=self._get_template(chat_template),
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        tiles = self._count_tiles(chats, options)
        frames = [self._count_frames(chat, options) for chat in chats]
        counts = self._count_prompts(prompts, spans, tiles, frames, options)
        return counts if is_batch else counts[0]

    def _count_tiles(self, chats: list[list[dict[str, Any]]], options: SimpleNamespace) -> list[list[int]]:
        """Return the tiles of every image of every conversation."""
        images = [_flatten_images(_collect_media(chat, "image")) for chat in chats]
        counts = iter(self.image_processor.count_tiles(_flatten_images(images), **options.images))
        return [list(islice(counts, len(own))) for own in images]

    def _count_frames(self, chat: list[dict[str, Any]], options: SimpleNamespace) -> list[int]:
        """Return the frames of every video of a conversation."""
        videos = flatten_videos(group_frames(_collect_media(chat, "video")))
        return [count_frames(video, options.videos) for video in videos]

    def _count_prompts(
        self,
        prompts: list[str],
        spans: list[list[tuple[int, int]]],
        images: list[list[int]],
        videos: list[list[int]],
        options: SimpleNamespace,
    ) -> list[TokenCounts]:
        self._check_count(prompts, self.image_token, "images", images)
        self._check_count(prompts, self.video_token, "videos", videos)
        frames = [_number_frames(self.image_token, number) for numbers in videos for number in numbers]
        replacements = {self.image_token: ((self.image_token, None) for numbers in images for _ in numbers)}
        replacements[self.video_token] = ((text, None) for text in frames)
        expanded, offsets, _ = self._expand(prompts, replacements)
        skipped = {"return_tensors", "padding", "truncation", "max_length", "return_offsets_mapping"}
        skipped |= {"return_mm_token_type_ids", "return_text_replacement_offsets", "return_tile_indices"}
        text_options = {k: v for k, v in options.text.items() if k not in skipped}
        encoded = self.tokenizer(expanded, **{**text_options, "return_attention_mask": False})
        counts = []
        for index, (image_tiles, video_frames) in enumerate(zip(images, videos, strict=True)):
            number, total = len(image_tiles) + sum(video_frames), sum(image_tiles) + sum(video_frames)
            ids = encoded["input_ids"][index]
            visual = self.image_seq_length * total + number  # start and end tokens: 2 for 1
            answers = _shift_spans(spans[index], offsets[index])
            answers = _count_overlapping(encoded.encodings[index], len(expanded[index]), answers)
            prefix = len(ids) - ids[::-1].index(self.image_token_id) + visual if number else 0
            counts.append(TokenCounts(len(ids) + visual, answers, total, prefix))
        return counts

    def _get_template(self, chat_template: str | None) -> str:
        """Return the template with this name, else `chat_template` itself, else the default template."""
        templates = self.chat_template
        if isinstance(templates, dict):
            chat_template = templates.get("default" if chat_template is None else chat_template, chat_template)
            if chat_template is None:
                raise ValueError(f"chat_template must be one of {', '.join(templates)}: none of them is named default")
        return templates if chat_template is None else chat_template

    def _check_template_variables(self, template: str, kwargs: Mapping[str, Any], parameters: Iterable[str]) -> None:
        known = {"tools", "documents", "add_generation_prompt", "continue_final_message", *parameters} - {"kwargs"}
        unknown = [key for key in kwargs.keys() - known if not re.search(rf"\b{re.escape(key)}\b", template)]
        self._check_known(unknown, others=known)

    # Interface for servers and training frameworks

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[tuple[int, int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Return tiles and tokens (start and end included) of images of (height, width) pixels, for vLLM and others."""
        if image_sizes is None:
            return MultiModalData()
        options = self._sort_options(kwargs).images
        count = self.image_processor.get_number_of_image_patches
        tiles = [count(height, width, options) for height, width in image_sizes]
        tokens = [self.image_seq_length * number + 2 for number in tiles]
        return MultiModalData(num_image_tokens=tokens, num_image_patches=tiles)

    # Files

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """As in transformers, without image processor and tokenizer: every version reads those from their own files."""
        saved = ("image_end_token", "image_seq_length", "image_start_token", "image_token", "processor_class")
        fields = {key: value for key, value in super().to_dict(**kwargs).items() if key in saved}
        name = type(self).__name__
        return {**fields, "auto_map": {self._auto_class: f"{type(self).__module__.rpartition('.')[2]}.{name}"}}

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> Any:
        """As in transformers; also writes preprocessor_config.json, which older versions read."""
        files = super().save_pretrained(save_directory, **kwargs)
        self.image_processor.save_pretrained(save_directory)
        return files


def _pixel_values(tiles: list[torch.Tensor], options: SimpleNamespace, tensor_type: str | None) -> BatchFeature:
    """Concatenate the tiles of all prompts, in the tensor type that the image or video options request."""
    types = {options.images.get("return_tensors"), options.frames.get("return_tensors")} - {None} or {tensor_type}
    if len({tile.shape[1:] for tile in tiles}) > 1 or len(types) > 1:
        raise ValueError("images and frames are concatenated: expected the same size and return_tensors for both")
    return BatchFeature({"pixel_values": torch.cat(tiles)}, tensor_type=types.pop())


def _without_repetitions(tiles: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[int]]:
    """Return every tensor of tiles once, and for each tile of `tiles` its index in their concatenation."""
    different = {id(tensor): tensor for tensor in tiles}
    starts = dict(zip(different, accumulate(map(len, different.values()), initial=0), strict=False))
    return [*different.values()], [starts[id(tensor)] + index for tensor in tiles for index in range(len(tensor))]


def _count(token: str, text: str) -> int:
    """Count a token in a text, without those that transformers escaped because they are user text."""
    return text.count(token) - (text.count(ESCAPE + token) if ESCAPE else 0)


def _sum_of(counts: list[int]) -> str:
    return " + ".join(map(str, counts)) if 0 < len(counts) <= 8 else str(sum(counts))


def _check_mapping(value: Any, name: str) -> None:
    if not isinstance(value, (Mapping, type(None))):
        raise TypeError(f"{name} must be a dict of options, got {type(value).__name__}")


def _check_not_given_twice(first: Mapping[str, Any], second: Mapping[str, Any], group: str) -> None:
    if twice := first.keys() & second.keys():
        raise ValueError(f"{', '.join(sorted(twice))}: given twice, in {group} and outside of it")


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, (list, tuple)) and all(map(_is_empty, value)))


def _normalize_messages(chat: Any) -> list[dict[str, Any]]:
    """Drop keys that are None and convert OpenAI's image_url parts to image parts."""
    messages = []
    for message in chat:
        message = as_dict(message)
        if isinstance(message.get("content"), (list, tuple)):
            message["content"] = [_convert_image_url(part) for part in message["content"]]
        messages.append(message)
    return messages


def _convert_image_url(part: Any) -> dict[str, Any]:
    part = as_dict(part)
    if part["type"] != "image_url":
        return part
    url = part["image_url"]
    return {"type": "image", "url": url["url"] if isinstance(url, Mapping) else url}


def _collect_media(chat: list[dict[str, Any]], part_type: str) -> list[Any]:
    """Return the images or videos of a conversation, in order."""
    contents = [message["content"] for message in chat if isinstance(message.get("content"), list)]
    parts = [part for content in contents for part in content if part.get("type") == part_type]
    return [part[key] for part in parts for key in MEDIA_KEYS[part_type] if key in part]


def _assistant_mask(tokens: Any, replacements: list[dict[str, Any]], spans: list[tuple[int, int]]) -> list[int]:
    """
    Return 1 for every token of the assistant's text, else 0.

    Args:
        tokens: (start, end) of each token in the expanded prompt; (0, 0) for padding.
        replacements: `text_replacement_offsets` of the prompt.
        spans: (start, end) of the assistant's text in the prompt before expansion.
    """
    answers = _shift_spans(spans, replacements)
    return [int(any(start < last and end > first for first, last in answers)) for start, end in tokens]


def _shift_spans(spans: list[tuple[int, int]], replacements: list[dict[str, Any]]) -> list[list[int]]:
    """Return the positions that spans of a prompt have after its placeholders were replaced."""
    ends = [0, *(replacement["span"][1] for replacement in replacements)]
    shifts = [0, *(replacement["new_span"][1] - replacement["span"][1] for replacement in replacements)]
    return [[offset + shifts[bisect_right(ends, offset) - 1] for offset in span] for span in spans]


def _count_overlapping(tokens: Any, length: int, spans: list[list[int]]) -> int:
    """Return how many `tokens`, an Encoding of a prompt of `length` characters, overlap with spans, given in order."""

    def first_token(start: int, end: int) -> int | None:
        found = (tokens.char_to_token(position) for position in range(start, end))
        return next((token for token in found if token is not None), None)

    count = counted = 0
    for start, end in spans:
        first, after = first_token(start, end), first_token(end, length)
        if first is not None:
            after = len(tokens) if after is None else after + (tokens.token_to_chars(after)[0] < end)
            count += max(0, after - max(first, counted))
            counted = after
    return count


def _number_frames(frame: str, count: int) -> str:
    """Return the text of a video: `frame` on a line per frame."""
    return "\n".join(f"Frame-{number}: {frame}" for number in range(1, count + 1))


def _by_prompt(media: Any, flatten: Callable[[Any], list[Any]]) -> list[list[Any]]:
    """Return one list of images or videos per prompt, or a single list if they are not nested per prompt."""
    if isinstance(media, (list, tuple)) and all(entry is None or isinstance(entry, (list, tuple)) for entry in media):
        return [flatten(entry) for entry in media]
    return [flatten(media)]


def _flatten_images(images: Any) -> list[Any]:
    """Flatten nested lists of images; None is an empty list."""
    if isinstance(images, (list, tuple)):
        return [image for entry in images for image in _flatten_images(entry)]
    if images is None:
        return []
    return list(images) if getattr(images, "ndim", 0) == 4 else [images]


SAILVLProcessor.register_for_auto_class()

__all__ = ["SAILVLProcessor", "SAILVLProcessorKwargs", "TokenCounts"]
