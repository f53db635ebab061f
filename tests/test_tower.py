"""Vision encoder: one test per capability; numbers are compared with transformers and timm."""

import copy
import inspect
import math
from pathlib import Path

import pytest
import torch
from conftest import TINY, random_pixels, randomize, relative_difference
from safetensors.torch import load_file
from torch import nn

from sailvit import SAILViTBackbone, SAILViTConfig, SAILViTForImageClassification, SAILViTModel, pixel_shuffle
from sailvit.modeling_sailvit import sincos_position_embeddings


def make(cls: type = SAILViTModel, seed: int = 0, **overrides):
    return randomize(cls(SAILViTConfig(**{**TINY, **overrides})), seed).eval()


# Numbers


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("pos_embed_type", ["absolute", "sincos"])
def test_equals_transformers_native_model(pixels, implementation, pos_embed_type):
    from twins import native_twin

    tower = make(pos_embed_type=pos_embed_type)
    twin = native_twin(tower, implementation)
    tower.set_attn_implementation(implementation)
    ours, theirs = tower(pixels, output_hidden_states=True), twin(pixels, output_hidden_states=True)
    assert relative_difference(ours.last_hidden_state, theirs.last_hidden_state) < 2e-6
    for mine, other in zip(ours.hidden_states[:-1], theirs.hidden_states[:-1], strict=True):
        assert relative_difference(mine, other) < 2e-6


def test_equals_timm(tower, pixels):
    pytest.importorskip("timm")
    from twins import timm_tokens, timm_twin

    assert relative_difference(tower(pixels).last_hidden_state, timm_tokens(timm_twin(tower), pixels)) < 2e-6


def test_interpolated_positions_equal_timm(tower):
    pytest.importorskip("timm")
    from twins import timm_tokens, timm_twin

    twin = timm_twin(tower, dynamic_img_size=True)
    for height, width in [(56, 84), (112, 28), (14, 14), (70, 70)]:
        pixel_values = random_pixels(1, 3, height, width)
        ours = tower(pixel_values, interpolate_pos_encoding=True).last_hidden_state
        assert relative_difference(ours, timm_tokens(twin, pixel_values)) < 2e-6


SMALLER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


def test_reference_tensor_is_unchanged():
    """Checks the numbers where transformers and timm lack the model."""
    reference = load_file(Path(__file__).parent / "data" / "tiny_tower.safetensors")
    tower = SAILViTModel(SAILViTConfig(**{**TINY, **SMALLER})).eval()
    tower.load_state_dict({k.removeprefix("weight."): v for k, v in reference.items() if k.startswith("weight.")})
    output = tower(reference["pixel_values"])
    torch.testing.assert_close(output.last_hidden_state, reference["last_hidden_state"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.pooler_output, reference["pooler_output"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        tower.get_image_features(reference["pixel_values"]), reference["image_features"], rtol=1e-5, atol=1e-5
    )


def test_bfloat16_error_is_no_larger_than_the_native_models(pixels):
    from twins import native_twin

    tower = make(hidden_size=256, intermediate_size=512)
    truth = tower(pixels).last_hidden_state
    half = copy.deepcopy(tower).to(torch.bfloat16)
    ours = relative_difference(half(pixels).last_hidden_state, truth)
    native = relative_difference(native_twin(half)(pixels.bfloat16()).last_hidden_state, truth)
    assert ours <= native * 1.05


def test_sincos_positions_equal_the_formula():
    positions = sincos_position_embeddings((3, 5), 16)[0]
    assert positions.shape == (15, 16)
    for row, column, channel in [(0, 0, 0), (2, 4, 3), (1, 3, 6), (2, 1, 9), (1, 4, 15)]:
        at = column if channel < 8 else row
        angle = at / 10000 ** ((channel % 4) / 4)
        expected = math.sin(angle) if channel % 8 < 4 else math.cos(angle)
        assert positions[row * 5 + column, channel].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.nightly
@pytest.mark.parametrize("size", ["large", "huge"])
def test_full_width_equals_native_and_timm(size):
    pytest.importorskip("timm")
    from twins import native_twin, timm_tokens, timm_twin

    torch.manual_seed(0)
    tower = SAILViTModel(SAILViTConfig.from_size(size, num_hidden_layers=24 if size == "large" else 8)).eval()
    pixel_values = random_pixels(1, 3, 448, 448)
    native, timm_model = native_twin(tower), timm_twin(tower)
    with torch.inference_mode():
        theirs = native(pixel_values).last_hidden_state
        assert relative_difference(timm_tokens(timm_model, pixel_values), theirs) < 2e-5
        for implementation in ("eager", "sdpa"):
            tower.set_attn_implementation(implementation)
            assert relative_difference(tower(pixel_values).last_hidden_state, theirs) < 2e-5
        pixel_values = pixel_values.bfloat16()
        ours = relative_difference(tower.bfloat16()(pixel_values).last_hidden_state, theirs)
        assert ours <= 1.05 * relative_difference(native.bfloat16()(pixel_values).last_hidden_state, theirs)


# Shapes


@pytest.mark.parametrize(("grid", "factor"), [((4, 6), 2), ((6, 3), 3), ((2, 4), 1), ((8, 4), 4)])
def test_pixel_shuffle_works_for_any_grid_and_factor(grid, factor):
    rows, columns = grid
    tokens = torch.arange(2 * rows * columns * 5.0).reshape(2, rows * columns, 5)
    folded = pixel_shuffle(tokens, grid, factor)
    image, expected = tokens.reshape(2, rows, columns, 5), []
    for row in range(0, rows, factor):
        for column in range(0, columns, factor):
            expected.append(image[:, row : row + factor, column : column + factor].reshape(2, -1))
    assert torch.equal(folded, torch.stack(expected, dim=1))


@pytest.mark.parametrize(
    ("count", "grid", "factor"), [(12, (4, 4), 2), (12, (3, 4), 2), (12, (4, 3), 2), (4, (2, 2), 0)]
)
def test_pixel_shuffle_raises_for_mismatched_grids(count, grid, factor):
    with pytest.raises(ValueError, match="grid of"):
        pixel_shuffle(torch.zeros(1, count, 8), grid, factor)


def test_image_features_are_pixel_shuffled_tokens(tower, pixels):
    features = tower.get_image_features(pixels)
    assert features.shape == (2, 4, 256)
    assert torch.equal(features, pixel_shuffle(tower(pixels).last_hidden_state, (4, 4), 2))


def test_image_features_with_return_dict_match_transformers(tower, pixels):
    features, expected = tower.get_image_features(pixels), tower(pixels, output_hidden_states=True)
    output = tower.get_image_features(pixels, return_dict=True)
    assert torch.equal(output.pooler_output, features) and output.hidden_states is None
    assert torch.equal(output.last_hidden_state, expected.last_hidden_state)
    with_states = tower.get_image_features(pixels, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(with_states.hidden_states, expected.hidden_states)
    assert len(with_states.attentions) == 3


def test_hidden_states_are_the_embeddings_and_every_block(tower, pixels):
    output = tower(pixels, output_hidden_states=True)
    assert len(output.hidden_states) == 4
    assert torch.equal(output.hidden_states[0], tower.preprocessor(pixels))
    assert torch.equal(tower.trunk.post_trunk_norm(output.hidden_states[-1]), output.last_hidden_state)
    assert torch.equal(output.pooler_output, output.last_hidden_state.mean(1))


def test_attentions_sum_to_one_for_every_implementation(tower, pixels):
    tower.set_attn_implementation("sdpa")
    output = tower(pixels, output_attentions=True)
    assert [weights.shape for weights in output.attentions] == [(2, 2, 16, 16)] * 3
    torch.testing.assert_close(output.attentions[1].sum(-1), torch.ones(2, 2, 16))
    torch.testing.assert_close(output.last_hidden_state, tower(pixels).last_hidden_state, rtol=1e-4, atol=1e-5)


def test_return_dict_false_gives_a_tuple(tower, pixels):
    tokens, pooled = tower(pixels, return_dict=False)
    assert torch.equal(tokens.mean(1), pooled)


def test_height_and_width_may_differ_with_interpolation(tower):
    pixel_values = random_pixels(1, 3, 28, 84)
    assert tower(pixel_values, interpolate_pos_encoding=True).last_hidden_state.shape == (1, 12, 64)
    assert tower.get_image_features(pixel_values, interpolate_pos_encoding=True).shape == (1, 3, 256)
    with pytest.raises(ValueError, match=r"56 x 56.*interpolate_pos_encoding=True"):
        tower(pixel_values)


def test_interpolation_to_the_same_grid_changes_nothing(tower, pixels):
    assert torch.equal(tower(pixels, interpolate_pos_encoding=True).last_hidden_state, tower(pixels).last_hidden_state)


def test_sincos_positions_fit_any_grid():
    assert make(pos_embed_type="sincos")(random_pixels(1, 3, 28, 70)).last_hidden_state.shape == (1, 10, 64)


@pytest.mark.parametrize(
    ("pixel_values", "message"),
    [
        (torch.zeros(1, 3, 50, 56), "resize to 56 x 56"),
        (torch.zeros(1, 3, 5, 33), "resize to 14 x 28"),
        (torch.zeros(1, 3, 0, 56), r"\(1, 3, 0, 56\)"),
        (torch.zeros(1, 4, 56, 56), r"\(tiles, 3, height, width\)"),
        (torch.zeros(0, 3, 56, 56), r"\(0, 3, 56, 56\)"),
        (torch.zeros(3, 56, 56), r"\(tiles, 3, height, width\)"),
        (torch.zeros(1, 3, 56, 56, dtype=torch.uint8), "floats"),
    ],
)
def test_invalid_pixel_values_raise_with_a_hint(tower, pixel_values, message):
    with pytest.raises(ValueError, match=message):
        tower(pixel_values)


# Dtypes, devices, compilation


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_runs_in_every_float_dtype_and_casts_the_pixels(tower, pixels, dtype):
    output = tower.to(dtype)(pixels).last_hidden_state
    assert output.dtype == dtype and output.isfinite().all()


def test_autocast_keeps_norms_and_the_residual_stream_in_float32(tower, pixels):
    with torch.autocast("cpu", torch.bfloat16):
        output = tower(pixels, output_hidden_states=True)
    assert {states.dtype for states in output.hidden_states} == {torch.float32}
    assert relative_difference(output.last_hidden_state, tower(pixels).last_hidden_state) < 2e-2


def test_meta_device_initialization_allocates_nothing():
    with torch.device("meta"):
        tower = SAILViTModel(SAILViTConfig.from_size("3b"))
    assert all(parameter.is_meta for parameter in tower.parameters())
    assert tower.num_parameters() == pytest.approx(2.7e9, rel=0.05)


def test_no_buffers_that_meta_loading_could_leave_empty(tower):
    assert not list(tower.buffers())


@pytest.mark.slow
@pytest.mark.parametrize("features", [False, True])
def test_compiles_as_one_graph(tower, pixels, features):
    function = tower.get_image_features if features else lambda pixel_values: tower(pixel_values).last_hidden_state
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(function, fullgraph=True)(pixels), function(pixels), rtol=1e-4, atol=1e-4
        )


@pytest.mark.slow
def test_image_features_use_a_model_compiled_in_place(tower, pixels):
    from torch._dynamo.testing import CompileCounter

    counter, expected = CompileCounter(), tower.get_image_features(pixels)
    tower.compile(backend=counter, fullgraph=True)
    torch.testing.assert_close(tower.get_image_features(pixels), expected)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_flex_attention_equals_eager(tower, pixels):
    eager = tower(pixels).last_hidden_state
    tower.set_attn_implementation("flex_attention")
    with torch.no_grad():
        assert relative_difference(tower(pixels).last_hidden_state, eager) < 1e-4


def test_a_registered_attention_function_is_called(tower, pixels):
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    calls = []

    def counted(*args, **kwargs):
        calls.append(args[0])
        return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register("counted", counted)
    expected = tower(pixels).last_hidden_state
    tower.set_attn_implementation("counted")
    assert torch.equal(tower(pixels).last_hidden_state, expected) and len(calls) == 3


# Training


@pytest.mark.parametrize("pos_embed_type", ["absolute", "sincos"])
@pytest.mark.parametrize("cls", [SAILViTModel, SAILViTBackbone, SAILViTForImageClassification])
def test_every_parameter_gets_a_gradient(cls, pos_embed_type, pixels):
    model = make(cls, pos_embed_type=pos_embed_type, qkv_bias=True, use_bias=True).train()
    output = model(pixels)
    output = output.feature_maps[-1] if cls is SAILViTBackbone else output[0]
    output.square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(pixels, reentrant):
    gradients, counts = [], []
    for checkpointing in (False, True):
        tower = make().train()
        calls = []
        tower.trunk.blocks[1].attn.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        if checkpointing:
            enable = "activation_checkpointing_enable"  # its name since transformers 5.2x
            if not hasattr(tower, enable):
                enable = "gradient_checkpointing_enable"
            getattr(tower, enable)({"use_reentrant": reentrant})
        tower(pixels.clone().requires_grad_()).last_hidden_state.square().sum().backward()
        gradients.append([parameter.grad for parameter in tower.parameters()])
        counts.append(len(calls))
    assert counts == [1, 2]
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_gradient_checkpointing_of_every_second_block():
    tower = make()
    enable = getattr(tower, "activation_checkpointing_enable", None)
    if enable is None or "every_n_layers" not in inspect.signature(enable).parameters:
        pytest.skip("this transformers checkpoints every block")
    enable(every_n_layers=2)
    assert [block.gradient_checkpointing for block in tower.trunk.blocks] == [True, False, True]


def test_dropout_is_active_only_in_training(pixels):
    tower = make(attention_dropout=0.3, projection_dropout=0.3)
    assert torch.equal(tower(pixels).last_hidden_state, tower(pixels).last_hidden_state)
    tower.train()
    assert not torch.equal(tower(pixels).last_hidden_state, tower(pixels).last_hidden_state)


def test_new_weights_follow_the_initializer_range():
    tower = SAILViTModel(SAILViTConfig(**TINY, initializer_range=0.05))
    for name, parameter in tower.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all()
        elif name.endswith("bias"):
            assert (parameter == 0).all()
        else:
            assert parameter.std().item() == pytest.approx(0.05, rel=0.15), name


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft calls it
def test_lora_on_qkv_trains_only_its_adapters(tower, pixels):
    peft = pytest.importorskip("peft")
    expected = tower(pixels).last_hidden_state
    model = peft.get_peft_model(tower, peft.LoraConfig(target_modules=["attn.qkv"], r=4))
    assert torch.equal(model(pixel_values=pixels).last_hidden_state, expected)
    model(pixel_values=pixels).last_hidden_state.sum().backward()
    trained = {name.split(".")[-3] for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"lora_B", "lora_A"}


# Backbone and classifier


def test_backbone_returns_maps_of_the_chosen_blocks(tower, pixels):
    config = SAILViTConfig(**TINY, out_features=["stem", "stage2", "stage3"])
    backbone = SAILViTBackbone(config).eval()
    backbone.load_state_dict(tower.state_dict())
    maps = backbone(pixels).feature_maps
    assert [tuple(feature_map.shape) for feature_map in maps] == [(2, 64, 4, 4)] * 3
    assert backbone.channels == [64, 64, 64]
    assert torch.equal(maps[-1].flatten(2).transpose(1, 2), tower(pixels).last_hidden_state)


def test_backbone_maps_keep_the_shape_of_the_image():
    backbone = make(SAILViTBackbone, out_indices=[1, 3])
    batch = {
        "pixel_values": random_pixels(1, 3, 28, 84),
        "num_tiles": torch.tensor([1]),
    }  # from the processor
    maps = backbone(**batch, interpolate_pos_encoding=True).feature_maps
    assert [tuple(feature_map.shape) for feature_map in maps] == [(1, 64, 2, 6)] * 2


def test_classifier_is_a_two_layer_mlp_on_the_mean_token(pixels):
    model = make(SAILViTForImageClassification, num_labels=5)
    pooled = model.vision_model(pixels).pooler_output
    head = model.classifier
    expected = head.fc2(nn.functional.gelu(head.fc1(pooled)))
    output = model(pixels, labels=torch.tensor([1, 4]))
    assert torch.equal(output.logits, expected)
    assert output.loss.item() == pytest.approx(nn.functional.cross_entropy(expected, torch.tensor([1, 4])).item())


def test_classifier_averages_the_tiles_of_an_image():
    model = make(SAILViTForImageClassification, num_labels=5)
    pixel_values = random_pixels(5, 3, 56, 56)
    output = model(pixel_values, num_tiles=torch.tensor([2, 3]), labels=torch.tensor([0, 1]))
    pooled = model.vision_model(pixel_values).pooler_output
    expected = model.classifier(torch.stack([pooled[:2].mean(0), pooled[2:].mean(0)]))
    torch.testing.assert_close(output.logits, expected)
    for counts in ([2, 2], [5, 0], [6, -1]):
        with pytest.raises(ValueError, match=r"add up to the 5 tiles in pixel_values"):
            model(pixel_values, num_tiles=torch.tensor(counts))


# Config


def test_published_sizes_have_the_published_parameter_counts():
    published = {"large": 0.31, "huge": 0.68, "1b": 1.23, "3b": 2.72}  # billions, arXiv 2411.14402
    for size, billions in published.items():
        with torch.device("meta"):
            model = SAILViTModel(SAILViTConfig.from_size(size))
        assert model.num_parameters() / 1e9 == pytest.approx(billions, rel=0.05), size
    for size in ("tiny", None):
        with pytest.raises(ValueError, match="base, large, huge, 1b, 3b"):
            SAILViTConfig.from_size(size)
    with pytest.raises(TypeError, match="no field hiden_size"):
        SAILViTConfig.from_size("base", hiden_size=3)
    assert SAILViTConfig.from_size("base", num_labels=3, attn_implementation="eager").num_labels == 3


def test_root_config_is_large():
    from conftest import ROOT

    config = SAILViTConfig.from_pretrained(ROOT)
    large = SAILViTConfig.from_size("large").to_dict()
    ours = config.to_dict()
    assert {key: ours[key] for key in large if key not in UNSHARED} == {k: large[k] for k in large if k not in UNSHARED}
    assert set(ours["auto_map"]) == set(large["auto_map"])


UNSHARED = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}


def test_an_unknown_activation_raises():
    with pytest.raises(ValueError, match="hidden_act 'nope'"):
        make(hidden_act="nope")


def test_the_default_feature_map_is_the_last_loaded_block(tmp_path):
    SAILViTConfig(**TINY).save_pretrained(tmp_path)
    config = SAILViTConfig.from_pretrained(tmp_path, num_hidden_layers=2)
    assert SAILViTBackbone(config).out_features == ["stage2"]
    SAILViTConfig(**TINY, out_indices=[1, 2]).save_pretrained(tmp_path)
    assert SAILViTConfig.from_pretrained(tmp_path).out_features == ["stage1", "stage2"]
    assert SAILViTConfig.from_pretrained(tmp_path, out_indices=[0]).out_features == ["stem"]
    with pytest.raises(ValueError, match="patch_size 15"):
        SAILViTConfig.from_pretrained(tmp_path, patch_size=15)


def test_config_without_arguments_and_its_repr_work():
    assert "SAILViTConfig" in repr(SAILViTConfig()) and SAILViTConfig().grid_size == 32
    assert SAILViTConfig(rms_norm_eps=1.0).rms_norm_eps == 1.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 65),
        ("patch_size", 15),
        ("num_hidden_layers", 0),
        ("pos_embed_type", "rope"),
        ("pixel_shuffle_factor", 1.5),
        ("attention_dropout", 1.0),
        ("out_features", ["stage9"]),
        ("out_indices", 3),
        ("out_features", []),
        ("rms_norm_eps", -1.0),
        ("qkv_bias", "yes"),
        ("projection_dropout", None),
    ],
)
def test_invalid_config_fields_raise(field, value):
    with pytest.raises(ValueError, match=field):
        SAILViTConfig(**{**TINY, field: value})
