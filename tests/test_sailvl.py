"""SAIL-VL model: parity with transformers components of the same weights, generation, training, offloading."""

import copy
import json
import math

import pytest
import torch
from conftest import random_pixels, randomize, relative_difference
from toy_sailvl import LANGUAGE, ReferenceModel, released_config, released_tensors, write_release
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    CompileConfig,
    DynamicCache,
    InternVLVisionConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
    TextIteratorStreamer,
)
from transformers.modeling_utils import PreTrainedModel

from sailvit import SAILViTConfig, SAILVLConfig, SAILVLForConditionalGeneration, modeling_sailvl
from sailvit.modeling_sailvl import CACHE


IMAGE = 309  # <IMG_CONTEXT> in the toy tokenizer
TILE = [IMAGE] * 4


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory):
    return write_release(tmp_path_factory.mktemp("releases") / "toy")


@pytest.fixture(scope="module")
def model(release) -> SAILVLForConditionalGeneration:
    loaded = SAILVLForConditionalGeneration.from_pretrained(release, dtype=torch.float32).eval()
    loaded.img_context_token_id = IMAGE
    return loaded


@pytest.fixture(scope="module")
def reference() -> ReferenceModel:
    config = released_config()
    return ReferenceModel(config, released_tensors(config), IMAGE)


def prompt(tiles: int, seed: int = 0, length: int = 9) -> torch.Tensor:
    """Return ids (1, S): text, an image of `tiles` tiles, text."""
    text = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return torch.tensor([text[:4] + TILE * tiles + text[4:]])


# Configuration


def test_a_released_config_loads_and_round_trips(release, tmp_path):
    config = SAILVLConfig.from_pretrained(release)
    assert config.vision_config.model_type == "sailvit" and config.text_config.model_type == "qwen2"
    assert config.llm_config is config.text_config and config.pixel_shuffle_factor == 2
    assert (config.max_dynamic_patch, config.template, config.image_seq_length) == (12, "sailvl-chat", 4)
    assert "flash_attention_2" not in json.dumps(config.to_dict()) and "/mnt" not in json.dumps(config.to_dict())
    config.save_pretrained(tmp_path)
    again = SAILVLConfig.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path / "twice")
    texts = [(folder / "config.json").read_text() for folder in (tmp_path, tmp_path / "twice")]
    assert texts[0] == texts[1] and again.architectures != ["SailVLModel"]
    for auto_class in ("AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
        assert again.auto_map[auto_class] == "modeling_sailvl.SAILVLForConditionalGeneration"


def test_the_default_config_is_sailvit_large_and_qwen2():
    config = SAILVLConfig()
    assert repr(config) and config.image_seq_length == 256 and config.vision_config.hidden_size == 1024
    assert config.image_token_id is None or config.text_config.vocab_size > config.image_token_id == 151667


def test_tied_embeddings_follow_the_text_config():
    tied = SAILVLConfig(text_config={"model_type": "qwen2", "tie_word_embeddings": True}, tie_word_embeddings=False)
    assert tied.tie_word_embeddings and SAILVLConfig.from_dict(tied.to_dict()).tie_word_embeddings


BAD_FIELDS = [
    ({"ps_version": "v1"}, "ps_version 'v1' is not supported"),
    ({"select_layer": 25}, "select_layer 25 is out of range: expected -25 to 24 for a vision encoder of 24"),
    ({"select_layer": -26}, "select_layer -26 is out of range"),
    ({"downsample_ratio": 0.4}, "downsample_ratio must be 1 / integer"),
    ({"pixel_shuffle_factor": 3}, "does not divide the 32 x 32 patches"),
    ({"vision_batch_size": 0}, "vision_batch_size must be a positive integer"),
    ({"force_image_size": 224}, "force_image_size 224"),
    (
        {"text_config": {"model_type": "internlm2"}},
        "'internlm2' is not known to the installed transformers: convert it",
    ),
    (
        {"text_config": {"model_type": "gpt-17"}},
        "'gpt-17' is not known to the installed transformers: use a supported one",
    ),
    ({"text_config": {"hidden_size": 8}}, "text_config.model_type None is not known"),
    ({"vision_config": {"model_type": "intern_vit_6b"}}, "convert it to transformers' internvl_vision"),
    ({"vision_config": {"model_type": "qwen2"}}, "'qwen2' is no vision encoder: missing image_size"),
    ({"llm_config": {"model_type": "qwen2"}, "text_config": {"model_type": "llama"}}, "two names of one field"),
    ({"image_token": ""}, "must be non-empty strings"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_FIELDS)
def test_an_invalid_field_raises_with_a_hint(fields, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        SAILVLConfig(**fields)


def test_an_override_at_loading_is_validated_with_the_other_fields(release):
    assert SAILVLConfig.from_pretrained(release, select_layer=-2).select_layer == -2
    with pytest.raises(ValueError, match="select_layer 9 is out of range"):
        SAILVLConfig.from_pretrained(release, select_layer=9)


# Parity


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("language", ["qwen2", "qwen3", "llama"])
def test_logits_equal_the_reference_model(language, tied, tmp_path):
    config = released_config(language, tied)
    twin = ReferenceModel(config, released_tensors(config), IMAGE)
    path = write_release(tmp_path / "toy", language, tied)
    model, report = SAILVLForConditionalGeneration.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True, image_token_id=IMAGE
    )
    assert not any(report.values())
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    for tiles in (0, 1, 3):
        pixels, ids = random_pixels(tiles, 3, 56, 56) if tiles else None, prompt(tiles)
        with torch.no_grad():
            assert relative_difference(model(ids, pixels).logits, twin.logits(ids, pixels)) < 1e-4
        generated = model.generate(ids, pixel_values=pixels, do_sample=False, max_new_tokens=6, eos_token_id=None)
        assert generated[0, ids.shape[1] :].tolist() == twin.greedy(ids, pixels, 6)
    model.save_pretrained(tmp_path / "saved")
    again = SAILVLForConditionalGeneration.from_pretrained(tmp_path / "saved")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_left_padded_batch_equals_single_prompts(model, reference):
    counts, ids = (2, 0, 1), [prompt(tiles, seed, length) for tiles, seed, length in ((2, 1, 9), (0, 2, 7), (1, 3, 12))]
    longest = max(row.shape[1] for row in ids)
    batch = torch.cat([torch.nn.functional.pad(row, (longest - row.shape[1], 0)) for row in ids])
    mask = torch.stack([torch.arange(longest) >= longest - row.shape[1] for row in ids]).long()
    pixels = random_pixels(3, 3, 56, 56)
    written = model.generate(
        batch, attention_mask=mask, pixel_values=pixels, do_sample=False, max_new_tokens=5, eos_token_id=None
    )
    for row, own, answer in zip(ids, pixels.split(counts), written, strict=True):
        assert answer[longest:].tolist() == reference.greedy(row, own if len(own) else None, 5)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beams_use_the_images_of_their_prompt(model, options):
    """Two prompts of two tiles each: repeating single tiles would mix up the prompts."""
    ids, pixels = torch.cat([prompt(2, 1), prompt(2, 2)]), random_pixels(4, 3, 56, 56)
    settings = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None, **options}
    together = model.generate(ids, pixel_values=pixels, **settings).split(options.get("num_return_sequences", 1))
    embeds = model.get_input_embeddings()(ids).masked_scatter(
        (ids == IMAGE)[..., None], model.get_image_features(pixels).flatten(0, 1)
    )
    alone = model.language_model.generate(
        inputs_embeds=embeds, attention_mask=torch.ones_like(ids), pad_token_id=0, **settings
    )
    assert torch.equal(torch.cat(together)[:, ids.shape[1] :], alone)


@pytest.mark.parametrize("beams", [1, 3])
def test_inputs_embeds_generate_the_same_tokens_as_input_ids(beams, model):
    ids, pixels = prompt(2), random_pixels(2, 3, 56, 56)
    settings = {"pixel_values": pixels, "do_sample": False, "max_new_tokens": 5, "eos_token_id": None}
    settings["num_beams"] = beams
    from_embeds = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **settings)
    assert torch.equal(from_embeds, model.generate(ids, **settings)[:, ids.shape[1] :])


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_every_cache_generates_the_same_tokens(model, reference, cache):
    ids, pixels = prompt(1), random_pixels(1, 3, 56, 56)
    options = {"use_cache": False} if cache is None else {"cache_implementation": cache, "disable_compile": True}
    written = model.generate(ids, pixel_values=pixels, do_sample=False, max_new_tokens=5, eos_token_id=None, **options)
    assert written[0, -5:].tolist() == reference.greedy(ids, pixels, 5)


def test_assisted_and_streamed_generation_give_the_same_tokens(model, reference, release):
    ids, pixels = prompt(1, seed=5), random_pixels(1, 3, 56, 56)
    expected = reference.greedy(ids, pixels, 6)
    assert 1 not in expected
    settings = {"pixel_values": pixels, "do_sample": False, "max_new_tokens": 6, "eos_token_id": 1}
    assert model.generate(ids, prompt_lookup_num_tokens=2, **settings)[0, -6:].tolist() == expected
    assistant = copy.deepcopy(model)
    assert model.generate(ids, assistant_model=assistant, **settings)[0, -6:].tolist() == expected
    tokenizer = AutoTokenizer.from_pretrained(release)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    model.generate(ids, streamer=streamer, **settings)
    assert "".join(streamer) == tokenizer.decode(expected)


def test_a_turn_with_a_new_image_continues_a_cache(model):
    first, second = prompt(1, 1), prompt(2, 2)
    pixels = random_pixels(3, 3, 56, 56)
    settings = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None}
    full = model.generate(torch.cat([first, second], 1), pixel_values=pixels, **settings)
    both = torch.cat([first, second], 1)
    for name in ("past_key_values", "cache"):
        with torch.no_grad():
            past = model(first, pixels[:1], use_cache=True)[CACHE]
        continued = model.generate(both, pixel_values=pixels[1:], **{name: past}, **settings)
        assert torch.equal(full, continued)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_the_cache_is_accepted_under_both_names(model, name):
    ids, pixels = prompt(1), random_pixels(1, 3, 56, 56)
    with torch.no_grad():
        full = model(ids, pixels, use_cache=True)
        cache = model(ids[:, :-1], pixels, use_cache=True)[CACHE]
        last = model(ids[:, -1:], **{name: cache}, use_cache=True)
        read = model.base_model(ids[:, :-1], pixels, use_cache=True)[CACHE]
        state = model.base_model(ids[:, -1:], **{name: read}).last_hidden_state
    torch.testing.assert_close(last.logits, full.logits[:, -1:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.language_model.lm_head(state), last.logits, rtol=1e-5, atol=1e-5)
    assert last.keys() == model.language_model(ids, use_cache=True).keys()


def test_two_caches_raise(model):
    caches = {"past_key_values": DynamicCache(), "cache": DynamicCache()}
    for call in (model, model.base_model, model.generate):
        with pytest.raises(ValueError, match="two names of one argument"):
            call(prompt(0), **caches)


def test_the_length_of_a_static_cache_is_read_only_for_the_prompt(model, reference, monkeypatch):
    """The length is a tensor: reading it synchronizes every step on a GPU and breaks compiled graphs."""
    read, is_empty = [], modeling_sailvl._is_empty
    monkeypatch.setattr(modeling_sailvl, "_is_empty", lambda cache: read.append(cache) or is_empty(cache))
    ids, pixels = prompt(1, 3), random_pixels(1, 3, 56, 56)
    settings = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None, "cache_implementation": "static"}
    written = model.generate(ids, pixel_values=pixels, **settings)
    assert written[0, -4:].tolist() == reference.greedy(ids, pixels, 4) and len(read) <= 2


def test_forward_accepts_every_output_of_the_processor(model):
    ids, pixels = prompt(1), random_pixels(1, 3, 56, 56)
    kinds = {"mm_token_type_ids": (ids == IMAGE).long(), "attention_mask": torch.ones_like(ids)}
    settings = {"pixel_values": pixels, "max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **kinds, **settings), model.generate(ids, **settings))
    assert torch.equal(model(ids, pixels, **kinds).logits, model(ids, pixels).logits)


# base_model


def test_base_model_is_the_model_without_lm_head(model):
    ids, pixels = prompt(2), random_pixels(2, 3, 56, 56)
    base = model.base_model
    with torch.no_grad():
        state = base(ids, pixel_values=pixels, use_cache=False).last_hidden_state
        assert torch.equal(model.language_model.lm_head(state), model(ids, pixels).logits)
        mask = torch.ones_like(ids).index_fill_(1, torch.tensor([0, 1]), 0)
        state = base(ids, pixels, mask, use_cache=False).last_hidden_state
        torch.testing.assert_close(model.language_model.lm_head(state), model(ids, pixels, mask).logits)
    own = {name: parameter for name, parameter in model.named_parameters() if "lm_head" not in name}
    assert {*map(id, base.parameters())} == {*map(id, own.values())} and model.model is not model
    assert all("base_model" not in name and "full_model" not in name for name in model.state_dict())
    base.train()
    assert model.vision_model.training and not model.training
    model.eval()
    with pytest.raises(ValueError, match=r"8 placeholders .* 4 visual tokens"):
        base(ids, pixel_values=pixels[:1])


# Image features


def test_image_features_of_another_width_are_refused(model):
    ids, features = prompt(2), model.get_image_features(random_pixels(2, 3, 56, 56))
    with pytest.raises(ValueError, match=r"visual tokens of width .* expected the same"):
        model(ids, image_features=torch.cat([features, features], -1))


def test_image_features_with_return_dict_match_transformers(model):
    pixels = random_pixels(3, 3, 56, 56)
    with torch.no_grad():
        features, tower = model.get_image_features(pixels), model.vision_model(pixels, output_hidden_states=True)
        for size in (2, 8):
            model.config.vision_batch_size = size
            output = model.get_image_features(pixels, return_dict=True)
            assert output.keys() == {"last_hidden_state", "pooler_output"}
            torch.testing.assert_close(output.pooler_output, features, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(output.last_hidden_state, tower.last_hidden_state, rtol=1e-5, atol=1e-5)
            states = model.get_image_features(pixels, output_hidden_states=True).hidden_states
            torch.testing.assert_close(states, tower.hidden_states, rtol=1e-5, atol=1e-5)
    model.config.vision_batch_size = 8


def test_internvl_names_are_available(release, model):
    loaded = SAILVLForConditionalGeneration.from_pretrained(release, use_flash_attn=False, load_in_8bit=False)
    assert loaded.num_image_token == 4 and loaded.config.downsample_ratio == 0.5
    pixels = random_pixels(2, 3, 56, 56)
    with torch.no_grad():
        assert torch.equal(model.extract_feature(pixels), model.get_image_features(pixels))
    config = SAILVLConfig.from_pretrained(release, downsample_ratio=0.25)
    assert (config.pixel_shuffle_factor, config.downsample_ratio, config.image_seq_length) == (4, 0.25, 1)


def test_use_flash_attn_selects_flash_attention_if_installed(release, monkeypatch):
    calls = []
    monkeypatch.setattr(
        PreTrainedModel, "from_pretrained", classmethod(lambda cls, path, **options: calls.append(options))
    )
    for installed in (True, False):
        monkeypatch.setattr(modeling_sailvl, "is_flash_attn_2_available", lambda found=installed: found)
        SAILVLForConditionalGeneration.from_pretrained(release, use_flash_attn=True)
    assert calls == [{"attn_implementation": "flash_attention_2"}, {}]


def test_micro_batches_equal_one_batch(model):
    pixels = random_pixels(7, 3, 56, 56)
    with torch.no_grad():
        full = model.get_image_features(pixels)
        for size in (1, 3, 7):
            model.config.vision_batch_size = size
            torch.testing.assert_close(model.get_image_features(pixels), full, rtol=1e-5, atol=1e-5)
    model.config.vision_batch_size = 8
    assert full.shape == (7, 4, 64)


def test_image_features_replace_pixel_values(model):
    ids, pixels = prompt(2), random_pixels(2, 3, 56, 56)
    with torch.no_grad():
        features = model.get_image_features(pixels)
        assert torch.equal(model(ids, image_features=features).logits, model(ids, pixels).logits)


SHOWN = torch.tensor([1, 2, 0, 1, 1])  # by prompts of two, two and one of three tiles


@pytest.mark.parametrize("kind", ["pixel_values", "image_features"])
def test_tiles_that_are_shown_several_times_are_encoded_once(model, kind):
    ids = torch.cat([prompt(2, 1), prompt(2, 2), prompt(1, 3)], 1)
    pixels, calls = random_pixels(3, 3, 56, 56), []
    tiles = {kind: pixels if kind == "pixel_values" else model.get_image_features(pixels)}
    hook = model.vision_model.register_forward_hook(lambda module, inputs, output: calls.append(output))
    with hook, torch.no_grad():
        shared = [part(ids, **tiles, tile_indices=SHOWN)[0] for part in (model, model.base_model)]
    assert sum(len(call.last_hidden_state) for call in calls) == (2 * 3 if kind == "pixel_values" else 0)
    with torch.no_grad():
        expected = [part(ids, pixels[SHOWN])[0] for part in (model, model.base_model)]
    torch.testing.assert_close(shared, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 2])
def test_questions_about_one_image_are_answered_together(model, beams):
    ids, pixels = torch.cat([prompt(2, 1), prompt(2, 2), prompt(2, 3)]), random_pixels(2, 3, 56, 56)
    settings = {"num_beams": beams, "do_sample": False, "max_new_tokens": 4, "eos_token_id": None}
    together = model.generate(ids, pixel_values=pixels, tile_indices=torch.tensor([0, 1] * 3), **settings)
    assert torch.equal(together, model.generate(ids, pixel_values=pixels.repeat(3, 1, 1, 1), **settings))


def test_wrong_tile_indices_are_an_error(model):
    ids, pixels = prompt(3), random_pixels(2, 3, 56, 56)
    wrong = {
        r"expected 0 to 1, got 0 to 2": torch.tensor([0, 1, 2]),
        r"expected 0 to 1, got -1 to 1": torch.tensor([0, 1, -1]),
        r"12 placeholders .* 8 visual tokens": torch.tensor([0, 1]),
        r"expected integers .* got torch.float32, shape \(3,\)": torch.zeros(3),
        r"expected integers .* got torch.int64, shape \(1, 3\)": torch.zeros(1, 3, dtype=torch.long),
    }
    for message, indices in wrong.items():
        with pytest.raises(ValueError, match=message):
            model(ids, pixels, tile_indices=indices)
    with pytest.raises(ValueError, match="tile_indices needs the tiles"):
        model(prompt(0), tile_indices=SHOWN)


VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14,
}  # fmt: skip
TOWERS = {
    "internvl_vision": InternVLVisionConfig(**VISION, image_size=[56, 56]),
    "siglip": SiglipVisionConfig(**VISION, image_size=56),
    "clip": CLIPVisionConfig(**VISION, image_size=56),
}
TEXTS = {
    "qwen2": Qwen2Config(**LANGUAGE),
    "qwen3": Qwen3Config(**LANGUAGE, head_dim=16),
    "llama": LlamaConfig(**LANGUAGE),
}


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("layer", [-1, -2, 0, 2])
def test_any_vision_encoder_works_and_its_class_token_is_dropped(tower, layer, tmp_path):
    config = SAILVLConfig(
        vision_config=TOWERS[tower].to_dict(), text_config=TEXTS["qwen2"], image_token_id=IMAGE, select_layer=layer
    )
    model = randomize(SAILVLForConditionalGeneration(config)).eval()
    pixels = random_pixels(2, 3, 56, 56)
    with torch.no_grad():
        output = model.vision_model(pixel_values=pixels)
        tokens = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
        tokens = tokens[:, -16:].reshape(2, 4, 4, 32)  # drop the class token
        squares = [tokens[:, row : row + 2, column : column + 2] for row in (0, 2) for column in (0, 2)]
        folded = torch.stack([square.reshape(2, 128) for square in squares], 1)
        torch.testing.assert_close(model.get_image_features(pixels), model.mlp1(folded))
    model.save_pretrained(tmp_path)
    again = SAILVLForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(again(prompt(2), pixels).logits, model(prompt(2), pixels).logits)


@pytest.mark.parametrize("text", TEXTS)
def test_any_language_model_works(text):
    config = SAILVLConfig(vision_config=SAILViTConfig(**{**VISION, "image_size": 56}), text_config=TEXTS[text])
    config.image_token_id = IMAGE
    model = SAILVLForConditionalGeneration(config).eval()
    assert type(model.language_model).__name__.lower() == f"{text}forcausallm"
    assert model(prompt(1), random_pixels(1, 3, 56, 56)).logits.shape == (1, 13, 384)


def test_attention_is_set_per_component(release):
    chosen = {"vision_config": "eager", "text_config": "sdpa"}
    model = SAILVLForConditionalGeneration.from_pretrained(release, attn_implementation=chosen, image_token_id=IMAGE)
    assert model.vision_model.config._attn_implementation == "eager"
    assert model.language_model.config._attn_implementation == "sdpa"
    model.set_attn_implementation({"vision_config": "sdpa", "text_config": "eager"})
    assert model.vision_model.config._attn_implementation == "sdpa"
    assert model.language_model.config._attn_implementation == "eager"


# Invalid input


@pytest.mark.parametrize(("placeholders", "tiles", "message"), [
    (4, 2, r"4 placeholders \(<IMG_CONTEXT>, id 309\) in the input, 8 visual tokens: expected 4 per tile"),
    (9, 2, "9 placeholders"),
    (4, 0, "4 placeholders .* 0 visual tokens"),
    (0, 1, "0 placeholders .* 4 visual tokens"),
])  # fmt: skip
def test_mismatched_placeholders_raise(model, placeholders, tiles, message):
    ids = torch.tensor([[1, 2, *[IMAGE] * placeholders, 3]])
    with pytest.raises(ValueError, match=message):
        model(ids, random_pixels(tiles, 3, 56, 56) if tiles else None)
    with pytest.raises(ValueError, match=message):
        model.generate(ids, pixel_values=random_pixels(tiles, 3, 56, 56) if tiles else None, max_new_tokens=2)


@pytest.mark.parametrize("shape", [(2, 3, 28, 28), (3, 56, 56), (1, 2, 3, 56, 56), (1, 4, 56, 56), (0, 3, 56, 56)])
def test_tiles_of_a_wrong_shape_raise(model, shape):
    with pytest.raises(ValueError, match=r"pixel_values must be a tensor of floats of shape \(tiles, 3, 56, 56\)"):
        model(prompt(1), torch.zeros(shape))


def test_images_without_image_token_id_raise(release):
    model = SAILVLForConditionalGeneration.from_pretrained(release)
    assert model.config.image_token_id is None
    with pytest.raises(ValueError, match=r"config\.image_token_id is None: set it to"):
        model(prompt(1), random_pixels(1, 3, 56, 56))


def test_input_ids_with_inputs_embeds_raise(model):
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="either pixel_values or image_features"):
        model(prompt(1), random_pixels(1, 3, 56, 56), image_features=torch.zeros(1, 4, 64))


def test_placeholders_are_checked_before_beam_expansion(model):
    with pytest.raises(ValueError, match=r"8 placeholders .* 4 visual tokens"):
        model.generate(prompt(2), pixel_values=random_pixels(1, 3, 56, 56), num_beams=2, max_new_tokens=2)


def test_a_checkpoint_of_another_model_raises(tmp_path):
    Qwen2Config(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected a SAIL-VL config.json, got model_type .qwen2."):
        SAILVLForConditionalGeneration.from_pretrained(tmp_path)


def test_a_corrupt_shard_raises_with_a_hint(tmp_path):
    release = write_release(tmp_path / "toy")
    shard = release / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"toy: a weight file is truncated or corrupt .*`sailvit inspect`"):
        SAILVLForConditionalGeneration.from_pretrained(release)


def test_a_missing_shard_is_named(tmp_path):
    release = write_release(tmp_path / "toy")
    (release / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors: the checkpoint is incomplete"):
        SAILVLForConditionalGeneration.from_pretrained(release)


# Training


def test_loss_ignores_visual_tokens_and_equals_the_language_models(model, reference):
    ids, pixels = prompt(2), random_pixels(2, 3, 56, 56)
    everywhere = model(ids, pixels, labels=ids.clone()).loss
    text_labels = ids.masked_fill(ids == IMAGE, -100)
    assert torch.equal(everywhere, model(ids, pixels, labels=text_labels).loss)
    logits = reference.logits(ids, pixels)[0, :-1]
    torch.testing.assert_close(everywhere, torch.nn.functional.cross_entropy(logits, text_labels[0, 1:]))
    count = (text_labels[0, 1:] != -100).sum()
    spread = model(ids, pixels, labels=ids, num_items_in_batch=2 * count).loss
    assert math.isclose(spread.item(), everywhere.item() / 2, rel_tol=1e-5)


def test_logits_to_keep_limits_the_logits(model):
    ids, pixels = prompt(1), random_pixels(1, 3, 56, 56)
    with torch.no_grad():
        last = model(ids, pixels, logits_to_keep=1).logits
        assert last.shape == (1, 1, 384)
        torch.testing.assert_close(last, model(ids, pixels).logits[:, -1:])
        assert isinstance(model(ids, pixels, return_dict=False), tuple)


def test_generate_computes_one_logit_position_per_step(model):
    """The logits of a whole prompt would cost more than the language model itself."""
    seen = []
    hook = model.language_model.lm_head.register_forward_hook(lambda *call: seen.append(call[2].shape[1]))
    model.generate(prompt(1), pixel_values=random_pixels(1, 3, 56, 56), max_new_tokens=3, min_new_tokens=3)
    hook.remove()
    assert seen == [1, 1, 1]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers renamed the method
def test_gradient_checkpointing_changes_nothing_and_every_parameter_gets_a_gradient(model):
    ids, pixels = prompt(2), random_pixels(2, 3, 56, 56)
    gradients = []
    for checkpointed in (False, True):
        trained = copy.deepcopy(model).train()
        if checkpointed:
            trained.gradient_checkpointing_enable({"use_reentrant": False})
        trained(ids, pixels, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in trained.named_parameters()})
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_lora_on_the_language_model_with_a_fully_trained_connector(model):
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(target_modules=".*language_model.*q_proj", modules_to_save=["mlp1"], r=2)
    adapted = peft.get_peft_model(copy.deepcopy(model).train(), options)
    ids, pixels = prompt(1), random_pixels(1, 3, 56, 56)
    adapted(input_ids=ids, pixel_values=pixels, labels=ids).loss.backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert any("mlp1" in name for name in trained) and all("mlp1" in name or "lora_" in name for name in trained)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("part", ["vision_model.*(qkv|fc1)", "language_model.*(q_proj|v_proj)"])
def test_lora_trains_only_its_component(model, part, tmp_path):
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(target_modules=f".*{part}", task_type="CAUSAL_LM", r=2)
    adapted = peft.get_peft_model(copy.deepcopy(model).train(), options)
    ids, pixels = prompt(1), random_pixels(1, 3, 56, 56)
    adapted(input_ids=ids, pixel_values=pixels, labels=ids).loss.backward()
    trained = [name for name, parameter in adapted.named_parameters() if parameter.grad is not None]
    assert trained and all("lora_" in name and part.split(".")[0] in name for name in trained)
    adapted.save_pretrained(tmp_path)
    merged = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).merge_and_unload()
    assert torch.equal(merged(ids, pixels).logits, model(ids, pixels).logits)  # a new adapter changes nothing


def test_embeddings_can_be_resized(model):
    resized = copy.deepcopy(model)
    resized.resize_token_embeddings(400)
    assert resized.config.text_config.vocab_size == 400
    with torch.no_grad():
        logits = resized(prompt(1), random_pixels(1, 3, 56, 56)).logits
    assert logits.shape[-1] == 400


# Compilation, quantization, device maps


@pytest.mark.nightly
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_gives_the_logits_of_eager(model, backend):
    ids, pixels = prompt(2), random_pixels(2, 3, 56, 56)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, pixels).logits, model(ids, pixels).logits, rtol=1e-4, atol=1e-4)
        if backend == "inductor":  # would abort
            return
        with pytest.raises(RuntimeError, match="another number of placeholders"):
            compiled(ids[:, 1:].clone().index_fill_(1, torch.tensor([5]), 7), pixels)


@pytest.mark.nightly
@pytest.mark.parametrize("images", [0, 1])
def test_generate_with_a_static_cache_compiles_without_a_graph_break(model, images):
    ids, pixels = prompt(images, 3), random_pixels(1, 3, 56, 56)
    settings = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None, "cache_implementation": "static"}
    compile_config = CompileConfig(fullgraph=True, mode="default")
    compile_config._compile_all_devices = True
    inputs = {"inputs": ids, **({"pixel_values": pixels} if images else {}), **settings}
    eager = copy.deepcopy(model).generate(**inputs)
    assert torch.equal(copy.deepcopy(model).generate(**inputs, compile_config=compile_config), eager)


@pytest.mark.slow
def test_int8_language_model_has_similar_logits(model):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    ids, pixels = prompt(2), random_pixels(2, 3, 56, 56)
    quantized = copy.deepcopy(model)
    quantize_(quantized.language_model, Int8WeightOnlyConfig(version=2))
    kinds = {type(module.weight).__name__ for module in quantized.language_model.model.layers[0].self_attn.children()
             if hasattr(module, "weight")}  # fmt: skip
    assert kinds == {"Int8Tensor"}
    with torch.no_grad():
        difference = relative_difference(quantized(ids, pixels).logits, model(ids, pixels).logits)
    assert 0 < difference < 0.05
    assert (
        quantized.generate(ids, pixel_values=pixels, max_new_tokens=3, eos_token_id=None).shape[1] == ids.shape[1] + 3
    )


def test_device_map_spreads_the_model_over_devices_and_disk(release, model, tmp_path):
    size = sum(parameter.nbytes for parameter in model.parameters())
    spread = SAILVLForConditionalGeneration.from_pretrained(
        release,
        dtype=torch.float32,
        device_map="auto",
        max_memory={"cpu": int(size * 0.6)},
        offload_folder=tmp_path,
        image_token_id=IMAGE,
    ).eval()
    assert {"cpu", "disk"} == set(map(str, spread.hf_device_map.values()))
    ids, pixels = prompt(2), random_pixels(2, 3, 56, 56)
    with torch.no_grad():
        torch.testing.assert_close(spread(ids, pixels).logits, model(ids, pixels).logits)


def test_a_disk_offloaded_vision_encoder_runs_in_micro_batches(release, model, tmp_path):
    places = {"vision_model": "disk", "mlp1": "cpu", "language_model": "cpu"}
    options = {"dtype": torch.float32, "device_map": places, "offload_folder": tmp_path, "image_token_id": IMAGE}
    spread = SAILVLForConditionalGeneration.from_pretrained(release, **options).eval()
    ids, pixels = prompt(2), random_pixels(2, 3, 56, 56)
    with torch.no_grad():
        torch.testing.assert_close(spread(ids, pixels).logits, model(ids, pixels).logits)


def test_auto_model_for_causal_lm_loads_it(release):
    config = SAILVLConfig.from_pretrained(release)
    assert type(AutoModelForCausalLM.from_config(config)) is SAILVLForConditionalGeneration
