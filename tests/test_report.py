"""`sailvit report`: its numbers against numpy and torch, and a page that needs nothing but itself."""

import importlib.util
import itertools
import json
import re
import shutil
from html.parser import HTMLParser
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PHOTOGRAPH
from doc_pages import write_model
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

import sailvit_cli
from sailvit import SAILViTConfig, SAILViTModel, SAILVLForConditionalGeneration
from sailvit.convert.storage.training_run import open_checkpoint
from sailvit.evaluate.charts import Line, line_chart, nice_ticks
from sailvit.evaluate.encoders import load_encoder
from sailvit.evaluate.probe.results import PAPER_ACCURACIES, match_probes, read_probe
from sailvit.evaluate.report import runs as runs_module
from sailvit.evaluate.report.build import Report, build_report
from sailvit.evaluate.report.page import as_markdown, missing, page
from sailvit.evaluate.report.similarity import MinibatchCKA, compare_encoders, unbiased_hsic
from sailvit.evaluate.report.weights_change import weights_change
from sailvit.train import checkpoints, log


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SKIPPED = {"step": 2, "source": "ocr", "path": "/data/secret/ocr.parquet", "index": 7, "reason": "truncated <image>"}
TRAINED = {"s1": ("mlp1.",), "s2": ("mlp1.", "vision_model."), "s3": ("",)}
LOSSES = {"s1": (3.0, 2.5), "s2": (2.5, 2.0), "s3": (2.0, 1.0)}


def write_run(folder: Path, source: Path, stages: list[dict], seed: int) -> list[dict]:
    """Write a finished run: the source with a change of what the stage trains, and the files of `sailvit train`."""
    shutil.copytree(source, folder)
    tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        if name.startswith(TRAINED[folder.name]):
            tensors[name] = tensor + 0.1 * tensor.std() * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    stage = {"recipe": f"stage{len(stages) + 1}", "trained_from": source.name, "step": 2, "samples_seen": 8}
    stage |= {"kinds": ["caption 3", "open qa 1"], "trainable": ["vision"], "learning_rate": 1e-5, "dropped": 4}
    stages = [*stages, stage]
    losses = LOSSES[folder.name]
    lines = [{"step": n, "loss": loss, "loss_by_kind": {"caption": loss + 1}} for n, loss in enumerate(losses, 1)]
    (folder / "run.json").write_text("{}")
    (folder / "training.json").write_text(json.dumps({"training": {"stages": stages}}))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "skipped.jsonl").write_text(json.dumps(SKIPPED) + "\n" if folder.name == "s2" else "")
    return stages


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with new-vl, runs/s1 to s3, and photos."""
    folder = tmp_path_factory.mktemp("place")
    base = write_model(folder / "new-vl", folder)
    tensors = {name: tensor.float() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    stages: list[dict] = []
    source = base
    for seed, name in enumerate(TRAINED):
        stages = write_run(folder / "runs" / name, source, stages, seed)
        source = folder / "runs" / name
    photograph = Image.open(PHOTOGRAPH).resize((120, 90))
    (folder / "photos" / "more").mkdir(parents=True)
    for number in range(9):
        photograph.crop((10 * number, 0, 10 * number + 40, 90)).save(folder / f"photos/more/{number}.png")
    (folder / "photos" / "broken.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def hashes(place) -> dict[str, str]:
    return {
        name: load_encoder(str(place / name), device="cpu").weights_hash for name in ("new-vl", "runs/s2", "runs/s3")
    }


@pytest.fixture(scope="module")
def probe(place, hashes) -> Path:
    """What `sailvit probe new-vl runs/s2 runs/s3 --layers 1 last` writes, as far as the report reads it."""
    return write_probe(place / "probe", hashes, {"val": (100, 10)}, classes=10)


def write_probe(folder: Path, hashes: dict[str, str], tests: dict[str, tuple[int, int]], classes: int) -> Path:
    results, layers = [], []
    for number, model in enumerate(hashes):
        for test in tests:
            entry = {"model": model, "test": test, "head": "mlp", "low": 0.1, "high": 0.9, "n": 100}
            results.append({**entry, "accuracy": 0.5 + number / 100})
            layers += [{**entry, "accuracy": 0.4 + number / 100, "layer": layer} for layer in (1, "last")]
    data = {"data/train": {"images": 1000, "classes": classes}}
    data |= {f"data/{name}": {"images": images, "classes": own} for name, (images, own) in tests.items()}
    encoders = {name: {"weights_sha256": weights} for name, weights in hashes.items()}
    settings = {"encoders": encoders, "train": "data/train", "data": data, "heads": {"caption": "mlp: 10 epochs."}}
    folder.mkdir()
    heads = [{"model": model, "head": "mlp", "layer": at, "is_best": at == 1} for model in hashes for at in (1, "last")]
    content = {"settings": settings, "results": results, "layers": layers, "heads": heads, "skipped": []}
    (folder / "results.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def report(place, probe) -> Report:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        return build_report([Path("runs")], probes=[probe], images=Path("photos"), device="cpu")


@pytest.fixture(scope="module")
def html(report) -> str:
    return page(report, "sailvit report runs")


class Page(HTMLParser):
    """Links, visible text and the texts of points of a page."""

    def __init__(self, html: str):
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.links += [
            value for key, value in attrs if key in ("src", "href", "srcset", "poster", "xlink:href") and value
        ]

    def handle_data(self, data: str) -> None:
        self.text += data


# CKA


def hsic_of_quadruples(first: np.ndarray, second: np.ndarray) -> float:
    """The unbiased HSIC by its definition: the mean over all quadruples of different samples."""
    total = [
        first[i, j] * (second[i, j] + second[q, r] - 2 * second[i, q])
        for i, j, q, r in permutations(range(len(first)), 4)
    ]
    return float(np.mean(total))


def test_unbiased_hsic_is_the_mean_over_quadruples():
    generator = np.random.default_rng(0)
    first, second = (features @ features.T for features in (generator.normal(size=(6, 3)) for _ in range(2)))
    ours = unbiased_hsic(torch.from_numpy(first), torch.from_numpy(second))
    assert ours.item() == pytest.approx(hsic_of_quadruples(first, second))


def cka(*batches: tuple[torch.Tensor, torch.Tensor]) -> float | None:
    estimate = MinibatchCKA()
    for first, second in batches:
        estimate.update(first, second)
    return estimate.value()


def test_cka_of_many_samples_is_that_of_the_full_batch():
    """||Y'X||^2 / (||X'X|| ||Y'Y||) of centred features, whose bias vanishes with the number of samples."""
    generator = np.random.default_rng(0)
    first = generator.normal(size=(4000, 5)) * (3, 2, 1, 1, 1) + 7
    second = first @ generator.normal(size=(5, 4)) + generator.normal(size=(4000, 4))
    x, y = first - first.mean(0), second - second.mean(0)
    expected = np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))
    batches = zip(torch.from_numpy(first).split(500), torch.from_numpy(second).split(500), strict=True)
    assert 0.3 < expected < 0.95
    assert cka(*batches) == pytest.approx(expected, abs=0.01)


def test_cka_does_not_depend_on_rotation_scale_and_mean():
    torch.manual_seed(0)
    first, second = torch.randn(40, 8), torch.randn(40, 8)
    second[:, 0] += 2 * first[:, 0]
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    assert cka((first, 3 * first @ rotation + 5)) == pytest.approx(1, abs=1e-6)
    assert cka((first, 3 * second @ rotation + 5)) == pytest.approx(cka((first, second)), abs=1e-5)
    assert cka((first, torch.ones(40, 8))) is None


def test_cka_of_independent_features_is_near_zero_even_with_fewer_samples_than_features():
    torch.manual_seed(0)
    assert abs(cka(*((torch.randn(20, 100), torch.randn(20, 100)) for _ in range(50)))) < 0.03


def test_an_encoder_is_compared_by_its_own_tokens(place):
    """Base and stage 1, whose encoder is the same, and stage 2; tokens are those of the model."""
    names = [str(place / name) for name in ("new-vl", "runs/s1", "runs/s2")]
    files = sorted((place / "photos" / "more").iterdir())
    base, first, second = compare_encoders(names, files, pictures=2, device="cpu")
    assert base.layers == (1, 2, 3, "last")
    assert first.similarity == pytest.approx([1] * 4) and max(second.similarity) < 0.999
    encoder = load_encoder(names[2], device="cpu")
    pixels = torch.stack([encoder.preprocessing(Image.open(file).convert("RGB")) for file in files])
    model = SAILVLForConditionalGeneration.from_pretrained(names[2], dtype=torch.float32).vision_model
    with torch.no_grad():
        states = model(pixel_values=pixels, output_hidden_states=True)
    expected = torch.nn.functional.normalize(states.last_hidden_state, dim=-1)[:2]
    torch.testing.assert_close(second.tokens.flatten(1, 2), expected)
    before = SAILVLForConditionalGeneration.from_pretrained(names[0], dtype=torch.float32).vision_model
    with torch.no_grad():
        hidden = before(pixel_values=pixels, output_hidden_states=True).hidden_states
    batches = [slice(0, 8), slice(8, 9)]  # 16 patches: all are drawn
    pairs = [(hidden[2][part].flatten(0, 1), states.hidden_states[2][part].flatten(0, 1)) for part in batches]
    assert second.similarity[1] == pytest.approx(cka(*pairs), abs=1e-4)


def test_encoders_of_another_depth_are_not_compared(place, folder, tmp_path):
    config = SAILViTConfig.from_pretrained(folder, num_hidden_layers=2)
    SAILViTModel(config).save_pretrained(tmp_path)
    shutil.copy(folder / "preprocessor_config.json", tmp_path)
    with pytest.raises(ValueError, match=r"expected 3 blocks, 16 tokens .* got 2 blocks"):
        compare_encoders([str(folder), str(tmp_path)], [PHOTOGRAPH], pictures=1, device="cpu")


# Weights


def test_change_of_weights_is_that_of_torch(place):
    before, after = (load_file(place / name / "model.safetensors") for name in ("new-vl", "runs/s3"))
    change = weights_change(*(open_checkpoint(str(place / name)) for name in ("new-vl", "runs/s3")))

    def expected(part: str) -> float:
        names = [name for name in before if re.match(part, name)]
        first, second = (torch.cat([tensors[name].double().flatten() for name in names]) for tensors in (before, after))
        return ((second - first).norm() / first.norm()).item()

    assert list(change.blocks) == [1, 2, 3, "other"] and change.left_out == ()
    assert change.components["connector"] == pytest.approx(expected(r"mlp1\."))
    assert change.components["language"] == pytest.approx(expected(r"language_model\."))
    assert change.blocks[2] == pytest.approx(expected(r"vision_model\.trunk\.blocks\.1\."))
    assert change.blocks["other"] == pytest.approx(expected(r"vision_model\.(?!trunk\.blocks\.)"))


def test_tensors_that_one_model_lacks_are_named(place, tmp_path):
    tensors = load_file(place / "new-vl" / "model.safetensors")
    lost, resized = "vision_model.trunk.post_trunk_norm.weight", "language_model.model.embed_tokens.weight"
    tensors.pop(lost)
    tensors[resized] = tensors[resized][1:].clone()
    save_file({**tensors, "extra": torch.zeros(1)}, tmp_path / "model.safetensors")
    change = weights_change(
        open_checkpoint(str(place / "new-vl")), open_checkpoint(str(tmp_path / "model.safetensors"))
    )
    assert change.left_out == ("extra", resized, lost) and {*change.components.values()} == {0.0}


# The page


def test_the_page_is_self_contained(html):
    parsed = Page(html)
    assert parsed.links and all(link.startswith("data:") for link in parsed.links)
    assert "default-src 'none'" in html and "script" not in parsed.tags
    assert not re.search(r"https?://|@import|url\(", html)


def test_the_page_shows_every_stage_in_every_part(html):
    parsed = Page(html)
    sections = dict(re.findall(r'<section[^>]* aria-labelledby="(\w+)">(.*?)</section>', html, re.DOTALL))
    assert {*sections} == {
        "stages", "probe", "weights", "similarity", "losses", "mix", "skipped", "pictures", "missing", "notes"
    }  # fmt: skip
    for name in ("stages", "weights", "similarity", "losses", "mix", "skipped", "pictures", "notes"):
        assert all(stage in sections[name] for stage in ("s1", "s2", "s3")), name
    assert "new-vl (base) → s1 → s2 → s3" in parsed.text
    assert sections["pictures"].count('class="row"') == 5 and sections["pictures"].count("data:image/png") == 20
    assert "broken.png: no image, or of a format" in parsed.text and "/data/secret" not in html
    assert "1 × truncated <image> ocr: ocr.parquet, index 7" in parsed.text


def test_points_of_the_charts_have_the_values_of_the_report(report, html):
    text = Page(html).text
    assert f"s2, 3: {100 * report.changes[1].blocks[3]:.2f}%" in text
    assert f"s3, last: {report.views[3].similarity[-1]:.4g}" in text
    assert (
        "all, 2: 1" in text
        and "caption, 1: 4" in text
        and "s3, last: 42.00%" in text
        and "new-vl (base), 1: 40.00%" in text
    )
    assert "caption 75.0% 3" in text and "open qa 25.0% 1" in text


def test_models_with_the_same_weights_share_the_results_of_a_probe(report):
    accuracies = {one["model"]: one["accuracy"] for one in report.probe.results}
    assert accuracies == {"new-vl (base)": 0.5, "s1": 0.5, "s2": 0.51, "s3": 0.52}


def test_results_of_other_models_and_two_of_the_same_are_refused(probe, hashes):
    content, models = read_probe(probe), {"s3": hashes["runs/s3"]}
    with pytest.raises(ValueError, match=r"results of other models .* expected some of other"):
        match_probes({probe: content}, {"other": "0"})
    with pytest.raises(ValueError, match=r"s3, val, 2-layer MLP is in .*, too: name one of them"):
        match_probes({probe: content, Path("again"): content}, models)


def test_pictures_of_all_models_are_in_one_basis(report):
    assert report.colours.shape == (4, 5, 4, 4, 3)
    assert torch.equal(report.colours[0], report.colours[1]) and not torch.equal(report.colours[1], report.colours[2])


def test_markdown_has_the_tables(report):
    text = as_markdown(report, "sailvit report runs")
    assert "| test, head | new-vl (base) | s1 | s2 | s3 |" in text and "Blocks are those that were chosen" in text
    assert "| val, 2-layer MLP | 50.00 [10.00, 90.00], block 1 | " in text
    assert "| s1 | 0 | " in text and "| s2 | 4 | 75.0 | 25.0 | 1 |" in text
    assert "## Not in this report" in text and "`sailvit report runs`" in text


def test_the_papers_numbers_stand_next_to_the_same_test_sets_only(hashes, report, tmp_path):
    tests = {"val": (50_000, 1000), "imagenet-r": (30_000, 200), "other": (30_001, 200)}
    folder = write_probe(tmp_path / "probe", hashes, tests, classes=1000)
    found = match_probes({folder: read_probe(folder)}, {"s3": hashes["runs/s3"]})
    assert found.paper == {"ImageNet-1k": "val", "ImageNet-R": "imagenet-r"} and found.others == ["new-vl", "runs/s2"]
    text = Page(page(Report(**{**vars(report), "probe": found}))).text
    assert "arXiv 2507.01643" in text and "not measured here" in text and "25.41" not in text
    assert all(f"{accuracy:.2f}" in text for row in PAPER_ACCURACIES.values() for accuracy in (row[0], row[2]))
    assert report.probe.paper == {}


def test_parts_without_input_are_left_out_with_what_would_fill_them(report):
    run = report.runs[0]
    bare = Report(**{
        **vars(report), "probe": None, "pictures": report.pictures[:1],
        "runs": (runs_module.Run(run.folder, "s1", ({"recipe": "stage1"},), (), ()), *report.runs[1:]),
    })  # fmt: skip
    html = page(bare)
    assert 'id="probe"' not in html and 'id="paper"' not in html
    lines = re.search(r'id="missing">.*?</ul>', html, re.DOTALL)[0]
    for text in (
        "--probe DIR",
        "The paper&#39;s accuracies",
        "Loss of s1: log.jsonl",
        "Data mix of s1",
        "--images DIR",
    ):
        assert text in lines


def test_models_that_no_probe_has_are_named(report, place, hashes):
    content = read_probe(place / "probe")
    known = {"new-vl (base)": hashes["new-vl"], "s3": hashes["runs/s3"]}
    found = match_probes({place / "probe": content}, known)
    text = as_markdown(Report(**{**vars(report), "probe": found}))
    assert "- Accuracy of s1, s2: no --probe has it; `sailvit probe` takes several models." in text
    assert "no --probe has it" not in as_markdown(report)


def test_stages_that_are_not_among_the_runs_are_named(report):
    without = Report(**{**vars(report), "runs": (report.runs[0], report.runs[2])})
    assert missing(without)[-1] == "Stage 2 (stage2), which s3 began with: name its run, too."
    assert not any("began with" in line for line in missing(report))


def test_the_files_are_those_of_training():
    assert (runs_module.RUN, runs_module.LOG, runs_module.SKIPPED) == (checkpoints.RUN, log.LOG, log.SKIPPED)


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_around_the_range(low, width):
    ticks = nice_ticks(low, low + width)
    assert 3 <= len(ticks) <= 9 and ticks[0] <= low + 1e-6 * width and ticks[-1] >= low + width * (1 - 1e-6)
    assert np.allclose(np.diff(ticks), ticks[1] - ticks[0])


@pytest.mark.parametrize("steps", [12, 625, 100_000])
def test_labels_of_steps_do_not_touch(steps):
    positions = [round(1 + (steps - 1) * index / 99) for index in range(100)]
    svg = line_chart("loss", "step", positions, [Line("all", [float(p) for p in positions], 0)])
    labels = re.findall(r'<text x="([^"]*)" y="[^"]*" text-anchor="middle">(\d+)<', svg)
    assert len(labels) >= 4
    for (left, before), (right, after) in itertools.pairwise(labels):
        assert float(right) - float(left) > 8 * (len(before) + len(after)) / 2


@given(st.floats(-1e6, 1e6), st.floats(0, 1e3) | st.floats(0, 1e-6), st.booleans())
def test_labels_of_ticks_differ(low, width, percent):
    svg = line_chart("t", "step", [0, 1], [Line("a", [low, low + width], 1)], percent)
    labels = re.findall(r'text-anchor="end">([^<]*)<', svg)
    assert len({*labels}) == len(labels) >= 2


def test_ticks_of_values_near_1_are_readable():
    svg = line_chart("CKA", "block", [1, 2, 3], [Line("s1", [1.0, 0.9999999, 0.99999995], 1)])
    labels = re.findall(r'text-anchor="end">([^<]*)<', svg)
    assert labels == ["0.9994", "0.9996", "0.9998", "1.0000", "1.0002", "1.0004", "1.0006"]


def test_lines_that_would_cover_each_other_are_dashed():
    values = [0.5, 0.6, 0.9]
    lines = [Line("a", values, 0), Line("b", [v + 1e-4 for v in values], 1), Line("c", values, 2)]
    svg = line_chart("t", "block", [1, 2, 3], [*lines, Line("d", [0.1, 0.6, 0.2], 3)])
    assert (
        re.findall(r"<polyline.*?>", svg)[0].count("dash") == 0 and "dash" not in re.findall(r"<polyline.*?>", svg)[3]
    )
    assert len({*re.findall(r'stroke-dasharray="([^"]+)"', svg)}) == 2


def test_a_chart_places_values_between_its_ticks_and_leaves_unknown_ones_out():
    svg = line_chart("t", "step", [0, 10, 20], [Line("<a>", [0.0, None, 1.0], 1)])
    (points,) = re.findall(r'points="([^"]*)"', svg)
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in points.split())
    labels = dict(zip(*[re.findall(p, svg) for p in (r'text-anchor="end">([^<]*)<', r'y1="([^"]*)"')], strict=True))
    assert (y0, y1) == (float(labels["0.0"]), float(labels["1.0"])) and x0 < x1
    assert "<a>" not in svg and "&lt;a&gt;, 20: 1" in svg


# The command


def run_report(*arguments: object) -> int:
    return sailvit_cli.main(["report", *map(str, arguments)])


def test_broken_images_have_exit_code_2(place, tmp_path):
    words = [place / "runs" / "s1", "--base", place / "new-vl", "--images", place / "photos", "--max-images", 3]
    assert run_report(*words, "--out", tmp_path / "r.html", "--device", "cpu") == 2
    assert "Images left out" in (tmp_path / "r.html").read_text()


def test_the_command_writes_page_and_markdown(place, tmp_path, capsys):
    runs, base = (place / "runs" / "s2", place / "runs" / "s3"), place / "new-vl"
    assert run_report(*runs, "--base", base, "--out", tmp_path / "r.html", "--device", "cpu") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.html", "r.md"]
    text = Page((tmp_path / "r.html").read_text()).text
    assert "new-vl (base), s2, s3" in text  # no arrows: stage 1 is not among them
    assert str(place) not in (tmp_path / "r.html").read_text().split("<dt>Command</dt>")[0]
    assert "r.html" in capsys.readouterr().out


BAD = {
    "no runs": (["{place}/photos"], "no run in it"),
    "no folder": (["absent"], "absent: no such folder"),
    "not finished": (["unfinished"], "not finished"),
    "no stages": (["empty"], "no stages in it"),
    "damaged log": (["damaged"], "log.jsonl: line 2 is not JSON"),
    "no base": (["elsewhere"], "'new-vl' is not next to the runs: name its folder with --base"),
    "several bases": (["elsewhere", "{place}/runs/s1", "elsewhere/other"], "got new-vl, other: name it with --base"),
    "another base": (["{place}/runs/s1", "--base", "{encoder}"], "no vision_model.* tensor in common"),
    "no probe": (["{place}/runs", "--probe", "{place}"], "no results.json in it"),
    "probe of old weights": (["{place}/runs", "--probe", "old"], "runs/s3 had other weights than s3 has now"),
    "no images": (["{place}/runs", "--images", "{place}/runs/s1"], "no images"),
    "exists": (["{place}/runs", "--out", "there.html"], "there.md exists"),
    "no page": (["{place}/runs", "--out", "report.pdf"], "expected a .html file"),
    "no folder to write in": (["{place}/runs", "--out", "/proc/report.html"], "/proc: No such file"),
}


@pytest.fixture
def bad_place(place, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("unfinished", "empty", "damaged", "elsewhere"):
        Path(name).mkdir()
        Path(name, "run.json").write_text("{}")
    stage = {"recipe": "stage1", "trained_from": "new-vl"}
    Path("empty/training.json").write_text('{"training": {"stages": []}}')
    for name, trained_from in (("damaged", "new-vl"), ("elsewhere", "new-vl"), ("elsewhere/other", "other")):
        Path(name).mkdir(exist_ok=True)
        stages = [{**stage, "trained_from": trained_from}]
        Path(name, "training.json").write_text(json.dumps({"training": {"stages": stages}}))
    Path("damaged/log.jsonl").write_text('{"step": 1, "loss": 1}\n{"step": ')
    Path("there.md").write_text("mine")
    write_probe(tmp_path / "old", {"runs/s3": "1"}, {"val": (1, 1)}, 1)
    return tmp_path


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_no_file(case, bad_place, place, folder, capsys):
    arguments, message = BAD[case]
    arguments = [argument.format(place=place, encoder=folder) for argument in arguments]
    before = sorted(bad_place.rglob("*"))
    out = [] if "--out" in arguments else ["--out", "report.html"]
    assert run_report(*arguments, *out, "--device", "cpu") == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert sorted(bad_place.rglob("*")) == before


@pytest.mark.nightly
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.skipif(not importlib.util.find_spec("playwright"), reason="playwright is not installed")
@pytest.mark.parametrize("width", [1400, 390])
def test_the_page_in_a_browser(width, html, tmp_path):
    """No error in the console, no request, nothing wider than the screen."""
    from playwright.sync_api import sync_playwright

    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    noise: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": width, "height": 900})
        tab.on("console", lambda message: noise.append(message.text))
        tab.on("pageerror", lambda error: noise.append(str(error)))
        tab.on("request", lambda request: noise.append(request.url) if "://" in request.url[:8] else None)
        tab.goto((tmp_path / "page.html").as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert tab.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
        assert tab.locator("svg.chart").count() == 6
        tables = tab.locator(".scroll").all()
        cut = [table.evaluate("table => table.scrollWidth > table.clientWidth") for table in tables]
        assert any(cut) is (width == 390)
        shade = tables[0].evaluate("table => getComputedStyle(table).backgroundAttachment")
        assert shade == "local, local, scroll, scroll"  # the edge behind which a table goes on has a shadow
        browser.close()
    assert [line for line in noise if not line.startswith("file://")] == []
