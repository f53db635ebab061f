"""assistant_masks of the chat template, compared with masks built turn by turn."""

import re

import jinja2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from toy_sailvl import SYSTEM, load_tokenizer

from sailvit import SAILViTImageProcessor, SAILVLProcessor


READING = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 130, 3), dtype=np.uint8))
MEDIA = {
    "image": {"type": "image", "image": PICTURE},
    "small image": {"type": "image", "image": PICTURE.resize((40, 40))},
    "video": {"type": "video", "video": [PICTURE] * 3},
}


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> SAILVLProcessor:
    tokenizer = load_tokenizer(tmp_path_factory.mktemp("tokenizers") / "toy")
    return SAILVLProcessor(SAILViTImageProcessor(size=56, max_tiles=4), tokenizer, image_seq_length=2)


def user_turn(text: str, *media: str) -> dict:
    return {"role": "user", "content": [*(MEDIA[kind] for kind in media), {"type": "text", "text": text}]}


def assistant_turn(text: str) -> dict:
    return {"role": "assistant", "content": text}


def split(processor: SAILVLProcessor, conversation: list[dict]) -> tuple[list[int], list[int]]:
    """Return the ids and the mask of a conversation, tokenized turn by turn."""
    ids, mask = processor.tokenizer(SYSTEM)["input_ids"], []
    for message in conversation:
        if message["role"] == "user":
            # the expanded turn without the system turn
            own = processor.apply_chat_template([message], tokenize=True)[0][
                len(processor.tokenizer(SYSTEM).input_ids) :
            ]
            ids, mask = ids + own, [*mask, *[0] * (len(ids) - len(mask) + len(own))]
            continue
        for text, label in ("<|im_start|>assistant\n", 0), (f"{message['content']}<|im_end|>", 1):
            own = processor.tokenizer(text)["input_ids"]
            ids, mask = ids + own, mask + [label] * len(own)
    return ids, mask


def check(processor: SAILVLProcessor, conversations: list[list[dict]], **options) -> None:
    batch = processor.apply_chat_template(conversations, **READING, **options)
    expected = [split(processor, conversation) for conversation in conversations]
    for ids, mask, attention, (own, labels) in zip(
        *(np.asarray(batch[key]).tolist() if options else batch[key] for key in KEYS), expected, strict=True
    ):
        kept = [index for index, attended in enumerate(attention) if attended]
        assert [ids[index] for index in kept] == own
        assert [mask[index] for index in kept] == labels and sum(mask) == sum(labels)


KEYS = ("input_ids", "assistant_masks", "attention_mask")
CONVERSATIONS = {
    "text": [user_turn("Why?"), assistant_turn("So.")],
    "an image": [user_turn("Why?", "image"), assistant_turn("The total is 42.")],
    "two images": [user_turn("Why?", "image", "small image"), assistant_turn("The total is 42.")],
    "a video": [user_turn("Why?", "video"), assistant_turn("So.")],
    "several turns": [
        user_turn("Why?", "image"), assistant_turn("The total is 42."),
        user_turn("And here?", "small image", "video"), assistant_turn("So."),
        user_turn("What?"), assistant_turn("Answer with one word."),
    ],
    "no answer": [user_turn("Why?", "image")],
    "an empty answer": [user_turn("Why?", "image"), assistant_turn("")],
}  # fmt: skip


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_the_mask_covers_answers_and_their_end_of_turn(case, processor):
    check(processor, [CONVERSATIONS[case]])
    one = processor.apply_chat_template(CONVERSATIONS[case], **READING)
    assert one["assistant_masks"] == [split(processor, CONVERSATIONS[case])[1]]
    assert one.keys() - {"pixel_values"} == {"input_ids", "attention_mask", "assistant_masks"}


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_masked_with_padding_on_either_side(side, processor):
    options = {"padding": True, "padding_side": side, "return_tensors": "pt"}
    check(processor, list(CONVERSATIONS.values()), **options)
    batch = processor.apply_chat_template(list(CONVERSATIONS.values()), **READING, processor_kwargs=options)
    assert batch["assistant_masks"].shape == batch["input_ids"].shape
    assert batch["assistant_masks"].dtype == torch.int64


def test_truncated_answers_are_not_masked(processor):
    conversation = CONVERSATIONS["several turns"]
    ids, mask = split(processor, conversation)
    end = mask.index(1) + 3
    batch = processor.apply_chat_template(
        [user_turn("Why?"), assistant_turn("So.")], **READING, truncation=True, max_length=4
    )
    assert batch["assistant_masks"] == [[0] * 4]
    batch = processor.apply_chat_template(
        CONVERSATIONS["an image"],
        **READING,
        truncation=True,
        max_length=split(processor, CONVERSATIONS["an image"])[1].index(1) + 2,
    )
    assert sum(batch["assistant_masks"][0]) == 2 and end < len(ids)


def test_an_image_in_an_answer_is_not_masked(processor):
    content = [{"type": "text", "text": "Here: "}, MEDIA["image"], {"type": "text", "text": "So."}]
    batch = processor.apply_chat_template([user_turn("Why?"), {"role": "assistant", "content": content}], **READING)
    (ids,), (mask,) = batch["input_ids"], batch["assistant_masks"]
    masked = [token for token, label in zip(ids, mask, strict=True) if label]
    assert not set(masked) & set(processor.image_token_ids) and ids.count(processor.image_token_id) > 2
    parts = processor.tokenizer(["Here: ", "So.", "<|im_end|>"])["input_ids"]
    assert masked == [token for part in parts for token in part]


# Leading whitespace could merge with the token before it.
ANSWERS = st.text(st.characters(codec="utf-8", exclude_characters="<>|"), max_size=12).filter(lambda t: t == t.strip())
TURNS = st.tuples(st.text("Why? 42.", max_size=9), st.lists(st.sampled_from(list(MEDIA)), max_size=3), ANSWERS)


@given(st.lists(st.lists(TURNS, min_size=1, max_size=3), min_size=1, max_size=3), st.sampled_from(["left", "right"]))
@settings(max_examples=60, deadline=None)
def test_random_conversations_are_masked(processor, batch, side):
    conversations = [
        [
            message
            for question, media, answer in turns
            for message in (user_turn(question, *media), assistant_turn(answer))
        ]
        for turns in batch
    ]
    check(processor, conversations, padding=True, padding_side=side, return_tensors="np")


def test_a_mask_excludes_continue_final_message(processor):
    with pytest.raises(ValueError, match="continue_final_message"):
        processor.apply_chat_template(CONVERSATIONS["text"], **READING, continue_final_message=True)


def test_a_mask_needs_tokenize_and_return_dict(processor):
    for missing in ("tokenize", "return_dict"):
        with pytest.raises(ValueError, match="needs tokenize=True and return_dict=True"):
            processor.apply_chat_template(CONVERSATIONS["text"], **{**READING, missing: False})


def test_another_template_is_masked_by_its_generation_tags(processor):
    template = (
        "{% for m in messages %}{{ m['role'] }}:{% generation %}{{ m['content'] }}{% endgeneration %};{% endfor %}"
    )
    messages = [{"role": "user", "content": "Why?"}, {"role": "user", "content": "42."}]
    batch = processor.apply_chat_template(messages, template, **READING)
    masked = [token for token, label in zip(*(batch[key][0] for key in KEYS[:2]), strict=True) if label]
    assert masked == [*processor.tokenizer("Why?")["input_ids"], *processor.tokenizer("42.")["input_ids"]]


def test_plain_jinja_renders_the_same_without_generation_tags(processor):
    """The tags have the form that plain Jinja engines remove before rendering."""
    template, tags = processor.chat_template, ("{% generation %}", "{% endgeneration %}")
    assert [template.count(tag) for tag in tags] == [2, 2] and len(re.findall("generation *-?%}", template)) == 4
    plain = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    plain.globals["raise_exception"] = None
    with pytest.raises(jinja2.TemplateSyntaxError, match="unknown tag 'generation'"):
        plain.from_string(template)
    for tag in tags:
        template = template.replace(tag, "")
    for conversation in CONVERSATIONS.values():
        for prompt in (True, False):
            ours = processor.apply_chat_template(conversation, add_generation_prompt=prompt)
            assert plain.from_string(template).render(messages=conversation, add_generation_prompt=prompt) == ours


def test_template_variables_are_distinguished_from_options(processor):
    template = "{{ greeting }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    messages = [{"role": "user", "content": "Why?"}]
    options = {"chat_template": template, "greeting": "Hello. ", "tokenize": True, "padding": "max_length"}
    ids = processor.apply_chat_template(messages, **options, max_length=30)[0]
    text = processor.tokenizer("Hello. Why?")["input_ids"]
    assert len(ids) == 30 and [token for token in ids if token != processor.tokenizer.pad_token_id] == text
    for tokenize in (True, False):
        with pytest.raises(TypeError, match="no option 'greetin'"):
            processor.apply_chat_template(messages, chat_template=template, greetin="Hello. ", tokenize=tokenize)


def test_a_template_is_selected_by_name(processor):
    templates = {"default": "{{ messages[0]['content'] }}!", "plain": "{{ messages[0]['content'] }}."}
    own = SAILVLProcessor(processor.image_processor, processor.tokenizer, chat_template=templates)
    messages = [{"role": "user", "content": "Why"}]
    assert own.apply_chat_template(messages) == "Why!"
    assert own.apply_chat_template(messages, "plain") == "Why."
    assert own.apply_chat_template(messages, "{{ messages[0]['content'] }}?") == "Why?"
    own = SAILVLProcessor(processor.image_processor, processor.tokenizer, chat_template={"plain": templates["plain"]})
    with pytest.raises(ValueError, match="plain"):
        own.apply_chat_template(messages)
