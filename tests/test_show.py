"""`sailvit show`: the numbers in the page are the model's, and the page needs nothing but itself."""

import base64
import importlib.util
import io
import json
import re
import shutil
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PHOTOGRAPH, TINY, randomize
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from toy_sailvl import write_release
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

import sailvit_cli
from sailvit import SAILViTImageProcessor, SAILViTModel, SAILVLForConditionalGeneration
from sailvit.evaluate.pictures import PrincipalColours, stitch_tiles, stitch_tokens
from sailvit.evaluate.show import ShownImage, draw_pngs, load_tiled_encoder, page, show_image
from sailvit.evaluate.show import attention as attention_module
from sailvit.evaluate.show import view as view_module
from sailvit.evaluate.show.attention import count_regions, evenly_spaced, expand_regions, plan_attention
from sailvit.examples.miniature.demo import make_picture
from sailvit.examples.miniature.shipped import ENCODER
from sailvit.modeling_sailvit import SAILViTAttention, eager_attention_forward


SMALL = {**TINY, "patch_size": 14}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """The facts, the arrays and the links of a page."""

    def __init__(self, html: str):
        super().__init__()
        self.links: list[str] = []
        self.scripts: dict[str, str] = {}
        self._open = ""
        self.feed(html)
        self.facts = json.loads(self.scripts["facts"])

    def handle_starttag(self, tag: str, attrs: list) -> None:
        values = dict(attrs)
        self.links += [values[key] for key in ("src", "href", "srcset", "poster") if values.get(key)]
        self._open = values.get("id", "code") if tag == "script" else ""

    def handle_data(self, data: str) -> None:
        if self._open:
            self.scripts[self._open] = self.scripts.get(self._open, "") + data

    def blob(self, name: str) -> bytes:
        return zlib.decompress(base64.b64decode(self.scripts[f"data-{name}"]))

    def cosines(self, token: int) -> np.ndarray:
        """As the page computes them."""
        scales = np.array(self.facts["scales"], dtype=np.float32)
        tokens = np.frombuffer(self.blob("tokens"), np.int8).reshape(-1, len(scales)) * scales
        tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
        return tokens @ tokens[token]

    def weights(self, name: str, *leading: int) -> np.ndarray:
        """The attention weights of a blob, scales[leading] * (codes[leading, ...] / 255)^2."""
        data, count = self.blob(name), int(np.prod(leading))
        scales = np.frombuffer(data, np.float32, count).reshape(*leading, 1)
        return scales * (np.frombuffer(data, np.uint8, offset=4 * count).reshape(*leading, -1) / 255.0) ** 2


@pytest.fixture(scope="module")
def shown(folder: Path) -> ShownImage:
    return show_image(load_tiled_encoder(str(folder), "cpu"), str(PHOTOGRAPH))


@pytest.fixture(scope="module")
def html(shown: ShownImage) -> str:
    return page(shown)


@pytest.fixture(scope="module")
def parsed(html: str) -> Page:
    return Page(html)


@pytest.fixture(scope="module")
def truth(folder: Path):
    """What the model itself returns for the tiles, with eager attention."""
    pixels = SAILViTImageProcessor.from_pretrained(folder)(PHOTOGRAPH)["pixel_values"]
    with torch.no_grad():
        return SAILViTModel.from_pretrained(folder)(pixels, output_attentions=True)


def test_cosines_in_the_page_are_those_of_torch(parsed, truth):
    tokens = truth.last_hidden_state.flatten(0, 1)
    for query in (0, 50, 111):
        expected = F.cosine_similarity(tokens, tokens[query, None])
        np.testing.assert_allclose(parsed.cosines(query), expected.numpy(), atol=0.02)


def test_attention_in_the_page_is_the_models_eager_attention(parsed, truth):
    assert parsed.facts["attention"]["blocks"] == [0, 1, 2] and parsed.facts["attention"]["querySide"] == 1
    for block in range(3):
        ours, theirs = parsed.weights(f"block-{block}", 7, 2, 16), truth.attentions[block].numpy()
        np.testing.assert_allclose(np.sqrt(ours), np.sqrt(theirs), atol=0.6 / 255)
        assert abs(ours.sum(-1) - 1).max() < 0.02
    mean = parsed.weights("mean", 3, 2).reshape(3, 2, 7, 16)
    expected = torch.stack(truth.attentions).mean(3).transpose(1, 2).numpy()  # over queries
    np.testing.assert_allclose(np.sqrt(mean), np.sqrt(expected), atol=0.6 / 255)


def test_distance_is_the_mean_over_queries_weighted_with_attention(parsed, truth):
    places = [(row, column) for row in range(4) for column in range(4)]
    distances = torch.tensor([[float(np.hypot(a[0] - b[0], a[1] - b[1])) for b in places] for a in places])
    expected = (torch.stack(truth.attentions) * distances).sum(-1).mean((1, 3))
    np.testing.assert_allclose(parsed.facts["attention"]["distance"], expected.numpy(), atol=0.006)


def test_a_head_of_a_trained_encoder_looks_at_the_objects(tmp_path):
    picture = make_picture((1, 1))[0]
    picture.save(tmp_path / "picture.png")
    attention = show_image(load_tiled_encoder(str(ENCODER), "cpu"), str(tmp_path / "picture.png")).attention
    light = rearrange(np.asarray(picture.convert("L")), "(y p) (x q) -> (y x) (p q)", p=4, q=4).max(-1)
    objects = torch.from_numpy(light > 150)
    shares = attention.mean[:, 0, :, objects].sum(-1)  # (blocks, heads)
    assert objects.float().mean() < 0.15 and shares.max() > 0.6


def test_regions_are_means_over_queries_and_sums_over_keys(folder, truth, monkeypatch):
    monkeypatch.setattr(attention_module, "REGIONS", ((3, 2),))  # 3 does not divide the 4 x 4 grid
    coarse = show_image(load_tiled_encoder(str(folder), "cpu"), str(PHOTOGRAPH))
    weights = truth.attentions[1].unflatten(2, (4, 4))[:, :, :3, :3].mean((2, 3))  # the first region of queries
    keys = weights.unflatten(2, (2, 2, 2, 2)).sum((3, 5)).flatten(2)
    torch.testing.assert_close(coarse.attention.by_query[1][:, :, 0], keys)
    corner = truth.attentions[1][:, :, 15].unflatten(2, (2, 2, 2, 2)).sum((3, 5)).flatten(2)
    torch.testing.assert_close(coarse.attention.by_query[1][:, :, 3], corner)
    assert Page(page(coarse)).weights("block-1", 7, 2, 4).shape == (7, 2, 4, 4)


def test_expanded_regions_cover_the_patches_in_them():
    expanded = expand_regions(torch.arange(6.0), (4, 5), 2)
    assert expanded.tolist() == [[0, 0, 1, 1, 2]] * 2 + [[3, 3, 4, 4, 5]] * 2


def test_colours_have_one_basis_and_range_over_all_tiles(folder, tmp_path):
    """Equal tiles have equal colours, wherever they are."""
    photograph = Image.open(PHOTOGRAPH).resize((224, 224))
    pair = Image.new("RGB", (448, 224))
    pair.paste(photograph, (0, 0))
    pair.paste(photograph, (224, 0))
    pair.save(tmp_path / "pair.png")
    encoder = load_tiled_encoder(
        str(folder), "cpu", resize_backend="pil", resample=Image.Resampling.NEAREST, max_tiles=2
    )
    parsed = Page(page(show_image(encoder, str(tmp_path / "pair.png"))))
    urls = [link for link in parsed.links if link.startswith("data:image/png")]
    main, thumbnail = (np.array(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))) for url in urls)
    assert parsed.facts["grid"] == [2, 1] and main.shape == (4, 8, 3) and thumbnail.shape == (4, 4, 3)
    assert np.array_equal(main[:, :4], main[:, 4:]) and len(np.unique(main.reshape(-1, 3), axis=0)) > 8


def test_principal_colours_equal_the_principal_components():
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(8, 8)).Q
    scores = torch.randn(20, 30, 8) * torch.tensor([9.0, 5.0, 3.0, 0.1, 0.1, 0.1, 0.1, 0.1])
    tokens = scores @ basis.T
    colours = PrincipalColours.fit(tokens)
    assert colours.shares == pytest.approx([0.7, 0.217, 0.078], abs=0.05)
    for channel in range(3):
        pair = torch.stack([colours(tokens)[..., channel].float().flatten(), scores[..., channel].flatten()])
        assert torch.corrcoef(pair)[0, 1].abs() > 0.98


def test_an_outlier_does_not_change_the_range_of_the_colours():
    torch.manual_seed(0)
    tokens = torch.randn(1000, 8) * torch.tensor([9.0, 5.0, 3.0, 0.1, 0.1, 0.1, 0.1, 0.1])
    with_outlier = torch.cat([tokens, 5 * tokens[:1]])
    before, after = (PrincipalColours.fit(each)(tokens).int() for each in (tokens, with_outlier))
    assert (before - after).abs().max() < 30


def test_with_one_tile_in_the_grid_the_whole_image_is_the_last_tile():
    """Before it are those of the second grid of msac."""
    processor = SAILViTImageProcessor(size=28, msac=True, max_tiles=4)
    batch = processor(Image.linear_gradient("L").resize((28, 28)).convert("RGB"))
    assert batch["tile_grids"].tolist() == [[1, 1]] and batch["num_tiles"][0] > 1
    assert torch.equal(stitch_tiles(batch["pixel_values"], (1, 1)), batch["pixel_values"][-1])


def test_stitched_tokens_keep_the_position_of_their_patches(folder, truth):
    pixels = SAILViTImageProcessor.from_pretrained(folder)(PHOTOGRAPH)["pixel_values"]
    with torch.no_grad():
        stitched = stitch_tokens(SAILViTModel.from_pretrained(folder).get_image_features(pixels), (3, 2), 2)
    patches = truth.last_hidden_state.unflatten(1, (4, 4))
    assert stitched.shape == (8, 12, 64)
    for row, column in [(0, 0), (3, 4), (5, 11), (7, 2)]:
        torch.testing.assert_close(stitched[row, column], patches[row // 4 * 3 + column // 4, row % 4, column % 4])


def test_the_page_is_self_contained(html, parsed):
    assert parsed.links and all(link.startswith("data:") for link in parsed.links)
    assert "default-src 'none'" in html and "@import" not in html and "url(" not in html
    assert {*re.findall(r"https?://[\w./]+", html)} == {"http://www.w3.org/2000/svg"}  # a namespace, not a request


def test_names_are_escaped(shown):
    name = "</script><b>.jpg"
    html = page(ShownImage(**{**vars(shown), "name": name}), command=name)
    assert name not in html and "&lt;/script&gt;" in html


@given(
    blocks=st.integers(1, 64),
    heads=st.integers(1, 32),
    tiles=st.integers(1, 13),
    patches=st.tuples(st.integers(1, 74), st.integers(1, 74)),
)
def test_attention_fits_its_share_of_the_page(blocks, heads, tiles, patches):
    limits = view_module.ATTENTION_BYTES, view_module.MEAN_ATTENTION_BYTES
    plan = plan_attention(blocks, heads, tiles, patches, *limits)
    sizes = [count_regions(patches, side) for side in (plan.query_side, plan.key_side, plan.mean_side)]
    assert len(plan.blocks) * heads * tiles * sizes[0] * sizes[1] <= limits[0]
    assert blocks * heads * tiles * sizes[2] <= limits[1]
    assert len({*plan.blocks}) >= min(3, blocks) and plan.blocks[-1] == blocks - 1


def test_a_page_of_nine_tiles_and_a_thumbnail_is_below_10_mb(shown):
    """Tokens, attention and picture of noise, which do not compress, of the shape of SAILViT-Large."""
    torch.manual_seed(0)
    plan = plan_attention(24, 8, 10, (32, 32), view_module.ATTENTION_BYTES, view_module.MEAN_ATTENTION_BYTES)
    queries, keys, means = (count_regions((32, 32), side) for side in (plan.query_side, plan.key_side, plan.mean_side))
    attention = attention_module.Attention(
        plan,
        {block: torch.rand(10, 8, queries, keys) for block in plan.blocks},
        torch.rand(24, 10, 8, means),
        torch.rand(24, 8),
        0.0,
    )
    noise = Image.effect_noise((1344, 1344), 100).convert("RGB")
    tokens = torch.randn(10, 32, 32, 256)
    large = ShownImage("noise.png", noise, (4000, 4000), (3, 3), tokens, attention, "", shown.facts)
    assert 4_000_000 < len(page(large).encode()) < 10_000_000


def test_blocks_are_evenly_spaced_up_to_the_last():
    assert evenly_spaced(3, 24) == (7, 15, 23) and evenly_spaced(4, 4) == (0, 1, 2, 3) and evenly_spaced(1, 5) == (4,)


def save_dinov2(folder: Path) -> torch.nn.Module:
    model = randomize(Dinov2Model._from_config(Dinov2Config(**SMALL), attn_implementation="eager"))
    model.save_pretrained(folder)
    return model


def save_clip(folder: Path) -> torch.nn.Module:
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = CLIPConfig(vision_config=SMALL, text_config=text | ids)
    model = CLIPModel._from_config(config, attn_implementation="eager")
    randomize(model.vision_model)
    model.save_pretrained(folder)
    return model.vision_model


def save_sailvl(folder: Path) -> torch.nn.Module:
    write_release(folder)
    return SAILVLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).vision_model


@pytest.mark.parametrize("save", [save_dinov2, save_clip, save_sailvl])
def test_encoders_alone_and_in_multimodal_models(save, tmp_path):
    model = save(tmp_path / "model").eval()
    encoder = load_tiled_encoder(str(tmp_path / "model"), "cpu", "float32")
    shown = show_image(encoder, str(PHOTOGRAPH))
    pixels = encoder.processor(PHOTOGRAPH)["pixel_values"]
    with torch.no_grad():
        truth = model(pixel_values=pixels, output_attentions=True)
    torch.testing.assert_close(shown.tokens.flatten(1, 2), truth.last_hidden_state[:, -16:])
    if truth.attentions is None:
        pytest.skip("this release of transformers returns no attention weights of CLIP")
    expected = truth.attentions[2][:, :, -16:, -16:]
    torch.testing.assert_close(shown.attention.by_query[2], expected)
    assert (shown.attention.elsewhere > 0) is (truth.last_hidden_state.shape[1] > 16)
    assert len(shown.tokens) == (7 if save is save_sailvl else 1)
    assert encoder.model.config._attn_implementation == "sdpa"


def test_tokens_of_a_block_are_its_hidden_states(folder, truth):
    encoder = load_tiled_encoder(str(folder), "cpu", layer=2)
    pixels = encoder.processor(PHOTOGRAPH)["pixel_values"]
    with torch.no_grad():
        states = SAILViTModel.from_pretrained(folder)(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(encoder.encode(pixels), states[2])


def test_without_attention_weights_the_page_leaves_the_panel_out(folder, monkeypatch):
    monkeypatch.setattr(SAILViTAttention, "_attention_function", lambda module: eager_attention_forward)
    lines: list[str] = []
    html = page(show_image(load_tiled_encoder(str(folder), "cpu"), str(PHOTOGRAPH), log=lines.append))
    assert len(lines) == 1 and "in 0 of its 3 blocks" in lines[0] and lines[0].replace("'", "&#39;") in html
    assert 'data-view="similarity"' in html and 'data-view="attention"' not in html
    assert Page(html).facts["attention"] is None


def show(*arguments: object) -> int:
    return sailvit_cli.main(["show", *map(str, arguments)])


def test_the_command_writes_a_page_and_pngs(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert (
        show(PHOTOGRAPH, "--model", folder, "--device", "cpu", "--png", "drawn", "--at", 700, 10, "--blocks", "1,3")
        == 0
    )
    parsed = Page((tmp_path / "raccoon.html").read_text())
    assert parsed.facts["place"] == [2, 0, 0] and parsed.facts["attention"]["blocks"] == [0, 2]
    names = {path.stem for path in (tmp_path / "drawn").iterdir()}
    maps = {"attention-block-1", "attention-block-3", "attention-mean"}
    assert names == {"picture", "components", "similarity", *maps}
    assert "raccoon.html" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drawn", "raccoon.html"]


def test_pngs_show_the_image_and_its_heads(shown):
    drawn = draw_pngs(shown, (0.1, 0.9))
    assert drawn["picture"].size == shown.image.size and drawn["components"].width > shown.image.width
    assert drawn["attention-block-3"].size == (2 * 224 + 8, 224)
    corner = np.array(drawn["picture"].crop((900, 10, 1000, 100))).astype(int)
    assert abs(corner - np.array(shown.image.crop((900, 10, 1000, 100)))).max() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.jpg"], "absent.jpg"),
        (["{image}", "--out", "photo.png"], "expected a .html file"),
        (["{image}", "--out", "absent/photo.html"], "in a folder that exists"),
        (["{image}", "--out", "there.html"], "there.html exists"),
        (["{image}", "--blocks", "9"], "block 9: expected 1 to 3"),
        (["{image}", "--at", "5000", "1"], "expected a pixel of the image, which is 1024 x 768"),
        (["{image}", "--layer", "7"], "layer 7"),
        (["{image}", "--png", "there.html"], "--png there.html/picture.png: cannot be created in "),
        (["{image}", "--out", "/proc/photo.html"], "/proc: No such file or directory: name another place"),
        (
            ["there.html", "--model", "nowhere", "--out", "o.html"],
            "there.html: cannot be opened as an image: cannot identify",
        ),
        (["{image}", "--device", "nonsense"], "device 'nonsense' cannot be used"),
        (["{image}", "--model", "nowhere"], "no such file or folder"),
        (["{image}", "--model", "timm:vit_tiny_patch16_224"], "a model of timm: expected a vision encoder or multimod"),
    ],
)
def test_invalid_input_is_one_line_and_exit_code_2(folder, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("there.html").touch()
    assert show("--model", folder, *(argument.format(image=PHOTOGRAPH) for argument in arguments)) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["there.html"]


@pytest.mark.nightly
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.skipif(not importlib.util.find_spec("playwright"), reason="playwright is not installed")
@pytest.mark.parametrize("screen", ["desktop", "phone"])
def test_the_page_in_a_browser(screen, html, truth, tmp_path):
    """Pointer, touch and keyboard move the query; no error in the console, no request."""
    from playwright.sync_api import sync_playwright

    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    noise: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_context(
            **(phone if screen == "phone" else {"viewport": {"width": 1400, "height": 1000}})
        ).new_page()
        tab.on("console", lambda message: noise.append(message.text))
        tab.on("pageerror", lambda error: noise.append(str(error)))
        tab.on("request", lambda request: noise.append(request.url) if "://" in request.url[:8] else None)
        tab.goto((tmp_path / "page.html").as_uri())
        tab.wait_for_selector("html[data-ready=true]", state="attached")
        check_browser(tab, truth, is_phone=screen == "phone")
        browser.close()
    assert [line for line in noise if not line.startswith("file://")] == []


def check_browser(tab, truth, is_phone: bool) -> None:
    def state() -> dict:
        return tab.evaluate("({...window.sailvit.state})")

    stage = tab.locator("[data-view=picture] .stage[data-part=main]")
    box = stage.bounding_box()
    place = {"x": box["width"] * 0.99, "y": box["height"] * 0.01}
    stage.tap(position=place) if is_phone else stage.hover(position=place)
    assert (state()["tile"], state()["row"], state()["column"], state()["pinned"]) == (2, 0, 3, is_phone)
    if not is_phone:
        stage.click(position=place)
    assert state()["pinned"]
    for key in ("ArrowDown", "ArrowLeft", "[", "."):
        tab.keyboard.press(key)
    now = state()
    assert (now["row"], now["column"], now["block"], now["head"]) == (1, 2, 1, 0)
    tokens = truth.last_hidden_state.flatten(0, 1)
    query = 2 * 16 + 1 * 4 + 2
    expected = F.cosine_similarity(tokens, tokens[query, None])
    cosines = tab.evaluate("[...window.sailvit.cosine(2, 1, 2)]")
    np.testing.assert_allclose(cosines, expected.numpy(), atol=0.02)
    weights = tab.evaluate("[...window.sailvit.attentionOf(1, 0, 2, 1, 2)]")
    np.testing.assert_allclose(np.sqrt(weights), truth.attentions[1][2, 0, 6].sqrt().numpy(), atol=0.6 / 255)
    tab.locator("#all button").nth(5).click()
    assert (state()["block"], state()["head"]) == (2, 1)
    tab.locator("[data-view=similarity] .title").click()
    assert tab.locator(".view.large").count() == 1
    tab.keyboard.press("Escape")
    assert not state()["pinned"]
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert tab.evaluate("document.getElementById('distance').getBoundingClientRect().right <= innerWidth")
