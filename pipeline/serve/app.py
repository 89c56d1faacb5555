"""The page's server: what it takes, what it refuses, and what it answers, as JSON."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.answers.best import pretrained
from pipeline.answers.model import Model
from pipeline.config import Params
from pipeline.errors import UserError
from pipeline.serve import ledger, mistakes
from pipeline.serve.album import Album
from pipeline.serve.desk import MOST_PIXELS, Desk, checked, data_uri, offered
from pipeline.serve.inside import Inside

PAGE = Path(__file__).parent / "page"
MOST_BYTES = 25 * 2**20  # of a picture that is sent
LOOPBACK = ("127.0.0.1", "localhost", "::1")
SAMPLES = 8  # pictures to begin with
HEADERS = {
    # Nothing on the page comes from elsewhere, or goes there.
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; "
    "form-action 'none'; base-uri 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


class TooLarge(Exception):
    """More bytes than are taken."""


@dataclass(frozen=True)
class Place:
    """What the server has: the model, and what is behind each part of the page."""

    model: Model
    desk: Desk
    album: Album
    inside: Inside

    @classmethod
    def of(cls, params: Params) -> Place:
        model, album = Model(params), Album(params)
        return cls(model, Desk(model), album, Inside(model, album))


def application(place: Place, hosts: tuple[str, ...] = LOOPBACK) -> Starlette:
    """The server; `hosts` are the names by which it may be addressed, "*" for any."""
    answers: dict[str, Callable[[Place, Request], Any]] = {
        "/api/about": lambda place, _: about(place),
        "/api/row": lambda place, request: place.album.row(*_which(request)),
        "/api/plane": lambda place, request: place.inside.plane(_asked(request, "state"), _asked(request, "data")),
        "/api/mistakes": lambda place, request: mistakes.table(place.album, _asked(request, "table")),
        "/api/runs": lambda *_: ledger.ledger(),
        "/api/experiments": lambda *_: ledger.experiments(),
        "/picture": _picture,
    }
    asked: dict[str, Callable[[Place, Request, bytes], Any]] = {
        "/api/answer": lambda place, _, content: place.desk.answer(content),
        "/api/ask": lambda place, request, content: place.desk.ask(content, _asked(request, "question")),
        "/api/similar": _similar,
        "/api/inside": _inside,
    }
    routes: list[Any] = [Route("/", lambda _: FileResponse(PAGE / "index.html"))]
    routes.append(Route("/favicon.ico", lambda _: FileResponse(PAGE / "icon.svg")))  # where browsers look by themselves
    routes += [Route(path, _answering(place, answer)) for path, answer in answers.items()]
    routes += [Route(path, _looking(place, answer), methods=["GET", "POST"]) for path, answer in asked.items()]
    routes.append(Mount("/page", StaticFiles(directory=PAGE)))
    guard = [Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts)), Middleware(OwnPageOnly)]
    faults: Any = {UserError: _fault, ValueError: _fault, TooLarge: _too_large}
    return Starlette(routes=routes, middleware=guard, exception_handlers=faults)


def serve(params: Params, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Answer until the process ends; `ready` is given the page's address. Raises UserError when the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()  # a browser that comes early waits
    except OSError as error:
        remedy = "take another --host or --port (0: any free one)"
        raise UserError(f"{host}:{port}", error.strerror or error, remedy) from None
    place = Place.of(params)
    app = application(place, LOOPBACK if host in LOOPBACK else ("*",))
    server = _Server(uvicorn.Config(app, log_level="warning", access_log=False))
    ready(f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}")
    threading.Thread(target=place.desk.warm, daemon=True).start()
    server.run([listener])


class _Server(uvicorn.Server):
    """Leaves signals to the command, which ends the process: uvicorn would wait for answers under way."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class OwnPageOnly:
    """Refuses what a browser sends on behalf of another site, and adds HEADERS to all that goes out."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = {name for name, _ in message["headers"]}
                added = [(key.encode(), value.encode()) for key, value in HEADERS.items() if key.encode() not in own]
                message["headers"] = [*message["headers"], *added]
            await send(message)

        headers = dict(scope["headers"])
        app = self.app
        if headers.get(b"sec-fetch-site", b"none") not in (b"same-origin", b"none"):
            app = JSONResponse({"error": "asked by another site"}, 403)
        await app(scope, receive, with_headers)


def about(place: Place) -> dict[str, Any]:
    """What the page has to know at first."""
    params = place.model.params
    samples, missing = [], []
    for data in params.run.data:
        try:
            samples += place.album.some(data, SAMPLES // len(params.run.data) or 1)
        except UserError as fault:
            missing.append(str(fault))
    return {
        "profile": params.profile,
        "encoder": params.vision.model or params.vision.encoder,
        "llm": params.llm.model,
        "data": {data: params.data[data].task for data in params.run.data},
        "ways": place.desk.ways,
        "offered": offered(params),
        "samples": samples,
        "missing": _untrained(params) or missing,
        "states": place.inside.states(),
        "tables": mistakes.tables(place.album),
        "limits": {"bytes": MOST_BYTES, "pixels": MOST_PIXELS},
    }


def _untrained(params: Params) -> list[str]:
    """What to do where nothing is trained, whatever else is missing; empty where something is."""
    try:
        pretrained(params)
    except UserError as fault:
        return [str(fault)]
    return []


# Requests.


def _answering(place: Place, answer: Callable[[Place, Request], Any]) -> Callable[[Request], Response]:
    """An endpoint that only reads; starlette calls it in a thread."""

    def endpoint(request: Request) -> Response:
        found = answer(place, request)
        return found if isinstance(found, Response) else JSONResponse(found)

    return endpoint


def _looking(place: Place, answer: Callable[[Place, Request, bytes], Any]) -> Callable[[Request], Any]:
    """An endpoint on a picture: the body that was sent, which is in memory until it is answered, or one of the run."""

    async def endpoint(request: Request) -> Response:
        content = await _body(request) if request.method == "POST" else None

        def work() -> Any:
            return answer(place, request, place.album.content(*_which(request)) if content is None else content)

        found = await run_in_threadpool(work)
        if isinstance(found, Generator):
            return StreamingResponse(_lines(found), media_type="application/x-ndjson")
        return JSONResponse(found)

    return endpoint


async def _body(request: Request) -> bytes:
    """At most MOST_BYTES, whatever the header says. Raises TooLarge."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > MOST_BYTES:
        raise TooLarge
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > MOST_BYTES:
            raise TooLarge
    return bytes(content)


async def _lines(events: Generator[Any, None, None]) -> AsyncIterator[str]:
    """One JSON object a line, each made in a thread; who leaves ends it at once.

    A fault on the way is the last line: the status has gone out by then.
    """
    try:
        async for event in iterate_in_threadpool(events):
            yield json.dumps(event) + "\n"
    except Exception as error:
        if not isinstance(error, UserError | ValueError):
            print(f"error: {error!r}", file=sys.stderr)
        yield json.dumps({"event": "fault", "error": str(error)}) + "\n"
    finally:
        with contextlib.suppress(ValueError):  # a thread is at work in it, after which nothing holds it
            events.close()


def _fault(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 400)


def _too_large(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": f"too large: at most {MOST_BYTES // 2**20} MB are taken"}, 413)


def _asked(request: Request, key: str) -> str:
    value = request.query_params.get(key, "").strip()
    if not value:
        raise UserError("", f"the {key} is empty")
    return value


def _which(request: Request) -> tuple[str, int]:
    """A picture of a data set, by its place there."""
    at = _asked(request, "at")
    if not at.isdecimal():
        raise UserError("at", f"{at} is no number")
    return _asked(request, "data"), int(at)


def _picture(place: Place, request: Request) -> Response:
    side = request.query_params.get("side", "")
    content = place.album.picture(*_which(request), int(side) if side.isdecimal() else 0)
    return Response(content, media_type="image/jpeg", headers={"cache-control": "private, max-age=600"})


def _encoded(place: Place, content: bytes) -> Any:
    checked(content)
    return place.model.encode([content])


def _similar(place: Place, request: Request, content: bytes) -> dict[str, Any]:
    return place.album.similar(_encoded(place, content), _which(request) if request.method == "GET" else None)


def _inside(place: Place, request: Request, content: bytes) -> dict[str, Any]:
    picture, seen = checked(content), place.model.seen(content)
    found = place.inside.look(place.model.encode([content]), _asked(request, "state"), _asked(request, "of"))
    return {**found, "picture": data_uri(seen or picture), "whole": seen is None}
