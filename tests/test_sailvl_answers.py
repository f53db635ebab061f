"""Which tokens of a conversation the assistant wrote, against ids that are put together turn by turn."""

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


def asked(text: str, *media: str) -> dict:
    return {"role": "user", "content": [*(MEDIA[kind] for kind in media), {"type": "text", "text": text}]}


def answered(text: str) -> dict:
    return {"role": "assistant", "content": text}


def split(processor: SAILVLProcessor, conversation: list[dict]) -> tuple[list[int], list[int]]:
    """The ids of a conversation and its mask: each turn tokenized by itself."""
    ids, mask = processor.tokenizer(SYSTEM)["input_ids"], []
    for message in conversation:
        if message["role"] == "user":
            # a turn of its own as the processor expands it, without the system's
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
        kept = [place for place, seen in enumerate(attention) if seen]
        assert [ids[place] for place in kept] == own
        assert [mask[place] for place in kept] == labels and sum(mask) == sum(labels)


KEYS = ("input_ids", "assistant_masks", "attention_mask")
CONVERSATIONS = {
    "text": [asked("Why?"), answered("So.")],
    "an image": [asked("Why?", "image"), answered("The total is 42.")],
    "two images": [asked("Why?", "image", "small image"), answered("The total is 42.")],
    "a video": [asked("Why?", "video"), answered("So.")],
    "several turns": [
        asked("Why?", "image"), answered("The total is 42."),
        asked("And here?", "small image", "video"), answered("So."),
        asked("What?"), answered("Answer with one word."),
    ],
    "no answer": [asked("Why?", "image")],
    "an empty answer": [asked("Why?", "image"), answered("")],
}  # fmt: skip


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_the_mask_is_of_the_answers_and_the_ends_of_their_turns(case, processor):
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


def test_answers_that_are_cut_off_are_not_masked(processor):
    conversation = CONVERSATIONS["several turns"]
    ids, mask = split(processor, conversation)
    end = mask.index(1) + 3
    batch = processor.apply_chat_template([asked("Why?"), answered("So.")], **READING, truncation=True, max_length=4)
    assert batch["assistant_masks"] == [[0] * 4]
    batch = processor.apply_chat_template(
        CONVERSATIONS["an image"],
        **READING,
        truncation=True,
        max_length=split(processor, CONVERSATIONS["an image"])[1].index(1) + 2,
    )
    assert sum(batch["assistant_masks"][0]) == 2 and end < len(ids)


def test_an_image_of_the_assistant_is_no_target(processor):
    content = [{"type": "text", "text": "Here: "}, MEDIA["image"], {"type": "text", "text": "So."}]
    batch = processor.apply_chat_template([asked("Why?"), {"role": "assistant", "content": content}], **READING)
    (ids,), (mask,) = batch["input_ids"], batch["assistant_masks"]
    masked = [token for token, label in zip(ids, mask, strict=True) if label]
    assert not set(masked) & set(processor.image_token_ids) and ids.count(processor.image_token_id) > 2
    parts = processor.tokenizer(["Here: ", "So.", "<|im_end|>"])["input_ids"]
    assert masked == [token for part in parts for token in part]


# A space or line break at its start may join the token before it.
ANSWERS = st.text(st.characters(codec="utf-8", exclude_characters="<>|"), max_size=12).filter(lambda t: t == t.strip())
TURNS = st.tuples(st.text("Why? 42.", max_size=9), st.lists(st.sampled_from(list(MEDIA)), max_size=3), ANSWERS)


@given(st.lists(st.lists(TURNS, min_size=1, max_size=3), min_size=1, max_size=3), st.sampled_from(["left", "right"]))
@settings(max_examples=60, deadline=None)
def test_any_conversations_are_masked(processor, batch, side):
    conversations = [
        [message for question, media, answer in turns for message in (asked(question, *media), answered(answer))]
        for turns in batch
    ]
    check(processor, conversations, padding=True, padding_side=side, return_tensors="np")


def test_a_mask_goes_with_nothing_to_continue(processor):
    with pytest.raises(ValueError, match="continue_final_message"):
        processor.apply_chat_template(CONVERSATIONS["text"], **READING, continue_final_message=True)


def test_a_mask_needs_what_holds_it(processor):
    for missing in ("tokenize", "return_dict"):
        with pytest.raises(ValueError, match="needs tokenize=True and return_dict=True"):
            processor.apply_chat_template(CONVERSATIONS["text"], **{**READING, missing: False})


def test_another_template_is_masked_by_its_own_marks(processor):
    template = (
        "{% for m in messages %}{{ m['role'] }}:{% generation %}{{ m['content'] }}{% endgeneration %};{% endfor %}"
    )
    messages = [{"role": "user", "content": "Why?"}, {"role": "user", "content": "42."}]
    batch = processor.apply_chat_template(messages, template, **READING)
    masked = [token for token, label in zip(*(batch[key][0] for key in KEYS[:2]), strict=True) if label]
    assert masked == [*processor.tokenizer("Why?")["input_ids"], *processor.tokenizer("42.")["input_ids"]]


def test_the_marks_are_transformers_and_an_engine_without_them_renders_the_same(processor):
    """They are written as the engines look for them that take them out before they render."""
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


def test_variables_of_a_template_are_told_from_options(processor):
    template = "{{ greeting }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    messages = [{"role": "user", "content": "Why?"}]
    options = {"chat_template": template, "greeting": "Hello. ", "tokenize": True, "padding": "max_length"}
    ids = processor.apply_chat_template(messages, **options, max_length=30)[0]
    text = processor.tokenizer("Hello. Why?")["input_ids"]
    assert len(ids) == 30 and [token for token in ids if token != processor.tokenizer.pad_token_id] == text
    for tokenize in (True, False):
        with pytest.raises(TypeError, match="no option 'greetin'"):
            processor.apply_chat_template(messages, chat_template=template, greetin="Hello. ", tokenize=tokenize)


def test_one_of_several_templates_is_taken_by_its_name(processor):
    templates = {"default": "{{ messages[0]['content'] }}!", "plain": "{{ messages[0]['content'] }}."}
    own = SAILVLProcessor(processor.image_processor, processor.tokenizer, chat_template=templates)
    messages = [{"role": "user", "content": "Why"}]
    assert own.apply_chat_template(messages) == "Why!"
    assert own.apply_chat_template(messages, "plain") == "Why."
    assert own.apply_chat_template(messages, "{{ messages[0]['content'] }}?") == "Why?"
    own = SAILVLProcessor(processor.image_processor, processor.tokenizer, chat_template={"plain": templates["plain"]})
    with pytest.raises(ValueError, match="plain"):
        own.apply_chat_template(messages)
