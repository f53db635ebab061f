"""Packs: labels, isolation of their samples, loss and gradients against one sample a row, samples that are left out."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate.utils import send_to_device
from PIL import Image
from torch.nn import functional as F
from torch.utils.data._utils.pin_memory import pin_memory
from toy_corpus import (
    MemoryCorpus,
    component_gradients,
    make_corpus,
    make_independent,
    make_model,
    make_processor,
    make_samples,
    split_turns,
)
from transformers import DataCollatorWithFlattening

from sailvit import SAILVLForConditionalGeneration, SAILVLProcessor
from sailvit.train.attention import (
    PER_SAMPLE,
    Segment,
    attend_per_sample,
    attention_arguments,
    can_share_prompt,
    is_per_sample,
)
from sailvit.train.collate import EncodedSample, Pack, collate, encode_sample, normalize_tiles, read_pack
from sailvit.train.formats import BadSample, Sample
from sailvit.train.loss import answer_weights, pack_loss
from sailvit.train.memory import enable_checkpointing


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> SAILVLProcessor:
    return make_processor(tmp_path_factory.mktemp("tokenizers") / "toy")


@pytest.fixture(scope="module")
def encoded(processor) -> list[EncodedSample]:
    return [encode_sample(sample, processor) for sample in make_samples(8)]


@pytest.fixture
def model(processor) -> SAILVLForConditionalGeneration:
    return make_model(processor)


def arguments_of(model, pack: Pack) -> dict:
    return pack.inputs | attention_arguments(model, pack.segments)


def sum_loss(model, pack: Pack, **options) -> torch.Tensor:
    """Return the sum of the cross entropy over the labels of a pack, computed without the model's own loss."""
    inputs = {**arguments_of(model, pack), **options}
    labels = inputs.pop("labels")
    logits = model(**inputs).logits
    return F.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")


# Labels


def test_only_answers_and_their_end_of_turn_have_labels(processor):
    turns = [("What is the total?", "The total is 42."), ("Describe the image.", "42")]
    messages = [{"role": "system", "content": [{"type": "text", "text": "Answer with one word."}]}]
    for question, answer in turns:
        messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    image = Image.new("RGB", (60, 60))
    messages[1]["content"].insert(0, {"type": "image", "image": image})
    sample = encode_sample(Sample(messages), processor)
    expected = [token for _, answer in turns for token in processor.tokenizer(f"{answer}<|im_end|>").input_ids]
    assert sample.labels[sample.labels != -100].tolist() == expected
    assert torch.equal(sample.labels[sample.labels != -100], sample.input_ids[sample.labels != -100])
    assert sample.tiles.shape == (1, 3, 56, 56)
    assert (sample.input_ids == processor.image_token_id).sum() == processor.image_seq_length


def test_the_first_token_of_a_sample_has_no_label():
    sample = EncodedSample(torch.tensor([3, 4]), torch.tensor([3, 4]))
    assert collate([sample, sample]).inputs["labels"].tolist() == [[-100, 4, -100, 4]]


def test_a_sample_without_an_answer_is_a_bad_sample(processor):
    question = {"role": "user", "content": [{"type": "text", "text": "What?"}]}
    with pytest.raises(BadSample, match="expected an answer"):
        encode_sample(Sample([question]), processor)


# One row


def test_a_pack_is_what_transformers_makes_of_the_samples(encoded):
    features = [{"input_ids": s.input_ids.tolist(), "labels": s.labels.tolist()} for s in encoded]
    expected = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(features, return_tensors="pt")
    inputs = collate(encoded, flash_attention=True).inputs
    assert expected.keys() == inputs.keys() - {"use_cache", "pixel_values"}
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(inputs[name], value) and inputs[name].dtype == value.dtype, name
        else:
            assert inputs[name] == value, name
    assert torch.equal(inputs["pixel_values"], torch.cat([s.tiles for s in encoded if s.tiles is not None]))


@pytest.mark.parametrize("attention", ["sdpa", "eager", PER_SAMPLE])
def test_a_pack_has_the_loss_and_gradients_of_one_sample_per_row(model, encoded, attention):
    model.language_model.set_attn_implementation(attention)
    num_labels = sum(int((sample.labels != -100).sum()) for sample in encoded)
    model.zero_grad()
    separate = 0.0
    for sample in encoded:
        loss = sum_loss(model, collate([sample])) / num_labels
        loss.backward()
        separate += loss.item()
    expected = component_gradients(model)
    model.zero_grad()
    pack = collate(encoded)
    loss = model(**arguments_of(model, pack)).loss
    loss.backward()
    assert pack.num_labels == num_labels
    assert abs(loss.item() - separate) <= 1e-6 * separate
    for name, gradient in component_gradients(model).items():
        cosine = F.cosine_similarity(gradient.double(), expected[name].double(), dim=0)
        assert cosine >= 0.99999 and gradient.norm() > 0, name
        torch.testing.assert_close(gradient.norm(), expected[name].norm(), rtol=1e-5, atol=0)


def logits_of_samples(model, samples: list[EncodedSample], **options) -> list[torch.Tensor]:
    inputs = {**arguments_of(model, collate(samples)), **options}
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    return list(logits.split([len(sample.input_ids) for sample in samples]))


def changed(sample: EncodedSample, what: str) -> EncodedSample:
    if what == "pixels":
        return replace(sample, tiles=-sample.tiles)
    ids = sample.input_ids.clone()
    start = 2 + sample.prefix
    ids[start : start + 3] = torch.tensor([10, 11, 12])
    return replace(sample, input_ids=ids)


def leakage(model, encoded: list[EncodedSample], what: str, **options) -> tuple[float, float]:
    """Return how much the logits of the changed sample move, and the most those of another sample do."""
    before = logits_of_samples(model, encoded, **options)
    after = logits_of_samples(model, [changed(encoded[0], what), *encoded[1:]], **options)
    own, *others = [(first - second).abs().max().item() for first, second in zip(before, after, strict=True)]
    return own, max(others)


@pytest.mark.parametrize("attention", ["sdpa", PER_SAMPLE])
@pytest.mark.parametrize("what", ["pixels", "tokens"])
def test_changing_one_sample_changes_no_other_sample_of_the_pack(model, encoded, what, attention):
    model.language_model.set_attn_implementation(attention)
    samples = [sample for sample in encoded if sample.tiles is not None]
    own, others = leakage(model.eval(), samples, what)
    assert own > 1e-2
    assert others <= 1e-6


def test_with_a_cache_the_samples_of_a_pack_would_see_each_other(model, encoded):
    """The measurement of the test before this one finds leaks: transformers isolates no samples if a cache is used."""
    samples = [sample for sample in encoded if sample.tiles is not None]
    assert leakage(model.eval(), samples, "tokens", use_cache=True)[1] > 1e-2


def test_other_attention_ignores_the_arguments_of_flash_attention(model, encoded):
    plain, more = (model(**collate(encoded, flash_attention=flag).inputs) for flag in (False, True))
    assert torch.equal(plain.logits, more.logits)


# Independent turns


@pytest.fixture(scope="module")
def independent() -> list[Sample]:
    """Samples with and without independent turns and images."""
    rng, (plain, *_, pictured) = np.random.default_rng(3), make_samples(3)
    return [plain, make_independent(rng), pictured, make_independent(rng, 0, 2), make_independent(rng, 1, 4)]


def weighted_loss(model, packs: list[Pack], reduction: str) -> tuple[float, dict[str, torch.Tensor], int]:
    """Return loss and gradients of a step, and how many tiles it encodes."""
    calls, total = [], 0.0
    weights = [answer_weights(pack, reduction) for pack in packs]
    model.zero_grad()
    with model.vision_model.register_forward_hook(lambda module, inputs, output: calls.append(output)):
        for pack, own in zip(packs, weights, strict=True):
            loss = pack_loss(model, arguments_of(model, pack), own, True)[0] / sum(map(torch.sum, weights))
            loss.backward()
            total += loss.item()
    return total, component_gradients(model), sum(len(call.last_hidden_state) for call in calls)


def sharing(samples: list[Sample]) -> list[Sample]:
    """Return the samples; turns about the same images share the tokens up to the last one."""
    return [replace(sample, share_prompt=sample is not samples[3]) for sample in samples]  # which has no images


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize(
    "reduction, attention", [("token", "sdpa"), ("sample", PER_SAMPLE), ("square", PER_SAMPLE), ("token", "eager")]
)
def test_independent_turns_have_the_loss_and_gradients_of_samples_of_their_own(
    model, processor, independent, reduction, attention, shares
):
    model.language_model.set_attn_implementation(attention)
    separate = [encode_sample(each, processor) for sample in independent for each in split_turns(sample)]
    encoded = [encode_sample(sample, processor) for sample in (sharing(independent) if shares else independent)]
    expected, gradients, tiles = weighted_loss(model, [collate([sample]) for sample in separate], reduction)
    for packs in ([collate(encoded)], [collate([sample]) for sample in encoded]):
        loss, found, encoded_tiles = weighted_loss(model, packs, reduction)
        assert loss == pytest.approx(expected, rel=1e-6)
        for name, gradient in found.items():
            assert gradient.norm() > 0
            torch.testing.assert_close(gradient, gradients[name], rtol=1e-4, atol=1e-6, msg=name)
        assert encoded_tiles == sum(len(sample.tiles) for sample in encoded if sample.tiles is not None) < tiles / 2


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", PER_SAMPLE])
def test_changing_a_turn_changes_no_other_independent_turn(model, processor, independent, attention, shares):
    model.eval().language_model.set_attn_implementation(attention)
    sample, logits = encode_sample(replace(independent[1], share_prompt=shares), processor), []
    for one in (sample, changed(sample, "tokens")):
        pack = collate([one])
        with torch.no_grad():
            logits.append(model(**arguments_of(model, pack)).logits[0].split(pack.lengths))
    own, *others = [(before - after).abs().max().item() for before, after in zip(*logits, strict=True)]
    assert own > 1e-2 and len(others) == 2
    assert max(others) <= 1e-6


def test_independent_turns_show_the_same_tiles(processor, independent):
    pack = collate([encode_sample(sample, processor) for sample in independent], flash_attention=True)
    separate = collate([encode_sample(each, processor) for sample in independent for each in split_turns(sample)])
    inputs = pack.inputs
    assert torch.equal(inputs["pixel_values"][inputs["tile_indices"]], separate.inputs["pixel_values"])
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(inputs[name], separate.inputs[name]), name
    assert pack.lengths == separate.lengths == inputs["cu_seq_lens_q"].diff().tolist()
    assert pack.conversations == [1, 3, 1, 2, 4] and pack.num_labels == separate.num_labels


# A shared prefix


SHARING = {
    "Qwen2": {},
    "Qwen3": {"model_type": "qwen3", "head_dim": 8},
    "Llama": {"model_type": "llama"},
    "Mistral": {"model_type": "mistral", "sliding_window": None},
    "Gemma": {"model_type": "gemma", "head_dim": 8},
}
NOT_SHARING = {
    "a sliding window": {"model_type": "mistral", "sliding_window": 7},
    "sliding windows in some layers": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "Gemma 2": {"model_type": "gemma2", "head_dim": 8, "sliding_window": 7},
    "Mamba": {"model_type": "mamba"},
    "BLOOM": {"model_type": "bloom"},
}


@pytest.mark.parametrize("text", SHARING.values(), ids=SHARING)
@pytest.mark.parametrize("attention", ["sdpa", "eager", PER_SAMPLE])
def test_logits_with_a_shared_prefix_are_those_of_separate_conversations(processor, independent, text, attention):
    model = make_model(processor, text).eval()
    assert can_share_prompt(model.config) and can_share_prompt(model.config, attention)
    model.language_model.set_attn_implementation(attention)
    separate, shared = (
        collate([encode_sample(sample, processor) for sample in samples])
        for samples in (independent, sharing(independent))
    )
    assert sum(shared.lengths) < 0.7 * sum(separate.lengths)
    logits = []
    for pack in (separate, shared):
        with torch.no_grad():
            row = model(**arguments_of(model, pack)).logits[0]
        logits.append(row[pack.inputs["labels"][0].roll(-1) != -100])
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", NOT_SHARING.values(), ids=NOT_SHARING)
def test_language_models_without_full_attention_share_no_prefix(processor, text):
    assert not can_share_prompt(make_model(processor, text).config)


def test_flash_attention_shares_no_prefix(model, processor, independent):
    assert not can_share_prompt(model.config, "flash_attention_2")
    encoded = [encode_sample(sample, processor) for sample in sharing(independent)]
    with pytest.raises(ValueError, match="prefixes of their own"):
        collate(encoded, flash_attention=True)


def test_a_chat_template_with_images_last_shares_no_prefix(processor, independent):
    other = copy.copy(processor)
    other.chat_template = "{% for m in messages %}{% for p in m.content | sort(attribute='type', reverse=True) %}" + (
        "{% if p.type == 'text' %}{{ p.text }}{% else %}<IMG_CONTEXT>{% endif %}{% endfor %}"
        "{% if m.role == 'assistant' %}{% generation %}{{ 'yes' }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    with pytest.raises(BadSample, match="let the chat template put images before texts"):
        encode_sample(replace(independent[1], share_prompt=True), other)


# Attention sample by sample


LANGUAGES = {
    "grouped heads": {},
    "one key-value head": {"num_key_value_heads": 1},
    "windows": {"model_type": "mistral", "sliding_window": 7},
    "windows in some layers": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("text", LANGUAGES.values(), ids=LANGUAGES)
def test_attention_per_sample_is_that_of_a_mask(processor, encoded, text, checkpointing):
    model, pack = make_model(processor, text), collate(encoded)
    model(**pack.inputs).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    if checkpointing:
        enable_checkpointing(model, ["language"])
    with attend_per_sample(model) as is_possible:
        model(**arguments_of(model, pack)).loss.backward()
    assert is_possible and not is_per_sample(model)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_attention_per_sample_without_lengths_is_an_error(model, encoded):
    inputs = collate(encoded).inputs
    for segments in (None, [Segment((3,))]):
        with attend_per_sample(model), pytest.raises(ValueError, match="segments that add up to one row"):
            model(**inputs, segments=segments)


def test_a_language_model_in_chunks_keeps_its_mask(model):
    model.language_model.config.layer_types = ["chunked_attention", "full_attention"]
    with attend_per_sample(model) as is_possible:
        assert not is_possible and model.language_model.config._attn_implementation == "sdpa"


# A pack without images, an empty pack


def test_a_zero_tile_gives_zero_gradients_and_the_same_loss(model, encoded):
    pack = collate([encoded[0], encoded[0]])
    assert "pixel_values" not in pack.inputs
    plain = model(**pack.inputs)
    plain.loss.backward()
    assert all(parameter.grad is None for parameter in model.vision_model.parameters())
    expected = {name: p.grad.clone() for name, p in model.language_model.named_parameters()}
    model.zero_grad()
    model.always_run_vision = True
    output = model(**pack.inputs)
    output.loss.backward()
    assert torch.equal(output.loss, plain.loss) and torch.equal(output.logits, plain.logits)
    for part in (model.vision_model, model.mlp1):
        assert all((parameter.grad == 0).all() for parameter in part.parameters())
    for name, parameter in model.language_model.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


def test_a_pack_with_images_runs_no_zero_tile(model, encoded):
    calls = []
    model.vision_model.register_forward_hook(lambda module, inputs, output: calls.append(output))
    model.always_run_vision = True
    model(**collate(encoded).inputs)
    assert len(calls) == 1
    assert len(calls[0].last_hidden_state) == sum(len(s.tiles) for s in encoded if s.tiles is not None)


def test_generation_runs_the_zero_tile_in_its_first_step_only(model, processor):
    calls = []
    model.eval().vision_model.register_forward_hook(lambda module, inputs, output: calls.append(output))
    ids = processor.tokenizer("What is the total?", return_tensors="pt").input_ids
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    assert not calls
    model.always_run_vision = True
    assert torch.equal(model.generate(ids, **options), expected)
    assert len(calls) == 1


@pytest.mark.slow
def test_the_zero_tile_compiles_without_a_graph_break(model, encoded):
    model.eval().always_run_vision = True
    inputs = collate([encoded[0]]).inputs
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)


def test_an_empty_pack_is_a_token_without_loss_and_gradient(model):
    model.always_run_vision = True
    pack = collate([], pad_token_id=7)
    assert pack.inputs["input_ids"].tolist() == [[7]] and pack.num_labels == 0 and pack.lengths == []
    loss = model(**pack.inputs, num_items_in_batch=torch.tensor(5)).loss
    loss.backward()
    assert loss == 0
    assert all((parameter.grad == 0).all() for parameter in model.parameters())


# Samples that are left out


def test_samples_that_cannot_be_read_are_left_out_and_listed(processor, tmp_path):
    samples = make_samples(5)
    corpus = make_corpus(samples, processor, tmp_path)
    broken = {"type": "image", "image": str(tmp_path / "missing.png")}
    samples[1] = BadSample("source a, line 2: no answer")
    samples[2] = Sample([{"role": "user", "content": [broken]}, samples[2].messages[1]])
    samples[3] = samples[4]
    pack = read_pack(corpus, [0, 1, 2, 3, 4])
    assert pack.samples == [0, 4]
    assert pack.lengths == corpus.tokens[[0, 4]].tolist()
    assert [index for index, _ in pack.skipped] == [1, 2, 3]
    reasons = [reason for _, reason in pack.skipped]
    assert reasons[0] == "source a, line 2: no answer"
    assert "no such file" in reasons[1]
    assert f"expected {corpus.tokens[3]} tokens" in reasons[2] and f"got {corpus.tokens[4]}" in reasons[2]
    expected = collate([encode_sample(samples[index], processor) for index in (0, 4)])
    assert torch.equal(pack.inputs["input_ids"], expected.inputs["input_ids"])


def test_a_pack_whose_samples_all_fail_is_empty(processor, tmp_path):
    corpus = MemoryCorpus([BadSample("broken")], processor, tmp_path, [9], [0])
    pack = read_pack(corpus, [0])
    assert pack.inputs["input_ids"].tolist() == [[processor.tokenizer.pad_token_id]]
    assert pack.samples == [] and pack.skipped == [(0, "broken")]


# Tiles as uint8, devices


@pytest.mark.parametrize("backend", ["torchvision", "pil"])
def test_uint8_tiles_are_normalised_to_the_bit(processor, backend):
    processor = copy.deepcopy(processor)
    processor.image_processor.resize_backend = backend
    for sample in make_samples(8, seed=1)[1:]:
        expected = encode_sample(sample, processor).tiles
        tiles = encode_sample(sample, processor, uint8_tiles=True).tiles
        if expected is None:
            assert tiles is None
            continue
        assert tiles.dtype == torch.uint8
        assert torch.equal(normalize_tiles(tiles, processor.image_processor), expected)


def test_a_float_image_as_uint8_is_a_bad_sample(processor):
    image = Image.fromarray(np.full((60, 60), 100.5, np.float32))
    messages = make_samples(1)[0].messages
    messages[0]["content"].insert(0, {"type": "image", "image": image})
    assert encode_sample(Sample(messages), processor).tiles.dtype == torch.float32
    with pytest.raises(BadSample):
        encode_sample(Sample(messages), processor, uint8_tiles=True)


def test_a_pack_moves_to_a_device_and_pickles(encoded):
    pack = collate(encoded, range(8), [(9, "broken")])
    moved = pack.to("meta")
    assert moved.inputs["pixel_values"].device.type == "meta" and moved.inputs["use_cache"] is False
    assert (moved.samples, moved.skipped, moved.num_labels) == (pack.samples, pack.skipped, pack.num_labels)
    (sent,) = send_to_device([pack], "meta")  # as accelerate moves a batch
    assert isinstance(sent, Pack) and sent.inputs["labels"].device.type == "meta"
    again = pickle.loads(pickle.dumps(pack))
    assert torch.equal(again.inputs["labels"], pack.inputs["labels"])


def test_a_data_loader_pins_the_tensors_of_packs(encoded, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *args: pinned.append(tensor) or tensor)
    pack = collate(encoded)
    (result,) = pin_memory([pack])
    assert isinstance(result, Pack)
    assert len(pinned) == sum(isinstance(value, torch.Tensor) for value in pack.inputs.values())
