# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
Text, images and videos in, the inputs of SAIL-VL out: every placeholder of a prompt becomes its visual tokens.

    <IMG_CONTEXT>  ->  <img>, N times <IMG_CONTEXT> for every tile of the image, </img>
    <video>        ->  Frame-1: and the same with one tile, a line for every frame

Shapes: B prompts, S tokens of a prompt, n tiles of all images and frames together, h and w the pixels of a tile.
"""

import difflib
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin, TextKwargs, Unpack
from transformers.utils.chat_template_utils import render_jinja_template

from .chat_sailvl import (
    CHAT_TEMPLATE,
    MEDIA_KEYS,
    VIDEO,
    check_conversations,
    fields_of,
    split_batch,
    token_id,
)
from .image_processing_sailvit import SAILViTImageProcessorKwargs
from .video_sailvl import Frames, SAILVLVideosKwargs, check_sampling, flat_videos, group_frames, read_clips


RELEASE = tuple(int(number) for number in version("transformers").split(".")[:2])
IS_V4 = RELEASE < (5,)
# The chat templates of older releases mask other tokens than the assistant's, and know no processor_kwargs.
HAS_OLD_CHAT_TEMPLATES = RELEASE < (5, 23)
try:
    from transformers.utils.chat_template_utils import _CONTROL_TOKEN_START as MARK  # before a token that is user text
except ImportError:  # transformers < 5.23
    MARK = ""
UNMARKED = f"(?<!{MARK})" if MARK else ""

# What the image processor does to an image and not to a frame, which is one tile.
TILING = {"do_tile", "min_tiles", "max_tiles", "use_thumbnail", "msac"}


class SAILVLTextKwargs(TextKwargs, total=False):
    """The tokenizer's options, and those that older releases of transformers do not list."""

    return_token_type_ids: bool | None
    return_mm_token_type_ids: bool | None
    return_text_replacement_offsets: bool | None
    return_tensors: str | None


class SAILVLProcessorKwargs(ProcessingKwargs, total=False):
    """Every option of a call, by what it is for. All may be given flat, too."""

    text_kwargs: SAILVLTextKwargs
    images_kwargs: SAILViTImageProcessorKwargs
    videos_kwargs: SAILVLVideosKwargs


class SAILVLProcessor(ProcessorMixin):
    r"""
    The image processor and the tokenizer as one. `apply_chat_template` renders the released prompt.

    A tokenizer whose files do not name a padding side is set to pad on the left, where generation needs it. A side
    that `tokenizer_config.json` or `from_pretrained` names, or that is set on `processor.tokenizer`, is kept.

    Args:
        image_processor: A SAILViTImageProcessor.
        tokenizer: With `image_token`, `image_start_token` and `image_end_token` as special tokens.
        image_seq_length: Visual tokens N of one tile; `config.image_seq_length` of the model.
        image_token, image_start_token, image_end_token: As in the model's configuration.
        chat_template: The released prompt if not given.

    Attributes:
        video_token: The placeholder of a video, `<video>`. It is no token of the vocabulary: the frames of a video
            become `image_token`s, so there is no `video_token_id`.
        image_token_id, image_token_ids: The id of `image_token`; the ids of the three tokens of an image.
        num_image_token: `image_seq_length`, as ms-swift calls it.

    Raises:
        ValueError: The tokenizer lacks one of the three tokens.
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
        if "padding_side" not in tokenizer.init_kwargs:  # which is what the tokenizer saves
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
        """The tokenizer's `encode`."""
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
            images: One image, or lists of them, in the order of their placeholders, of any kind the image processor
                takes.
            text: One prompt or several, with an `image_token` for every image and a `<video>` for every video.
            videos: One video or a list of them: each a path or URL (http, https, file, data) of a video file or an
                animated image, or its frames, as a list of images, or as an array or tensor of 4 dimensions. A
                picture is a video of one frame. A frame is one tile.
            kwargs: Options of the image processor (max_tiles, ...), of the tokenizer (padding, truncation, max_length,
                return_tensors, ...), and of videos, flat or within `images_kwargs`, `text_kwargs`, `videos_kwargs`;
                flat ones of the image processor are for images and frames. Those of videos:

                num_frames: Take at most so many frames, evenly spaced; 8 of a file, and all frames of a list, unless
                    a call says otherwise.
                fps: Take so many frames a second instead, and at most those that there are. A list of frames needs
                    its own rate in `video_metadata`.
                do_sample_frames: False takes every frame, whatever `num_frames` and `fps` are; True takes 8 frames
                    of a list, too.
                video_metadata: What is known of each video: a VideoMetadata or a dict, `{"fps": 25}`, or a list of
                    them. It goes before what a file says.
                return_metadata: Return a VideoMetadata for each video.

        Returns:
            input_ids, attention_mask (B, S); pixel_values (n, 3, h, w) where there are images, in the order of the
            prompts. On request mm_token_type_ids (B, S), 1 for the tokens of images and frames, start and end
            included; text_replacement_offsets, of every placeholder of a prompt its span and that of what replaced
            it; video_metadata.

        Raises:
            ValueError: Placeholders do not match the images or videos; a video cannot be decoded or has no known rate
                where one is needed; an option is out of range or given twice; truncation would cut off visual tokens.
            FileNotFoundError: There is no such video.
            ImportError: A video file is given, and PyAV is not installed.
            TypeError: An option that does not exist, or audio.
        """
        prompts = [text] if isinstance(text, str) else list(text or [])
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"text must be a prompt or a list of prompts, with a {self.image_token} for every image")
        options = self._sort_options(kwargs)
        videos = group_frames(videos)
        self._check_counts(prompts, images, videos)
        clips = read_clips(flat_videos(videos), options.videos)
        visuals = {
            self.image_token: self._replace_images(_flat_images(images), options.images),
            self.video_token: self._replace_videos([clip.frames for clip in clips], options.frames),
        }
        prompts, offsets, tiles = self._expand(prompts, visuals)
        extra = {}
        if options.text.pop("return_text_replacement_offsets", None):
            extra["text_replacement_offsets"] = offsets
        if options.videos.return_metadata and clips:
            extra["video_metadata"] = [clip.metadata for clip in clips]
        return self._tokenize(prompts, tiles, options, extra)

    # Options

    def _option_names(self) -> dict[str, set[str]]:
        """The names of the options, by the argument that holds them where they are not given flat."""
        images = self.image_processor.valid_kwargs.__annotations__.keys() | {"return_tensors"}
        return {
            "text_kwargs": set(SAILVLTextKwargs.__annotations__),
            "images_kwargs": set(images),
            "videos_kwargs": SAILVLVideosKwargs.__annotations__.keys() | (images - TILING),
        }

    def _sort_options(self, kwargs: Mapping[str, Any]) -> SimpleNamespace:
        """The options of a call: text, images and frames as dicts, videos as a namespace."""
        names = self._option_names()
        self._refuse_audio(kwargs)
        for kind in {*names, "common_kwargs"} & kwargs.keys():
            _check_mapping(kwargs[kind], kind)
        nested = {kind: dict(kwargs.get(kind) or {}) for kind in names}
        own = {*names, "common_kwargs", "audio_kwargs", "audio", "audios"}
        flat = {key: value for key, value in kwargs.items() if key not in own}
        common = dict(kwargs.get("common_kwargs") or {})
        self._refuse_unknown([*flat, *common])
        chosen = {}
        for kind, known in names.items():
            self._refuse_unknown(nested[kind], within=kind)
            if twice := nested[kind].keys() & flat.keys():
                raise ValueError(f"{', '.join(sorted(twice))}: given twice, in {kind} and outside of it")
            chosen[kind] = {key: value for key, value in {**common, **flat}.items() if key in known} | nested[kind]
        text, images, videos = chosen.values()
        sampling = {key: videos.pop(key, None) for key in SAILVLVideosKwargs.__annotations__}
        return SimpleNamespace(
            text={**self._tokenizer_options(), **text}, images=images, frames=videos, videos=check_sampling(sampling)
        )

    def _refuse_unknown(self, keys: Iterable[str], within: str | None = None, others: Iterable[str] = ()) -> None:
        """A TypeError for a key that is no option, nor one of `others`."""
        names = self._option_names()
        known = names[within] if within else set().union(names, others, *names.values())
        for key in keys:
            if key in known:
                continue
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
            places = [kind for kind, own in names.items() if key in own]
            hint = f"; did you mean {close[0]}?" if close else ""
            hint = f"; it belongs in {' or '.join(places)}" if places else hint
            if key in vars(GenerationConfig()):
                hint = ": pass it to generate, or to a pipeline in generate_kwargs={...}"
            where = f"{within}: " if within else ""
            raise TypeError(f"{where}{type(self).__name__} has no option {str(key)[:80]!r}{hint}")

    def _refuse_audio(self, kwargs: Mapping[str, Any]) -> None:
        for key in ("audio", "audios"):
            if not _is_nothing(kwargs.get(key)):
                raise TypeError(f"{type(self).__name__} takes images and videos, not {key}")
        if kwargs.get("audio_kwargs"):
            raise TypeError(f"{type(self).__name__} takes no audio, and so no audio_kwargs")

    def _tokenizer_options(self) -> dict[str, Any]:
        """
        Options that the tokenizer was loaded with, as transformers' processors follow them. Token types are left out
        unless its files name the inputs of a model: the classes that name them by default serve models that have none.
        """
        saved = self.tokenizer.init_kwargs
        named = SAILVLTextKwargs.__annotations__.keys() - {"padding_side"}  # the tokenizer knows its own side
        own = {key: getattr(self.tokenizer, key, saved[key]) for key in saved.keys() & named}
        return own if "model_input_names" in saved else {"return_token_type_ids": False, **own}

    # Placeholders

    def _check_counts(self, prompts: list[str], images: Any, videos: Any) -> None:
        """What is given against what the prompts have a place for, prompt by prompt where it is given so."""
        self._check_count(prompts, self.image_token, "images", _by_prompt(images, _flat_images))
        is_flat = isinstance(videos, (list, tuple)) and any(isinstance(video, Frames) for video in videos)
        by_prompt = [flat_videos(videos)] if is_flat else _by_prompt(videos, flat_videos)
        self._check_count(prompts, self.video_token, "videos", by_prompt)

    def _check_count(self, prompts: list[str], token: str, what: str, given: list[list[Any]]) -> None:
        found, counts = [_count(token, prompt) for prompt in prompts], [len(own) for own in given]
        if found != counts if len(found) == len(counts) else sum(found) != sum(counts):
            raise ValueError(
                f"{_sum_of(found)} {token} in the text, {_sum_of(counts)} {what}: the number of {token} tokens in the "
                f"prompts should be the same as the number of {what}"
            )

    def _replace_images(self, pictures: list[Any], options: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
        """What stands for each image in the prompt, and its tiles (tiles, 3, h, w)."""
        if not pictures:
            return
        inputs = self.image_processor(pictures, **{**options, "return_tensors": "pt"})
        for index, tiles in enumerate(inputs["pixel_values"].split(inputs["num_tiles"].tolist())):
            yield self.replace_image_token(inputs, index), tiles

    def _replace_videos(self, clips: list[list[Any]], options: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
        """The same for each video, of a tile a frame."""
        if not clips:
            return
        inputs = self.image_processor(clips, **{**options, "do_tile": False, "return_tensors": "pt"})
        inputs["num_frames"] = [len(frames) for frames in clips]
        for index, tiles in enumerate(inputs["pixel_values"].split(inputs["num_frames"])):
            yield self.replace_video_token(inputs, index), tiles

    def replace_image_token(self, image_inputs: Mapping[str, Any], image_idx: int, **kwargs: Any) -> str:
        """What stands for an image in the prompt, by `num_tiles` of `image_inputs`."""
        context = self.image_token * (self.image_seq_length * int(image_inputs["num_tiles"][image_idx]))
        return f"{self.image_start_token}{context}{self.image_end_token}"

    def replace_video_token(self, video_inputs: Mapping[str, Any], video_idx: int, **kwargs: Any) -> str:
        """What stands for a video in the prompt, by `num_frames` of `video_inputs`."""
        frame = self.replace_image_token({"num_tiles": [1]}, 0)
        return "\n".join(f"Frame-{number + 1}: {frame}" for number in range(video_inputs["num_frames"][video_idx]))

    def _expand(
        self, prompts: list[str], visuals: Mapping[str, Iterator[tuple[str, torch.Tensor]]]
    ) -> tuple[list[str], list[list[dict[str, Any]]], list[torch.Tensor]]:
        """Prompts with every placeholder replaced; where they were and are now; tiles in the order of placeholders."""
        kinds = {self.image_token: "image", self.video_token: "video"}
        pattern = UNMARKED + f"({'|'.join(map(re.escape, kinds))})"
        expanded, offsets, tiles = [], [], []
        for prompt in prompts:
            text, end, replaced = "", 0, []
            for match in re.finditer(pattern, prompt):
                replacement, own = next(visuals[match[0]])
                text, end = text + prompt[end : match.start()], match.end()
                span = {"span": match.span(), "new_span": (len(text), len(text) + len(replacement))}
                replaced.append({"type": kinds[match[0]], **span, "text": match[0], "replacement": replacement})
                text += replacement
                tiles.append(own)
            expanded.append(text + prompt[end:])
            offsets.append(replaced)
        return expanded, offsets, tiles

    # Tokens

    def _tokenize(
        self, prompts: list[str], tiles: list[torch.Tensor], options: SimpleNamespace, extra: dict[str, Any]
    ) -> BatchFeature:
        tensor_type, mark = options.text.pop("return_tensors", None), options.text.pop("return_mm_token_type_ids", None)
        data = dict(self.tokenizer(prompts, **options.text))
        self._check_image_tokens(prompts, data["input_ids"], options.text.get("max_length"))
        if mark:
            data["mm_token_type_ids"] = [
                [int(token in self.image_token_ids) for token in ids] for ids in data["input_ids"]
            ]
        batch = BatchFeature(data=data, tensor_type=tensor_type)
        if tiles:
            batch.update(_pixel_values(tiles, options, tensor_type))
        batch.update(extra)
        batch.skip_tensor_conversion = list(extra)  # where apply_chat_template converts what it adds
        return batch

    def _check_image_tokens(self, prompts: list[str], rows: list[list[int]], max_length: int | None) -> None:
        if len(rows) != len(prompts):
            raise ValueError(
                f"expected one row of tokens for each prompt, got {len(rows)} rows of {len(prompts)} prompts"
            )
        names = (self.image_token, self.image_start_token, self.image_end_token)
        for prompt, ids in zip(prompts, rows, strict=True):
            whole, kept = sum(_count(name, prompt) for name in names), sum(map(list(ids).count, self.image_token_ids))
            if kept != whole:
                raise ValueError(
                    f"only {kept} of {whole} tokens of images are left of a prompt of max_length {max_length}: "
                    "truncation would cut through an image; raise max_length, or lower max_tiles"
                )

    # Chat

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """
        As transformers' own of 5.24, on every release: a conversation or several -> the prompt or, with
        `tokenize=True`, what a call returns of it and of the images and videos in it.

        Args:
            kwargs: Options of a call may be given here or in `processor_kwargs`; other names are the template's.
                `return_assistant_tokens_mask` adds assistant_masks (B, S), 1 for the tokens of every answer and the
                end of its turn.

        Raises:
            ValueError: A conversation is empty, a message lacks its role or content, or an image or video part does
                not hold one; an option is given twice; a mask is asked for without tokenize and return_dict.
            TypeError: An option that neither a call nor the template has, or a key of a part that nothing reads.
        """
        processor_kwargs = kwargs.pop("processor_kwargs", None)
        _check_mapping(processor_kwargs, "processor_kwargs")
        options = dict(processor_kwargs or {})
        names = self._option_names()
        names = {*names, "common_kwargs", "audio_kwargs"}.union(*names.values())
        names -= signature(ProcessorMixin.apply_chat_template).parameters.keys()
        flat = {key: kwargs.pop(key) for key in names & kwargs.keys()}
        if twice := flat.keys() & options.keys():
            raise ValueError(f"{', '.join(sorted(twice))}: given twice, in processor_kwargs and outside of it")
        options |= flat
        media = {"images", "videos"}  # which newer releases take beside the options
        self._sort_options({key: value for key, value in options.items() if key not in media})
        apply = self._apply_chat_template if HAS_OLD_CHAT_TEMPLATES else super().apply_chat_template
        self._refuse_what_the_template_lacks(self._named_template(chat_template), kwargs, signature(apply).parameters)
        is_read = kwargs.get("tokenize") and kwargs.get("return_dict")
        if kwargs.get("return_assistant_tokens_mask") and not is_read:
            raise ValueError("return_assistant_tokens_mask needs tokenize=True and return_dict=True")
        required = [kind for kind in MEDIA_KEYS if kwargs.get("tokenize") and not options.get(f"{kind}s")]
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
        """transformers' own, for the releases that have an older one."""
        template = self._named_template(chat_template)
        if kwargs.get("continue_final_message") and (
            return_assistant_tokens_mask or kwargs.get("add_generation_prompt")
        ):
            raise ValueError(
                "continue_final_message goes with neither add_generation_prompt nor return_assistant_tokens_mask"
            )
        chats, batched = split_batch(conversation)
        chats = [_normalized(chat) for chat in chats]
        prompts, spans = render_jinja_template(
            conversations=chats,
            chat_template=template,
            return_assistant_tokens_mask=return_assistant_tokens_mask,
            **{**self.tokenizer.special_tokens_map, **kwargs},
        )
        if not tokenize:
            return prompts if batched else prompts[0]
        if return_tensors is not None:
            processor_kwargs["return_tensors"] = return_tensors
        if self.tokenizer.bos_token is not None and prompts[0].startswith(self.tokenizer.bos_token):
            processor_kwargs["add_special_tokens"] = False
        if return_assistant_tokens_mask:
            processor_kwargs |= {"return_offsets_mapping": True, "return_text_replacement_offsets": True}
        images, videos = ([_media(chat, kind) for chat in chats] for kind in ("image", "video"))
        batch = self(images, prompts, videos, **processor_kwargs)
        if return_assistant_tokens_mask:
            offsets = zip(batch.pop("offset_mapping"), batch.pop("text_replacement_offsets"), spans, strict=True)
            batch["assistant_masks"] = [_assistant_mask(*row) for row in offsets]
        return batch if return_dict else batch["input_ids"]

    def _named_template(self, chat_template: str | None) -> str:
        own = self.chat_template
        if isinstance(own, dict):
            chat_template = own.get("default" if chat_template is None else chat_template, chat_template)
            if chat_template is None:
                raise ValueError(f"chat_template must be one of {', '.join(own)}: none of them is named default")
        return own if chat_template is None else chat_template

    def _refuse_what_the_template_lacks(
        self, template: str, kwargs: Mapping[str, Any], parameters: Iterable[str]
    ) -> None:
        known = {"tools", "documents", "add_generation_prompt", "continue_final_message", *parameters} - {"kwargs"}
        unknown = [key for key in kwargs.keys() - known if not re.search(rf"\b{re.escape(key)}\b", template)]
        self._refuse_unknown(unknown, others=known)

    # What servers and training frameworks ask for

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[tuple[int, int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """What servers ask for: tiles, and tokens (start and end included), of images of (height, width) pixels."""
        if image_sizes is None:
            return MultiModalData()
        options = self._sort_options(kwargs).images
        count = self.image_processor.get_number_of_image_patches
        tiles = [count(height, width, options) for height, width in image_sizes]
        tokens = [self.image_seq_length * number + 2 for number in tiles]
        return MultiModalData(num_image_tokens=tokens, num_image_patches=tiles)

    # Files

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """As transformers' own, without the parts: they have files of their own, which every release reads."""
        own = ("image_end_token", "image_seq_length", "image_start_token", "image_token", "processor_class")
        fields = {key: value for key, value in super().to_dict(**kwargs).items() if key in own}
        name = type(self).__name__
        return {**fields, "auto_map": {self._auto_class: f"{type(self).__module__.rpartition('.')[2]}.{name}"}}

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> Any:
        """As transformers' own, and preprocessor_config.json on every release, so that the older ones find it."""
        saved = super().save_pretrained(save_directory, **kwargs)
        self.image_processor.save_pretrained(save_directory)
        return saved


def _pixel_values(tiles: list[torch.Tensor], options: SimpleNamespace, tensor_type: str | None) -> BatchFeature:
    """The tiles of all prompts as one array, of the type that is asked for in the options of images or videos."""
    types = {options.images.get("return_tensors"), options.frames.get("return_tensors")} - {None} or {tensor_type}
    if len({tile.shape[1:] for tile in tiles}) > 1 or len(types) > 1:
        raise ValueError("images and frames become one array: expected one size and one return_tensors for both")
    return BatchFeature({"pixel_values": torch.cat(tiles)}, tensor_type=types.pop())


def _count(token: str, text: str) -> int:
    """How often a token is in a text, not counting user text that transformers has marked as such."""
    return len(re.findall(UNMARKED + re.escape(token), text))


def _sum_of(counts: list[int]) -> str:
    return " + ".join(map(str, counts)) if 0 < len(counts) <= 8 else str(sum(counts))


def _check_mapping(given: Any, name: str) -> None:
    if not isinstance(given, (Mapping, type(None))):
        raise TypeError(f"{name} must be a dict of options, got {type(given).__name__}")


def _is_nothing(given: Any) -> bool:
    return given is None or (isinstance(given, (list, tuple)) and all(map(_is_nothing, given)))


def _normalized(chat: Any) -> list[dict[str, Any]]:
    """Messages without the keys that hold None, and with OpenAI's image_url parts as images."""
    messages = []
    for message in chat:
        message = fields_of(message)
        if isinstance(message.get("content"), (list, tuple)):
            message["content"] = [_as_image(part) for part in message["content"]]
        messages.append(message)
    return messages


def _as_image(part: Any) -> dict[str, Any]:
    part = fields_of(part)
    if part["type"] != "image_url":
        return part
    url = part["image_url"]
    return {"type": "image", "url": url["url"] if isinstance(url, Mapping) else url}


def _media(chat: list[dict[str, Any]], kind: str) -> list[Any]:
    """The images or videos of a conversation, in order."""
    contents = [message["content"] for message in chat if isinstance(message.get("content"), list)]
    parts = [part for content in contents for part in content if part.get("type") == kind]
    return [part[key] for part in parts for key in MEDIA_KEYS[kind] if key in part]


def _assistant_mask(tokens: Any, replacements: list[dict[str, Any]], spans: list[tuple[int, int]]) -> list[int]:
    """
    Args:
        tokens: (start, end) of each token in the expanded prompt; (0, 0) of padding.
        replacements: As a call returns them.
        spans: (start, end) of what the assistant wrote, in the prompt before its placeholders were replaced.
    """
    ends = [0, *(replaced["span"][1] for replaced in replacements)]
    gained = [0, *(replaced["new_span"][1] - replaced["span"][1] for replaced in replacements)]
    answers = [[place + gained[bisect_right(ends, place) - 1] for place in span] for span in spans]
    return [int(any(start < last and end > first for first, last in answers)) for start, end in tokens]


def _by_prompt(given: Any, flatten: Callable[[Any], list[Any]]) -> list[list[Any]]:
    """What is given for each prompt; all together where it is not given so."""
    if isinstance(given, (list, tuple)) and all(own is None or isinstance(own, (list, tuple)) for own in given):
        return [flatten(own) for own in given]
    return [flatten(given)]


def _flat_images(images: Any) -> list[Any]:
    """Nested lists of images, None among them where a message has none -> a list."""
    if isinstance(images, (list, tuple)):
        return [image for own in images for image in _flat_images(own)]
    if images is None:
        return []
    return list(images) if getattr(images, "ndim", 0) == 4 else [images]


SAILVLProcessor.register_for_auto_class()

__all__ = ["SAILVLProcessor", "SAILVLProcessorKwargs"]
