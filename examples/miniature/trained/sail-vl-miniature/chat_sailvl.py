# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
Prompt format and chat API of SAIL-VL: the chat template, and the `chat` and `batch_chat` of the releases.

    <|im_start|>system\n{system}<|im_end|><|im_start|>user\n{message}<|im_end|><|im_start|>assistant\n

An image is `<img>`, one `<IMG_CONTEXT>` per visual token of its tiles, `</img>`; in the questions of `chat` it is
`<image>`.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging


if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

logger = logging.get_logger(__name__)

TEMPLATE_NAME = "sailvl-chat"  # `template` in the config.json of a release
SYSTEM_MESSAGE = "你是由抖音内容理解组开发的多模态大模型，英文名叫UniVL, 是一个有用无害的人工智能助手。"
END_OF_TURN = "<|im_end|>"
IMAGE = "<image>"
VIDEO = "<video>"
# Keys that may hold the image or video of a message part.
MEDIA_KEYS = {"image": ("image", "url", "path", "base64"), "video": ("video", "url", "path")}

# An image becomes one <IMG_CONTEXT> and a video one <video>, which the processor expands; several images of a message
# are numbered, as in the training of the releases. The assistant's text, its end of turn included, is enclosed in
# `generation` and `endgeneration`, which transformers and TRL read to build the mask of training targets. These tags
# are a transformers extension without output: for a plain Jinja engine delete them, and the prompt stays the same.
CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{- '<|im_start|>system\n" + SYSTEM_MESSAGE + "<|im_end|>' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- set content = message['content'] or [] -%}"
    "{%- set parts = [{'type': 'text', 'text': content}] if content is string else content -%}"
    "{%- set images = parts | selectattr('type', 'equalto', 'image') | list | length -%}"
    "{%- set seen = namespace(images=0) -%}"
    "{%- for part in parts -%}"
    "{%- if part['type'] == 'image' -%}"
    "{%- set seen.images = seen.images + 1 -%}"
    "{%- if images > 1 -%}{{- 'Image-' + seen.images | string + ': ' -}}{%- endif -%}"
    "{{- '<IMG_CONTEXT>\n' -}}"
    "{%- elif part['type'] == 'video' -%}"
    "{{- '<video>\n' -}}"
    "{%- elif part['type'] != 'text' -%}"
    "{{- raise_exception('content of the type ' + part['type'] | string + ': image, video or text is wanted') -}}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{% generation %}{{- part['text'] -}}{% endgeneration %}"
    "{%- else -%}"
    "{{- part['text'] -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{% generation %}{{- '<|im_end|>' -}}{% endgeneration %}"
    "{%- else -%}"
    "{{- '<|im_end|>' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- '<|im_start|>assistant\n' -}}"
    "{%- endif -%}"
)


def token_id(tokenizer: "PreTrainedTokenizerBase", token: str) -> int:
    """
    Return the id of a special token.

    Raises:
        ValueError: The tokenizer does not have the token.
    """
    index = tokenizer.convert_tokens_to_ids(token)
    if index is None or tokenizer.convert_ids_to_tokens(index) != token:
        raise ValueError(
            f"the tokenizer has no {token!r}: use the tokenizer published with the model, or one extended by "
            "`sailvit compose`"
        )
    return index


def split_batch(conversation: Any) -> tuple[list[Any], bool]:
    """Return a list of conversations (lists of messages or a pipeline's Chat) and whether a batch was given."""
    first = conversation[0] if isinstance(conversation, (list, tuple)) and conversation else None
    is_batch = isinstance(first, (list, tuple)) or hasattr(first, "messages")
    return list(conversation) if is_batch else [conversation], is_batch


def as_dict(entry: Any) -> dict[str, Any]:
    """Return the fields that are not None of a message or message part, a dict or an object; {} for other types."""
    fields = entry if isinstance(entry, Mapping) else getattr(entry, "__dict__", {})
    return {key: value for key, value in fields.items() if value is not None}


def check_conversations(conversation: Any, required: Collection[str] = ()) -> None:
    """
    Validate conversations before a chat template renders them.

    Args:
        conversation: A list of messages or of conversations, as `apply_chat_template` takes it.
        required: Part types ("image", "video") whose parts must contain the image or video; parts of other types may
            be placeholders only.

    Raises:
        ValueError: Something is missing or given twice; the message names the message and part.
        TypeError: Something has the wrong type, or a part has an unknown key.
    """
    chats, is_batch = split_batch(conversation)
    for index, chat in enumerate(chats):
        location = f"conversation {index}" if is_batch else "the conversation"
        messages = getattr(chat, "messages", chat)
        if not isinstance(messages, (list, tuple)):
            raise TypeError(f"{location}: expected a list of messages, got {type(messages).__name__}")
        if not messages:
            raise ValueError(f"{location} is empty: expected a list of messages")
        for number, message in enumerate(messages):
            _check_message(message, f"{location}, message {number}" if is_batch else f"message {number}", required)


def _check_message(message: Any, location: str, required: Collection[str]) -> None:
    fields = as_dict(message)
    role, content = fields.get("role"), fields.get("content")
    if not isinstance(role, str):
        raise ValueError(f'{location}: expected {{"role": "user", "content": ...}}, got {_summary(message)}')
    if isinstance(content, str) or (content is None and role == "assistant"):
        return
    if not isinstance(content, (list, tuple)):
        raise TypeError(f"{location}: content must be a string or a list of parts, got {type(content).__name__}")
    for index, part in enumerate(content):
        _check_part(part, f"{location}, part {index}", required)


def _check_part(part: Any, location: str, required: Collection[str]) -> None:
    fields = as_dict(part)
    part_type = fields.pop("type", None)
    if not isinstance(part_type, str):
        example = '{"type": "text", "text": ...}'
        raise ValueError(f"{location}: expected a part with a type, {example}, got {_summary(part)}")
    if part_type == "text" and not isinstance(text := fields.get("text"), str):
        raise TypeError(f"{location}: a text part needs a string as text, got {type(text).__name__}")
    if part_type == "image_url":
        url = fields.get("image_url")
        if not isinstance(url.get("url") if isinstance(url, Mapping) else url, str):
            raise ValueError(f'{location}: an image_url part needs "image_url": {{"url": ...}}')
    if part_type in MEDIA_KEYS:
        _check_media(part_type, list(fields), location, part_type in required)


def _summary(entry: Any) -> str:
    """Return a short description of a value for an error message."""
    return f"a dict of {', '.join(map(str, entry))}"[:80] if isinstance(entry, Mapping) else type(entry).__name__


def _check_media(part_type: str, given: list[str], location: str, is_required: bool) -> None:
    keys = MEDIA_KEYS[part_type]
    found = [key for key in given if key in keys]
    others = ", ".join(str(key) for key in given if key not in keys)[:80]
    part = f"{location}: {'an' if part_type == 'image' else 'a'} {part_type} part"
    if len(found) > 1 or (is_required and not found):
        raise ValueError(f"{part} needs one of {', '.join(keys)}; got {', '.join(found) or others or 'none'}")
    if others:
        raise TypeError(
            f"{part} takes one of {', '.join(keys)}, not {others}: pass options to the call, as in "
            "apply_chat_template(messages, max_tiles=4)"
        )


class SAILVLChat:
    """
    Mixin with `chat` and `batch_chat`, the API that evaluation harnesses call.

    The model must generate from `input_ids` and `pixel_values`.

    Attributes:
        system_message: Text of the system turn; by default that of the releases.
    """

    system_message = SYSTEM_MESSAGE

    def chat(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        pixel_values: torch.Tensor | None,
        question: str,
        generation_config: "Mapping[str, Any] | GenerationConfig | None" = None,
        history: Sequence[tuple[str, str]] | None = None,
        return_history: bool = False,
        num_patches_list: Sequence[int] | None = None,
        IMG_START_TOKEN: str = "<img>",
        IMG_END_TOKEN: str = "</img>",
        IMG_CONTEXT_TOKEN: str = "<IMG_CONTEXT>",
        verbose: bool = False,
    ) -> str | tuple[str, list[tuple[str, str]]]:
        """
        Answer a question about images, or a text-only question.

        Args:
            tokenizer: The tokenizer of the model.
            pixel_values: (tiles, 3, h, w) of all images of the conversation, on any device, in any float dtype; None
                without images.
            question: Text with an `<image>` for every image of this turn. If a first question has none, `<image>` is
                prepended.
            generation_config: Options of `generate`; options that are None are ignored.
            history: Earlier (question, answer) pairs.
            return_history: Also return the history including this turn.
            num_patches_list: Number of tiles of every image of the conversation, in order. Default: one image with all
                tiles.
            IMG_START_TOKEN, IMG_END_TOKEN, IMG_CONTEXT_TOKEN: The special tokens of an image.
            verbose: Log the prompt and the answer at level INFO.

        Raises:
            ValueError: The images, tiles and `<image>`s do not match, or the tokenizer lacks a special token.
        """
        tokens = (IMG_START_TOKEN, IMG_CONTEXT_TOKEN, IMG_END_TOKEN)
        past = list(history or [])
        if not past and pixel_values is not None:
            question = _with_image(question)
        prompt = self._prompt(tokenizer, past, question)
        answers = self._answer(tokenizer, [prompt], pixel_values, num_patches_list, generation_config, tokens, verbose)
        return (answers[0], [*past, (question, answers[0])]) if return_history else answers[0]

    def batch_chat(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        pixel_values: torch.Tensor | None,
        questions: Sequence[str],
        generation_config: "Mapping[str, Any] | GenerationConfig | None" = None,
        num_patches_list: Sequence[int] | None = None,
        history: Sequence[Sequence[tuple[str, str]]] | None = None,
        return_history: bool = False,
        IMG_START_TOKEN: str = "<img>",
        IMG_END_TOKEN: str = "</img>",
        IMG_CONTEXT_TOKEN: str = "<IMG_CONTEXT>",
        verbose: bool = False,
    ) -> list[str] | tuple[list[str], list[list[tuple[str, str]]]]:
        """
        Answer a batch of questions, each in its own conversation. The other arguments are those of `chat`.

        Args:
            questions: If there are images, `<image>` is prepended to a question without one and without history.
            num_patches_list: Number of tiles of every image, question by question. Default: one tile per image.
            history: Earlier (question, answer) pairs, one list per question.

        Raises:
            ValueError: As in `chat`, or the numbers of histories and questions differ.
        """
        if isinstance(questions, str):
            raise ValueError("questions must be a list of questions; for a single question call chat")
        tokens = (IMG_START_TOKEN, IMG_CONTEXT_TOKEN, IMG_END_TOKEN)
        pasts = [list(past or []) for past in history or [None] * len(questions)]
        if not questions or len(pasts) != len(questions):
            raise ValueError(
                f"expected one history per question, got {len(questions)} questions and {len(pasts)} histories"
            )
        if pixel_values is not None:
            num_patches_list = [1] * len(pixel_values) if num_patches_list is None else num_patches_list
            questions = [
                question if past else _with_image(question) for question, past in zip(questions, pasts, strict=True)
            ]
        prompts = [self._prompt(tokenizer, past, question) for past, question in zip(pasts, questions, strict=True)]
        answers = self._answer(tokenizer, prompts, pixel_values, num_patches_list, generation_config, tokens, verbose)
        if not return_history:
            return answers
        turns = zip(questions, answers, strict=True)
        return answers, [[*past, turn] for past, turn in zip(pasts, turns, strict=True)]

    def _prompt(self, tokenizer: "PreTrainedTokenizerBase", past: list[tuple[str, str]], question: str) -> str:
        template = getattr(self.config, "template", None)
        if template not in (None, TEMPLATE_NAME):
            raise ValueError(
                f"config.template is {template!r}, chat supports {TEMPLATE_NAME!r}: build the prompt with the "
                "chat template of the model's processor and call generate"
            )
        turns = [{"role": "system", "content": self.system_message}]
        for user, assistant in past:
            turns += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        turns.append({"role": "user", "content": question})
        return tokenizer.apply_chat_template(
            turns, chat_template=CHAT_TEMPLATE, tokenize=False, add_generation_prompt=True
        )

    def _answer(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        prompts: list[str],
        pixel_values: torch.Tensor | None,
        num_tiles: Sequence[int] | None,
        generation_config: "Mapping[str, Any] | GenerationConfig | None",
        tokens: tuple[str, str, str],
        verbose: bool,
    ) -> list[str]:
        """Generate the answers to prompts with an `<image>` for every image."""
        if pixel_values is not None:
            num_tiles = [len(pixel_values)] if num_tiles is None else list(num_tiles)
            prompts = _expand_images(prompts, num_tiles, len(pixel_values), self.config.image_seq_length, tokens)
            self.img_context_token_id = token_id(tokenizer, tokens[1])
        elif num_tiles:
            raise ValueError(f"num_patches_list is {list(num_tiles)}, but pixel_values is None")
        padding = {"padding": True, "padding_side": "left"} if len(prompts) > 1 else {}
        inputs = tokenizer(prompts, return_tensors="pt", return_token_type_ids=False, **padding).to(self.device)
        options = _generation_options(generation_config, tokenizer)
        output = self.generate(**inputs, pixel_values=pixel_values, **options)
        answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers = [answer.split(END_OF_TURN)[0].strip() for answer in answers]
        if verbose:
            for prompt, answer in zip(prompts, answers, strict=True):
                logger.info("%s %s", prompt.replace(tokens[1], "").replace(tokens[0] + tokens[2], IMAGE), answer)
        return answers


def _with_image(question: str) -> str:
    """Prepend `<image>` to a question without one."""
    return question if IMAGE in question else f"{IMAGE}\n{question}"


def _expand_images(
    prompts: list[str], num_tiles: list[int], available: int, tokens_per_tile: int, tokens: tuple[str, str, str]
) -> list[str]:
    """Replace every `<image>` by the special tokens of its tiles."""
    start, context, end = tokens
    images = sum(prompt.count(IMAGE) for prompt in prompts)
    if images != len(num_tiles) or sum(num_tiles) != available or min(num_tiles, default=1) < 1:
        raise ValueError(
            f"{images} {IMAGE} in the prompt, num_patches_list {num_tiles} with {sum(num_tiles)} tiles, {available} "
            f"tiles in pixel_values: expected one entry of at least 1 per {IMAGE}, adding up to all tiles"
        )
    counts = (tokens_per_tile * count for count in num_tiles)
    expanded = []
    for prompt in prompts:
        first, *others = prompt.split(IMAGE)
        expanded.append(first + "".join(start + context * next(counts) + end + other for other in others))
    return expanded


def _generation_options(
    generation_config: "Mapping[str, Any] | GenerationConfig | None", tokenizer: "PreTrainedTokenizerBase"
) -> dict[str, Any]:
    """
    Return the options for `generate`; the end-of-turn token ends the answer, as in the releases.

    Raises:
        ValueError: The config requests several answers or a dict instead of text.
    """
    if generation_config is not None and not isinstance(generation_config, Mapping):
        generation_config = generation_config.to_diff_dict()
    options = {key: value for key, value in (generation_config or {}).items() if value is not None}
    if options.get("num_return_sequences", 1) > 1 or options.get("return_dict_in_generate"):
        raise ValueError("chat returns one answer per question, as text: for more, build the prompt and call generate")
    options["eos_token_id"] = token_id(tokenizer, END_OF_TURN)
    padding = options["eos_token_id"] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return {"pad_token_id": padding, **options}
