"""`sailvit serve`: the OpenAI client and a server in a process of its own, which serves the trained miniature."""

import asyncio
import base64
import io
import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from random import Random
from types import SimpleNamespace

import numpy as np
import openai
import pytest
import torch
import transformers
from conftest import PHOTOGRAPH, ROOT
from doc_pages import code_blocks
from fastapi import HTTPException
from fork_server import start_forked
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from PIL import Image
from transformers import pipeline

import sailvit_cli
from sailvit import SAILVLForConditionalGeneration, SAILVLProcessor
from sailvit.examples.miniature.demo import SIZE
from sailvit.examples.miniature.draw import draw_picture
from sailvit.examples.miniature.questions import TASKS
from sailvit.examples.miniature.shipped import ENCODER, MULTIMODAL
from sailvit.examples.miniature.vocabulary import SEEN
from sailvit.serve.checks import RequestError, check_request, image_urls, insert_images
from sailvit.serve.images import Limits
from sailvit.serve.server import OLDEST, CheckedChat, finish_stream
from sailvit.serve.stop_strings import StopFilter, cut


needs_server = pytest.mark.skipif(
    Version(transformers.__version__) < Version(OLDEST), reason="the server of this transformers finds no other models"
)
needs_auto_class = pytest.mark.skipif(
    not hasattr(transformers, "AutoModelForMultimodalLM"), reason="transformers < 5.0 has no such class"
)
COMMAND = "import sys, sailvit_cli; sys.exit(sailvit_cli.main(sys.argv[1:]))"
NAME = MULTIMODAL.name
LIMITS = {"--max-images": 4, "--max-bytes": 300_000, "--max-pixels": 1_000_000}
RED = Image.new("RGB", (2 * SIZE, 2 * SIZE), "red")
QUESTION = "What is it?"  # of RED it is answered by "red red red", without end


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a server; it has served until the end of the tests."""
    if Version(transformers.__version__) < Version(OLDEST):
        pytest.skip(needs_server.kwargs["reason"])
    limits = [word for option, value in LIMITS.items() for word in (option, str(value))]
    arguments = ["serve", str(MULTIMODAL), *limits, "--port", "0", "--device", "cpu", "--dtype", "float32"]
    with start_forked(COMMAND, *arguments, folder=ROOT) as (process, _, errors):
        while not (found := re.search(r"running on (http://127\.0\.0\.1:\d+)", errors.read_text())):
            assert process.is_alive(), errors.read_text()
            time.sleep(0.1)
        yield found[1]
        assert process.is_alive() and "Traceback" not in errors.read_text()


@pytest.fixture(scope="module")
def client(server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def model() -> SAILVLForConditionalGeneration:
    return SAILVLForConditionalGeneration.from_pretrained(MULTIMODAL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor() -> SAILVLProcessor:
    return SAILVLProcessor.from_pretrained(MULTIMODAL)


def data_url(image: Image.Image, file_format: str = "PNG") -> str:
    file = io.BytesIO()
    image.save(file, file_format)
    return f"data:image/{file_format.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def image_part(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def user(*parts: str | Image.Image) -> dict:
    """A message with texts and images."""
    content = [{"type": "text", "text": p} if isinstance(p, str) else image_part(data_url(p)) for p in parts]
    return {"role": "user", "content": content}


def ask(client: openai.OpenAI, *messages: dict, **options) -> str:
    options = {"model": NAME, "max_tokens": 16, **options}
    return client.chat.completions.create(messages=messages, **options).choices[0].message.content


def draw_pictures(number: int) -> list[tuple[Image.Image, str]]:
    """Different scenes, each with a question about it."""
    pairs, random = [], Random(0)
    for index in range(number):
        scene, questions = TASKS["scenes"].make(random, SEEN, True, 7)
        pairs.append((Image.fromarray(draw_picture(scene, SIZE, random)), questions[index % len(questions)].user))
    return pairs


PICTURES = draw_pictures(8)


@pytest.fixture
def generate(model, processor):
    """What `generate` answers to messages with images in place of URLs."""

    def answer(*messages: dict, tokens: int = 16) -> str:
        inputs = processor.apply_chat_template(
            json.loads(json.dumps(messages)), add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip
        output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return answer


CONVERSATIONS = {
    "text": [user("What is two and two?")],
    "plain text": [{"role": "user", "content": "What is two and two?"}],
    "one image": [user(*PICTURES[0])],
    "several tiles": [user(Image.fromarray(np.tile(np.asarray(RED), (2, 3, 1))), QUESTION)],
    "several images": [user(PICTURES[0][0], PICTURES[1][0], "How many objects are there?")],
    "a history": [
        {"role": "system", "content": "Answer."},
        user(*PICTURES[2]),
        {"role": "assistant", "content": "a red 3"},
        user("And this?", PICTURES[3][0]),
    ],
}


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_answers_are_those_of_generate(messages, client, generate):
    assert ask(client, *messages) == generate(*messages) != ""


def test_a_jpeg_is_read_and_counted_as_by_generate(client, generate, processor):
    message = {"role": "user", "content": [image_part(data_url(PICTURES[0][0], "JPEG")), *user("What?")["content"]]}
    answer = client.chat.completions.create(model=NAME, messages=[message], max_tokens=4)
    assert answer.choices[0].message.content == generate(message, tokens=4)
    assert answer.usage.prompt_tokens == processor.apply_chat_template(
        [message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )["input_ids"].shape[1]  # fmt: skip


def test_a_stream_has_the_same_answer_in_pieces(client):
    message = user(RED, QUESTION)
    events = [*client.chat.completions.create(model=NAME, messages=[message], max_tokens=8, stream=True)]
    pieces = [event.choices[0].delta.content or "" for event in events]
    assert "".join(pieces) == ask(client, message, max_tokens=8) and len([*filter(None, pieces)]) == 8
    assert events[-1].choices[0].finish_reason == "length" and events[-1].usage.completion_tokens == 8


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", ["d r", ["x", "ed red"], "never"])
def test_an_answer_ends_before_a_stop_string(stop, stream, client, generate):
    message = user(RED, QUESTION)
    whole = generate(message, tokens=8)
    options = {"model": NAME, "messages": [message], "max_tokens": 8, "stop": stop}
    if stream:
        events = client.chat.completions.create(**options, stream=True)
        found = "".join(event.choices[0].delta.content or "" for event in events)
    else:
        found = client.chat.completions.create(**options).choices[0].message.content
    assert found == cut(whole, [stop] if isinstance(stop, str) else stop)
    assert (found == whole) is (stop == "never")


def test_clients_at_once_get_their_own_answers(client, generate):
    messages = [user(*pair) for pair in PICTURES]
    expected = [generate(message) for message in messages]
    with ThreadPoolExecutor(len(messages)) as pool:
        assert [*pool.map(lambda message: ask(client, message), messages)] == expected
    assert len({*expected}) > 3


def test_the_server_goes_on_after_a_client_hung_up(client, generate):
    message = user(RED, QUESTION)
    for _ in range(2):
        stream = client.chat.completions.create(model=NAME, messages=[message], max_tokens=3000, stream=True)
        assert [next(stream) for _ in range(3)][-1].choices[0].delta.content
        stream.close()
    assert ask(client, message) == generate(message)


@pytest.mark.parametrize(
    "options",
    [{"logit_bias": {"5": -1}}, {"stop": []}, {"extra_body": {"chat_template_kwargs": None}}, {"seed": 0}],
    ids=str,
)
def test_options_that_say_nothing_change_nothing(options, client, generate):
    assert ask(client, user(*PICTURES[0]), **options) == generate(user(*PICTURES[0]))


def test_numbers_of_settings_may_be_integers_or_floats(client):
    """transformers wants the type that each has in generate."""
    settings = {
        "do_sample": True,
        "temperature": 2,
        "top_k": 50.0,
        "repetition_penalty": 2,
        "no_repeat_ngram_size": 3.0,
    }
    options = {"extra_body": {"generation_config": json.dumps(settings)}, "max_tokens": 8}
    answers = [ask(client, user(RED, QUESTION), seed=seed, **options) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_penalties_and_probabilities_are_taken(client):
    greedy, penalized = (ask(client, user(RED, QUESTION), max_tokens=3, frequency_penalty=f) for f in (0, 2))
    assert greedy == " red red red" != penalized
    assert ask(client, user(RED, QUESTION), max_tokens=3, temperature=0, top_p=0.5) == greedy


def test_stop_strings_of_settings_are_cut_from_the_answer(client):
    settings = json.dumps({"stop_strings": ["red red"]})
    assert ask(client, user(RED, QUESTION), extra_body={"generation_config": settings}) == " "


def test_tiling_of_a_request_changes_the_prompt(client):
    message = user(Image.fromarray(np.tile(np.asarray(PICTURES[0][0]), (2, 2, 1))), "How many objects are there?")
    one_tile = client.chat.completions.create(
        model=NAME, messages=[message], max_tokens=4, extra_body={"chat_template_kwargs": {"do_tile": False}}
    )
    tiles = client.chat.completions.create(model=NAME, messages=[message], max_tokens=4)
    assert tiles.usage.prompt_tokens - one_tile.usage.prompt_tokens == 4 * 16


def test_developer_is_another_name_of_system(client, generate):
    developer, system = ({"role": role, "content": "Answer."} for role in ("developer", "system"))
    assert ask(client, developer, user(*PICTURES[0])) == generate(system, user(*PICTURES[0]))


def test_a_request_of_transformers_chat_is_answered(client, server):
    """It waits for the model, then sends a whole generation_config."""
    ready = openai.OpenAI(base_url=server, api_key="none").post("/load_model", body={"model": NAME}, cast_to=str)
    assert json.loads(ready.removeprefix("data: "))["status"] == "ready"
    config = transformers.GenerationConfig(max_new_tokens=3).to_json_string()
    assert ask(client, user(RED, QUESTION), extra_body={"generation_config": config}, max_tokens=None) == " red red red"


def test_the_client_of_the_page_prints_an_answer(server, generate, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (block,) = code_blocks(ROOT / "docs" / "serving.md", "python")
    exec(block.replace("http://127.0.0.1:8000", server).replace('"sail-vl"', f'"{NAME}"'), {})
    part = image_part(data_url(Image.open(PHOTOGRAPH)))
    expected = generate({"role": "user", "content": [part, *user(QUESTION)["content"]]}, tokens=64)
    assert capsys.readouterr().out == expected


def test_without_max_tokens_an_answer_ends_with_the_context(client):
    number = 3 * 1300  # of tokens, of 4096
    answer = client.chat.completions.create(model=NAME, messages=[user(RED, "red, " * (number // 2), QUESTION)])
    assert answer.usage.total_tokens <= 4096


def user_parts(*parts: dict) -> list[dict]:
    return [{"role": "user", "content": [*parts]}]


def images_at(*urls: str) -> list[dict]:
    return user_parts(*map(image_part, urls))


def template_options(**options: object) -> dict:
    return {"extra_body": {"chat_template_kwargs": options}}


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8))
BROKEN = data_url(PICTURES[0][0])[:-300]
TEXT = [user("x")]
BAD_REQUESTS = {
    "no messages": ([], {}, "messages: expected a list"),
    "a role": ([{"role": "root", "content": "x"}], {}, "messages[0].role: expected system, developer, user,"),
    "no content": ([{"role": "user"}], {}, "messages[0].content: expected a string or a list, got null"),
    "no image": (images_at("data:image/png;base64,aGVsbG8="), {}, "image 1: these 5 bytes are not an image"),
    "a broken image": (images_at(BROKEN), {}, "image 1: cannot be decoded"),
    "a path": (images_at(str(MULTIMODAL / "config.json")), {}, "image 1: expected a data: URL"),
    "a file": (images_at("file:///etc/passwd"), {}, "image 1: expected a data: URL"),
    "http": (images_at("http://example.com/x.png"), {}, "image 1: expected a data: URL"),
    "a loopback address": (images_at("https://localhost/x.png"), {}, "'localhost' has a private"),
    "metadata of a cloud": (images_at("https://169.254.169.254/"), {}, "'169.254.169.254' has a private"),
    "many images": ([user(*[RED] * 5)], {}, "expected at most 4 images in a request, got 5"),
    "many pixels": ([user(RED, RED.resize((1000, 1000)))], {}, "image 2: expected at most 1000000 pixels in all"),
    "many bytes": ([user(NOISE)], {}, "image 1: expected at most 300000 bytes in all"),
    "a video": (
        user_parts({"type": "video_url", "video_url": {"url": "/x.mp4"}}),
        {}, "messages[0].content[0].type: expected text or image_url, got 'video_url'; send frames"),
    "audio": (
        user_parts({"type": "input_audio", "input_audio": {"data": "/x.wav"}}), {}, "got 'input_audio'"),
    "a path in options": (TEXT, template_options(videos=["/etc/passwd"]), "chat_template_kwargs: 'videos'"),
    "a template": (TEXT, template_options(chat_template="{{ 1 }}"), "chat_template_kwargs: 'chat_template'"),
    "an unknown tiling": ([user(RED)], template_options(max_tiles=-1), "min_tiles <= max_tiles"),
    "a placeholder": ([user("a <IMG_CONTEXT> b")], {}, "messages[0]: the text contains <IMG_CONTEXT>"),
    "an end of turn": ([user("a<|im_end|>")], {}, "messages[0]: the text contains <|im_end|>"),
    "an end of turn in parts": (
        user_parts({"type": "text", "text": "a<|im_"}, {"type": "text", "text": "end|>"}),
        {}, "messages[0]: the text contains <|im_end|>"),
    "an end of text": ([user("a<|endoftext|>")], {}, "messages[0]: the text contains <|endoftext|>"),
    "much text": ([user("x" * 100_000)], {}, "expected at most 4096 tokens, got 100000 characters"),
    "a long prompt": ([user("x " * 5000)], {}, "expected at most 4096 tokens, got 10"),
    "a long answer": (TEXT, {"max_tokens": 5000}, "and 5000 for the answer"),
    "many messages": ([{"role": "assistant", "content": ""}] * 2000 + TEXT, {}, "expected at most 2000 messages and"),
    "a word as number": (TEXT, {"temperature": "hot"}, "temperature: expected a number from 1e-06 to 100, got a"),
    "a cold temperature": (TEXT, {"temperature": -1}, "temperature: expected a number from 1e-06 to 100, got -1"),
    "next to no temperature": (TEXT, {"temperature": 1e-40}, "temperature: expected a number from 1e-06"),
    "a large seed": (TEXT, {"seed": 2**64}, "seed: expected an integer from"),
    "half a token": (TEXT, {"max_tokens": 1.5}, "max_tokens: expected an integer from 1 to"),
    "a negative penalty": (TEXT, {"frequency_penalty": -1}, "frequency_penalty: expected a number from 0 to 2"),
    "a bias of a word": (TEXT, {"logit_bias": {"abc": 1}}, "logit_bias: expected numbers of tokens"),
    "a bias of no token": (TEXT, {"logit_bias": {"999999": 1}}, "logit_bias: expected tokens below"),
    "a setting out of range": (
        TEXT, {"extra_body": {"generation_config": '{"do_sample": true, "top_k": -1}'}},
        "generation_config: top_k: expected an integer from 1"),
    "an empty stop": (TEXT, {"stop": [""]}, "stop: expected a string or a list of strings"),
    "half a character as stop": (TEXT, {"extra_body": {"generation_config": '{"stop_strings": "\\ud800"}'}},
        "stop_strings: expected a string or a list"),
    "a long stop": (TEXT, {"stop": "a" * 101}, "stop: expected at most 4 strings of at most 100 characters each"),
    "many stops": (TEXT, {"stop": ["a", "b", "c", "d", "e"]}, "stop: expected at most 4 strings"),
    "nested settings": (TEXT, {"extra_body": {"generation_config": "[" * 100_000}}, "generation_config: expected"),
    "a field of another server": (TEXT, {"extra_body": {"top_k": 5}}, "Unexpected fields in the request: {'top_k'}"),
    "tools": (TEXT, {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools: not supported"),
    "beams": (TEXT, {"extra_body": {"generation_config": '{"num_beams": 900}'}}, "'num_beams'"),
    "another model": (TEXT, {"model": "other"}, f"model: expected '{NAME}', which is served, got 'other'"),
}  # fmt: skip


@pytest.mark.parametrize(("messages", "options", "message"), BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_bad_requests_are_refused(messages, options, message, client):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, *messages, **options)
    error = caught.value.body
    assert error.keys() == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert message in error["message"] and "\n" not in error["message"]
    assert str(ROOT) not in caught.value.response.text and "/etc" not in caught.value.response.text


def test_after_bad_requests_the_server_answers(client, generate):
    assert ask(client, user(*PICTURES[0])) == generate(user(*PICTURES[0]))


def test_a_large_body_is_refused(client):
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, user("x" * 2_000_000))
    assert (
        caught.value.status_code == 413
        and caught.value.body["message"] == "expected at most 1400000 bytes in a request"
    )


def test_models_are_listed_without_paths(client):
    assert [model.id for model in client.models.list()] == [NAME]


def test_the_model_is_described(client):
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match=f"expected '{NAME}', which is served, got 'gpt-5'"):
        client.models.retrieve("gpt-5")


@pytest.mark.parametrize("path", ["reset", "v1/responses", "v1/completions", "v1/audio/transcriptions", "docs"])
def test_other_routes_of_transformers_are_closed(path, server):
    with pytest.raises(openai.NotFoundError, match=f"/{path}: expected POST /v1/chat/completions"):
        openai.OpenAI(base_url=server, api_key="none").post(f"/{path}", body={"model": NAME}, cast_to=dict)


def test_no_other_model_can_be_loaded(server):
    with pytest.raises(openai.BadRequestError, match="which is served, got '/etc'"):
        openai.OpenAI(base_url=server, api_key="none").post("/load_model", body={"model": "/etc"}, cast_to=str)


# Failures of generation, which no request should reach


def fail_with(error: Exception):
    """A server's handler whose handle_request raises; behind it are the checks."""

    async def handle_request(body: dict, request_id: str) -> None:
        raise error

    return SimpleNamespace(handle_request=handle_request, _validate_request=lambda body: None, chat_template_kwargs={})


@pytest.fixture
def manager(model, processor) -> SimpleNamespace:
    return SimpleNamespace(
        force_model=NAME, process_model_name=str, load_model_and_processor=lambda name: (model, processor)
    )


@pytest.mark.parametrize("where", ["generation", "the checks"])
def test_a_failure_tells_nothing_of_the_server(where, manager, caplog, monkeypatch):
    error = RuntimeError("in /home/me/model")
    chat = CheckedChat(fail_with(error), manager, Limits())
    if where == "the checks":
        monkeypatch.setattr("sailvit.serve.server.check_length", lambda *arguments: 1 / 0)
    with pytest.raises(HTTPException) as caught:
        asyncio.run(chat.handle_request({"model": NAME, "messages": TEXT}, "request-1"))
    assert caught.value.status_code == 500 and "Traceback" in caplog.text
    assert caught.value.detail == "internal error in request request-1; the log of the server has the cause"


def test_tiling_options_of_the_server_hold_for_its_requests(manager):
    handler = fail_with(RuntimeError())
    handler.chat_template_kwargs = {"max_tiles": 1}
    chat = CheckedChat(handler, manager, Limits())
    for options, expected in (({}, {"max_tiles": 1}), ({"chat_template_kwargs": {"max_tiles": 2}}, {"max_tiles": 2})):
        assert chat._check_fields({"messages": TEXT, **options})["chat_template_kwargs"] == expected
    handler.chat_template_kwargs = {"enable_thinking": True}
    with pytest.raises(ValueError, match=r"enable_thinking: not of this model \(--chat-template-kwargs, --reasoning\)"):
        CheckedChat(handler, manager, Limits())


def test_a_stream_that_is_not_read_to_its_end_ends_the_generation():
    ended = []

    async def chunks():
        try:
            while True:
                yield 'data: {"choices": []}\n\n'
        finally:
            ended.append(True)

    async def hang_up() -> None:
        events = finish_stream(chunks(), [], "request-1")
        await anext(events)
        await events.aclose()

    asyncio.run(hang_up())
    assert ended == [True]


def test_a_failure_in_a_stream_is_an_error_of_openai():
    async def chunks():
        yield 'data: {"choices": []}\n\n'
        yield 'data: {"choices": []}\n\ndata: {"error": "in "/home/me/model""}\n\n'

    async def collect(stops: list[str]) -> str:
        return "".join([event async for event in finish_stream(chunks(), stops, "request-1")])

    for stops in ([], ["x"]):
        *events, end = filter(None, asyncio.run(collect(stops)).split("\n\n"))
        error = json.loads(events[-1].removeprefix("data: "))["error"]
        assert len(events) == 3 and end == "data: [DONE]" and error["type"] == "server_error"
        assert error["message"] == "internal error in request request-1; the log of the server has the cause"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: st.lists(values) | st.dictionaries(
        st.sampled_from(["role", "content", "type", "text", "image_url", "url"]) | st.text(), values),
)  # fmt: skip
PARTS = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image_url"])}, optional={"text": JSON, "image_url": JSON}
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant"]) | JSON}, optional={"content": JSON | st.lists(PARTS)}
    )
)


@settings(deadline=None, max_examples=25)
@given(
    st.dictionaries(
        st.sampled_from(
            ["temperature", "n", "stop", "max_tokens", "generation_config", "chat_template_kwargs", "tools"]
        ),
        JSON,
    ),
    MESSAGES | JSON,
)
def test_any_request_is_checked_or_refused(fields, messages):
    body = {**fields, "messages": messages}
    before = json.dumps(body)
    try:
        checked = check_request(body)
        insert_images(checked, [RED for _ in image_urls(checked)])
    except RequestError:
        pass
    else:
        assert {*checked} <= {*body} and all(
            part["type"] in ("text", "image_url") for m in checked["messages"] for part in m["content"]
        )
    assert json.dumps(body) == before


@given(st.lists(st.text("ab", max_size=3)), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_a_text_in_pieces_ends_where_the_whole_text_does(pieces, stops):
    stop_filter = StopFilter(stops)
    assert "".join([*map(stop_filter.feed, pieces), stop_filter.finish()]) == cut("".join(pieces), stops)


# The command


@needs_server
def test_an_unknown_option_is_an_error_of_transformers(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert sailvit_cli.main(["serve", str(MULTIMODAL), "--port", "0", "--nonsense"]) == 2
    assert "No such option: --nonsense" in capsys.readouterr().err


@needs_server
def test_options_are_passed_on(monkeypatch, capsys):
    """A wrong value of an option is refused by the server of transformers, which got it."""
    monkeypatch.chdir(ROOT)
    for option, value in (("--quantization", "2bit"), ("--attn-implementation", "none"), ("--dtype", "complex3")):
        words = ["--port", "0", option, value, "--continuous-batching", "--compile"]
        assert sailvit_cli.main(["serve", str(MULTIMODAL), *words]) == 2
        assert f"'{value}'" in capsys.readouterr().err


@needs_server
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--port 999999", "--port: expected a number from 0 to 65535, got '999999'"),
        ("--port x", "--port: expected a number from 0 to 65535, got 'x'"),
        ("--host 192.0.2.1", "--host 192.0.2.1 --port 8000: Cannot assign requested address"),
        ("--port 0 --device cuda:99", "device 'cuda:99' cannot be used"),
        ("--port 0 --log-level trace", "--log-level: expected detail, debug, info, warning,"),
        ("--port 0 --max-pixels 400000000", "--max-pixels: expected at most 178956970, the limit of Pillow"),
    ],
)
def test_an_address_or_device_that_cannot_be_used_is_found_before_the_model_is_loaded(
    words, message, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)
    assert sailvit_cli.main(["serve", str(MULTIMODAL), *words.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@needs_server
def test_a_port_in_use_is_found_before_the_model_is_loaded(server, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    port = server.rpartition(":")[2]
    assert sailvit_cli.main(["serve", str(MULTIMODAL), "--port", port]) == 2
    assert f"--port {port}: Address already in use" in capsys.readouterr().err


@needs_server
@pytest.mark.parametrize(
    ("name", "message"), [("/nope/model", "no such folder; MODEL comes first"), ("8901", "no such folder; MODEL")]
)
def test_what_is_no_model_is_one_line(name, message, capsys):
    assert sailvit_cli.main(["serve", name]) == 2
    assert message in capsys.readouterr().err


@needs_server
def test_a_folder_without_a_processor_is_not_served(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text((MULTIMODAL / "config.json").read_text())
    assert sailvit_cli.main(["serve", str(tmp_path)]) == 2
    assert "expected a folder with a processor, got no processor_config.json" in capsys.readouterr().err


@needs_server
def test_an_encoder_is_not_served(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert sailvit_cli.main(["serve", str(ENCODER)]) == 2
    assert "expected a multimodal model (sailvl), got sailvit" in capsys.readouterr().err


def test_an_old_transformers_is_named(monkeypatch, capsys):
    monkeypatch.setattr(transformers, "__version__", "4.56.2")
    assert sailvit_cli.main(["serve", str(MULTIMODAL)]) == 2
    error = capsys.readouterr().err
    assert "expected transformers >= 5.23" in error and "got 4.56.2" in error and error.count("\n") == 1


# What transformers knows after `import sailvit`


@needs_auto_class
def test_the_multimodal_auto_class_loads_the_model():
    assert type(transformers.AutoModelForMultimodalLM.from_pretrained(MULTIMODAL)) is SAILVLForConditionalGeneration


@needs_auto_class
def test_pipelines_of_any_modality_run_the_model(generate):
    picture, question = PICTURES[0]
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    for task in ("image-text-to-text", "any-to-any"):
        answerer = pipeline(task, model=str(MULTIMODAL), device="cpu", dtype=torch.float32)
        output = answerer(text=[{"role": "user", "content": parts}], max_new_tokens=16, return_full_text=False)
        assert output[0]["generated_text"] == generate(user(picture, question))


def test_stop_strings_take_the_processor_as_tokenizer(model, processor):
    inputs = processor.apply_chat_template(
        [user(RED, QUESTION)], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    lengths = [
        model.generate(**inputs, max_new_tokens=8, stop_strings=["d red"], tokenizer=one).shape[1]
        for one in (processor, processor.tokenizer)
    ]
    assert lengths == [inputs["input_ids"].shape[1] + 2] * 2
