# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
Runs the server of transformers (`transformers serve`) for one SAIL-VL.

Options, loading, generation and streaming are those of transformers. Added here: checks of requests, errors in the form
of OpenAI, and only the routes that are checked.
"""

import argparse
import asyncio
import json
import os
import socket
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from packaging.version import Version
from transformers import AutoConfig
from transformers.utils import logging

from ..devices import choose_device
from ..processing_sailvl import TILING_OPTIONS
from .checks import (
    RequestError,
    check_length,
    check_request,
    check_texts,
    count_opening,
    image_urls,
    insert_images,
    special_tokens,
)
from .images import ImageError, Limits, read_images
from .stop_strings import cut_completion, cut_stream


logger = logging.get_logger(__name__)

OLDEST = "5.23"  # transformers from here on serves models that are registered
DOWNLOADS = 16  # requests whose images are read at the same time
ROUTES = ("/v1/chat/completions", "/health")  # of transformers, that stay open
JSON_BYTES = 1_000_000  # of a request, besides its images
HOST = "127.0.0.1"
INTERNAL_ERROR = "internal error in request {}; the log of the server has the cause"


def run_server(model: str, arguments: Sequence[str], limits: Limits) -> int:
    """
    Serve a SAIL-VL until it is interrupted. Return the exit code.

    Args:
        model: A folder, served under its name, or a name on the Hub.
        arguments: Options of `transformers serve`.

    Raises:
        ImportError: The installed transformers has no server that serves the model, or packages are missing.
        ValueError: The model is not a SAIL-VL, or the address or the device cannot be used.
    """
    check_installation()
    import typer
    from transformers.cli import serve
    from transformers.cli.serving import server

    name = _enter_folder_of(model)
    _check_model_type(name)
    check_options(arguments)
    command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    command.command()(serve.Serve)
    # The constructor of Serve imports this function and runs what it returns: there is no other place for an app.
    build_server = server.build_server
    server.build_server = partial(build_checked_server, build_server, limits=limits)
    try:
        command([name, "--host", HOST, *arguments], prog_name="sailvit serve MODEL")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    finally:
        server.build_server = build_server
    return 0


def check_installation() -> None:
    """
    Raises:
        ImportError: transformers is too old, or the packages of the extra `serve` are missing.
    """
    if Version(transformers.__version__) < Version(OLDEST):
        raise ImportError(
            f"sailvit serve: expected transformers >= {OLDEST}, whose server finds registered models, got "
            f'{transformers.__version__}: pip install "transformers>={OLDEST}"'
        )
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ImportError('sailvit serve: expected fastapi, uvicorn, openai and pydantic: pip install "sailvit[serve]"')


def check_options(arguments: Sequence[str]) -> None:
    """
    Check the options of transformers that it would use after the model is loaded.

    Raises:
        ValueError: The address is in use or not of this machine, there is no such device, or no such level of the log.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--host", default=HOST)
    parser.add_argument("--port", default="8000")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--log-level", default="warning")
    try:
        options, _ = parser.parse_known_args(arguments)
    except argparse.ArgumentError:
        return  # an option without a value, of which transformers says so
    if options.log_level.lower() not in logging.log_levels:
        raise ValueError(f"--log-level: expected {', '.join(logging.log_levels)}, got {options.log_level[:40]!r}")
    if options.device != "auto":
        choose_device(options.device)
    if not options.port.isdecimal() or int(options.port) > 65535:
        raise ValueError(f"--port: expected a number from 0 to 65535, got {options.port[:40]!r}")
    try:
        family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        with socket.create_server((options.host, int(options.port)), family=family):
            pass
    except OSError as error:
        cause = error.strerror or error
        raise ValueError(f"--host {options.host} --port {options.port}: {cause}: choose another") from error


def _enter_folder_of(model: str) -> str:
    """Return the name under which a model is served. A folder's is its last part, so that no client sees its path."""
    folder = Path(model).expanduser().resolve()
    if not folder.is_dir():
        return model
    os.chdir(folder.parent)
    return folder.name


def _check_model_type(name: str) -> None:
    if name.isdecimal() or (name[0] in "/.~" and not Path(name).expanduser().exists()):
        raise ValueError(f"{name}: no such folder; MODEL comes first, then the options")
    repo, _, revision = (name, "", "") if Path(name).exists() else name.partition("@")
    found = AutoConfig.from_pretrained(repo, revision=revision or None).model_type
    if found != "sailvl":
        raise ValueError(f"{name}: expected a multimodal model (sailvl), got {found}: try `transformers serve`")
    if Path(name).is_dir() and not (Path(name) / "processor_config.json").exists():
        what = "expected a folder with a processor, got no processor_config.json"
        raise ValueError(f"{name}: {what}: save the processor there, too")


def build_checked_server(
    build_server: Callable[..., Any], model_manager: Any, chat_handler: Any, limits: Limits, **others: Any
) -> Any:
    """
    Return the app of the server of transformers, with checks.

    Args:
        build_server: `transformers.cli.serving.server.build_server`; the other arguments but `limits` are its own.
    """
    from starlette.middleware.base import BaseHTTPMiddleware

    app = build_server(model_manager, CheckedChat(chat_handler, model_manager, limits), **others)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in ROUTES]
    _add_routes(app, model_manager)
    _add_error_handlers(app)
    # That of transformers, which numbers requests, copies every piece of a stream through queues. _Requests does not.
    app.user_middleware[:] = [entry for entry in app.user_middleware if entry.cls is not BaseHTTPMiddleware]
    # Base64 has 4 characters for 3 bytes.
    app.add_middleware(_Requests, size=limits.size * 4 // 3 + JSON_BYTES)
    return app


class CheckedChat:
    """The handler of chat requests, behind the checks."""

    def __init__(self, handler: Any, manager: Any, limits: Limits):
        self.handler, self.limits = handler, limits
        self.model, self.processor = manager.load_model_and_processor(manager.process_model_name(manager.force_model))
        self.name, self.tiling = manager.force_model, handler.chat_template_kwargs
        if unknown := self.tiling.keys() - TILING_OPTIONS:
            known = ", ".join(sorted(TILING_OPTIONS))
            raise ValueError(f"{sorted(unknown)[0]}: not of this model (--chat-template-kwargs, --reasoning): {known}")
        self.context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self.opening, self.tokens = count_opening(self.processor), special_tokens(self.processor)
        # Threads of their own: what waits for downloads keeps no other request waiting.
        self.downloads = ThreadPoolExecutor(DOWNLOADS, thread_name_prefix="downloads")

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        from fastapi import HTTPException

        try:
            body = await self._check(body)
            response = await self.handler.handle_request(body, request_id)
        except HTTPException:
            raise
        except (RequestError, ImageError) as error:
            raise HTTPException(400, str(error)) from error
        except Exception as error:
            logger.exception("request %s", request_id)
            raise HTTPException(500, INTERNAL_ERROR.format(request_id)) from error
        return _finish(response, body.get("stop") or [], request_id)

    async def _check(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return a checked request with images; what needs no download is checked before."""
        body = await asyncio.to_thread(self._check_fields, body)
        if urls := image_urls(body):
            loop = asyncio.get_running_loop()
            insert_images(body, await loop.run_in_executor(self.downloads, read_images, urls, self.limits))
        try:
            return await asyncio.to_thread(check_length, body, self.processor, self.context, self.opening)
        except (ValueError, TypeError) as error:  # of the processor
            raise RequestError(str(error)) from error

    def _check_fields(self, body: dict[str, Any]) -> dict[str, Any]:
        from fastapi import HTTPException

        try:
            self.handler._validate_request(body)
        except HTTPException as error:  # of an unknown field
            raise RequestError(str(error.detail)) from error
        if body.get("model") not in (None, self.name):
            raise RequestError(f"model: expected {self.name!r}, which is served, got {str(body['model'])[:100]!r}")
        body = check_request(body)
        check_texts(body, self.tokens, self.context)
        return {**body, "chat_template_kwargs": {**self.tiling, **body.get("chat_template_kwargs", {})}}


def _finish(response: Any, stop: str | list[str], request_id: str) -> Any:
    """Return a response, streamed or not, that ends before a stop string."""
    from fastapi.responses import JSONResponse

    stops = [stop] if isinstance(stop, str) else stop
    if not hasattr(response, "body_iterator"):
        return JSONResponse(cut_completion(json.loads(response.body), stops)) if stops else response
    response.body_iterator = finish_stream(response.body_iterator, stops, request_id)
    return response


async def finish_stream(chunks: Any, stops: list[str], request_id: str) -> AsyncIterator[str]:
    """Yield the events of a stream, an error in the form of OpenAI, and the event that ends it."""
    events = _with_errors(chunks, request_id)
    try:
        async for event in cut_stream(events, stops) if stops else events:
            yield event
        yield "data: [DONE]\n\n"
    finally:
        await chunks.aclose()  # which ends the generation, if the client hung up


async def _with_errors(chunks: AsyncIterator[str], request_id: str) -> AsyncIterator[str]:
    async for chunk in chunks:
        before, found, message = chunk.partition('data: {"error":')
        if found:
            logger.error("request %s: %s", request_id, message)
            error = _error(INTERNAL_ERROR.format(request_id), 500)
            chunk = f"{before}data: {json.dumps(error)}\n\n"
        yield chunk


def _add_routes(app: Any, manager: Any) -> None:
    """Add routes that transformers has for any model, and here are for the one that is served."""
    from fastapi import Body, HTTPException
    from fastapi.responses import StreamingResponse

    name = manager.force_model
    served = {"id": name, "object": "model", "created": 0, "owned_by": "sailvit"}

    def check_name(model: str, status: int) -> None:
        if model != name:
            raise HTTPException(status, f"model: expected {name!r}, which is served, got {model[:100]!r}")

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [served]}

    @app.get("/v1/models/{model:path}")
    async def describe_model(model: str) -> dict[str, Any]:
        check_name(model, 404)
        return served

    @app.post("/load_model")  # `transformers chat` waits for it
    async def load_model(model: str = Body(embed=True)) -> StreamingResponse:
        check_name(model, 400)
        events = manager.load_model_streaming(manager.process_model_name(model))
        return StreamingResponse(events, media_type="text/event-stream")


# Errors


def _add_error_handlers(app: Any) -> None:
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    @app.exception_handler(HTTPException)
    async def refuse(request: Any, error: HTTPException) -> JSONResponse:
        message = str(error.detail)
        if message in ("Not Found", "Method Not Allowed"):  # of the router
            message = f"{request.method} {request.url.path}: expected POST /v1/chat/completions or GET /v1/models"
        return JSONResponse(_error(message, error.status_code), error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def refuse_body(request: Any, error: RequestValidationError) -> JSONResponse:
        return JSONResponse(_error(f"expected a JSON object as the body: {error.errors()[0]['msg']}"), 400)


def _error(message: str, status: int = 400) -> dict[str, Any]:
    """Return an error in the form of OpenAI."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


class _Requests:
    """ASGI middleware that numbers requests, reads their bodies, and refuses large ones."""

    def __init__(self, app: Any, size: int):
        self.app, self.size = app, size

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        from fastapi.responses import JSONResponse

        request_id = scope.setdefault("state", {})["request_id"] = str(uuid.uuid4())
        send = partial(_send_with_id, send, request_id)
        body, message = bytearray(), {"more_body": True}
        while message.get("more_body"):
            message = await receive()
            body += message.get("body", b"")
            if len(body) > self.size:
                refusal = JSONResponse(_error(f"expected at most {self.size} bytes in a request"), 413)
                await refusal(scope, receive, send)
                return
        await self.app(scope, _replay({**message, "body": bytes(body)}, receive), send)


async def _send_with_id(send: Callable, request_id: str, message: dict[str, Any]) -> None:
    if message["type"] == "http.response.start":
        message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
    await send(message)


def _replay(message: dict[str, Any], receive: Callable) -> Callable:
    """Return a `receive` of ASGI that gives a message once before it goes on."""
    waiting = [message]

    async def receive_next() -> dict[str, Any]:
        return waiting.pop() if waiting else await receive()

    return receive_next
