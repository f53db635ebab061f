# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
Checks of a chat request before the server of transformers handles it.

A request is written anew from the fields that are known here, so that nothing else of it reaches the processor: the
server of transformers passes `chat_template_kwargs` on, in which a client could name files or a template.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from PIL.Image import Image

from ..processing_sailvl import TILING_OPTIONS, SAILVLProcessor


# Role of a message -> that of the prompt; "developer" is OpenAI's newer name for "system".
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# Numbers -> type, least and largest value, as `generate` takes them; "temperature" is used with do_sample alone.
NUMBERS: dict[str, tuple[type, float, float]] = {
    "temperature": (float, 1e-6, 100),  # or 0
    "top_p": (float, 0, 1),
    "frequency_penalty": (float, 0, 2),
    "seed": (int, -(2**63), 2**63 - 1),
    "max_tokens": (int, 1, 2**31),
    "max_completion_tokens": (int, 1, 2**31),
}
# Fields that would change the answer, and that the server of transformers ignores or a SAIL-VL cannot do.
UNSUPPORTED = ("tools", "functions", "response_format", "logprobs", "audio", "prediction")
# Of `generation_config`, which `transformers chat` sends as JSON.
GENERATION_NUMBERS: dict[str, tuple[type, float, float]] = {
    "temperature": (float, 1e-6, 100),
    "top_p": (float, 0, 1),
    "top_k": (int, 1, 2**31),
    "min_p": (float, 0, 1),
    "typical_p": (float, 1e-6, 1),
    "repetition_penalty": (float, 1e-6, 100),
    "no_repeat_ngram_size": (int, 0, 2**31),
    "max_new_tokens": (int, 1, 2**31),
}
GENERATION_FIELDS = {*GENERATION_NUMBERS, "do_sample", "stop_strings", "transformers_version"}
MOST_PARTS = 2000  # of all messages
MOST_STOPS, STOP_LENGTH = 4, 100  # as OpenAI has it; characters. transformers makes a table of them for all tokens
CHARACTERS = 16  # of a token, at most; in English about 4
DEFAULT_TOKENS = 1024  # of an answer, as in the server of transformers


class RequestError(ValueError):
    """A request that is not answered; the message is for the client."""


def check_request(body: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return a request with checked messages.

    Args:
        body: The JSON of a request to /v1/chat/completions.

    Raises:
        RequestError: A field has a wrong type or value, or is not supported.
    """
    _check_fields(body)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages: expected a list of at least one message")
    if (parts := sum(map(_count_parts, messages))) > MOST_PARTS:
        raise RequestError(f"messages: expected at most {MOST_PARTS} messages and parts, got {parts}")
    messages = [_check_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    return {**_rewrite_fields(body), "messages": messages}


def image_urls(body: Mapping[str, Any]) -> list[str]:
    """Return the URLs of all images of a checked request, in order."""
    return [part["image_url"]["url"] for part in _image_parts(body["messages"])]


def insert_images(body: Mapping[str, Any], images: Sequence[Image]) -> None:
    """Put images in the place of the URLs of a checked request."""
    for part, image in zip(_image_parts(body["messages"]), images, strict=True):
        part["image_url"] = {"url": image}


def check_length(
    body: Mapping[str, Any], processor: SAILVLProcessor, context: int | None, opening: int
) -> dict[str, Any]:
    """
    Return a checked request with `max_completion_tokens`, at most what the context of the model leaves.

    Args:
        body: As `check_request` returns it, with images.
        context: Tokens of a prompt and its answer; None if the model has no limit.
        opening: Tokens that open the answer, of `count_opening`.

    Raises:
        RequestError: Prompt and answer are longer than the context, or a token of logit_bias does not exist.
        ValueError, TypeError: An image has no tiling; a tiling option has a wrong value.
    """
    if unknown := [token for token in body.get("logit_bias", ()) if int(token) >= len(processor.tokenizer)]:
        raise RequestError(f"logit_bias: expected tokens below {len(processor.tokenizer)}, got {unknown[0]}")
    tiling = body.get("chat_template_kwargs") or {}
    counts = processor.count_tokens(_as_conversation(body["messages"]), **tiling)
    prompt = counts.tokens + opening
    settings = json.loads(body.get("generation_config") or "{}")
    names = ("max_completion_tokens", "max_tokens")
    requested = next((int(body[name]) for name in names if body.get(name) is not None), settings.get("max_new_tokens"))
    room = prompt + (requested or DEFAULT_TOKENS) if context is None else context
    if prompt + (requested or 1) > room:
        raise RequestError(
            f"expected at most {context} tokens, got {prompt} in the prompt ({counts.tiles} tiles of images) and "
            f"{requested or 1} for the answer: shorten the messages, send fewer or smaller images, or lower max_tokens"
        )
    return {**body, "max_completion_tokens": requested or min(DEFAULT_TOKENS, room - prompt)}


def check_texts(body: Mapping[str, Any], tokens: Sequence[str], context: int | None) -> None:
    """
    Args:
        body: As `check_request` returns it.
        tokens: Of `special_tokens`.
        context: Tokens of a prompt and its answer; None if the model has no limit.

    Raises:
        RequestError: A message contains a special token, such as an end of turn or a placeholder, or the texts are much
            longer than the context; to count their tokens would take long.
    """
    texts = ["".join(part.get("text", "") for part in message["content"]) for message in body["messages"]]
    for index, text in enumerate(texts):
        if found := [token for token in tokens if token in text]:
            raise RequestError(f"messages[{index}]: the text contains {found[0]}, a token of the prompt format")
    if context is not None and (length := sum(map(len, texts))) > context * CHARACTERS:
        raise RequestError(f"messages: expected at most {context} tokens, got {length} characters: shorten the texts")


def special_tokens(processor: SAILVLProcessor) -> list[str]:
    """Return what a tokenizer makes one token, wherever it is in a text: ends of turns, placeholders, end of text."""
    own = (processor.image_token, processor.image_start_token, processor.image_end_token, processor.video_token)
    added = [str(token) for token in processor.tokenizer.added_tokens_decoder.values() if token.special]
    return [*dict.fromkeys([*own, *added])]


def _check_fields(body: Mapping[str, Any]) -> None:
    _check_numbers(body, NUMBERS)
    for name in UNSUPPORTED:
        if body.get(name) not in (None, False, [], {"type": "text"}):
            raise RequestError(f"{name}: not supported by this server; leave it out")
    if body.get("n") not in (None, 1):
        raise RequestError(f"n: expected 1 answer to a request, got {str(body['n'])[:20]}")
    if not isinstance(body.get("stream") or False, bool):
        raise RequestError(f"stream: expected true or false, got {_type(body['stream'])}")
    _check_stop(body.get("stop"), "stop")
    _read_generation_config(body.get("generation_config"))
    options = body.get("chat_template_kwargs")
    if unknown := _mapping({} if options is None else options, "chat_template_kwargs").keys() - TILING_OPTIONS:
        raise RequestError(
            f"chat_template_kwargs: {sorted(unknown)[0]!r}: expected {', '.join(sorted(TILING_OPTIONS))}"
        )


def _check_numbers(values: Mapping[str, Any], known: Mapping[str, tuple[type, float, float]], where: str = "") -> None:
    for name, (kind, least, most) in known.items():
        value = values.get(name)
        if value is None or (name == "temperature" and value == 0 and not where):
            continue
        is_number = _is_number(value)
        if not is_number or not least <= value <= most or (kind is int and value != int(value)):
            what = "an integer" if kind is int else "a number"
            got = str(value)[:40] if is_number else _type(value)
            raise RequestError(f"{where}{name}: expected {what} from {least:g} to {most:g}, got {got}")


def _check_stop(stop: Any, name: str) -> None:
    texts = [stop] if isinstance(stop, str) else _list([] if stop is None else stop, name)
    if not all(_is_text(text) and text for text in texts):
        raise RequestError(f"{name}: expected a string or a list of strings, none of them empty")
    if len(texts) > MOST_STOPS or any(len(text) > STOP_LENGTH for text in texts):
        raise RequestError(f"{name}: expected at most {MOST_STOPS} strings of at most {STOP_LENGTH} characters each")


def _read_generation_config(text: Any) -> Mapping[str, Any]:
    try:
        settings = json.loads(text) if text is not None else {}
    except (ValueError, TypeError, RecursionError) as error:
        raise RequestError(f"generation_config: expected a JSON object in a string: {str(error)[:80]}") from error
    if unknown := _mapping(settings, "generation_config").keys() - GENERATION_FIELDS:
        raise RequestError(
            f"generation_config: {sorted(unknown)[0]!r}: expected {', '.join(sorted(GENERATION_FIELDS))}"
        )
    _check_numbers(settings, GENERATION_NUMBERS, "generation_config: ")
    _check_stop(settings.get("stop_strings"), "generation_config: stop_strings")
    if not isinstance(settings.get("do_sample") or False, bool):
        raise RequestError(f"generation_config: do_sample: expected true or false, got {_type(settings['do_sample'])}")
    return settings


def _rewrite_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return checked fields without those that say nothing, and with numbers of the types that transformers wants."""
    kept = {name: value for name, value in body.items() if value not in (None, [], {}, "")}
    if "logit_bias" in kept:
        kept["logit_bias"] = _check_biases(kept["logit_bias"])
    if "generation_config" in kept:
        settings = {k: v for k, v in _read_generation_config(kept["generation_config"]).items() if v is not None}
        if stop := settings.pop("stop_strings", None):
            kept.setdefault("stop", stop)  # where they are cut from the answer
        numbers = {name: GENERATION_NUMBERS[name][0](value) for name, value in settings.items() if _is_number(value)}
        kept["generation_config"] = json.dumps({**settings, **numbers})
    return kept


def _check_biases(biases: Any) -> dict[str, float]:
    """Return token -> bias as floats, which transformers wants; clients of OpenAI send integers."""
    for token, bias in _mapping(biases, "logit_bias").items():
        if not str(token).isdecimal() or not _is_number(bias) or not -100 <= bias <= 100:
            raise RequestError("logit_bias: expected numbers of tokens and biases from -100 to 100")
    return {token: float(bias) for token, bias in biases.items()}


def _check_message(message: Any, location: str) -> dict[str, Any]:
    """Return role and content of a message, the content as a list of parts; what else it has is dropped."""
    message = _mapping(message, location)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise RequestError(f"{location}.role: expected {', '.join(ROLES)}, got {str(role)[:40]!r}")
    if message.get("tool_calls"):
        raise RequestError(f"{location}.tool_calls: not supported by this server")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else _list(content, f"{location}.content")
    return {
        "role": ROLES[role],
        "content": [_check_part(part, f"{location}.content[{index}]") for index, part in enumerate(parts)],
    }


def _check_part(part: Any, location: str) -> dict[str, Any]:
    part = _mapping(part, location)
    kind = part.get("type")
    if kind == "text" and _is_text(part.get("text")):
        return {"type": "text", "text": part["text"]}
    image = part.get("image_url")
    url = image.get("url") if isinstance(image, Mapping) else image
    if kind == "image_url" and isinstance(url, str):
        return {"type": "image_url", "image_url": {"url": url}}
    if kind in ("text", "image_url"):
        example = '{"url": "data:..."}' if kind == "image_url" else '"..."'
        raise RequestError(f'{location}: expected {{"type": "{kind}", "{kind}": {example}}}')
    hint = "; send frames of a video as images" if "video" in str(kind) else ""
    raise RequestError(f"{location}.type: expected text or image_url, got {str(kind)[:40]!r}{hint}")


def _image_parts(messages: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    return (part for message in messages for part in message["content"] if part["type"] == "image_url")


def _as_conversation(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages as processors take them, as the server of transformers converts them."""
    return [
        {
            "role": message["role"],
            "content": [
                {"type": "image", "image": part["image_url"]["url"]} if part["type"] == "image_url" else part
                for part in message["content"]
            ],
        }
        for message in messages
    ]


def count_opening(processor: SAILVLProcessor) -> int:
    """Return the tokens that `add_generation_prompt` adds."""
    chat = [{"role": "user", "content": ""}]
    without, whole = (processor.apply_chat_template(chat, add_generation_prompt=added) for added in (False, True))
    return len(processor.tokenizer(whole.removeprefix(without), add_special_tokens=False)["input_ids"])


def _count_parts(message: Any) -> int:
    """Return 1 for a message and 1 for each of its parts."""
    content = message.get("content") if isinstance(message, Mapping) else None
    return 1 + len(content if isinstance(content, list) else ())


def _is_text(value: Any) -> bool:
    """Return whether it is a string of valid Unicode; JSON may have half a surrogate pair, which is none."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _mapping(value: Any, location: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RequestError(f"{location}: expected an object, got {_type(value)}")
    return value


def _list(value: Any, location: str) -> list[Any]:
    if not isinstance(value, list):
        raise RequestError(f"{location}: expected a string or a list, got {_type(value)}")
    return value


def _type(value: Any) -> str:
    """Return the name of a value's type in JSON."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
