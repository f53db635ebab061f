"""Recipes of training: the paper's values, files, overrides, errors; what they do without torch is tested here."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import TrainingArguments

from sailvit.train import Recipe, describe_recipe, list_recipes, load_recipe
from sailvit.train.foreign_settings import FOREIGN_SETTINGS
from sailvit.train.recipe import FOLDER, SOURCES, TEXT_FIELDS, LoRA, parse_override
from sailvit_cli import main


CONNECTOR, REFINED, ALL = ["connector"], ["vision", "connector"], ["vision", "connector", "language"]

# The paper's table: what is trained, learning rate, global batch.
PAPER = {
    "stage1": (CONNECTOR, 2e-4, 1920),
    "stage2": (REFINED, 2e-5, 512),
    "stage3": (ALL, 1e-5, 512),
    "regime-a-pretrain": (CONNECTOR, 2e-4, 1920),
    "regime-a-sft": (ALL, 1e-5, 512),
    "regime-c-alignment": (REFINED, 2e-5, 512),
}
# LLaVA-1.5's scripts; the paper evaluates with the vision encoder frozen and not.
LLAVA = {
    "regime-b-pretrain": (CONNECTOR, 1e-3, 256),
    "regime-b-sft": (["connector", "language"], 2e-5, 128),
    "regime-b-sft-unfrozen": (ALL, 2e-5, 128),
}
PRETRAINING = {"aim-pretrain": (["vision"], 1e-3, 4096)}  # AIM's paper, of what comes before the stages
DATA_SIZES = {"2m": 2_000_000, "4m": 4_000_000, "8m": 8_000_000, "16m": 16_000_000, "24m": 24_000_000}
STEPS = {"1": 21_000_000, "2": 12_000_000, "3": 3_500_000}
KINDS = ("caption", "ocr", "open_qa", "short_qa", "text", "math")


def changes(name: str, base: str) -> dict:
    """The fields in which a recipe differs from another."""
    ours, others = load_recipe(name).model_dump(), load_recipe(base).model_dump()
    return {key: value for key, value in ours.items() if value != others[key] and key not in ("name", "description")}


def write(folder: Path, text: str, name: str = "mine.yaml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


@pytest.mark.parametrize("name", [*PAPER, *LLAVA, *PRETRAINING])
def test_stages_and_regimes_have_the_values_of_the_paper(name):
    recipe = load_recipe(name)
    assert (recipe.trainable, recipe.learning_rate, recipe.samples_per_step) == {**PAPER, **LLAVA, **PRETRAINING}[name]
    assert recipe.epochs == 1 and recipe.max_steps is None and recipe.kinds is None


def test_what_the_paper_leaves_out_is_that_of_internvl_and_of_llava():
    decays = {name: load_recipe(name).weight_decay for name in ("stage1", "stage2", "stage3", *LLAVA)}
    assert decays == {"stage1": 0.01, "stage2": 0.05, "stage3": 0.01, **dict.fromkeys(LLAVA, 0.0)}
    for name in list_recipes().keys() - PRETRAINING.keys():
        recipe = load_recipe(name)
        assert (recipe.warmup_ratio, recipe.lr_scheduler_type, recipe.max_grad_norm) == (0.03, "cosine", 1.0)
        assert (recipe.adam_beta1, recipe.adam_beta2, recipe.adam_epsilon) == (0.9, 0.999, 1e-8)
        assert (recipe.gradient_checkpointing, recipe.loss_reduction) == (True, "token")


def test_ablations_are_the_stage_and_what_they_change():
    assert changes("stage3-frozen-language", "stage3") == {"trainable": REFINED}
    size = {"language_parameters": [400_000_000, 600_000_000]}
    assert changes("stage3-language-0.5b", "stage3") == size
    for kind in KINDS:
        assert changes(f"stage3-half-{kind.replace('_', '-')}", "stage3-data-8m") == {"kinds": {kind: 0.5}}
    sizes = {f"stage3-data-{name}": size for name, size in DATA_SIZES.items()}
    sizes |= {f"stage3-step{step}": size for step, size in STEPS.items()}
    for name, size in sizes.items():
        assert [*changes(name, "stage3")] == ["max_steps"]
        assert 0 <= load_recipe(name).max_steps * 512 - size < 512  # the last step is full


def test_nothing_of_the_paper_is_missing():
    ablations = ["frozen-language", "language-0.5b", *(f"step{step}" for step in STEPS)]
    ablations += [f"data-{size}" for size in DATA_SIZES] + [f"half-{kind.replace('_', '-')}" for kind in KINDS]
    assert {*list_recipes()} == {*PAPER, *LLAVA, *PRETRAINING, *(f"stage3-{name}" for name in ablations)}
    assert all(list_recipes().values())


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_is_short_and_names_its_commands_and_sources(path):
    text = path.read_text()
    source = "AIM, appendix" if path.stem in PRETRAINING else "paper, (section 3|appendix [AF]|experiments)"
    assert len(text.splitlines()) <= 20 and re.search(source, text)
    commands = [shlex.split(line) for line in re.findall(r"^#   .*sailvit\.train (.*)", text, re.MULTILINE)]
    assert path.stem in [command[0] for command in commands]
    for name, *overrides in commands:
        recipe = load_recipe(name, overrides)
        assert recipe.model and recipe.data and recipe.output
    for line in re.findall(r"^\w+: .*", text, re.MULTILINE):
        assert "  # " in line or line.startswith(("description", "extends")), f"{line}: no source"


def test_the_installed_package_has_the_recipes(monkeypatch):
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.chdir(ROOT)
    package = setuptools.Distribution()
    package.parse_config_files(["setup.cfg"])
    command = package.get_command_obj("build_py")
    command.ensure_finalized()
    files = {file for name, _, _, files in command.data_files if name == "sailvit.train" for file in files}
    assert files == {f"recipes/{name}.yaml" for name in list_recipes()}


def test_defaults_are_those_that_their_sources_have():
    recipe = load_recipe("stage1")
    named = [name for name, source in SOURCES.items() if source.startswith("transformers.TrainingArguments")]
    defaults = {name: TrainingArguments.__dataclass_fields__[name].default for name in named}
    assert defaults == {name: getattr(recipe, name) for name in named} and len(named) == 2
    peft = LoraConfig()
    assert LoRA().model_dump() == {"r": peft.r, "alpha": peft.lora_alpha, "dropout": peft.lora_dropout}


def test_a_described_recipe_loads_again_and_names_the_source_of_every_field(tmp_path):
    overrides = [
        "trainable=vision,language",
        "learning_rate.vision=1e-6",
        "lora.language.r=16",
        "output=#1: a",
        "model=1e5",
    ]
    for name, given_overrides in [*((name, []) for name in list_recipes()), ("stage3-half-ocr", overrides)]:
        text = describe_recipe(name, given_overrides)
        assert load_recipe(write(tmp_path, text)) == load_recipe(name, given_overrides)
        sources = dict(re.findall(r"^(\w+): .*?  # (.*)$", text, re.MULTILINE))
        assert [*sources] == [*Recipe.model_fields]
    assert sources["samples_per_step"] == "stage3: paper, section 3: global batch"
    assert sources["learning_rate"] == "command line, over stage3: paper, section 3"
    assert sources["trainable"] == "command line"
    assert sources["adam_beta1"] == "default: InternVL2.5, zero_stage1_config.json"
    assert sources["kinds"] == "stage3-half-ocr: paper, appendix F" and sources["seed"] == "default"


def test_a_file_extends_a_recipe_or_another_file(tmp_path):
    write(tmp_path, "extends: stage2\nlearning_rate:\n  vision: 1e-5  # mine\n  connector: 3e-5\n", "parent.yaml")
    recipe = load_recipe(write(tmp_path, "extends: parent.yaml\nmax_steps: 7\n", "child.yaml"))
    assert (recipe.name, recipe.max_steps, recipe.samples_per_step) == ("child", 7, 512)
    assert recipe.learning_rate == {"vision": 1e-5, "connector": 3e-5}


def test_an_override_of_one_rate_keeps_those_of_the_other_components():
    overrides = ["learning_rate.vision=1e-6", "trainable=[language, vision]"]
    assert load_recipe("stage1", overrides).learning_rate == {"language": 2e-4, "vision": 1e-6}
    recipe = load_recipe("stage3", ["learning_rate=1", "learning_rate.vision=2", "learning_rate.vision=3"])
    assert recipe.learning_rate == {"vision": 3, "connector": 1, "language": 1}
    assert load_recipe("stage3", ["learning_rate.vision=2", "learning_rate=1"]).learning_rate == 1


def test_added_tokens_have_the_rate_of_the_language_model():
    rates = {"connector": 2e-4, "language": 1e-5}
    overrides = [f"learning_rate={rates}", "train_added_tokens=true"]
    assert load_recipe("stage1", overrides).learning_rate == rates
    for wrong in (overrides[:1], [*overrides, "learning_rate={connector: 1}"]):
        with pytest.raises(ValueError, match=r"learning_rate\.language: (language is not trained|missing, but lang)"):
            load_recipe("stage1", wrong)


TEXT = st.text().filter(
    lambda text: not re.fullmatch(r"[-+]?\d+e[-+]?\d+", text, re.IGNORECASE)
)  # a number in YAML 1.2
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
    max_leaves=5,
)
KEYS = st.sampled_from([name for name in Recipe.model_fields if name not in TEXT_FIELDS] + ["learning_rate.vision"])


@given(KEYS, VALUES)
def test_an_override_has_the_value_that_yaml_gives_it(key, value):
    text = yaml.safe_dump(value, default_flow_style=True)
    assert parse_override(f"{key}={text}") == (tuple(key.split(".")), value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_an_override_has_the_number_that_python_prints(number):
    assert parse_override(f"learning_rate={number!r}") == (("learning_rate",), number)


@given(st.sampled_from(sorted(TEXT_FIELDS)), st.text())
def test_a_path_is_taken_as_it_is(key, text):
    assert parse_override(f"{key}={text}") == ((key,), None if text == "null" else text)


@given(st.lists(st.tuples(st.sampled_from([*Recipe.model_fields, "learning_rate.vision", "a", ""]), st.text())))
def test_whatever_is_typed_is_a_recipe_or_an_error_of_one_line(pairs):
    try:
        recipe = load_recipe("stage2", [f"{key}={text}" for key, text in pairs])
    except ValueError as error:
        assert type(error) is ValueError and len(str(error).splitlines()) == 1
    else:
        assert isinstance(recipe, Recipe)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_steps", "expected key=value, such as max_steps=100, got 'max_steps'"),
        ("--max_steps=3", "expected key=value, such as max_steps=100, got '--max_steps=3'"),
        ("max_stps=3", "recipe stage2: max_stps: unknown field; did you mean max_steps?"),
        ("max_steps=0", "max_steps: expected greater than or equal to 1, got 0"),
        ("max_steps=ten", "max_steps: expected a valid integer, got 'ten'"),
        ("max_steps=[1", r"max_steps: no valid YAML: .*"),
        ("samples_per_step=true", "samples_per_step: expected a valid integer, got True"),
        ("samples_per_step.a=1", "samples_per_step.a: samples_per_step is 512, which has no entries"),
        ("epochs=.nan", "epochs: expected a finite number, got nan"),
        ("trainable=vision,tower", "trainable.1: expected 'vision', 'connector' or 'language', got 'tower'"),
        ("trainable=vision,vision", "trainable: vision is given twice"),
        ("trainable=[]", "trainable: List should have at least 1 item after validation, not 0, got []"),
        ("learning_rate=fast", "learning_rate: expected a valid number, got 'fast'"),
        ("learning_rate.vison=1", "learning_rate.vison: expected 'vision', 'connector' or 'language', got 'vison'"),
        ("learning_rate.language=1", "learning_rate.language: language is not trained: add it to trainable"),
        ("learning_rate={vision: 1}", "learning_rate.connector: missing, but connector is trained"),
        ("lora.language.r=8", "lora.language: language is not trained: add it to trainable"),
        ("trainable=language lora.language.r=8 train_added_tokens=true", "train_added_tokens: LoRA keeps .*"),
        ("lora.vision.rank=8", "lora.vision.rank: unknown field; expected one of r, alpha, dropout"),
        ("lora.connector.r=8", "lora.connector: expected 'vision' or 'language', got 'connector'"),
        (
            "lr_scheduler_type=constant_with_warmup min_learning_rate_ratio=0.1",
            "min_learning_rate_ratio: expected 0 .*",
        ),
        ("kinds={a: 0.7, b: 0.6}", "kinds: expected shares of at most 1 together, got 1.3"),
        ("engine=zero1", "engine: expected 'auto', 'single', 'ddp', 'zero2', 'zero3' or 'fsdp2', got 'zero1'"),
        (
            "gradient_checkpointing=connector",
            "gradient_checkpointing: expected True, False, 'vision' or 'language', .*",
        ),
    ],
)
def test_a_wrong_override_is_an_error_that_names_it(override, message):
    overrides = re.split(r" (?=[\w.]+=)", override)
    pattern = message if message.endswith(".*") else re.escape(message)
    with pytest.raises(ValueError, match=pattern + "$") as error:
        load_recipe("stage2", overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "expected a mapping with trainable, learning_rate, ..., got list"),
        ("", "expected a mapping with trainable, learning_rate, ..., got NoneType"),
        ("a: [", "no valid YAML"),
        ("seed: 1\nseed: 2\n", "the key 'seed' is given twice"),
        ("extends: stage9\n", "stage9: no such recipe; did you mean stage3?"),
        ("extends: [stage1]\n", "extends: expected a recipe, such as stage3, got ['stage1']"),
        ("extends: mine.yaml\n", "extends itself"),
        ("seed: 1\n", "trainable: Field required"),
        ("extends: stage1\n1: 2\n", "1: unknown field"),
        ("extends: stage1\nseed: 4294967296\n", "seed: expected"),
        ("extends: stage1\nmodel: 2\n", "model: expected a valid string, got 2"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_it(tmp_path, text, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_recipe(write(tmp_path, text))
    assert "\n" not in str(error.value)


def test_a_recipe_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="stagge1: no such recipe; did you mean stage1"):
        load_recipe("stagge1")
    with pytest.raises(OSError, match=r"none\.yaml: cannot be read: No such file or directory"):
        load_recipe(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize("name", FOREIGN_SETTINGS)
def test_a_setting_of_another_framework_is_answered_with_ours(name):
    assert name not in Recipe.model_fields
    with pytest.raises(ValueError, match=f"recipe stage1: {name}: unknown field; ") as error:
        load_recipe("stage1", [f"{name}=true"])
    hint = str(error.value).partition("; ")[2]
    ours = {field.partition(".")[0] for field in re.findall(r"`([\w.]+)`", hint)}
    assert ours <= {*Recipe.model_fields, "max_tiles"}
    assert ours or name in ("unfreeze_vit_layers", "drop_path_rate", "optim", "resume_from_checkpoint")


@pytest.mark.parametrize(
    ("name", "ours"),
    {
        "freeze_vit": "`trainable`",
        "freeze_aligner": "`trainable`",
        "freeze_llm": "`trainable`",
        "vit_lr": "`learning_rate.vision`",
        "aligner_lr": "`learning_rate.connector`",
        "freeze_vision_tower": "`trainable`",
        "freeze_multi_modal_projector": "`trainable`",
        "freeze_language_model": "`trainable`",
        "freeze_backbone": "`trainable`",
        "freeze_mlp": "`trainable`",
        "unfreeze_vit_layers": "lora.vision.r=16",
        "per_device_train_batch_size": "`samples_per_step`",
        "gradient_accumulation_steps": "`samples_per_step`",
        "num_train_epochs": "`epochs`",
        "output-dir": "`output`",
    }.items(),
)
def test_the_known_spellings_of_other_frameworks(name, ours):
    with pytest.raises(ValueError, match=re.escape(ours)):
        load_recipe("stage1", [f"{name}=1"])


def test_the_command_prints_recipes_and_their_values(capsys, monkeypatch):
    assert main(["train", "--list"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert dict(lines) == list_recipes()
    assert main(["train", "stage1", "seed=1", "--print-config", "max_steps=3"]) == 0
    printed = capsys.readouterr().out
    assert printed == describe_recipe("stage1", ["seed=1", "max_steps=3"]) + "\n"
    monkeypatch.setattr(sys, "argv", ["sailvit.train", "stage1", "--print-config", "seed=1", "max_steps=3"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("sailvit.train", run_name="__main__")
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stage1", "freeze_vit=true", "--print-config"], "sailvit train: recipe stage1: freeze_vit: unknown field; "),
        (["stage1", "--print-config", "max_steps"], "sailvit train: expected key=value, such as max_steps=100, got "),
        (["--print-config"], "sailvit train: expected STAGE, such as stage1, or --list"),
        (["stage1", "max_steps=3"], "sailvit train: model: missing; give it as model=..."),
        (["stage1", "--list"], "sailvit train: expected --list alone, got stage1"),
    ],
)
def test_wrong_usage_of_the_command_is_one_line(words, message, capsys):
    assert main(["train", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count("\n") == 1


def test_an_unknown_option_is_an_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["train", "stage1", "--max_steps", "3"])
    assert "sailvit train: unrecognized arguments: --max_steps" in capsys.readouterr().err
