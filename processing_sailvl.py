# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
Text and pictures in, what SAIL-VL reads out: the placeholders of a prompt become as many as there are visual tokens.

    <IMG_CONTEXT>  ->  <img>, N times <IMG_CONTEXT> for every tile of the image, </img>
    <video>        ->  Frame-1: and the same with one tile, a line for every frame
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessorMixin, TextKwargs
from transformers.video_utils import load_video

from .chat_sailvl import CHAT_TEMPLATE, VIDEO, token_id


# Of a call, but neither the image processor's nor the tokenizer's; transformers passes the last ones for videos.
SERVICE_KEYS = {
    "audio", "common_kwargs", "images_kwargs", "text_kwargs", "videos_kwargs",
    "do_sample_frames", "fps", "return_metadata", "video_metadata",
}  # fmt: skip
IS_V4 = version("transformers").startswith("4.")
# How a prompt is tokenized unless a call says otherwise; generation continues at the right end.
TEXT_DEFAULTS = {"padding": False, "padding_side": "left", "return_token_type_ids": False}
PICTURE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class SAILVLProcessor(ProcessorMixin):
    r"""
    The image processor and the tokenizer as one. `apply_chat_template` renders the released prompt.

    Args:
        image_processor: A SAILViTImageProcessor.
        tokenizer: With `image_token`, `image_start_token` and `image_end_token` as special tokens.
        image_seq_length: Visual tokens N of one tile; `config.image_seq_length` of the model.
        image_token, image_start_token, image_end_token: As in the model's configuration.
        chat_template: The released prompt if not given.

    Raises:
        ValueError: The tokenizer lacks one of the three tokens.
    """

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
        chat_template: str | None = None,
        **kwargs: Any,
    ):
        self.image_seq_length = image_seq_length
        self.image_token = image_token
        self.image_start_token = image_start_token
        self.image_end_token = image_end_token
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE, **kwargs)
        self.image_token_id = token_id(tokenizer, image_token)
        start, end = token_id(tokenizer, image_start_token), token_id(tokenizer, image_end_token)
        self.image_ids = [start, self.image_token_id, end]

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, "pixel_values"]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        num_frames: int = 8,
        return_mm_token_type_ids: bool = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Args:
            images: One image, or lists of them, in the order of their placeholders, of any kind the image processor
                takes.
            text: One prompt or several, with an `image_token` for every image and a `<video>` for every video.
            videos: One video or a list of them: each a path, or its frames, as a list of images, or as an array or
                tensor of 4 dimensions. A frame is one tile.
            num_frames: Frames that are taken, evenly spaced, out of a video that is given as a path.
            return_mm_token_type_ids: Return where images stand: 1 for their tokens, start and end included.
            kwargs: Options of the image processor (max_tiles, ...) and of the tokenizer (padding, truncation,
                max_length, return_tensors, ...), also within `images_kwargs` and `text_kwargs`.

        Returns:
            input_ids, attention_mask (B, S); pixel_values (n, 3, h, w) where there are images, in the order of the
            prompts; mm_token_type_ids (B, S) on request.

        Raises:
            ValueError: Placeholders do not match the images or videos; truncation would cut off visual tokens.
            FileNotFoundError: There is no such video.
            TypeError: An option that does not exist, or audio.
        """
        prompts = [text] if isinstance(text, str) else list(text or [])
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"text must be a prompt or a list of prompts, with a {self.image_token} for every image")
        if kwargs.get("audio") is not None:
            raise TypeError(f"{type(self).__name__} takes images and videos, not audio")
        image_options, text_options = self._sort_options(kwargs)
        return_mm_token_type_ids |= text_options.pop("return_mm_token_type_ids", False)
        num_frames = (kwargs.get("videos_kwargs") or {}).get("num_frames", num_frames)
        clips = [_read_frames(video, num_frames) for video in _flat_videos(videos)]
        self._check_counts(prompts, images, len(clips))
        visuals = [self._image(tiles) for tiles in self._cut(_flat_images(images), image_options)]
        frames = self._cut([frame for clip in clips for frame in clip], {**image_options, "do_tile": False})
        scenes = [self._video([next(frames) for _ in clip]) for clip in clips]
        prompts, pixel_values = self._expand(prompts, {self.image_token: visuals, VIDEO: scenes})
        return self._tokenize(prompts, pixel_values, return_mm_token_type_ids, text_options)

    def _sort_options(self, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The options of the image processor and those of the tokenizer."""
        kwargs = {**kwargs.get("common_kwargs", {}), **kwargs}
        images, text = dict(kwargs.get("images_kwargs") or {}), {**TEXT_DEFAULTS, **(kwargs.get("text_kwargs") or {})}
        image_names = self.image_processor.valid_kwargs.__annotations__.keys() - {"return_tensors"}
        text_names = {*TextKwargs.__annotations__, *TEXT_DEFAULTS, "return_tensors", "return_mm_token_type_ids"}
        for key, value in kwargs.items():
            if key not in SERVICE_KEYS:
                (images if key in image_names else text)[key] = value
        for key in text.keys() - text_names:
            close = difflib.get_close_matches(key, {*image_names, *text_names, "num_frames"}, n=1, cutoff=0.8)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise TypeError(f"{type(self).__name__} has no option {key!r}{hint}")
        return images, text

    def _check_counts(self, prompts: list[str], images: Any, videos: int) -> None:
        """What is given against what the prompts have a place for, prompt by prompt where it is given so."""
        found, given = [prompt.count(self.image_token) for prompt in prompts], [len(_flat_images(images))]
        # transformers < 5 gives a list for every message, not for every prompt.
        by_prompt = isinstance(images, (list, tuple)) and all(
            own is None or isinstance(own, (list, tuple)) for own in images
        )
        if by_prompt and len(images) == len(prompts) and not IS_V4:
            given = [len(_flat_images(own)) for own in images]
        if found != given and (len(given) > 1 or sum(found) != given[0]):
            raise ValueError(
                f"{_told(found)} {self.image_token} in the text, {_told(given)} images: one for each is wanted, none "
                "elsewhere in the text"
            )
        if (scenes := sum(prompt.count(VIDEO) for prompt in prompts)) != videos:
            raise ValueError(
                f"{scenes} {VIDEO} in the text, {videos} videos: one for each is wanted, and none elsewhere"
            )

    def _cut(self, pictures: list[Any], options: dict[str, Any]) -> Iterator[torch.Tensor]:
        """The tiles (tiles, 3, h, w) of every picture."""
        if not pictures:
            return iter(())
        batch = self.image_processor(pictures, **{**options, "return_tensors": "pt"})
        return iter(batch["pixel_values"].split(batch["num_tiles"].tolist()))

    def _image(self, tiles: torch.Tensor) -> tuple[str, torch.Tensor]:
        context = self.image_token * (self.image_seq_length * len(tiles))
        return f"{self.image_start_token}{context}{self.image_end_token}", tiles

    def _video(self, frames: list[torch.Tensor]) -> tuple[str, torch.Tensor]:
        lines = [f"Frame-{number}: {self._image(frame)[0]}" for number, frame in enumerate(frames, 1)]
        return "\n".join(lines), torch.cat(frames)

    def _expand(
        self, prompts: list[str], visuals: Mapping[str, list[tuple[str, torch.Tensor]]]
    ) -> tuple[list[str], torch.Tensor | None]:
        """Prompts with every placeholder replaced, and the tiles in the order of the placeholders."""
        rest, tiles = {token: iter(found) for token, found in visuals.items()}, []

        def replace(match: re.Match[str]) -> str:
            text, own = next(rest[match[0]])
            tiles.append(own)
            return text

        pattern = "|".join(map(re.escape, visuals))
        prompts = [re.sub(pattern, replace, prompt) for prompt in prompts]
        return prompts, torch.cat(tiles) if tiles else None

    def _tokenize(
        self, prompts: list[str], pixel_values: torch.Tensor | None, mark: bool, options: dict[str, Any]
    ) -> BatchFeature:
        tensor_type = options.pop("return_tensors", None)
        data = dict(self.tokenizer(prompts, **options))
        for prompt, ids in zip(prompts, data["input_ids"], strict=True):
            whole, kept = (self._image_tokens_of(own) for own in (prompt, ids))
            if kept != whole:
                raise ValueError(
                    f"only {kept} of {whole} tokens of images are left of a prompt of max_length "
                    f"{options.get('max_length')}: truncation would cut through an image; raise max_length, or lower "
                    "max_tiles"
                )
        if mark:
            data["mm_token_type_ids"] = [[int(token in self.image_ids) for token in ids] for ids in data["input_ids"]]
        if pixel_values is not None:
            data["pixel_values"] = pixel_values
        return BatchFeature(data=data, tensor_type=tensor_type)

    def _image_tokens_of(self, prompt: str | list[int]) -> int:
        """Start, placeholders and end of every image of a text, or of its ids."""
        names = (self.image_start_token, self.image_token, self.image_end_token)
        return sum(map(prompt.count, names if isinstance(prompt, str) else self.image_ids))

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """As transformers' own, of which the older releases take no plain text for the content of a message."""
        if not conversation:
            raise ValueError("the conversation is empty: a list of messages is wanted")
        batched = isinstance(conversation[0], (list, tuple))
        turns = [_as_parts(messages) for messages in (conversation if batched else [conversation])]
        return super().apply_chat_template(turns if batched else turns[0], chat_template, **kwargs)

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[tuple[int, int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """What servers ask for: tiles, and tokens (start and end included), of images of (height, width) pixels."""
        if image_sizes is None:
            return MultiModalData()
        options, _ = self._sort_options(kwargs)
        count = self.image_processor.get_number_of_image_patches
        tiles = [count(height, width, options) for height, width in image_sizes]
        tokens = [self.image_seq_length * number + 2 for number in tiles]
        return MultiModalData(num_image_tokens=tokens, num_image_patches=tiles)

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """As transformers' own, without the parts: they have files of their own, which every release reads."""
        parts = ("image_processor", "tokenizer", "image_ids", "image_token_id", "chat_template")
        return {key: value for key, value in super().to_dict(**kwargs).items() if key not in parts}

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> Any:
        """As transformers' own, and preprocessor_config.json on every release, so that the older ones find it."""
        saved = super().save_pretrained(save_directory, **kwargs)
        self.image_processor.save_pretrained(save_directory)
        return saved


def _as_parts(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message["content"], str)
        else dict(message)
        for message in messages
    ]


def _told(counts: list[int]) -> str:
    return " + ".join(map(str, counts)) or "0"


def _flat_images(images: Any) -> list[Any]:
    """Nested lists of images, None among them where a message has none -> a list."""
    if isinstance(images, (list, tuple)):
        return [image for own in images for image in _flat_images(own)]
    if images is None:
        return []
    return list(images) if getattr(images, "ndim", 0) == 4 else [images]


def _flat_videos(videos: Any) -> list[Any]:
    """Nested lists of videos -> a list; a list of pictures, or of paths to pictures, is one video."""
    if videos is None:
        return []
    if not isinstance(videos, (list, tuple)):
        return [videos]
    if videos and all(_is_picture(entry) for entry in videos):
        return [list(videos)]
    return [video for own in videos for video in _flat_videos(own)]


def _is_picture(entry: Any) -> bool:
    if isinstance(entry, (str, Path)):
        return str(entry).lower().endswith(PICTURE_SUFFIXES)
    return entry is not None and not isinstance(entry, (list, tuple)) and getattr(entry, "ndim", 3) in (2, 3)


def _read_frames(video: Any, num_frames: int) -> list[Any]:
    if isinstance(video, (str, Path)):
        if "://" not in str(video) and not Path(video).is_file():
            raise FileNotFoundError(f"{video}: no such video")
        video = load_video(str(video), num_frames=num_frames, backend="pyav")[0]
    if not len(video):
        raise ValueError("a video without frames")
    return list(video)


SAILVLProcessor.register_for_auto_class()

__all__ = ["SAILVLProcessor"]
