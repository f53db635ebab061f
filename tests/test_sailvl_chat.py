"""`chat` and `batch_chat`: prompts and answers compared with the releases' format and a reference model."""

import copy
import json

import pytest
import torch
from conftest import random_pixels
from PIL import Image, ImageDraw, ImageFont
from test_hub_folder import run_isolated
from torchvision import transforms
from toy_sailvl import (
    SYSTEM,
    TILE,
    RecordingTokenizer,
    ReferenceModel,
    load_tokenizer,
    released_config,
    released_tensors,
    write_release,
    write_tokenizer,
)
from transformers import AutoTokenizer, GenerationConfig, LogitsProcessor

from sailvit import SAILViTImageProcessor, SAILVLForConditionalGeneration, SAILVLProcessor


GREEDY = {"do_sample": False, "max_new_tokens": 6, "top_p": None}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory):
    return write_release(tmp_path_factory.mktemp("releases") / "toy", attentive=True)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return load_tokenizer(tmp_path_factory.mktemp("tokenizers") / "toy")


@pytest.fixture(scope="module")
def model(release) -> SAILVLForConditionalGeneration:
    return SAILVLForConditionalGeneration.from_pretrained(release, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def reference() -> ReferenceModel:
    config = released_config()
    return ReferenceModel(config, released_tensors(config, attentive=True), image_token_id=309)


def tiles_of(*counts: int) -> torch.Tensor:
    return random_pixels(sum(counts), 3, 56, 56, seed=sum(counts))


class ForcedTokens(LogitsProcessor):
    """Force the generated tokens, one row per prompt; the last token of a row repeats."""

    def __init__(self, *rows: list[int]):
        self.rows, self.steps = rows, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        tokens = torch.tensor([row[min(self.steps, len(row) - 1)] for row in self.rows])
        self.steps += 1
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


# One question

FIRST_TURN = [("<image>\nWhat is the total?", "The total is 42.")]
# question, tiles of the images, history, the prompt after the system turn
QUESTIONS = {
    "text alone": (
        "What is the total?", None, None,
        "<|im_start|>user\nWhat is the total?<|im_end|><|im_start|>assistant\n",
    ),
    "an image before the question": (
        "What is the total?", [1], None,
        f"<|im_start|>user\n<img>{TILE}</img>\nWhat is the total?<|im_end|><|im_start|>assistant\n",
    ),
    "an image within the question": (
        "In <image>, what is the total?", [3], None,
        f"<|im_start|>user\nIn <img>{TILE * 3}</img>, what is the total?<|im_end|><|im_start|>assistant\n",
    ),
    "several images": (
        "Image-1: <image>\nImage-2: <image>\nWhat is the total?", [3, 1], None,
        f"<|im_start|>user\nImage-1: <img>{TILE * 3}</img>\nImage-2: <img>{TILE}</img>\nWhat is the total?<|im_end|>"
        "<|im_start|>assistant\n",
    ),
    "a history of text": (
        " Why?\n", None, [("What is the total?", "42."), ("Is it?", "Yes.")],
        "<|im_start|>user\nWhat is the total?<|im_end|><|im_start|>assistant\n42.<|im_end|>"
        "<|im_start|>user\nIs it?<|im_end|><|im_start|>assistant\nYes.<|im_end|>"
        "<|im_start|>user\n Why?\n<|im_end|><|im_start|>assistant\n",
    ),
    "an image in the history": (
        "Describe the image.", [2], FIRST_TURN,
        f"<|im_start|>user\n<img>{TILE * 2}</img>\nWhat is the total?<|im_end|>"
        "<|im_start|>assistant\nThe total is 42.<|im_end|>"
        "<|im_start|>user\nDescribe the image.<|im_end|><|im_start|>assistant\n",
    ),
    "an image in the history and a new one": (
        "And here?\n<image>", [2, 1], FIRST_TURN,
        f"<|im_start|>user\n<img>{TILE * 2}</img>\nWhat is the total?<|im_end|>"
        "<|im_start|>assistant\nThe total is 42.<|im_end|>"
        f"<|im_start|>user\nAnd here?\n<img>{TILE}</img><|im_end|><|im_start|>assistant\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", QUESTIONS)
def test_prompt_equals_the_releases_and_answer_equals_the_reference_model(case, model, reference, tokenizer):
    question, counts, history, rest = QUESTIONS[case]
    recorder, pixels = RecordingTokenizer(tokenizer), tiles_of(*counts) if counts else None
    answer = model.chat(recorder, pixels, question, GREEDY, history=history, num_patches_list=counts)
    assert recorder.prompts == [SYSTEM + rest]
    assert answer and answer == reference.answer(tokenizer, SYSTEM + rest, pixels)


def test_one_image_of_all_tiles_is_the_default(model, tokenizer):
    recorder = RecordingTokenizer(tokenizer)
    model.chat(recorder, tiles_of(3), "What is the total?", GREEDY)
    assert f"<img>{TILE * 3}</img>\nWhat" in recorder.prompts[0]


def test_tiles_of_any_float_dtype_are_accepted(model, reference, tokenizer):
    pixels = tiles_of(2).bfloat16()
    prompt = SYSTEM + QUESTIONS["an image before the question"][3].replace(TILE, TILE * 2)
    assert model.chat(tokenizer, pixels, "What is the total?", GREEDY) == reference.answer(
        tokenizer, prompt, pixels.float()
    )


def test_a_returned_history_continues_the_conversation(model, reference, tokenizer):
    """The first question has no <image>, the second has one."""
    pixels = tiles_of(2, 1)
    options = {"generation_config": GREEDY, "return_history": True}
    first, history = model.chat(tokenizer, pixels[:2], "What is the total?", **options)
    assert history == [("<image>\nWhat is the total?", first)]
    second, longer = model.chat(tokenizer, pixels, "And <image>?", history=history, num_patches_list=[2, 1], **options)
    prompt = f"{SYSTEM}<|im_start|>user\n<img>{TILE * 2}</img>\nWhat is the total?<|im_end|><|im_start|>assistant\n"
    assert first == reference.answer(tokenizer, prompt, pixels[:2])
    prompt += f"{first}<|im_end|><|im_start|>user\nAnd <img>{TILE}</img>?<|im_end|><|im_start|>assistant\n"
    assert second == reference.answer(tokenizer, prompt, pixels)
    assert longer == [*history, ("And <image>?", second)] and len(history) == 1


def test_image_tokens_can_be_changed(release, tokenizer):
    config = released_config()
    reference = ReferenceModel(config, released_tensors(config, attentive=True), image_token_id=314)
    model, pixels = SAILVLForConditionalGeneration.from_pretrained(release, dtype=torch.float32).eval(), tiles_of(2)
    answer = model.chat(
        tokenizer, pixels, "Why?", GREEDY,
        IMG_START_TOKEN="<ref>", IMG_END_TOKEN="</ref>", IMG_CONTEXT_TOKEN="<box>",
    )  # fmt: skip
    prompt = f"{SYSTEM}<|im_start|>user\n<ref>{'<box>' * 8}</ref>\nWhy?<|im_end|><|im_start|>assistant\n"
    assert answer == reference.answer(tokenizer, prompt, pixels)


def test_the_system_message_can_be_replaced(model, tokenizer, monkeypatch):
    monkeypatch.setattr(model, "system_message", "Answer in one word.")
    recorder = RecordingTokenizer(tokenizer)
    model.chat(recorder, None, "Why?", GREEDY)
    assert recorder.prompts == [
        "<|im_start|>system\nAnswer in one word.<|im_end|><|im_start|>user\nWhy?<|im_end|><|im_start|>assistant\n"
    ]


def test_verbose_logs_the_compact_prompt_and_the_answer(model, tokenizer, caplog):
    with caplog.at_level("INFO", logger="sailvit.chat_sailvl"):
        assert model.chat(tokenizer, tiles_of(2), "Why?", GREEDY) and not caplog.messages
        answer = model.chat(tokenizer, tiles_of(2), "Why?", GREEDY, verbose=True)
    prompt = f"{SYSTEM}<|im_start|>user\n<image>\nWhy?<|im_end|><|im_start|>assistant\n"
    assert caplog.messages == [f"{prompt} {answer}"]


# Several questions at once

# questions, tiles of the images per question, histories
BATCHES = {
    "of other lengths and tiles": (
        ["What is the total?", "<image>\nDescribe the image. Answer with one word.", "In <image>?"], [[3], [1], [2]],
        None,
    ),
    "one with two images": (["Image-1: <image>\nImage-2: <image>\nWhy?", "Describe the image."], [[1, 2], [2]], None),
    "one without an image": (
        ["Describe the image.", "Why?", "And here?\n<image>"], [[2], [], [1, 1]],
        [[], [("What is the total?", "42.")], FIRST_TURN],
    ),
    "none with an image": (["What is the total?", "Why?"], [[], []], [None, [("What is the total?", "42.")]]),
}  # fmt: skip


@pytest.mark.parametrize("case", BATCHES)
def test_batch_chat_equals_chat_per_question(case, model, reference, tokenizer):
    questions, counts, histories = BATCHES[case]
    flat = [count for own in counts for count in own]
    pixels, recorder = tiles_of(*flat) if flat else None, RecordingTokenizer(tokenizer)
    answers = model.batch_chat(recorder, pixels, questions, GREEDY, flat if flat else None, histories)
    own_tiles = pixels.split([sum(own) for own in counts]) if flat else [None] * len(questions)
    own_tiles = [None if own is None or not len(own) else own for own in own_tiles]
    assert answers == [reference.answer(tokenizer, *own) for own in zip(recorder.prompts, own_tiles, strict=True)]
    alone = RecordingTokenizer(tokenizer)
    for answer, question, own, tiles, history in zip(
        answers, questions, own_tiles, counts, histories or [None] * len(questions), strict=True
    ):
        assert answer == model.chat(alone, own, question, GREEDY, history, num_patches_list=tiles)
    assert alone.prompts == recorder.prompts


def test_batch_chat_uses_one_tile_per_image_by_default(model, tokenizer):
    recorder, pixels, questions = RecordingTokenizer(tokenizer), tiles_of(2), ["What is the total?", "Why? <image>"]
    answers = model.batch_chat(recorder, pixels, questions, GREEDY)
    assert [prompt.removeprefix(SYSTEM) for prompt in recorder.prompts] == [
        f"<|im_start|>user\n<img>{TILE}</img>\nWhat is the total?<|im_end|><|im_start|>assistant\n",
        f"<|im_start|>user\nWhy? <img>{TILE}</img><|im_end|><|im_start|>assistant\n",
    ]
    assert answers == [model.chat(tokenizer, pixels[i : i + 1], questions[i], GREEDY) for i in (0, 1)]


def test_returned_histories_continue_a_batch(model, tokenizer):
    pixels = tiles_of(2)
    options = {"generation_config": GREEDY, "return_history": True}
    first, histories = model.batch_chat(tokenizer, pixels, ["Why?", "What is the total?"], **options)
    assert histories == [[("<image>\nWhy?", first[0])], [("<image>\nWhat is the total?", first[1])]]
    second, longer = model.batch_chat(tokenizer, pixels, ["And now?", "Why?"], history=histories, **options)
    for index, question in enumerate(["And now?", "Why?"]):
        own = model.chat(tokenizer, pixels[index : index + 1], question, history=histories[index], **options)
        assert (second[index], longer[index]) == own


# Generation


def test_an_answer_ends_at_the_end_of_turn_and_is_stripped(model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(tmp_path))
    short, long = (tokenizer(text).input_ids for text in (" 42.\n<|im_end|>The total", "The total is 42.<|im_end|>"))
    end = short.index(306) + 1
    assert end < len(long)
    alone, together = ForcedTokens(short), ForcedTokens(long, short)
    answer = model.chat(tokenizer, None, "Why?", {"logits_processor": [alone], "max_new_tokens": 40})
    assert (answer, alone.steps) == ("42.", end)
    answers = model.batch_chat(tokenizer, None, ["Why?"] * 2, {"logits_processor": [together], "max_new_tokens": 40})
    assert (answers, together.steps) == (["The total is 42.", "42."], len(long))


@pytest.mark.parametrize("kind", [dict, GenerationConfig])
def test_generation_config_is_used_and_not_modified(kind, model, reference, tokenizer):
    settings = kind(do_sample=False, max_new_tokens=4, top_p=None)
    before = copy.deepcopy(settings)
    prompt = SYSTEM + QUESTIONS["text alone"][3]
    for _ in range(2):
        assert model.chat(tokenizer, None, "What is the total?", settings) == reference.answer(
            tokenizer, prompt, None, 4
        )
    assert settings == before


def test_none_in_generation_config_keeps_the_models_default(model, reference, tokenizer, monkeypatch):
    monkeypatch.setattr(model.generation_config, "max_new_tokens", 3)
    prompt = SYSTEM + QUESTIONS["text alone"][3]
    answer = model.chat(tokenizer, None, "What is the total?", {"do_sample": False, "max_new_tokens": None})
    assert answer == reference.answer(tokenizer, prompt, tokens=3)


def test_do_sample_false_overrides_the_models_default(model, reference, tokenizer, monkeypatch):
    """As in the generation_config.json of Qwen2."""
    for name, value in {"do_sample": True, "temperature": 50.0, "top_k": 300}.items():
        monkeypatch.setattr(model.generation_config, name, value)
    prompt = SYSTEM + QUESTIONS["text alone"][3]
    assert model.chat(tokenizer, None, "What is the total?", GREEDY) == reference.answer(tokenizer, prompt)


# Invalid input

WRONG_COUNTS = [
    ("Why?", 2, [3], r"1 <image> in the prompt, num_patches_list \[3\] with 3 tiles, 2 tiles in pixel_values"),
    ("Why?", 2, [1, 1], r"1 <image> in the prompt, num_patches_list \[1, 1\] with 2 tiles, 2 tiles in pixel_values"),
    ("<image> <image>", 2, None, r"2 <image> in the prompt, num_patches_list \[2\] with 2 tiles"),
    ("<image> <image>", 2, [0, 2], r"2 <image> in the prompt, num_patches_list \[0, 2\]"),
    ("Why?", 2, [], r"1 <image> in the prompt, num_patches_list \[\] with 0 tiles"),
    ("Why?", 0, [2], r"num_patches_list is \[2\], but pixel_values is None"),
]


@pytest.mark.parametrize(("question", "tiles", "counts", "message"), WRONG_COUNTS)
def test_mismatched_images_and_tiles_raise(question, tiles, counts, message, model, tokenizer):
    with pytest.raises(ValueError, match=message):
        model.chat(tokenizer, tiles_of(tiles) if tiles else None, question, GREEDY, num_patches_list=counts)


def test_images_in_the_history_are_counted(model, tokenizer):
    with pytest.raises(ValueError, match=r"1 <image> in the prompt, num_patches_list \[2, 1\] with 3 tiles"):
        model.chat(tokenizer, tiles_of(2, 1), "Why?", GREEDY, history=FIRST_TURN, num_patches_list=[2, 1])


def test_a_tokenizer_without_image_tokens_raises(model, tmp_path):
    plain_tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(tmp_path, image_tokens=False))
    with pytest.raises(ValueError, match=r"the tokenizer has no '<IMG_CONTEXT>': use the tokenizer published"):
        model.chat(plain_tokenizer, tiles_of(1), "Why?", GREEDY)
    assert model.chat(plain_tokenizer, None, "Why?", GREEDY)


def test_an_unknown_prompt_format_raises(model, tokenizer, monkeypatch):
    monkeypatch.setattr(model.config, "template", "internvl2_5")
    with pytest.raises(
        ValueError, match=r"template is 'internvl2_5', chat supports 'sailvl-chat': build the prompt with"
    ):
        model.chat(tokenizer, None, "Why?", GREEDY)


def test_unsupported_generation_options_raise(model, tokenizer):
    for options in ({"num_return_sequences": 3, "do_sample": True}, {"return_dict_in_generate": True}):
        with pytest.raises(ValueError, match="one answer per question, as text"):
            model.chat(tokenizer, None, "hello", options)
    with pytest.raises(ValueError, match="questions must be a list of questions"):
        model.batch_chat(tokenizer, None, "hello")


@pytest.mark.parametrize(("questions", "histories"), [(["Why?"], [[], []]), ([], None)])
def test_mismatched_questions_and_histories_raise(questions, histories, model, tokenizer):
    with pytest.raises(ValueError, match=rf"got {len(questions)} questions and {len(histories or [])} histories"):
        model.batch_chat(tokenizer, None, questions, GREEDY, history=histories)


# Evaluation harnesses

HARNESS = """
import json, logging, sys, torch
from transformers import AutoModel, AutoTokenizer
is_not_deprecation = lambda record: "`torch_dtype` is deprecated" not in record.getMessage()  # by the harness
logging.getLogger("transformers").handlers[0].addFilter(is_not_deprecation)
path, images = sys.argv[1], torch.load(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True, use_fast=False)
model = AutoModel.from_pretrained(
    path, torch_dtype=torch.bfloat16, load_in_8bit=False, trust_remote_code=True, low_cpu_mem_usage=True
).eval()
assert type(model).__module__.startswith("transformers_modules") and model.config.vision_config.image_size == 56
assert not any(name.split(".")[0] == "sailvit" for name in sys.modules)
settings, written, generate = dict(do_sample=False, max_new_tokens=6, top_p=None), [], model.generate

def recorded(input_ids, **options):
    output = generate(input_ids=input_ids, **options)
    written.append(output[0, input_ids.shape[1]:].tolist())
    return output

def stacked(*tiles):
    return torch.cat([own.to(torch.bfloat16) for own in tiles]), [len(own) for own in tiles]

def ask(question, *tiles, **options):
    pixel_values, counts = stacked(*tiles) if tiles else (None, [])
    return model.chat(
        tokenizer, pixel_values=pixel_values, num_patches_list=counts, question=question, generation_config=settings,
        **options,
    )

model.generate = recorded
answers = [
    ask("What is the total?", verbose=True),
    ask("<image>\\nWhat is the total?", images[0], verbose=True),
    ask("Image-1: <image>\\nImage-2: <image>\\nWhy?", *images, verbose=True),
]
history = None
for question, shown in [("<image>\\nWhy?", 1), ("<image>\\nAnd here?", 2), ("So?", 2)]:
    answer, history = ask(question, *images[:shown], history=history, return_history=True)
    answers.append(answer)
print(json.dumps([answers, written, history]))
"""


def test_vlmevalkit_calls_work_with_remote_code(release, tmp_path):
    folder, tokenizer = tmp_path / "saved", AutoTokenizer.from_pretrained(write_tokenizer(tmp_path / "tokenizer"))
    model = SAILVLForConditionalGeneration.from_pretrained(release, dtype=torch.bfloat16, image_token_id=309).eval()
    model.save_pretrained(folder)
    SAILVLProcessor(SAILViTImageProcessor(size=56), tokenizer, image_seq_length=4).save_pretrained(folder)
    images = [tiles_of(3), tiles_of(1)]
    torch.save(images, tmp_path / "tiles.pt")
    answers, written, history = json.loads(run_isolated(HARNESS, folder, tmp_path / "tiles.pt", home=tmp_path))

    one, two = f"<img>{TILE * 3}</img>", f"<img>{TILE}</img>"
    turn, reply, end = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"
    first = f"{SYSTEM}{turn}{one}\nWhy?{end}{reply}"
    second = f"{first}{answers[3]}{end}{turn}{two}\nAnd here?{end}{reply}"
    expected = [
        (f"{SYSTEM}{turn}What is the total?{end}{reply}", 0),
        (f"{SYSTEM}{turn}{one}\nWhat is the total?{end}{reply}", 1),
        (f"{SYSTEM}{turn}Image-1: {one}\nImage-2: {two}\nWhy?{end}{reply}", 2),
        (first, 1),
        (second, 2),
        (f"{second}{answers[4]}{end}{turn}So?{end}{reply}", 2),
    ]
    for (prompt, shown), answer, tokens in zip(expected, answers, written, strict=True):
        inputs, pixels = tokenizer(prompt, return_tensors="pt"), torch.cat(images[:shown]) if shown else None
        output = model.generate(
            **inputs, pixel_values=pixels, do_sample=False, max_new_tokens=6, eos_token_id=306, pad_token_id=304
        )
        assert output[0, inputs.input_ids.shape[1] :].tolist() == tokens
        assert tokenizer.decode(tokens, skip_special_tokens=True).strip() == answer
    questions = ["<image>\nWhy?", "<image>\nAnd here?", "So?"]
    assert history == [[question, answer] for question, answer in zip(questions, answers[3:], strict=True)]


def test_chat_about_a_document_page_equals_the_reference_model(model, reference, tokenizer):
    page = Image.new("RGB", (900, 1200), "white")
    text = "Invoice 17\n\nPaper, 3 boxes   27.00\nInk, 1 bottle    15.00\n\nThe total is 42."
    ImageDraw.Draw(page).multiline_text((60, 80), text, "black", ImageFont.load_default(size=56), spacing=24)
    tiles = SAILViTImageProcessor(size=56, max_tiles=12, resize_backend="pil")(page)["pixel_values"]
    answer = model.chat(tokenizer, tiles, "What is the total?", GREEDY)

    large = page.resize((3 * 56, 4 * 56), Image.Resampling.BICUBIC)
    corners = [(left, top) for top in range(0, 224, 56) for left in range(0, 168, 56)]
    cut = [large.crop((left, top, left + 56, top + 56)) for left, top in corners]
    cut.append(page.resize((56, 56), Image.Resampling.BICUBIC))
    normalized = transforms.Compose([
        transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    ])  # fmt: skip
    by_pillow = torch.stack([normalized(tile) for tile in cut])
    prompt = f"{SYSTEM}<|im_start|>user\n<img>{TILE * 13}</img>\nWhat is the total?<|im_end|><|im_start|>assistant\n"
    assert answer == reference.answer(tokenizer, prompt, by_pillow)
    assert answer != reference.answer(tokenizer, prompt, torch.zeros_like(by_pillow))
