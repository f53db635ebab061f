# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
How SAIL-VL is spoken to: the prompt, and the released `chat` and `batch_chat`, which evaluation harnesses call.

    <|im_start|>system\n{system}<|im_end|><|im_start|>user\n{message}<|im_end|><|im_start|>assistant\n

An image is `<img>`, its tiles' `<IMG_CONTEXT>`s, `</img>`; in the questions of `chat` it is `<image>`.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging


if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

logger = logging.get_logger(__name__)

TEMPLATE_NAME = "sailvl-chat"  # what the config.json of a release calls its prompt
SYSTEM_MESSAGE = "你是由抖音内容理解组开发的多模态大模型，英文名叫UniVL, 是一个有用无害的人工智能助手。"
END_OF_TURN = "<|im_end|>"
IMAGE = "<image>"
VIDEO = "<video>"
# Under which key a part of a message holds its image or video.
MEDIA_KEYS = {"image": ("image", "url", "path", "base64"), "video": ("video", "url", "path")}

# An image becomes one <IMG_CONTEXT> and a video one <video>, which the processor expands; several images of a message
# are numbered, as the releases were trained. What the assistant writes, the end of its turn included, is between the
# tags `generation` and `endgeneration`, by which transformers and TRL find the tokens to train on. They are tags of
# transformers' own, and write nothing: an engine of plain Jinja renders the same prompt when they are deleted.
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
    The id of a special token.

    Raises:
        ValueError: The tokenizer does not have it.
    """
    index = tokenizer.convert_tokens_to_ids(token)
    if index is None or tokenizer.convert_ids_to_tokens(index) != token:
        raise ValueError(
            f"the tokenizer has no {token!r}: take the one that was published with the model, or one that "
            "`sailvit compose` has extended"
        )
    return index


def split_batch(conversation: Any) -> tuple[list[Any], bool]:
    """One conversation or several, each a list of messages or a pipeline's Chat -> all of them; whether several."""
    first = conversation[0] if isinstance(conversation, (list, tuple)) and conversation else None
    is_batch = isinstance(first, (list, tuple)) or hasattr(first, "messages")
    return list(conversation) if is_batch else [conversation], is_batch


def fields_of(entry: Any) -> dict[str, Any]:
    """A message or a part of one, as a dict or an object -> its fields that are not None; {} of anything else."""
    fields = entry if isinstance(entry, Mapping) else getattr(entry, "__dict__", {})
    return {key: value for key, value in fields.items() if value is not None}


def check_conversations(conversation: Any, required: Collection[str] = ()) -> None:
    """
    Refuse what is no conversation, before a template makes something else of it.

    Args:
        conversation: A list of messages or of conversations, as `apply_chat_template` takes it.
        required: Types of parts, "image" or "video", that must hold one; otherwise they may be bare placeholders.

    Raises:
        ValueError: Something is missing, or is given twice; the message says of which message and part.
        TypeError: Something is of another type than expected, or a part has a key that nothing reads.
    """
    chats, is_batch = split_batch(conversation)
    for index, chat in enumerate(chats):
        place = f"conversation {index}" if is_batch else "the conversation"
        messages = getattr(chat, "messages", chat)
        if not isinstance(messages, (list, tuple)):
            raise TypeError(f"{place}: expected a list of messages, got {type(messages).__name__}")
        if not messages:
            raise ValueError(f"{place} is empty: expected a list of messages")
        for number, message in enumerate(messages):
            _check_message(message, f"{place}, message {number}" if is_batch else f"message {number}", required)


def _check_message(message: Any, place: str, required: Collection[str]) -> None:
    fields = fields_of(message)
    role, content = fields.get("role"), fields.get("content")
    if not isinstance(role, str):
        raise ValueError(f'{place}: expected {{"role": "user", "content": ...}}, got {_outline(message)}')
    if isinstance(content, str) or (content is None and role == "assistant"):
        return
    if not isinstance(content, (list, tuple)):
        raise TypeError(f"{place}: content must be a text or a list of parts, got {type(content).__name__}")
    for index, part in enumerate(content):
        _check_part(part, f"{place}, part {index}", required)


def _check_part(part: Any, place: str, required: Collection[str]) -> None:
    fields = fields_of(part)
    kind = fields.pop("type", None)
    if not isinstance(kind, str):
        raise ValueError(f'{place}: expected a part with a type, {{"type": "text", "text": ...}}, got {_outline(part)}')
    if kind == "text" and not isinstance(text := fields.get("text"), str):
        raise TypeError(f"{place}: a text part needs text, a string, got {type(text).__name__}")
    if kind == "image_url":
        url = fields.get("image_url")
        if not isinstance(url.get("url") if isinstance(url, Mapping) else url, str):
            raise ValueError(f'{place}: an image_url part needs "image_url": {{"url": ...}}')
    if kind in MEDIA_KEYS:
        _check_media(kind, list(fields), place, kind in required)


def _outline(entry: Any) -> str:
    """What a message quotes of anything, however long it is."""
    return f"a dict of {', '.join(map(str, entry))}"[:80] if isinstance(entry, Mapping) else type(entry).__name__


def _check_media(kind: str, given: list[str], place: str, is_required: bool) -> None:
    keys = MEDIA_KEYS[kind]
    found = [key for key in given if key in keys]
    others = ", ".join(str(key) for key in given if key not in keys)[:80]
    part = f"{place}: {'an' if kind == 'image' else 'a'} {kind} part"
    if len(found) > 1 or (is_required and not found):
        raise ValueError(f"{part} needs one of {', '.join(keys)}; got {', '.join(found) or others or 'none'}")
    if others:
        raise TypeError(
            f"{part} takes one of {', '.join(keys)}, not {others}: options are given to the call, as in "
            "apply_chat_template(messages, max_tiles=4)"
        )


class SAILVLChat:
    """
    `chat` and `batch_chat`, for a model that generates from `input_ids` and `pixel_values`.

    Attributes:
        system_message: What stands in the system's turn; the releases' own.
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
        Answers a question about images, or about none.

        Args:
            tokenizer: The model's.
            pixel_values: (tiles, 3, h, w) of all images of the conversation, on any device, in any floating point type;
                None where there are none.
            question: With an `<image>` for every image of this turn. Without any, the images of a first question stand
                before it.
            generation_config: What `generate` is given; a value of None is as if it were not there.
            history: Earlier questions and answers.
            return_history: Whether to return the history, this turn added, beside the answer.
            num_patches_list: Tiles of every image of the conversation, in order; one image of all tiles if not given.
            IMG_START_TOKEN, IMG_END_TOKEN, IMG_CONTEXT_TOKEN: What an image is written as.
            verbose: Log the prompt and the answer, at the level INFO.

        Raises:
            ValueError: Images, tiles and `<image>`s do not match; the tokenizer lacks a token of the prompt.
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
        Answers several questions at once, each in a conversation of its own. Takes what `chat` takes, and:

        Args:
            questions: Where there are images, one without an `<image>` (and without a history) has one before it.
            num_patches_list: Tiles of every image, question by question; one tile an image if not given.
            history: Earlier questions and answers, one list a question.

        Raises:
            ValueError: As `chat` does, and if there are not as many histories as questions.
        """
        if isinstance(questions, str):
            raise ValueError("questions must be a list of questions; chat takes a single one")
        tokens = (IMG_START_TOKEN, IMG_CONTEXT_TOKEN, IMG_END_TOKEN)
        pasts = [list(past or []) for past in history or [None] * len(questions)]
        if not questions or len(pasts) != len(questions):
            raise ValueError(f"{len(questions)} questions and {len(pasts)} histories: as many of each are wanted")
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
                f"the model's prompt is {template!r}, chat knows {TEMPLATE_NAME!r}: build the prompt with the template "
                "of its own processor and call generate"
            )
        turns = [{"role": "system", "content": self.system_message}]
        for asked, answered in past:
            turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        turns.append({"role": "user", "content": question})
        return tokenizer.apply_chat_template(
            turns, chat_template=CHAT_TEMPLATE, tokenize=False, add_generation_prompt=True
        )

    def _answer(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        prompts: list[str],
        pixel_values: torch.Tensor | None,
        tiles: Sequence[int] | None,
        generation_config: "Mapping[str, Any] | GenerationConfig | None",
        tokens: tuple[str, str, str],
        verbose: bool,
    ) -> list[str]:
        """Prompts with an `<image>` for every image -> answers."""
        if pixel_values is not None:
            tiles = [len(pixel_values)] if tiles is None else list(tiles)
            prompts = _with_tiles(prompts, tiles, len(pixel_values), self.config.image_seq_length, tokens)
            self.img_context_token_id = token_id(tokenizer, tokens[1])
        elif tiles:
            raise ValueError(f"num_patches_list is {list(tiles)}, but there are no pixel_values")
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
    return question if IMAGE in question else f"{IMAGE}\n{question}"


def _with_tiles(
    prompts: list[str], tiles: list[int], available: int, tile_tokens: int, tokens: tuple[str, str, str]
) -> list[str]:
    """Every `<image>` -> the tokens of its tiles."""
    start, context, end = tokens
    images = sum(prompt.count(IMAGE) for prompt in prompts)
    if images != len(tiles) or sum(tiles) != available or min(tiles, default=1) < 1:
        raise ValueError(
            f"{images} {IMAGE} in the prompt, num_patches_list {tiles} of {sum(tiles)} tiles, {available} tiles in "
            "pixel_values: an entry of at least one tile for every image, and their sum, are wanted"
        )
    rest = iter(tiles)
    filled = []
    for prompt in prompts:
        first, *others = prompt.split(IMAGE)
        filled.append(first + "".join(start + context * (tile_tokens * next(rest)) + end + other for other in others))
    return filled


def _generation_options(
    generation_config: "Mapping[str, Any] | GenerationConfig | None", tokenizer: "PreTrainedTokenizerBase"
) -> dict[str, Any]:
    """
    What `generate` is given; the end of a turn ends the answer, as in the releases.

    Raises:
        ValueError: It asks for what is no text.
    """
    if generation_config is not None and not isinstance(generation_config, Mapping):
        generation_config = generation_config.to_diff_dict()
    options = {key: value for key, value in (generation_config or {}).items() if value is not None}
    if options.get("num_return_sequences", 1) > 1 or options.get("return_dict_in_generate"):
        raise ValueError("chat gives one answer a question, as text: for more build the prompt and call generate")
    options["eos_token_id"] = token_id(tokenizer, END_OF_TURN)
    padding = options["eos_token_id"] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return {"pad_token_id": padding, **options}
