"""The model card: made from what is recorded; a person's text is kept."""

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, TINY_SHAPE, make_checkpoint, published_config
from huggingface_hub import ModelCard

from sailvit.convert import CheckpointError, convert_checkpoint
from sailvit.convert.export.card import MARK, NO_LICENCE, card_problems, write_model_card
from sailvit.convert.export.model_types import MODEL_TYPES


APPLE = {"name": "apple/aimv2", "revision": "a" * 40, "license": "other", "license_name": "apple-amlr"}
QWEN = {"name": "Qwen/Qwen2.5-0.5B", "revision": "b" * 40, "license": "apache-2.0"}
CONFIG = {"model_type": "sailvit", "auto_map": {"AutoModel": "modeling_sailvit.SAILViTModel"}, "dtype": "bfloat16"}
SCORE = {
    "task_type": "image-classification",
    "dataset_type": "imagenet-1k",
    "dataset_name": "ImageNet-1k",
    "metric_type": "accuracy",
    "metric_value": 80.7,
}


def make_folder(folder: Path, config: dict = CONFIG, **record) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if record:
        (folder / "provenance.json").write_text(json.dumps(record))
    return folder


def card_of(folder: Path, *arguments: str, **options: str) -> ModelCard:
    write_model_card(folder, *(arguments or ("owner/tower", "v1")), **options)
    assert card_problems(folder) == []
    return ModelCard.load(folder / "README.md")


def test_card_describes_the_model_and_pins_its_revision(tmp_path):
    card = card_of(make_folder(tmp_path, source=APPLE), "owner/tower", "v1.0")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "image-feature-extraction")
    assert card.data.base_model == "apple/aimv2" and {"sailvit", "custom_code"} <= {*card.data.tags}
    assert 'AutoModel.from_pretrained("owner/tower", revision="v1.0", trust_remote_code=True)' in card.text
    assert f"[apple/aimv2](https://huggingface.co/apple/aimv2) at commit `{'a' * 40}`" in card.text


def test_card_cites_the_paper_as_the_readme_does(tmp_path):
    readme = re.search(r"```bibtex\n(.*?)\n```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    assert f"```bibtex\n{readme}\n```" in card_of(make_folder(tmp_path)).text


@pytest.mark.parametrize("model_type", MODEL_TYPES, ids=lambda model_type: model_type.auto_class)
def test_the_usage_of_every_model_type_is_python(model_type):
    for revision in ("v1", None):
        usage = model_type.usage("owner/model", revision, has_code=True)
        compile(usage, model_type.title, "exec")
        assert "owner/model" in usage and ("v1" in usage) == bool(revision)


def test_the_licence_is_what_the_card_of_the_source_states(tmp_path):
    source = make_checkpoint(tmp_path / "apple")
    (source / "README.md").write_text("---\nlicense: other\nlicense_name: apple-amlr\nlicense_link: LICENSE\n---\n")
    convert_checkpoint(source, tmp_path / "out", verify=False)
    card = card_of(tmp_path / "out")
    assert (card.data.license, card.data.license_name, card.data.license_link) == ("other", "apple-amlr", "LICENSE")
    assert "- weights (apple): apple-amlr, as its own card states: LICENSE" in card.text
    assert "- the Python files: apache-2.0" in card.text


def test_a_licence_that_is_not_stated_is_not_guessed(tmp_path):
    convert_checkpoint(make_checkpoint(tmp_path / "apple"), tmp_path / "out", verify=False)
    card = card_of(tmp_path / "out")
    assert card.data.license is None and f"- weights (apple): {NO_LICENCE}" in card.text


def test_every_component_keeps_its_own_licence(tmp_path):
    card = card_of(make_folder(tmp_path, source={"name": "both", "vision": APPLE, "language": QWEN}))
    assert (card.data.license, card.data.license_name) == ("other", "by-component")
    assert "- vision (apple/aimv2): apple-amlr, as" in card.text
    assert "- language (Qwen/Qwen2.5-0.5B): apache-2.0, as" in card.text
    assert card.data.base_model == ["apple/aimv2", "Qwen/Qwen2.5-0.5B"]
    assert card.data.to_dict()["base_model_relation"] == "merge"


def test_a_component_without_a_licence_leaves_the_model_without(tmp_path):
    unknown = {"name": "tower", "revision": None}
    card = card_of(make_folder(tmp_path, source={"name": "both", "vision": unknown, "language": QWEN}))
    assert card.data.license is None and f"- vision (tower): {NO_LICENCE}" in card.text


def test_the_base_is_the_nearest_source_on_the_hub(tmp_path):
    source = {"name": "converted", "revision": None, "source": {"name": "earlier", "revision": None, "source": APPLE}}
    card = card_of(make_folder(tmp_path, source=source))
    assert card.data.base_model == "apple/aimv2" and "weights: converted, from apple/aimv2" in card.text


def test_a_trained_model_is_a_finetune_with_its_recipe(tmp_path):
    stages = [{"stage": 1, "recipe": "stage1.yaml", "steps": 2000}, {"stage": 2, "recipe": "stage2.yaml", "tokens": 9}]
    training = {"engine": "DeepSpeed ZeRO-3", "tokens_seen": 12, "base": APPLE, "stages": stages}
    card = card_of(make_folder(tmp_path, source={"name": "checkpoint-9", "revision": None}, training=training))
    assert card.data.base_model == "apple/aimv2" and card.data.to_dict()["base_model_relation"] == "finetune"
    assert "- engine: DeepSpeed ZeRO-3\n- tokens seen: 12\n" in card.text
    assert f"- base: apple/aimv2 at {'a' * 40}" in card.text
    rows = ["| | 1 | 2 |", "|---|---|---|", "| stage | 1 | 2 |", "| recipe | stage1.yaml | stage2.yaml |"]
    assert "\n".join([*rows, "| steps | 2000 |  |", "| tokens |  | 9 |"]) in card.text


def test_the_same_weights_under_other_names_are_no_finetune(tmp_path):
    assert "base_model_relation" not in card_of(make_folder(tmp_path, source=APPLE)).data.to_dict()


def test_results_become_a_table_and_a_model_index(tmp_path):
    folder = make_folder(tmp_path, source=APPLE)
    (folder / "evaluation.json").write_text(json.dumps([SCORE, {**SCORE, "metric_value": 81.5, "dataset_split": "v2"}]))
    card = card_of(folder)
    assert [result.metric_value for result in card.data.eval_results] == [80.7, 81.5]
    assert card.data.model_name == "tower"
    assert "| image-classification | ImageNet-1k | accuracy | 80.7 |" in card.text
    (folder / "evaluation.json").write_text(json.dumps([{**SCORE, "metric_value": 90.0}]))
    assert [result.metric_value for result in card_of(folder).data.eval_results] == [90.0]


@pytest.mark.parametrize("content", ["{", "{}", "[1]", '[{"task_type": "x"}]', '{"accuracy": 3}'])
def test_invalid_results_are_refused_and_the_card_stays(tmp_path, content):
    folder = make_folder(tmp_path)
    (folder / "README.md").write_text("as it was")
    (folder / "evaluation.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"evaluation\.json: expected a list of maps with task_type"):
        write_model_card(folder)
    assert (folder / "README.md").read_text() == "as it was"


def test_a_persons_text_below_the_mark_survives(tmp_path):
    folder = make_folder(tmp_path, source=APPLE)
    write_model_card(folder, "owner/tower", "v1")
    with (folder / "README.md").open("a") as file:
        file.write("\n## Notes\n\nMine.\n")
    for revision in ("v2", "v3"):
        text = card_of(folder, "owner/tower", revision).content
        assert text.endswith(f"{MARK}\n\n## Notes\n\nMine.\n") and text.count("Mine.") == 1 and revision in text


def test_the_card_of_a_conversion_is_replaced_and_what_was_added_to_it_stays(tmp_path):
    convert_checkpoint(make_checkpoint(tmp_path / "apple"), tmp_path / "out", verify=False)
    with (tmp_path / "out" / "README.md").open("a") as file:
        file.write("\nMine.\n")
    text = card_of(tmp_path / "out").content
    assert text.endswith(f"{MARK}\n\nMine.\n") and text.count(MARK) == 1 and "Made from apple" not in text


OLD_CARDS = {
    "push": "# Tower\n\n<!-- What stands above this line is written by `sailvit push`. What stands below it is kept. "
    "-->\n",
    "convert": "# tower\n\nA vision tower.\n\n```python\nx\n```\n\nConverted from apple; `provenance.json` says how, "
    "with the hashes of what was read and written.\n",
    "compose": "# vl\n\nThe connector is fresh: it has to be trained before the model can say anything of a picture."
    "\n\nEach component keeps its own licence.\n\n```python\nx\n```\n",
}


@pytest.mark.parametrize("command", OLD_CARDS)
def test_cards_of_earlier_versions_are_replaced_and_what_was_added_to_them_stays(tmp_path, command):
    folder = make_folder(tmp_path)
    (folder / "README.md").write_text(f"---\ntags:\n- ocr\n---\n{OLD_CARDS[command]}\n## Notes\n\nMine.\n")
    card = card_of(folder)
    assert card.content.endswith(f"{MARK}\n\n## Notes\n\nMine.\n") and "ocr" in card.data.tags


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ("x", "training: expected an object or a list of stages, got 'x'"),
        ({"step": "3"}, r"training\.step: expected a number, got '3'"),
        ({"stages": [{"steps": 1}, {"recipe": {}}]}, r"training\.stages\[1\]\.recipe: expected a number or a string"),
    ],
)
def test_an_invalid_training_record_is_refused_and_the_card_stays(tmp_path, training, message):
    folder = make_folder(tmp_path, source=APPLE, training=training)
    (folder / "README.md").write_text("as it was")
    with pytest.raises(CheckpointError, match=rf"provenance\.json: {message}"):
        write_model_card(folder)
    assert (folder / "README.md").read_text() == "as it was"


def test_the_record_that_a_training_run_wrote_is_shown(tmp_path):
    folder = make_folder(tmp_path, source=APPLE, training={"step": 1})
    (folder / "training.json").write_text(json.dumps({"training": {"stages": [{"stage": 1, "steps": 2000}]}}))
    card = card_of(folder)
    assert "| | 1 |\n|---|---|\n| stage | 1 |\n| steps | 2000 |" in card.text and "step: 1" not in card.text


def test_a_card_written_by_hand_is_kept_below_the_mark(tmp_path):
    folder = make_folder(tmp_path)
    (folder / "README.md").write_text("---\nlanguage: en\ntags:\n- ocr\n---\n# By hand\n\nMine.\n")
    card = card_of(folder)
    assert card.content.endswith(f"{MARK}\n\n# By hand\n\nMine.\n")
    assert card.data.language == "en" and {"ocr", "sailvit"} <= {*card.data.tags}


def test_text_written_on_the_hub_is_kept_where_the_folder_has_none(tmp_path):
    folder = make_folder(tmp_path)
    theirs = f"---\nlicense: mit\n---\nold\n{MARK}\nOn the Hub.\n"
    card = card_of(folder, "owner/tower", "v1", published=theirs)
    assert card.content.endswith(f"{MARK}\n\nOn the Hub.\n") and card.data.license == "mit"
    assert "- weights: mit, as the publisher of this model states" in card.text and NO_LICENCE not in card.text
    (folder / "README.md").write_text(f"{MARK}\nHere.\n")
    assert write_model_card(folder, published=theirs) == "On the Hub."
    assert (folder / "README.md").read_text().endswith("\nHere.\n")


def test_the_licence_of_another_model_on_the_hub_is_not_taken(tmp_path):
    theirs = "---\nlicense: mit\ntags: [llama]\n---\n# Another model\n"
    card = card_of(make_folder(tmp_path), "owner/tower", "v1", published=theirs)
    assert card.data.license is None and NO_LICENCE in card.text and "llama" not in card.data.tags


def test_writing_it_twice_changes_nothing(tmp_path):
    folder = make_folder(tmp_path, source=APPLE)
    first = card_of(folder).content
    assert card_of(folder).content == first and not [*folder.glob(".*")]


@pytest.mark.parametrize(
    ("config", "tag", "library"),
    [
        (published_config("transformers"), "image-feature-extraction", "transformers"),
        (published_config("timm"), "image-feature-extraction", "timm"),
        ({"model_type": "sailvl", "vision_config": {"hidden_size": 64}}, "image-text-to-text", "transformers"),
        ({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}, "text-generation", "transformers"),
        ({**CONFIG, "architectures": ["SAILViTForImageClassification"]}, "image-classification", "transformers"),
    ],
)
def test_every_kind_of_folder_has_its_task_and_library(tmp_path, config, tag, library):
    card = card_of(make_folder(tmp_path, config))
    assert (card.data.pipeline_tag, card.data.library_name) == (tag, library)
    assert ("trust_remote_code" in card.text) == ("auto_map" in config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "missing"),
        ("# no YAML", "has no YAML"),
        ("---\nlicense: [\n---\n", "its YAML is broken"),
        ("---\n- a\n---\n", "its YAML is no map"),
        (
            "---\nlicense: mit\npipeline_tag: image-feature-extraction\n---\n",
            "library_name: expected 'transformers', got None",
        ),
        (
            "---\nlicense: mit\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n",
            "pipeline_tag: expected",
        ),
        ("---\nbase_model: /home/me/aimv2\nlicense: mit\n---\n", "expected a name on the Hub"),
        ("---\nlibrary_name: transformers\npipeline_tag: image-feature-extraction\n---\n", "has no licence"),
        ("---\nlicense: other\n---\n", "without a license_name"),
        ("---\nlicense: mit\n---\n", "license: expected 'other', got 'mit'"),
        ("---\nlicense: mit\nmodel-index: 3\n---\n", "the Hub does not accept its YAML"),
    ],
)
def test_a_wrong_card_is_reported(tmp_path, text, message):
    folder = make_folder(tmp_path, source=APPLE)
    if text is not None:
        (folder / "README.md").write_text(text)
    assert any(message in problem.message for problem in card_problems(folder)), card_problems(folder)


def test_a_bar_in_a_recipe_breaks_no_table(tmp_path):
    record = {"source": APPLE, "training": [{"recipe": "a | b\nc", "steps": [1, 2]}]}
    assert "| recipe | a \\| b c |\n| steps | [1, 2] |" in card_of(make_folder(tmp_path, **record)).text


def test_a_published_shape_is_described(tmp_path):
    config = {**CONFIG, **published_config("sailvit"), "model_type": "sailvit"}
    assert f"width {TINY_SHAPE.hidden_size}, layers 3, 56 pixels" in card_of(make_folder(tmp_path, config)).text
