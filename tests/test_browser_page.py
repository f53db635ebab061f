"""examples/browser: tiles, tokens and colours in a browser are those of the image processor, the model and Python."""

import http.server
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PHOTOGRAPH, ROOT, relative_difference
from PIL import ExifTags, Image

from sailvit import SAILViTImageProcessor, SAILViTModel, image_processing_sailvit
from sailvit.evaluate.pictures import PrincipalColours, stitch_tiles, stitch_tokens
from sailvit.examples.miniature.shipped import ENCODER
from sailvit.exporters.folder import convert_to_onnx


PAGE = ROOT / "examples" / "browser"
CASES = json.loads((ROOT / "tests" / "data" / "tile_grids.json").read_text())["cases"]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, "color_scheme": "dark"}
DESKTOP = {"viewport": {"width": 1400, "height": 1000}}

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")


def run_node(module: str, script: str, data: object) -> dict:
    """Run statements with `page`, a module of the page, and `data`; return the JSON of what they return."""
    program = f"""
        import * as page from {json.dumps((PAGE / module).as_uri())};
        import {{ readFileSync, writeFileSync }} from "node:fs";
        const data = JSON.parse(readFileSync(0, "utf8"));
        const plain = (_, value) => ArrayBuffer.isView(value) ? [...value] : value;
        writeFileSync(1, JSON.stringify((() => {{ {script} }})(), plain));
    """
    command = ["node", "--input-type=module", "-e", program]
    done = subprocess.run(command, input=json.dumps(data), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def as_data(image: Image.Image) -> dict:
    return {"width": image.width, "height": image.height, "data": np.asarray(image).flatten().tolist()}


@pytest.fixture
def passes_of_pillow_13(monkeypatch):
    monkeypatch.setattr(image_processing_sailvit, "PILLOW_ORDERS_PASSES", True)


@needs_node
def test_grids_are_those_of_the_released_rule():
    """All cases of the file for ports, and their tiles with the thumbnail."""
    script = """
        const size = { width: 448, height: 448 };
        return data.map(([width, height, max_tiles]) => {
            const options = { do_tile: true, use_thumbnail: true, min_tiles: 1, max_tiles, size };
            const grids = page.allGrids(width, height, options);
            const tiles = grids.reduce((sum, [columns, rows]) => sum + columns * rows, 0);
            return [...page.chooseTileGrid(width, height, 1, max_tiles, size), tiles];
        });
    """
    assert run_node("tiling.js", script, CASES) == [case[3:] for case in CASES]


@needs_node
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_tiles": 6, "msac": True, "use_thumbnail": False},
        {"do_tile": False, "do_normalize": False},
        {"min_tiles": 3, "size": {"height": 20, "width": 36}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3},
        {"msac": True, "do_rescale": False},
    ],
)
def test_tiles_are_those_of_the_processor(options, passes_of_pillow_13):
    """Reduced, enlarged, and so tall that Pillow since 13.0 resizes the height first."""
    processor = SAILViTImageProcessor(**{"size": 28, "max_tiles": 4, **options})
    images = [noise(*size) for size in ((150, 100), (31, 17), (40, 400), (28, 28), (1, 3))]
    script = """
        const bytes = (image) => ({ ...image, data: Uint8Array.from(image.data) });
        return data.images.map((image) => page.tileImage(bytes(image), data.options));
    """
    tiled = run_node("tiling.js", script, {"images": [*map(as_data, images)], "options": processor.to_dict()})
    for image, ours in zip(images, tiled, strict=True):
        theirs = processor(image)
        assert ours["grid"] == theirs["tile_grids"][0].tolist() and ours["count"] == theirs["num_tiles"][0]
        pixels = torch.tensor(ours["pixels"]).view(theirs["pixel_values"].shape)
        torch.testing.assert_close(pixels, theirs["pixel_values"], rtol=1e-6, atol=1e-6)


@needs_node
@pytest.mark.parametrize("size", [(70, 44), (13, 8), (160, 5), (100, 60)])
def test_with_the_backend_pil_resizing_equals_pillow(size):
    image = noise(100, 60)
    script = "return page.resize({ ...data.image, data: Uint8Array.from(data.image.data) }, ...data.size, 'pil');"
    if size == (160, 5) and not image_processing_sailvit.PILLOW_ORDERS_PASSES:
        pytest.skip("Pillow before 13.0 resizes the width first")
    ours = run_node("tiling.js", script, {"image": as_data(image), "size": size})
    theirs = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    assert np.array_equal(np.reshape(ours["data"], theirs.shape), theirs)


@needs_node
def test_a_filter_that_the_page_does_not_have_is_an_error():
    script = "try { page.tileImage(data.image, data.options); } catch (error) { return error.message; }"
    options = SAILViTImageProcessor(resample=Image.Resampling.BILINEAR).to_dict()
    message = run_node("tiling.js", script, {"image": as_data(noise(4, 4)), "options": options})
    assert message == "preprocessor_config.json: resample: expected 3 (bicubic), got 2."


@needs_node
@pytest.mark.parametrize("grid", [(1, 1), (3, 2), (1, 2)])
def test_the_tiles_of_a_grid_are_stitched_as_in_python(grid):
    """Next to the first grid there are the two tiles of a second one of msac, and the thumbnail."""
    count = (grid[0] * grid[1] if grid != (1, 1) else 0) + 2 + 1
    tiles = torch.arange(count * 4 * 3).view(count, 2, 2, 3).float()
    script = "return page.stitchTiles(Float32Array.from(data.tokens), data.grid, 2, 3);"
    ours = run_node("colours.js", script, {"tokens": tiles.flatten().tolist(), "grid": grid})
    theirs = stitch_tiles(tiles, grid)
    assert torch.equal(torch.tensor(ours).view(theirs.shape), theirs)


@needs_node
@pytest.mark.parametrize(("count", "depth"), [(600, 24), (5, 40), (300, 3)])
def test_colours_are_those_of_python(count, depth):
    torch.manual_seed(0)
    tokens = torch.randn(count, depth) * torch.arange(1, depth + 1) ** -0.5 + torch.randn(depth)
    script = "return page.principalColours(Float32Array.from(data.flat()), data[0].length);"
    ours = run_node("colours.js", script, tokens.tolist())
    theirs = PrincipalColours.fit(tokens)
    assert ours["shares"] == pytest.approx(theirs.shares, abs=1e-5)
    assert (torch.tensor(ours["levels"]).view(count, 3) - theirs(tokens).int()).abs().max() <= 1


@needs_node
def test_equal_tokens_have_no_components():
    ours = run_node("colours.js", "return page.principalColours(new Float32Array(40).fill(0.1), 4);", None)
    assert ours == {"levels": [0] * 30, "shares": [0, 0, 0]}


# In a browser


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """dist/, as the commands of the page's README.md write it in a fresh checkout."""
    if not shutil.which("npm"):
        pytest.skip("npm is not installed")
    folder = tmp_path_factory.mktemp("examples")
    shutil.copytree(PAGE, folder / "browser", ignore=shutil.ignore_patterns("node_modules", "dist"))
    shutil.copy(PHOTOGRAPH, folder)
    installed = subprocess.run(["npm", "ci"], cwd=folder / "browser", capture_output=True, text=True)
    if "ENOTFOUND" in installed.stderr or "ECONNREFUSED" in installed.stderr:
        pytest.skip("npm does not reach its registry")
    assert installed.returncode == 0, installed.stderr
    model = folder / "miniature"
    convert_to_onnx(ENCODER, model, verify=False, log=lambda line: None)
    command = ["npm", "run", "build", "--", str(model)]
    done = subprocess.run(command, cwd=folder / "browser", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "browser" / "dist"


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder as `python -m http.server` does."""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), partial(QuietHandler, directory=folder))
        self.url = f"http://127.0.0.1:{self.server_port}/"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        super().__exit__(*error)


@pytest.fixture
def browser() -> Iterator:
    pytest.importorskip("playwright")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser, folder: Path, events: list[str], screen: dict = DESKTOP) -> Iterator:
    """The page of a folder in a tab; what its console says and what it requests of other hosts goes into `events`."""
    with Server(folder) as server:
        own = (server.url, "data:", f"blob:{server.url}")
        context = browser.new_context(**screen)
        tab = context.new_page()
        tab.on("console", lambda message: events.append(message.text))
        tab.on("pageerror", lambda error: events.append(str(error)))
        context.on("request", lambda request: None if request.url.startswith(own) else events.append(request.url))
        tab.goto(server.url)
        wait_until(tab, "ready", "failed")
        yield tab
        context.close()


def wait_until(tab, *states: str) -> None:
    selector = ", ".join(f"html[data-state={state}]" for state in states)
    tab.wait_for_selector(selector, state="attached", timeout=120_000)


def result_of(tab) -> dict:
    """What the page computed, and the colours that it drew."""
    return tab.evaluate("""() => {
        const canvas = document.getElementById("components");
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        const { grid, pixels, tokens, shares } = window.sailvit;
        const drawn = { size: [canvas.height, canvas.width], data: [...data] };
        return { grid, pixels: [...pixels], tokens: [...tokens], shares, drawn };
    }""")


@pytest.fixture(scope="module")
def model() -> SAILViTModel:
    return SAILViTModel.from_pretrained(ENCODER).eval()


def check_result(result: dict, image: Path, model: SAILViTModel, **options: object) -> None:
    """Compare pixels, tokens and drawn colours with Python's."""
    batch = SAILViTImageProcessor.from_pretrained(ENCODER)(image, **options)
    pixels, (grid,) = batch["pixel_values"], batch["tile_grids"].tolist()
    with torch.no_grad():
        features = model.get_image_features(pixels)
        tokens = model(pixels).last_hidden_state
    patches = stitch_tokens(features, grid, model.config.pixel_shuffle_factor)
    colours = PrincipalColours.fit(patches)
    ours = torch.tensor(result["pixels"]).view(pixels.shape)
    levels = (ours - pixels).abs() * 255 * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    drawn = torch.tensor(result["drawn"]["data"]).view(*result["drawn"]["size"], 4)
    differences = {
        "pixels": levels.max().item(),
        "tokens": relative_difference(torch.tensor(result["tokens"]).view(tokens.shape), tokens),
        "colours": (drawn[..., :3] - colours(patches).int()).abs().max().item(),
    }
    assert result["grid"] == grid and result["shares"] == pytest.approx(colours.shares, abs=1e-4)
    assert differences["pixels"] < 0.01 and differences["tokens"] < 1e-4 and differences["colours"] <= 1
    assert (drawn[..., 3] == 255).all() and len(drawn.flatten(0, 1).unique(dim=0)) > 50


def turned(path: Path) -> Path:
    """A photograph that its EXIF turns by 90 degrees, which the processor ignores by default."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.open(PHOTOGRAPH).resize((300, 200)).save(path, exif=exif)
    return path


def tall(path: Path) -> Path:
    noise(40, 150).resize((70, 400)).save(path)
    return path


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("make", "screen"),
    [(lambda path: PHOTOGRAPH, DESKTOP), (turned, PHONE), (tall, DESKTOP)],
    ids=["photograph", "turned", "tall"],
)
def test_the_page_equals_processor_model_and_colours(
    make, screen, browser, built, model, tmp_path, passes_of_pillow_13
):
    image, events = make(tmp_path / ("image.png" if make is tall else "image.jpg")), []
    with opened(browser, built, events, screen) as tab:
        tab.locator("#file").set_input_files(image)
        wait_until(tab, "done", "failed")
        check_result(result_of(tab), image, model)
        assert tab.locator("#status").inner_text().startswith("Encoded ")
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert events == []


@pytest.mark.nightly
def test_the_page_turns_a_photograph_if_the_processor_does(browser, built, model, tmp_path):
    shutil.copytree(built, tmp_path / "dist")
    settings = tmp_path / "dist" / "model" / "preprocessor_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"do_exif_transpose": True}))
    events: list[str] = []
    with opened(browser, tmp_path / "dist", events) as tab:
        tab.locator("#file").set_input_files(image := turned(tmp_path / "image.jpg"))
        wait_until(tab, "done", "failed")
        check_result(result_of(tab), image, model, do_exif_transpose=True)
    assert events == []


@pytest.mark.nightly
def test_the_page_chooses_all_grids_as_the_processor(browser, built):
    script = """async (cases) => {
        const { chooseTileGrid } = await import("./tiling.js");
        const size = { width: 448, height: 448 };
        return cases.map(([width, height, most]) => chooseTileGrid(width, height, 1, most, size));
    }"""
    events: list[str] = []
    with opened(browser, built, events) as tab:
        assert tab.evaluate(script, CASES) == [case[3:5] for case in CASES]
    assert events == []


@pytest.mark.nightly
def test_a_photograph_is_dropped_or_chosen_by_keyboard(browser, built, model, tmp_path):
    events: list[str] = []
    script = """(bytes) => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([Uint8Array.from(bytes)], "dropped.jpg"));
        dispatchEvent(new DragEvent("drop", { dataTransfer: transfer }));
    }"""
    with opened(browser, built, events) as tab:
        tab.evaluate(script, [*PHOTOGRAPH.read_bytes()])
        tab.wait_for_selector("text=dropped.jpg, 1,024 × 768 pixels")
        check_result(result_of(tab), PHOTOGRAPH, model)
        tab.keyboard.press("Tab")
        with tab.expect_file_chooser() as chooser:
            tab.keyboard.press("Enter")
        chooser.value.set_files(tall(tmp_path / "chosen.png"))
        tab.wait_for_selector("text=chosen.png, 70 × 400 pixels")
        tab.keyboard.press("Tab")
        tab.keyboard.press("Enter")
        tab.wait_for_selector("text=example.jpg, 1,024 × 768 pixels")
    assert events == []


@pytest.mark.nightly
def test_a_broken_file_is_one_sentence_and_the_page_goes_on(browser, built, tmp_path):
    events: list[str] = []
    (tmp_path / "broken.jpg").write_bytes(PHOTOGRAPH.read_bytes()[:100])
    with opened(browser, built, events) as tab:
        tab.locator("#file").set_input_files(tmp_path / "broken.jpg")
        wait_until(tab, "failed")
        assert tab.get_by_role("alert").inner_text() == "broken.jpg is not an image that this browser can read."
        tab.locator("#file").set_input_files(PHOTOGRAPH)
        wait_until(tab, "done")
        assert not tab.get_by_role("alert").is_visible()
    assert events == []


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda model: shutil.rmtree(model),
            "model/config.json cannot be loaded (File not found): build the page with",
        ),
        (
            lambda model: (model / "onnx" / "model.onnx").write_bytes(b"x"),
            "model/onnx/model.onnx cannot be loaded by onnx",
        ),
    ],
)
def test_without_a_model_the_page_says_what_is_missing(change, sentence, browser, built, tmp_path):
    shutil.copytree(built, tmp_path / "dist")
    change(tmp_path / "dist" / "model")
    with opened(browser, tmp_path / "dist", []) as tab:
        assert tab.get_by_role("alert").inner_text().startswith(sentence)


@pytest.mark.nightly
def test_the_build_refuses_a_folder_without_onnx(built):
    command = ["npm", "run", "--silent", "build", "--", str(ENCODER)]
    done = subprocess.run(command, cwd=built.parent, capture_output=True, text=True)
    assert done.returncode == 2 and "onnx/model.onnx does not exist: expected an ONNX folder" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and (built / "index.html").exists()
