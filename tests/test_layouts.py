"""The tables of names, against the models whose names they are, and against names that are no tower's."""

import re
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from conftest import TINY, TINY_SHAPE, make_checkpoint, randomize, relative_difference
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from sailvit import SAILViTConfig, SAILViTForImageClassification, SAILViTModel
from sailvit.configuration_sailvit import SIZES
from sailvit.convert import LAYOUTS, CheckpointError, convert_tensors
from sailvit.convert.export.runtimes import SIZE_NAMES, timm_config, transformers_config
from sailvit.convert.models.aimv2_config import MLP_WIDTHS
from sailvit.convert.models.aimv2_names import AIMV2, AIMv2Dimensions, plan_layout
from sailvit.convert.models.name_tables import match_names, tensor_specs
from sailvit.convert.synthetic import published_shape


def random_tensors(layout: str, shape: AIMv2Dimensions, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """One for every name of a layout, told apart by their values."""
    generator = torch.Generator().manual_seed(0)
    target = LAYOUTS[layout]
    return {
        target.prefix + piece.name: torch.randn(piece.shape, generator=generator).to(dtype)
        for piece in tensor_specs(target, shape)
    }


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        same = ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape
        assert same and (ours[name].data_ptr() == tensor.data_ptr() or torch.equal(ours[name], tensor)), name


# The tables


def test_the_sizes_are_those_of_the_configuration():
    assert {SIZE_NAMES[size["hidden_size"]]: MLP_WIDTHS[size["hidden_size"]] for size in SIZES.values()} == {
        name: size["intermediate_size"] for name, size in SIZES.items()
    }
    for name, size in SIZES.items():
        shape = published_shape(name)
        assert {key: getattr(shape, key, value) for key, value in size.items()} == size


@pytest.mark.parametrize("grid_size", [4, None])
@pytest.mark.parametrize("biases", [(False, False), (True, False), (True, True)])
def test_released_names_are_those_of_the_model(grid_size, biases):
    shape = replace(TINY_SHAPE, grid_size=grid_size, qkv_bias=biases[0], use_bias=biases[1])
    kind = "absolute" if grid_size else "sincos"
    model = SAILViTModel(SAILViTConfig(**TINY, pos_embed_type=kind, qkv_bias=biases[0], use_bias=biases[1]))
    ours = {piece.name: piece.shape for piece in tensor_specs(LAYOUTS["sailvit"], shape)}
    assert ours == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("grid_size", [4, None])
@pytest.mark.parametrize("bias", [False, True])
def test_transformers_names_are_those_of_its_model(grid_size, bias):
    from transformers import Aimv2VisionConfig, Aimv2VisionModel

    shape = replace(TINY_SHAPE, grid_size=grid_size, qkv_bias=bias, use_bias=bias)
    fields = {**TINY, "qkv_bias": bias, "use_bias": bias, "pos_embed_type": "absolute" if grid_size else "sincos"}
    model = Aimv2VisionModel(Aimv2VisionConfig(**transformers_config(fields)))
    ours = {piece.name: piece.shape for piece in tensor_specs(LAYOUTS["transformers"], shape)}
    assert ours == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_ovis2_names_are_those_of_transformers_full_model():
    from transformers import Ovis2Config, Ovis2ForConditionalGeneration

    vision = {**transformers_config({**TINY, "use_bias": False, "pos_embed_type": "absolute"}), "vocab_size": 40}
    text = {"model_type": "qwen2", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 64}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    for key in ("model_type", "architectures", "is_native", "use_head"):
        vision.pop(key)
    model = Ovis2ForConditionalGeneration(Ovis2Config(vision_config=vision, text_config=text, hidden_size=16))
    layout = LAYOUTS["ovis2-transformers"]
    found = match_names(model.state_dict(), AIMV2)
    assert found.scheme is layout and found.prefix == layout.prefix and not found.unmapped
    assert set(found.names) == {piece.name for piece in tensor_specs(layout, TINY_SHAPE)}
    converted = convert_tensors(model.state_dict(), "sailvit")
    SAILViTModel(SAILViTConfig(**TINY)).load_state_dict(converted, strict=True)


def test_apples_names_go_to_timms_as_timm_itself_takes_them():
    timm = pytest.importorskip("timm")
    from timm.models.vision_transformer import checkpoint_filter_fn

    fields = {**TINY, "num_channels": 3, "patch_size": 14, "qkv_bias": False, "use_bias": False}
    config = timm_config(fields)
    model = timm.create_model(config["architecture"], num_classes=0, **config["model_args"])
    apple = random_tensors("sailvit", TINY_SHAPE)
    assert_same(convert_tensors(apple, "timm"), checkpoint_filter_fn(apple, model))
    assert set(convert_tensors(apple, "timm")) == set(model.state_dict())


@pytest.mark.parametrize(("source", "target"), list(permutations(LAYOUTS, 2)))
@settings(max_examples=8, deadline=None)
@given(
    width=st.integers(1, 4).map(lambda heads: 4 * heads),
    mlp=st.integers(1, 24),
    blocks=st.integers(0, 11),
    patch=st.integers(1, 4),
    grid=st.none() | st.integers(1, 5),
    biases=st.tuples(st.booleans(), st.booleans()),
)
def test_every_pair_of_layouts_round_trips(source, target, width, mlp, blocks, patch, grid, biases):
    if not (LAYOUTS[source].has_sincos and LAYOUTS[target].has_sincos):
        grid = grid or 1
    shape = AIMv2Dimensions(width, mlp, blocks, 3, patch, grid, *(biases if blocks else (False, False)))
    tensors = random_tensors(source, shape)
    there = convert_tensors(tensors, target)
    assert set(there) == set(random_tensors(target, shape))
    assert_same(convert_tensors(there, source), tensors)


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("size", "blocks"), [("base", 12), ("large", 24), ("huge", 24), ("1b", 24), ("3b", 4)])
def test_every_pair_of_layouts_round_trips_at_published_shapes(size, blocks, dtype):
    shape = published_shape(size, blocks=blocks)
    for source in LAYOUTS:
        tensors = counted_tensors(source, shape, dtype)
        for target in LAYOUTS:
            back = convert_tensors(convert_tensors(tensors, target), source)
            assert back.keys() == tensors.keys()
            for name, tensor in tensors.items():
                ours, theirs = back[name].view(torch.int16), tensor.view(torch.int16)
                assert ours.data_ptr() == theirs.data_ptr() or torch.equal(ours, theirs), name


def counted_tensors(layout: str, shape: AIMv2Dimensions, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every bit pattern there is, NaN too, from another one on in every tensor."""
    tensors = {}
    for piece in tensor_specs(LAYOUTS[layout], shape):
        tensor = torch.empty(piece.shape, dtype=dtype)
        numbers = tensor.view(torch.int16).reshape(-1)
        torch.arange(len(tensors), len(tensors) + len(numbers), dtype=torch.int16, out=numbers)
        tensors[LAYOUTS[layout].prefix + piece.name] = tensor
    return tensors


def test_a_plan_takes_every_element_once():
    for source, target in permutations(LAYOUTS.values(), 2):
        taken: dict[str, list[tuple[int, int]]] = {}
        for move in plan_layout(source, target, TINY_SHAPE, TINY_SHAPE.grid_size):
            for name, start, stop in move.sources:
                taken.setdefault(name, []).append((start, stop))
        for piece in tensor_specs(source, TINY_SHAPE):
            runs = sorted(taken[piece.name])
            assert [start for start, _ in runs] == [0, *(stop for _, stop in runs[:-1])]
            assert runs[-1][1] == sum(stop - start for start, stop in piece.intervals)


# Recognition


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grid_size", [4, None])
def test_layouts_are_recognised_with_a_reason(layout, grid_size):
    names = random_tensors(layout, replace(TINY_SHAPE, grid_size=grid_size))
    found = match_names(names, AIMV2)
    assert found.scheme.name == layout and found.prefix == LAYOUTS[layout].prefix
    assert found.reason.startswith(f"{len(names)} of {len(names)} names") and LAYOUTS[layout].title in found.reason
    assert len(found.names) == len(names) and not (found.unmapped or found.dropped or found.others)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prefix", ["", "vision_model.", "model.", "a.b.c.", "student.backbone.model."])
def test_any_prefix_is_taken(layout, prefix):
    bare = {
        name.removeprefix(LAYOUTS[layout].prefix): tensor for name, tensor in random_tensors(layout, TINY_SHAPE).items()
    }
    tensors = {prefix + name: tensor for name, tensor in bare.items()}
    tensors |= {"language_model.lm_head.weight": torch.ones(2), "mlp1.0.weight": torch.ones(2)} if prefix else {}
    found = match_names(tensors, AIMV2)
    assert found.prefix == prefix and found.names == {name: prefix + name for name in bare}
    assert found.others == ({"language_model": 1, "mlp1": 1} if prefix else {})


def test_names_that_wrappers_left_are_cleaned():
    model = randomize(SAILViTModel(SAILViTConfig(**TINY)))
    expected = model.state_dict()
    whole = torch.compile(model)
    assert any(name.startswith("_orig_mod.") for name in whole.state_dict())
    assert_same(convert_tensors(whole.state_dict(), "sailvit"), expected)
    assert match_names(whole.state_dict(), AIMV2).wrappers == ["_orig_mod"]
    for index, block in enumerate(model.trunk.blocks):
        model.trunk.blocks[index] = torch.compile(block)
    holder = nn.ModuleDict({"vision_model": nn.ModuleDict({"module": model})})
    assert_same(convert_tensors(holder.state_dict(), "sailvit"), expected)


def test_checkpointing_wrappers_are_cleaned():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = randomize(SAILViTModel(SAILViTConfig(**TINY)))
    expected = model.state_dict()
    model.trunk.blocks[1] = checkpoint_wrapper(model.trunk.blocks[1])
    names = {name for name, _ in model.named_parameters()}
    assert any("_checkpoint_wrapped_module" in name for name in names)
    assert set(match_names(names, AIMV2).names) == set(expected)


def test_a_full_lit_model_of_transformers_gives_its_image_tower():
    from transformers import Aimv2Config, Aimv2Model

    vision = transformers_config({**TINY, "use_bias": False, "pos_embed_type": "absolute"})
    vision = {key: value for key, value in vision.items() if key != "architectures"} | {"use_head": True}
    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "vocab_size": 9,
    }
    model = Aimv2Model(Aimv2Config(vision_config=vision, text_config=text))
    found = match_names(model.state_dict(), AIMV2)
    assert found.scheme.name == "transformers" and found.prefix == "vision_model."
    assert {name.split(".")[2] for name in found.dropped} == {"cls_token", "k_proj", "v_proj", "output_proj"}
    assert set(found.others) == {"text_model", "visual_projection", "text_projection", "logit_scale"}
    pixels = torch.randn(1, 3, 56, 56)
    tower = SAILViTModel(SAILViTConfig(**TINY))
    tower.load_state_dict(convert_tensors(model.state_dict(), "sailvit"), strict=True)
    theirs = model.vision_model.eval()(pixels).last_hidden_state
    assert relative_difference(tower.eval()(pixels).last_hidden_state, theirs) < 2e-6


def test_apples_lit_gives_its_image_tower():
    tensors = random_tensors("lit", TINY_SHAPE)
    text = random_tensors("sailvit", replace(TINY_SHAPE, num_hidden_layers=4, grid_size=None))
    tensors |= {f"text_encoder.{name}": tensor for name, tensor in text.items() if name.startswith("trunk.")}
    others = ("text_encoder.preprocessor.text_embedding.weight", "image_projector.weight", "log_logit_scale")
    tensors |= {
        name: torch.ones(2) for name in (*others, "image_encoder.head.cls_token", "image_encoder.head.k.weight")
    }
    found = match_names(tensors, AIMV2)
    assert found.scheme.name == "lit" and len(found.dropped) == 2
    assert set(found.others) == {"text_encoder", "image_projector", "log_logit_scale"}


def test_a_classifier_gives_its_tower():
    model = randomize(SAILViTForImageClassification(SAILViTConfig(**TINY)))
    assert_same(convert_tensors(model.state_dict(), "sailvit"), model.vision_model.state_dict())


def test_two_towers_are_ambiguous_until_one_is_chosen():
    tensors = random_tensors("sailvit", TINY_SHAPE)
    both = {f"{side}.{name}": tensor for side in ("student", "teacher") for name, tensor in tensors.items()}
    with pytest.raises(CheckpointError, match=r"more than one AIMv2 encoder.*student\..*teacher\..*--prefix"):
        match_names(both, AIMV2)
    assert match_names(both, AIMV2, prefix="teacher.").prefix == "teacher."
    with pytest.raises(CheckpointError, match=r"no AIMv2 encoder under the prefix 'nobody\.'"):
        match_names(both, AIMV2, prefix="nobody.")


def test_two_names_for_one_are_an_error():
    tensors = random_tensors("sailvit", TINY_SHAPE)
    tensors["module.trunk.post_trunk_norm.weight"] = torch.ones(64)
    with pytest.raises(CheckpointError, match=r"module\.trunk\.post_trunk_norm\.weight and trunk\.post_trunk_norm"):
        convert_tensors(tensors, "timm")


@pytest.mark.parametrize("name", ["trunk.blocks.0.attn.q_norm.weight", "cls_token", "trunk.blocks.0.norm_1.bias"])
def test_a_name_that_maps_nowhere_is_an_error(name):
    with pytest.raises(CheckpointError, match=re.escape(name) + ".*has no mapping"):
        convert_tensors({**random_tensors("sailvit", TINY_SHAPE), name: torch.ones(64)}, "timm")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks by the old name
def test_an_adapter_has_to_be_merged_first():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(SAILViTModel(SAILViTConfig(**TINY)), LoraConfig(target_modules=["qkv"]))
    with pytest.raises(CheckpointError, match="merge it first"):
        convert_tensors(model.state_dict(), "sailvit")
    merged = model.merge_and_unload().state_dict()
    assert set(convert_tensors(merged, "sailvit")) == {
        piece.name for piece in tensor_specs(LAYOUTS["sailvit"], TINY_SHAPE)
    }


def other_architectures():
    from transformers import (
        Dinov2Config,
        Dinov2Model,
        Qwen2Config,
        Qwen2ForCausalLM,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    small = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
    }
    yield SiglipVisionModel(SiglipVisionConfig(**small, patch_size=14))
    yield Dinov2Model(Dinov2Config(**small))
    text = {**small, "vocab_size": 9, "num_key_value_heads": 2}
    text.pop("image_size")
    yield Qwen2ForCausalLM(Qwen2Config(**text))
    timm = pytest.importorskip("timm")
    yield timm.create_model("vit_tiny_patch16_224", depth=2)
    yield nn.Sequential(nn.Linear(2, 2))


def test_other_architectures_are_refused():
    for model in other_architectures():
        with pytest.raises(CheckpointError, match=r"no AIMv2 encoder|has no mapping"):
            convert_tensors(model.state_dict(), "sailvit")


def test_what_is_missing_empty_or_misshapen_is_named():
    tensors = random_tensors("transformers", TINY_SHAPE)
    key = "encoder.layers.1.attention.k_proj.weight"
    for change, what in [
        (None, "missing"),
        (torch.empty(0), "empty"),
        (torch.ones(63, 64), r"expected shape \[64, 64\], got \[63, 64\]"),
    ]:
        changed = {name: tensor for name, tensor in tensors.items() if name != key}
        changed |= {} if change is None else {key: change}
        with pytest.raises(CheckpointError, match=rf"{re.escape(key)}: {what}"):
            convert_tensors(changed, "sailvit")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_mangled_names_are_an_error_or_a_tower(data):
    """Whatever is done to the names: a checkpoint is understood as it stands, or refused."""
    names = [piece.name for piece in tensor_specs(LAYOUTS[data.draw(st.sampled_from(list(LAYOUTS)))], TINY_SHAPE)]
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(names) - 1))
        change = data.draw(st.sampled_from(["cut", "double", "insert", "drop", "text", "wrap"]))
        name = names[at]
        if change == "cut":
            names[at] = name[: data.draw(st.integers(0, len(name)))]
        elif change == "double":
            names.append(name)
        elif change == "insert":
            where = data.draw(st.integers(0, len(name)))
            names[at] = name[:where] + data.draw(st.text(max_size=3)) + name[where:]
        elif change == "drop" and len(names) > 1:
            del names[at]
        elif change == "text":
            names[at] = data.draw(st.text())
        elif change == "wrap":
            names[at] = "module." + name
    shapes = dict.fromkeys(names)
    try:
        found = match_names(shapes, AIMV2)
    except CheckpointError:
        return
    sorted_out = [*found.names.values(), *found.dropped, *found.unmapped]
    assert len(sorted_out) + sum(found.others.values()) == len(shapes)
    assert set(sorted_out) <= shapes.keys()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.characters(categories=("L", "N", "P")), max_size=20)))
def test_any_names_are_an_error_or_a_tower(names):
    try:
        match_names(names, AIMV2)
    except CheckpointError as error:
        assert "\n" not in str(error)


def test_synthetic_checkpoints_are_one_tower_in_every_layout(tmp_path):
    for layout in LAYOUTS:
        make_checkpoint(tmp_path / layout, layout)
    released = load_file(tmp_path / "sailvit" / "model.safetensors")
    for layout in LAYOUTS:
        assert_same(convert_tensors(load_file(tmp_path / layout / "model.safetensors"), "sailvit"), released)
