"""What is trained: frozen components, LoRA, rows of added tokens, parameter groups, activation checkpointing."""

import json
from pathlib import Path

import pytest
import torch
from conftest import relative_difference
from safetensors.torch import load_file
from toy_corpus import MemoryCorpus, make_corpus, make_model, make_processor, make_samples
from toy_recipe import ToyRecipe
from toy_sailvl import write_tokenizer

from sailvit import SAILVLForConditionalGeneration, SAILVLProcessor
from sailvit.convert import convert_checkpoint
from sailvit.convert.storage.lora import RANK_FIELDS
from sailvit.train.collate import read_pack
from sailvit.train.components import (
    COMPONENTS,
    added_token_ids,
    check_trainable,
    merge_adapters,
    parameter_groups,
    set_trainable,
    trainable_table,
)
from sailvit.train.loss import answer_weights, pack_loss
from sailvit.train.packing import PackedBatches
from sailvit.train.trainer import SAILVLTrainer


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> SAILVLProcessor:
    return make_processor(tmp_path_factory.mktemp("tokenizers") / "toy")


@pytest.fixture(scope="module")
def corpus(processor, tmp_path_factory: pytest.TempPathFactory) -> MemoryCorpus:
    return make_corpus(make_samples(8), processor, tmp_path_factory.mktemp("cache"))


def train(model, corpus: MemoryCorpus, recipe: ToyRecipe, output: Path) -> SAILVLTrainer:
    trainer = SAILVLTrainer(model, recipe, PackedBatches(corpus, 4, 600), output)
    trainer.train()
    return trainer


def backward(model, corpus: MemoryCorpus) -> torch.Tensor:
    pack = read_pack(corpus, range(4))
    loss = pack_loss(model, pack.inputs, answer_weights(pack, "token"), True)[0] / pack.num_labels
    loss.backward()
    return loss.detach()


# Frozen components


@pytest.mark.parametrize("trainable", [["connector"], ["language"], ["vision", "connector"]])
def test_frozen_components_are_frozen_and_stay_in_eval_mode(processor, trainable):
    model = make_model(processor)
    set_trainable(model, ToyRecipe(trainable=trainable))
    for mode in (True, False, True):
        model.train(mode)
        for name, attribute in COMPONENTS.items():
            part = getattr(model, attribute)
            assert {parameter.requires_grad for parameter in part.parameters()} == {name in trainable}
            assert {module.training for module in part.modules()} == {mode and name in trainable}


def test_frozen_dropout_does_not_run(processor, corpus):
    model = make_model(processor, {"attention_dropout": 0.9}, {"attention_dropout": 0.9, "projection_dropout": 0.9})
    losses = {}
    for trainable in (["connector"], ["connector", "language"]):
        set_trainable(model, ToyRecipe(trainable=trainable))
        model.train()
        losses[len(trainable)] = [backward(model, corpus).item() for _ in range(3)]
        model.__dict__.pop("train", None)
        for part in (model.vision_model, model.language_model):
            part.__dict__.pop("train", None)
    assert len(set(losses[1])) == 1 and len(set(losses[2])) == 3


def test_a_frozen_vision_encoder_builds_no_graph(processor, corpus):
    model = make_model(processor)
    set_trainable(model, ToyRecipe(trainable=["connector"]))
    outputs = []
    model.vision_model.register_forward_hook(lambda module, inputs, output: outputs.append(output.last_hidden_state))
    backward(model.train(), corpus)
    assert len(outputs) == 1 and not outputs[0].requires_grad
    assert all((parameter.grad is None) != parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("change", ["frozen", "trained", "mode"])
def test_a_model_that_was_changed_after_set_trainable_is_refused(processor, change):
    model, recipe = make_model(processor), ToyRecipe(trainable=["connector"])
    set_trainable(model, recipe)
    check_trainable(model, recipe)
    if change == "frozen":
        model.mlp1[1].weight.requires_grad_(False)
    elif change == "trained":
        model.vision_model.requires_grad_(True)
    else:
        del model.language_model.train
        model.train()
    with pytest.raises(RuntimeError, match=r"expected .*call set_trainable after loading"):
        check_trainable(model, recipe)


BAD = {
    "trainable: expected components of vision, connector, language, got 'vit'": {"trainable": ["vit"]},
    "trainable: expected at least one component of vision, connector, language, got none": {"trainable": []},
    "lora: expected components of vision, language, got 'connector'": {"lora": {"connector": {}}},
    "lora: vision is not in trainable": {"trainable": ["language"], "lora": {"vision": {}}},
    "train_added_tokens: the ids of the added tokens are missing": {"train_added_tokens": True},
}


@pytest.mark.parametrize("message", BAD)
def test_options_that_do_not_fit_are_refused(processor, message):
    with pytest.raises(ValueError, match=message):
        set_trainable(make_model(processor), ToyRecipe(**BAD[message]))


# Optimizer


def test_every_component_has_its_learning_rate_and_matrices_decay(processor):
    model = make_model(processor)
    rates = {"vision": 1e-5, "connector": 1e-3}
    recipe = ToyRecipe(trainable=["vision", "connector"], learning_rate=rates, weight_decay=0.05)
    set_trainable(model, recipe)
    of_parameter = {
        id(parameter): group for group in parameter_groups(model, recipe) for parameter in group.pop("params")
    }
    for name, parameter in model.named_parameters():
        if name.startswith("language_model."):
            assert id(parameter) not in of_parameter
        else:
            rate = rates["vision" if name.startswith("vision_model.") else "connector"]
            decay = 0.0 if name.endswith("bias") or "norm" in name or parameter.ndim == 1 else 0.05
            assert of_parameter.pop(id(parameter)) == {"lr": rate, "weight_decay": decay}
    assert not of_parameter


def test_there_is_no_empty_group(processor):
    model = make_model(processor)
    set_trainable(model, ToyRecipe(trainable=["vision"]))
    for name, parameter in model.vision_model.named_parameters():
        parameter.requires_grad_(name.endswith("norm.weight"))
    groups = parameter_groups(model, ToyRecipe())
    assert len(groups) == 1 and groups[0]["weight_decay"] == 0 and groups[0]["params"]


def test_a_component_without_a_learning_rate_is_an_error(processor):
    with pytest.raises(ValueError, match="learning_rate: expected a number for connector, got only vision"):
        parameter_groups(make_model(processor), ToyRecipe(learning_rate={"vision": 1e-3}))


def test_the_table_has_parameters_and_rates(processor):
    model = make_model(processor)
    recipe = ToyRecipe(trainable=["connector"], learning_rate={"connector": 2e-4})
    set_trainable(model, recipe)
    lines = [line.split() for line in trainable_table(model, recipe).replace(",", "").splitlines()]
    sizes = {
        name: str(sum(p.numel() for p in getattr(model, attribute).parameters()))
        for name, attribute in COMPONENTS.items()
    }
    assert lines[1:] == [
        ["vision", sizes["vision"], "0", "frozen"],
        ["connector", sizes["connector"], sizes["connector"], "0.0002"],
        ["language", sizes["language"], "0", "frozen"],
    ]


# Rows of added tokens


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_added_tokens_are_trained_alone(processor, corpus, tmp_path, tied):
    model, rows = make_model(processor, {"tie_word_embeddings": tied}), added_token_ids(processor)
    recipe = ToyRecipe(trainable=["connector"], train_added_tokens=True, weight_decay=0.1)
    set_trainable(model, recipe, rows)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, corpus, recipe, tmp_path)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    table = "language_model.model.embed_tokens.weight"
    expected = {table, "language_model.lm_head.weight"} if tied else {table}
    assert {name for name in changed if not name.startswith("mlp1.")} == expected
    difference = (model.state_dict()[table] - before[table]).abs().sum(1)
    assert difference.nonzero().flatten().tolist() == sorted(rows) and len(rows) == 2
    assert f"{2 * 64:,}" in trainable_table(model, recipe)


# LoRA


LORA = {"language": {"r": 4, "alpha": 12, "dropout": 0.1}, "vision": {"r": 2, "alpha": 4, "dropout": 0.0}}


def is_adapter(name: str) -> bool:
    return ".lora_" in name


def test_lora_trains_adapters_on_all_linear_layers(processor, corpus, tmp_path):
    model, recipe = make_model(processor), ToyRecipe(lora=LORA)
    set_trainable(model, recipe)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, corpus, recipe, tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != (is_adapter(name) or name.startswith("mlp1.")), name
    adapted = {name.partition(".lora_")[0] for name in before if is_adapter(name)}
    linear = {
        name.removesuffix(".base_layer")
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and not name.startswith("mlp1.") and "lora_" not in name
    }
    assert linear - adapted == {"language_model.lm_head"} and adapted < linear


def test_a_checkpoint_with_lora_converts_to_the_merged_model(processor, corpus, tmp_path):
    model, recipe = make_model(processor), ToyRecipe(lora=LORA, learning_rate=1e-2, save_steps=2)
    names = set(model.state_dict())
    set_trainable(model, recipe)
    train(model, corpus, recipe, tmp_path / "run")
    pack = read_pack(corpus, range(4)).inputs
    with torch.no_grad():
        expected = model.eval()(**pack).logits
        merge_adapters(model)
        assert set(model.state_dict()) == names
        assert relative_difference(model(**pack).logits, expected) < 1e-5
    checkpoint = tmp_path / "run" / "checkpoint-2"
    write_tokenizer(checkpoint)
    convert_checkpoint(checkpoint, tmp_path / "out", verify=False)
    converted = SAILVLForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        assert relative_difference(converted(**pack).logits, expected) < 1e-5
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {name: value for name, value in config.items() if "lora" in name} == dict.fromkeys(RANK_FIELDS.values(), 0)
    assert not any(is_adapter(name) for name in load_file(tmp_path / "out" / "model.safetensors"))


# Activation checkpointing


@pytest.mark.parametrize("which", [True, "vision", "language"])
@pytest.mark.parametrize("trainable", [["connector"], ["vision", "connector", "language"]])
def test_checkpointing_recomputes_layers_and_keeps_the_gradients(processor, corpus, which, trainable):
    """A frozen language model is recomputed, too; a frozen vision encoder has no graph."""
    gradients, calls = [], []
    for checkpointing in (False, which):
        model = make_model(processor)
        set_trainable(model, ToyRecipe(trainable=trainable, gradient_checkpointing=checkpointing))
        layers = {
            "vision": model.vision_model.trunk.blocks[0].attn,
            "language": model.language_model.model.layers[0].mlp,
        }
        counts = dict.fromkeys(layers, 0)
        for name, layer in layers.items():
            layer.register_forward_pre_hook(
                lambda *_, name=name, counts=counts: counts.update({name: counts[name] + 1})
            )
        backward(model.train(), corpus)
        calls.append(counts)
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert calls[0] == {"vision": 1, "language": 1}
    assert calls[1]["language"] == (1 if which == "vision" else 2)
    assert calls[1]["vision"] == (2 if which != "language" and "vision" in trainable else 1)
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)
