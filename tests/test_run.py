"""Stages of training from recipe to model: `sailvit train` in one process, and on two."""

import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from doc_pages import TRAINING, code_blocks, write_model, write_training_data
from run_stage import Do
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor
from transformers.integrations import integration_utils

import sailvit_cli
from sailvit.configuration_sailvl import SAILVLConfig
from sailvit.convert import convert_checkpoint
from sailvit.convert.export.card import write_model_card
from sailvit.convert.models.sailvl import verify_sailvl
from sailvit.evaluate.report.runs import find_base, find_runs
from sailvit.train import Corpus, failures, load_recipe
from sailvit.train.record import differences
from sailvit.train.run import INTERRUPTED, RunTrainer, Stage, check_environment, check_language, plan_run, run
from sailvit_cli.train import _be_quiet


TOY = ["samples_per_step=4", "epochs=3", "save_steps=2", "workers=0", "report_to=[]", "precision=float32"]
# What each stage of the paper trains, by the names of tensors.
TRAINED = {"s1": "mlp1.", "s2": ("mlp1.", "vision_model."), "s3": ""}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory):
    """A current directory with the model and the data of docs/training.md."""
    folder = tmp_path_factory.mktemp("place")
    write_model(folder / "new-vl", folder)
    with pytest.MonkeyPatch.context() as patch:
        write_training_data(folder, patch)
        patch.setenv("HF_MODULES_CACHE", str(folder / "modules"))
        for name in ("corpus2.yaml", "corpus3.yaml"):
            shutil.copyfile("corpus.yaml", name)
        yield folder


@pytest.fixture(scope="module")
def stages(place) -> Path:
    """The three stages, by the commands of the page."""
    commands = [line for block in code_blocks(TRAINING, "bash") for line in block.splitlines()]
    stages = [shlex.split(line) for line in commands if re.search(r"sailvit\.train stage\d", line)]
    assert [words[words.index("sailvit.train") + 1] for words in stages] == ["stage1", "stage2", "stage3"]
    for words in stages:
        assert sailvit_cli.main(["train", *words[words.index("sailvit.train") + 1 :], *TOY]) == 0
    return place / "runs"


def recipe_for(output: Path, stage: str = "stage3", *overrides: str):
    return load_recipe(stage, [*TOY, "model=new-vl", "data=corpus.yaml", f"output={output}", *overrides])


def read_log(output: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"], line["learning_rate"], line["tokens"]) for line in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def read_stages(folder: Path, file: str = "training.json") -> list[dict]:
    return json.loads((folder / file).read_text())["training"]["stages"]


@pytest.fixture
def after_step(monkeypatch):
    """Arrange that a function is called after a step of the next runs."""
    make = Stage._make_trainer

    def arrange(step: int, action) -> None:
        def make_trainer(stage):
            trainer = make(stage)
            trainer.callback_handler.callbacks.insert(0, Do(step, action))
            return trainer

        monkeypatch.setattr(Stage, "_make_trainer", make_trainer)

    yield arrange


# Stages


def test_only_the_components_of_the_recipe_change(stages):
    before = {name: tensor.float() for name, tensor in weights(stages.parent / "new-vl").items()}
    for name, trained in TRAINED.items():
        after = weights(stages / name)
        assert {*after} == {*before} and {tensor.dtype for tensor in after.values()} == {torch.float32}
        changed = {key for key, tensor in after.items() if not torch.equal(tensor, before[key])}
        assert changed <= {key for key in after if key.startswith(trained)}
        assert {key.split(".")[0] for key in changed} == {key.split(".")[0] for key in after if key.startswith(trained)}
        before = after


def test_the_report_reads_what_the_stages_wrote(stages, monkeypatch):
    monkeypatch.chdir(stages)
    runs = find_runs([Path("s3"), Path("s1"), Path("s2")])
    assert [run.name for run in runs] == ["s1", "s2", "s3"] and Path(find_base(runs)).samefile(stages.parent / "new-vl")
    for one in runs:
        assert [entry["loss"] for entry in one.log] == [entry[1] for entry in read_log(stages / one.name)]
        assert sum(one.kinds.values()) == one.stage["data_samples"] and {*one.log[0]["loss_by_kind"]} <= {*one.kinds}


def test_a_stage_starts_with_the_exact_weights_of_the_one_before(stages):
    stage = Stage(recipe_for(stages / "new", "stage2", "model=runs/s1"), "single", 0, 1, lambda line: None)
    model = stage._make_trainer().model
    for name, tensor in weights(stages / "s1").items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_the_record_has_all_stages(stages):
    first, second, third = read_stages(stages / "s3")
    assert read_stages(stages / "s2") == [first, second] and read_stages(stages / "s1") == [first]
    assert [stage["recipe"] for stage in (first, second, third)] == ["stage1", "stage2", "stage3"]
    assert [stage["trained_from"] for stage in (first, second, third)] == ["new-vl", "s1", "s2"]
    log = [json.loads(line) for line in (stages / "s3" / "log.jsonl").read_text().splitlines()]
    assert third["step"] == len(log) == 6 and third["samples_seen"] == 24 and third["data_samples"] == 8
    assert third["tokens_seen"] == sum(line["tokens"] for line in log)
    assert third["loss"] == log[-1]["loss"] and third["kinds"][0] == "caption 1"
    assert (third["trainable"], third["learning_rate"]) == (["vision", "connector", "language"], 1e-5)
    assert third["torch"] == torch.__version__.split("+")[0] and third["precision"] == "float32"
    checkpoint = read_stages(stages / "s3" / "checkpoint-4")[2]
    assert checkpoint["samples_seen"] == 16 and checkpoint["loss"] == log[3]["loss"]


@pytest.mark.slow
def test_the_result_loads_with_its_own_code(stages):
    counts = verify_sailvl(stages / "s3")  # in a process that cannot import this package
    assert counts["placeholders"] == counts["tiles"] * counts["image_seq_length"]


def test_processor_and_settings_are_those_of_the_source(stages, place):
    messages = [{"role": "user", "content": [{"type": "text", "text": "What?"}]}]
    prompts = [AutoProcessor.from_pretrained(path).apply_chat_template(messages) for path in (stages / "s3", "new-vl")]
    assert prompts[0] == prompts[1]
    configs = [json.loads((path / "config.json").read_text()) for path in (stages / "s3", place / "new-vl")]
    for config in configs:
        for fields in (config, config["vision_config"], config["text_config"]):
            fields.pop("dtype", None)
    assert configs[0] == configs[1]


def test_the_card_of_the_vision_encoder_shows_the_stages(stages, tmp_path):
    convert_checkpoint(stages / "s3", tmp_path / "tower", part="vision", verify=False)
    tower, source = weights(tmp_path / "tower"), weights(stages / "s3")
    assert all(torch.equal(tensor, source[f"vision_model.{name}"]) for name, tensor in tower.items()) and tower
    assert read_stages(tmp_path / "tower", "provenance.json") == read_stages(stages / "s3")
    write_model_card(tmp_path / "tower", "OWNER/NAME")
    card = (tmp_path / "tower" / "README.md").read_text()
    assert "| recipe | stage1 | stage2 | stage3 |" in card and str(stages) not in card


def test_a_checkpoint_is_converted_too(stages, tmp_path):
    convert_checkpoint(stages / "s3" / "checkpoint-4", tmp_path / "tower", part="vision", verify=False)
    assert [stage["step"] for stage in read_stages(tmp_path / "tower", "provenance.json")] == [6, 6, 4]


def test_a_finished_run_is_left_alone(stages, capsys):
    before = {path: path.stat().st_mtime_ns for path in (stages / "s3").rglob("*")}
    lines: list[str] = []
    assert run(recipe_for(Path("runs/s3"), "stage3", "model=runs/s2", "data=corpus3.yaml"), lines.append) == 0
    assert lines == ["runs/s3: this run is finished; nothing to do"]
    assert {path: path.stat().st_mtime_ns for path in (stages / "s3").rglob("*") if path.name != ".lock"} == {
        path: time for path, time in before.items() if path.name != ".lock"
    }
    with pytest.raises(ValueError, match=r"runs/s3: a finished run of another recipe \(seed: 0 in the run, 1 now\)"):
        run(recipe_for(Path("runs/s3"), "stage3", "seed=1"))


def test_lora_is_merged_into_the_result(stages, tmp_path):
    run(recipe_for(tmp_path / "out", "stage3", "lora={language: {r: 4, alpha: 8}}", "learning_rate=1e-3"))
    before, after = weights(stages.parent / "new-vl"), weights(tmp_path / "out")
    assert {*after} == {*before}
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in changed
    assert "language_model.model.embed_tokens.weight" not in changed
    assert read_stages(tmp_path / "out")[0]["lora.language.r"] == 4


# Going on


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("save 4", marks=pytest.mark.slow),
        *(pytest.param(moment, marks=pytest.mark.nightly) for moment in ("step 3", "result")),
    ],
)
def test_a_killed_run_goes_on_bit_by_bit(stages, tmp_path, moment):
    """The expected log is that of stage 3 of `stages`, which was not interrupted."""
    arguments = ["stage3", *TOY, "model=runs/s2", "data=corpus3.yaml", f"output={tmp_path / 'out'}"]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(stages.parent / "datasets-cache")}
    command = [sys.executable, str(ROOT / "tests" / "run_stage.py"), moment, *arguments]
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    assert not (tmp_path / "out" / "training.json").exists()
    lines: list[str] = []
    recipe = recipe_for(tmp_path / "out", "stage3", "model=runs/s2", "data=corpus3.yaml")
    assert run(recipe, lines.append) == 0
    first = {"step 3": 2, "save 4": 2, "result": 6}[moment]
    assert any(line.endswith(f"from checkpoint-{first}") for line in lines)
    assert any("checkpoint-4: not complete, removed" in line for line in lines) == (moment == "save 4")
    assert read_log(tmp_path / "out") == read_log(stages / "s3")
    expected = weights(stages / "s3")
    for name, tensor in weights(tmp_path / "out").items():
        assert torch.equal(tensor, expected[name]), name


def test_sigterm_saves_and_exits_with_the_code_for_later(stages, tmp_path, after_step, monkeypatch):
    """A launcher sends the signal to all processes of the run, those that read data, too."""
    recipe = recipe_for(tmp_path / "out", "stage3", "model=runs/s2", "data=corpus3.yaml", "workers=1")

    def terminate() -> None:
        processes = [*(str(worker.pid) for worker in multiprocessing.active_children()), str(os.getpid())]
        subprocess.run(["kill", *processes], check=True)
        assert len(processes) == 2

    with monkeypatch.context():
        after_step(3, terminate)
        assert run(recipe) == INTERRUPTED == 75
    assert (tmp_path / "out" / "checkpoint-3" / "complete.json").exists()
    assert not (tmp_path / "out" / "training.json").exists()
    assert json.loads((tmp_path / "out" / "interrupted").read_text()) == {"step": 3, "reason": "SIGTERM"}
    assert run(recipe) == 0
    assert not (tmp_path / "out" / "interrupted").exists()
    assert read_log(tmp_path / "out") == read_log(stages / "s3")


def test_sigterm_before_the_first_step_has_the_code_for_later(place, tmp_path, monkeypatch):
    recipe, output = recipe_for(tmp_path / "out", "stage1", "max_steps=1"), tmp_path / "out"

    def terminate(*arguments: object, **options: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    with monkeypatch.context() as patch:
        patch.setattr(Corpus, "from_yaml", terminate)
        assert run(recipe) == INTERRUPTED
    assert json.loads((output / "interrupted").read_text()) == {"step": 0, "reason": "SIGTERM"}
    (output / ".run.json.0123abcd").touch()  # what a rank that starts later may meet
    assert run(recipe) == 0
    assert not (output / "interrupted").exists()


def test_torch_writes_to_authors_of_engines_and_all_other_warnings_stay():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _be_quiet()
        with suppress(Exception):
            torch.distributed.all_gather_into_tensor(None, None)
        warnings.warn("`torch.distributed` is ours", FutureWarning, stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["`torch.distributed` is ours"]


def test_another_engine_is_named_once():
    recorded = {"recipe": {"engine": "auto"}, "engine": "zero3"}
    current = {"recipe": {"engine": "ddp"}, "engine": "ddp"}
    assert differences(recorded, current) == ['engine: "zero3" in the run, "ddp" now']


def test_max_hours_saves_and_exits(place, tmp_path):
    recipe = recipe_for(tmp_path / "out", "stage1", "max_hours=1e-9")
    assert run(recipe) == INTERRUPTED
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-1"]
    assert json.loads((tmp_path / "out" / "interrupted").read_text()) == {"step": 1, "reason": "max_hours"}


def test_a_failed_save_leaves_the_last_checkpoint(stages, tmp_path, monkeypatch):
    recipe = recipe_for(tmp_path / "out", "stage3", "model=runs/s2", "data=corpus3.yaml", "save_total_limit=1")
    save = torch.save

    def fill_disk(content, path, *arguments, **options):
        if "checkpoint-4" in str(path):
            raise OSError(28, "No space left on device")
        save(content, path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fill_disk)
        with pytest.raises(OSError, match=r"checkpoint-4: cannot be saved: .*No space.*goes on from checkpoint-2"):
            run(recipe)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    assert run(recipe) == 0
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-6"]
    assert read_log(tmp_path / "out") == read_log(stages / "s3")


@pytest.mark.parametrize("damage", ["cut", "removed"])
def test_a_damaged_checkpoint_does_not_count(place, tmp_path, after_step, damage):
    recipe = recipe_for(tmp_path / "out", "stage1", "max_steps=5")
    after_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run(recipe) == INTERRUPTED
    file = tmp_path / "out" / "checkpoint-4" / "optimizer.pt"
    file.unlink() if damage == "removed" else os.truncate(file, 1000)
    lines: list[str] = []
    assert run(recipe, lines.append) == INTERRUPTED  # after step 4, again
    assert f"{tmp_path}/out/checkpoint-4: not complete, removed" in lines
    assert any(line.endswith("from checkpoint-2") for line in lines)


@pytest.mark.parametrize("offset", [200, -200], ids=["pickle", "directory of the archive"])
def test_a_checkpoint_that_was_overwritten_is_named(place, tmp_path, after_step, offset):
    recipe = recipe_for(tmp_path / "out", "stage1", "max_steps=5")
    after_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run(recipe) == INTERRUPTED
    with (tmp_path / "out" / "checkpoint-4" / "optimizer.pt").open("r+b") as file:
        file.seek(offset, os.SEEK_SET if offset > 0 else os.SEEK_END)
        file.write(bytes(150))
    with pytest.raises(ValueError, match=r"checkpoint-4: .*: a file is corrupt: remove this folder"):
        run(recipe)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["seed=1", "learning_rate=1e-3"], r"learning_rate: 0.0002 in the run, 0.001 now; seed: 0 in the run, 1 now"),
        (["data=meta.yaml"], "data: other samples than in the run"),
        (["model=other-vl"], "model: other weights than in the run"),
    ],
)
def test_a_run_does_not_go_on_as_another(place, changes, message):
    output = place / "stopped"
    if not output.exists():
        assert run(recipe_for(output, "stage1", "max_hours=1e-9")) == INTERRUPTED
        Path("meta.yaml").write_text("sources:\n  - {name: meta, path: meta.json}\n")
        shutil.copytree("new-vl", "other-vl")
        content = bytearray(Path("other-vl/model.safetensors").read_bytes())
        content[-1] ^= 1
        Path("other-vl/model.safetensors").write_bytes(content)
    before = (output / "log.jsonl").read_bytes()
    with pytest.raises(ValueError, match=rf"stopped: the run there is another one \({re.escape(message)}\)"):
        run(recipe_for(output, "stage1", *changes))
    assert (output / "log.jsonl").read_bytes() == before and (output / "checkpoint-1" / "complete.json").exists()


# Bad input


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=null"], "model: missing"),
        (["data=null"], "data: missing"),
        (["output=null"], "output: missing"),
        (["model=nowhere"], "nowhere: no such file or folder"),
        (["model=tower"], "tower: expected a SAIL-VL, got model_type 'sailvit': build one"),
        (["model=wide"], r"wide: mlp1\S+: expected the shape .* got .*: the weights are of another width"),
        (["model=lacking"], "lacking: the weights lack mlp1"),
        (["data=nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["output=holiday"], r"holiday: it holds something else \(photo.jpg\), not a run"),
        (["output=corpus.yaml"], "corpus.yaml: expected a folder, got a file"),
        (["output=new-vl/run"], "is inside the source"),
        (["kinds={ocr: 0.5}"], r"kinds.ocr: expected 50.0% of the samples, got 12.5% .* write `kinds: {ocr: 0.5}`"),
        (["kinds={code: 0.5}"], r"kinds.code: expected 50.0% of the samples, got 0.0%"),
        (["engine=zero3"], "engine: zero3 needs a launcher: torchrun"),
        (["engine=ddp"], "engine: ddp needs a launcher: torchrun"),
        (
            ["language_parameters=[400000000, 600000000]"],
            r"expects a language model of .* parameters, got [\d,]+ in new-vl",
        ),
        (["report_to=[tensorbord]"], "report_to: expected some of .*tensorboard.*, got 'tensorbord'"),
        (["data=text.yaml"], "text.yaml: all steps are text alone"),
    ],
)
def test_bad_input_is_one_line(place, overrides, message, capsys):
    prepare_bad_input(place)
    arguments = ["model=new-vl", "data=corpus.yaml", "output=bad-output", *TOY, *overrides]
    assert sailvit_cli.main(["train", "stage1", *arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sailvit train:")]
    assert re.search(message, line), line
    assert not list(Path("bad-output").glob("checkpoint-*"))
    shutil.rmtree("bad-output", ignore_errors=True)


def prepare_bad_input(place: Path) -> None:
    if (place / "holiday").exists():
        return
    (place / "holiday").mkdir()
    (place / "holiday" / "photo.jpg").touch()
    (place / "text.jsonl").write_text(json.dumps({"messages": [
        {"role": "user", "content": "3 + 4?"}, {"role": "assistant", "content": "7"},
    ]}))  # fmt: skip
    (place / "text.yaml").write_text("sources:\n  - {name: text, path: text.jsonl}\n")
    convert_checkpoint(place / "new-vl", place / "tower", part="vision", verify=False)
    for name, change in {"wide": lambda tensor: tensor[:-1], "lacking": lambda tensor: None}.items():
        shutil.copytree(place / "new-vl", place / name)
        tensors = dict(weights(place / name))
        key = next(key for key in sorted(tensors) if key.startswith("mlp1.") and key.endswith("weight"))
        changed = change(tensors.pop(key))
        tensors |= {} if changed is None else {key: changed.contiguous()}
        save_file(tensors, place / name / "model.safetensors", metadata={"format": "pt"})


def test_an_integration_that_is_not_installed_is_named_before_anything_is_loaded(place, monkeypatch):
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    with pytest.raises(ImportError, match=r"report_to: wandb: WandbCallback requires wandb .*, or set report_to=\[\]"):
        check_environment(recipe_for("out", "stage1", "report_to=[wandb]"), 1)


def test_fewer_samples_than_ranks_are_refused(place, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ValueError, match="samples_per_step: expected at least one sample of each of 8 ranks"):
        run(recipe_for(place / "bad-output"))


def test_a_missing_compiler_is_named(place, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ImportError, match=r"DeepSpeed on CPU needs ninja and c[+][+] on PATH"):
        run(recipe_for(place / "bad-output", "stage1", "engine=zero2"))


def test_steps_of_text_alone_are_counted(place, tmp_path):
    lines: list[str] = []
    Path("mixed.jsonl").write_text(Path("chat.jsonl").read_text())
    Path("mixed.yaml").write_text("sources:\n  - {name: mixed, path: mixed.jsonl, image_root: examples}\n")
    overrides = ["data=mixed.yaml", "samples_per_step=1", "epochs=1"]
    assert run(recipe_for(tmp_path / "out", "stage1", *overrides), lines.append) == 0
    assert any(line.startswith("1 of 2 steps are text alone: they train nothing") for line in lines)


def test_the_plan_reads_no_weights(place, tmp_path, capsys):
    shutil.copytree("new-vl", tmp_path / "light")
    (tmp_path / "light" / "model.safetensors").unlink()
    arguments = ["stage3", f"model={tmp_path / 'light'}", "--plan", "--gpus", "64", "--gpu", "h100"]
    assert sailvit_cli.main(["train", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "71,290 of 512 samples" in printed and "10,304 NPU hours" in printed and "64 x h100" in printed
    plan, origin = plan_run(load_recipe("stage3", ["model=new-vl", "data=corpus.yaml", *TOY]), 1, None)
    assert (plan.samples, plan.steps, origin) == (8, 6, "")


@pytest.mark.parametrize(("width", "layers", "fits"), [(896, 24, True), (1536, 28, False)])
def test_the_small_language_model_of_the_ablation_is_checked(width, layers, fits):
    """The shapes of Qwen2.5-0.5B and Qwen2.5-1.5B."""
    text = {
        "model_type": "qwen2", "hidden_size": width, "intermediate_size": {896: 4864, 1536: 8960}[width],
        "num_hidden_layers": layers, "num_attention_heads": width // 64, "num_key_value_heads": 2,
        "vocab_size": 151936, "tie_word_embeddings": True,
    }  # fmt: skip
    recipe, config = load_recipe("stage3-language-0.5b", ["model=new-vl"]), SAILVLConfig(text_config=text)
    if fits:
        check_language(recipe, config)
        return
    with pytest.raises(ValueError, match=r"stage3-language-0.5b expects .* 600,000,000 parameters, got 1,5\d\d,"):
        check_language(recipe, config)


def test_out_of_memory_names_settings_that_fit(place, tmp_path, monkeypatch, capsys):
    class Device:
        total_memory = 300e6

    step = RunTrainer.training_step

    def exhaust(trainer, *arguments):
        if trainer.state.global_step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return step(trainer, *arguments)

    monkeypatch.setattr(RunTrainer, "training_step", exhaust)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: {3: Device}[index])
    arguments = ["model=new-vl", "data=corpus.yaml", f"output={tmp_path / 'out'}", "gradient_checkpointing=false"]
    assert sailvit_cli.main(["train", "stage3", *TOY, *arguments]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sailvit train:")]
    assert re.fullmatch(r"sailvit train: rank 0: out of memory: .*=\S+ would fit: \S+ of 0.25 GiB", line), line
    assert (tmp_path / "out" / "checkpoint-2" / "complete.json").exists()


# Failures of one rank


@pytest.fixture
def as_rank(monkeypatch):
    """Be a rank of three, in turn; the launcher's store is one of this process."""
    store = torch.distributed.TCPStore("localhost", 0, is_master=True)
    monkeypatch.setattr(failures, "WAIT_SECONDS", 0.3)
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": store.port, "WORLD_SIZE": 3}.items():
        monkeypatch.setenv(name, str(value))
    yield lambda rank: monkeypatch.setenv("RANK", str(rank))
    del store


def test_an_error_of_all_ranks_is_printed_once(as_rank):
    printed = []
    for rank, error in enumerate([ValueError("data: no"), ValueError("data: no"), ValueError("disk: no")]):
        as_rank(rank)
        printed.append(not failures.is_printed_by_first_rank(error))
    assert printed == [True, False, True]


def test_ranks_that_do_not_answer_are_named_once(as_rank):
    as_rank(2)
    error = RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer")
    assert failures.is_lost_connection(error) and not failures.is_lost_connection(RuntimeError("no"))
    explained = failures.explain_lost_rank(error, "RESUME")
    assert re.fullmatch(r"no answer from ranks 0, 1, ended or stuck \(.*closed by peer\); RESUME", str(explained))
    as_rank(0)
    assert str(failures.explain_lost_rank(error, "RESUME")) == "stopped, since another rank did not answer"


def test_a_rank_that_failed_is_not_called_silent(as_rank):
    for rank in (1, 2):
        as_rank(rank)
        failures.is_printed_by_first_rank(OSError(f"disk of {rank}"))
    as_rank(0)
    explained = failures.explain_lost_rank(RuntimeError("gloo: closed"), "RESUME")
    assert str(explained) == "stopped, since another rank failed (gloo: closed); RESUME"


def test_a_run_is_stopped_at_its_start_if_all_ranks_are(as_rank):
    """The launcher of a rank that failed sends SIGTERM to the others: that is no reason to requeue the job."""
    stopped = []
    for rank in (1, 2, 0):
        as_rank(rank)
        stopped.append(failures.all_ranks_stop())
    assert stopped == [False, False, True]


@pytest.mark.parametrize("was_open", [True, False])
def test_without_the_store_of_the_launcher_every_rank_prints(as_rank, monkeypatch, was_open):
    """The store ends with the process that had it, while a rank waits; or there is none."""
    as_rank(1)
    monkeypatch.setenv("MASTER_PORT", "1")
    if was_open:
        server = torch.distributed.TCPStore("localhost", 0, is_master=True)
        client = torch.distributed.TCPStore("localhost", server.port, is_master=False)
        monkeypatch.setattr(failures, "_open_store", lambda: client)
        del server
    assert not failures.is_printed_by_first_rank(ValueError("data: no"))
    explained = failures.explain_lost_rank(RuntimeError("gloo: closed"), "RESUME")
    assert str(explained) == "the connection to another rank is lost (gloo: closed); RESUME"


# Several processes


def launch(moment: str, *arguments: str, processes: int = 2) -> subprocess.CompletedProcess:
    """Run `tests/run_stage.py` on several processes."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path, "HF_DATASETS_CACHE": "datasets-cache"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [str(ROOT / "tests" / "run_stage.py"), moment, arguments[0], *TOY, *arguments[1:]]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)


def check_launch(*arguments: str, processes: int = 2) -> str:
    result = launch("never", *arguments, processes=processes)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def zero3(place) -> Path:
    """The three stages under ZeRO-3 in bfloat16, stage 3 killed after step 3 and started again."""
    (place / "zero3").mkdir()
    options = ["data=corpus.yaml", "engine=zero3", "precision=bfloat16"]
    for stage, model, output in (
        ("stage1", "new-vl", "s1"),
        ("stage2", "zero3/s1", "s2"),
        ("stage3", "zero3/s2", "s3"),
    ):
        arguments = [stage, f"model={model}", f"output=zero3/{output}", *options]
        if stage == "stage3":
            shutil.rmtree("zero3/whole", ignore_errors=True)
            check_launch(stage, f"model={model}", "output=zero3/whole", *options)
            assert launch("step 3", *arguments).returncode != 0
        printed = check_launch(*arguments)
        assert printed.count(f"zero3/{output}: finished") == 1  # by the first rank alone
    return place / "zero3"


@pytest.mark.nightly
def test_zero3_changes_only_the_components_of_the_recipe(zero3, place):
    before = {name: tensor.float() for name, tensor in weights(place / "new-vl").items()}
    for name, trained in TRAINED.items():
        after = weights(zero3 / name)
        assert {*after} == {*before}
        changed = {key for key, tensor in after.items() if not torch.equal(tensor, before[key])}
        assert {key.split(".")[0] for key in changed} == {key.split(".")[0] for key in after if key.startswith(trained)}
        assert changed <= {key for key in after if key.startswith(trained)}
        before = after
    assert [stage["engine"] for stage in read_stages(zero3 / "s3")] == ["zero3"] * 3
    assert {stage["ranks"] for stage in read_stages(zero3 / "s3")} == {2}


@pytest.mark.nightly
def test_zero3_starts_from_float32_masters(zero3):
    """With a learning rate of 0, in warm-up, a stage returns what it started from."""
    options = ["data=corpus.yaml", "engine=zero3", "precision=bfloat16", "max_steps=1", "warmup_ratio=0.5"]
    check_launch("stage2", "model=zero3/s1", "output=zero3/still", *options)
    before, after = weights(zero3 / "s1"), weights(zero3 / "still")
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    connector = torch.cat([tensor.flatten() for name, tensor in before.items() if name.startswith("mlp1.")])
    assert not torch.equal(connector, connector.bfloat16().float())


@pytest.mark.nightly
def test_a_killed_run_under_zero3_goes_on_bit_by_bit(zero3):
    assert read_log(zero3 / "s3") == read_log(zero3 / "whole")
    expected = weights(zero3 / "whole")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(zero3 / "s3").items())


@pytest.mark.nightly
def test_zero_does_not_go_on_with_other_ranks(zero3):
    shutil.copytree("zero3/s3", "zero3/fewer")
    Path("zero3/fewer/training.json").unlink()
    content = json.loads(Path("zero3/fewer/run.json").read_text())
    Path("zero3/fewer/run.json").write_text(json.dumps({**content, "ranks": 3}))
    result = launch(
        "never",
        "stage3",
        "model=zero3/s2",
        "data=corpus.yaml",
        "output=zero3/fewer",
        "engine=zero3",
        "precision=bfloat16",
    )
    assert "the run there is another one (ranks: 3 in the run, 2 now)" in result.stderr


@pytest.mark.nightly
@pytest.mark.parametrize("engine", ["ddp", "zero2", "fsdp2"])
def test_other_engines_train_the_same_stage(place, tmp_path, engine):
    """The run of the engine is killed after step 3 and goes on."""
    assert sailvit_cli.main(["train", *stage2_of(tmp_path / "single"), *TOY]) == 0
    options = stage2_of(tmp_path / engine, f"engine={engine}")
    assert launch("step 3", *options).returncode != 0
    check_launch(*options)
    for line, expected in zip(read_log(tmp_path / engine), read_log(tmp_path / "single"), strict=True):
        assert line == pytest.approx(expected, rel=1e-4)
    before, after, single = (weights(path) for path in (place / "new-vl", tmp_path / engine, tmp_path / "single"))
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, single[name], rtol=1e-4, atol=1e-6)
        assert name.startswith(TRAINED["s2"]) or torch.equal(tensor, before[name].float())


@pytest.fixture(scope="module")
def whole(place) -> Path:
    """A run of FSDP2 on two ranks, without interruption."""
    check_launch(*stage2_of("whole", "engine=fsdp2"))
    return place / "whole"


def stage2_of(output: Path | str, *overrides: str) -> list[str]:
    """Stage 2, with an epsilon of AdamW that does not amplify noise."""
    fixed = ["stage2", "model=new-vl", "data=corpus.yaml", "adam_epsilon=1e-2", "learning_rate=1e-3"]
    return [*fixed, f"output={output}", *overrides]


def check_same_steps(output: Path, expected: Path) -> None:
    lines = [
        [json.loads(line) for line in (each / "log.jsonl").read_text().splitlines()] for each in (output, expected)
    ]
    for line, other in zip(*lines, strict=True):
        assert all(line[name] == other[name] for name in ("step", "samples", "tokens", "answer_tokens", "tiles"))
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
    for name, tensor in weights(output).items():
        torch.testing.assert_close(tensor, weights(expected)[name], rtol=1e-4, atol=1e-6)


@pytest.mark.nightly
def test_fsdp2_goes_on_with_other_ranks(whole, tmp_path):
    """Two ranks, then one, then two; the first two runs are killed."""
    arguments = stage2_of(tmp_path / "out", "engine=fsdp2")
    assert launch("step 3", *arguments).returncode != 0
    assert launch("step 5", *arguments, processes=1).returncode != 0
    printed = check_launch(*arguments)
    assert "from checkpoint-4" in printed and "fsdp2 on 2 rank(s)" in printed
    check_same_steps(tmp_path / "out", whole)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("moment", "message"),
    [
        ("lone 3", r"rank 0: no answer from rank 1, ended or stuck \(.*\); the same command goes on from checkpoint-2"),
        (
            "stuck 3",
            r"rank 0: no answer from rank 1, ended or stuck \(.*\); the same command goes on from checkpoint-2",
        ),
        ("broken 3", "rank 1: broken: unreadable"),
        ("all broken 3", "broken: unreadable"),
    ],
)
def test_the_loss_of_a_rank_ends_the_others_and_is_named(whole, tmp_path, moment, message):
    arguments = stage2_of(tmp_path / "out", "engine=ddp", "timeout_minutes=0.1")
    result = launch(moment, *arguments)
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if line.startswith("sailvit train:")]
    assert len([line for line in lines if re.fullmatch(f"sailvit train: {message}", line)]) == 1, result.stderr
    assert len(lines) == (2 if moment == "broken 3" else 1)  # rank 0 adds that it stopped
    assert 'run_stage.py", line' not in result.stderr  # no traceback of a rank
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    check_launch(*arguments)
    check_same_steps(tmp_path / "out", whole)


@pytest.mark.nightly
def test_sigterm_to_torchrun_leaves_a_file_for_the_scheduler(whole, tmp_path):
    arguments = stage2_of(tmp_path / "out", "engine=fsdp2", "workers=2")
    result = launch("launcher 3", *arguments)
    assert result.returncode not in (0, INTERRUPTED)  # torchrun hides it
    interrupted = tmp_path / "out" / "interrupted"
    assert interrupted.exists(), result.stdout[-2000:] + result.stderr[-4000:]
    assert json.loads(interrupted.read_text())["reason"] == "SIGTERM"
    assert not (tmp_path / "out" / "training.json").exists()
    check_launch(*arguments)
    assert not interrupted.exists() and (tmp_path / "out" / "training.json").exists()
    check_same_steps(tmp_path / "out", whole)


@pytest.mark.nightly
@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
def test_a_checkpoint_of_an_engine_has_every_weight_once(place, tmp_path, engine):
    """No model.safetensors next to the files of the engine, which `sailvit convert` reads."""
    arguments = stage2_of(tmp_path / "out", f"engine={engine}", "max_steps=2")
    check_launch(*arguments)
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert not list(checkpoint.glob("*.safetensors")) and (checkpoint / "config.json").exists()
    convert_checkpoint(checkpoint, tmp_path / "tower", part="vision", verify=False)
    after = weights(tmp_path / "out")
    for name, tensor in weights(tmp_path / "tower").items():
        assert torch.equal(tensor.float(), after[f"vision_model.{name}"]), name
