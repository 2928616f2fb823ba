"""The HTTP interface: OpenAI's image form, the models, health, metrics, and a page to try it."""

from __future__ import annotations

import asyncio
import base64
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from flows.serving.drawing import Drawn, Facts, Picture
from flows.serving.models import BASE, Mix, Refusal, Version, written
from flows.serving.server import Server, Settings

logger = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("page.html")
MOST_PICTURES = 10  # a request, as with OpenAI
LARGEST_BODY = 100_000  # bytes
LAST_SEED = 2**63 - 1
KINDS = {404: "not_found_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class ImagesRequest(BaseModel):
    """Body of POST /v1/images/generations: OpenAI's, with a seed and the sampler's two numbers."""

    model_config = ConfigDict(extra="forbid")

    prompt: Annotated[str, Field(min_length=1, max_length=4000, description="{subject} is the first concept in words")]
    model: Annotated[str, Field(max_length=4000, description="teapot@champion, teapot@3, teapot:0.7+cat:0.3, base")]
    n: Annotated[int, Field(ge=1, le=MOST_PICTURES, description="pictures; the second has the next seed")] = 1
    size: Annotated[str, Field(description="the base's own, such as 64x64, or auto")] = "auto"
    seed: Annotated[int | None, Field(ge=0, le=LAST_SEED, description="default: a random one, which is told")] = None
    steps: Annotated[int | None, Field(ge=1, description="DDIM steps")] = None
    guidance: Annotated[float | None, Field(ge=1, le=50, description="scale s of Eq. 9; 1 is none")] = None
    response_format: Literal["b64_json"] = "b64_json"
    user: Annotated[str | None, Field(description="not used")] = None


class ImageData(BaseModel):
    """One picture, and what draws it again."""

    b64_json: str
    seed: int
    model: str


class ImagesResponse(BaseModel):
    """Pictures in the order of their seeds."""

    created: int
    data: list[ImageData]


class ModelData(BaseModel):
    """A name that can be asked for, and the version that it stands for now."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "svdiff"
    version: int | None = None
    subject: str | None = None


class ModelList(BaseModel):
    """All aliases and the base; versions can be asked for by number as well."""

    object: Literal["list"] = "list"
    data: list[ModelData]


class Metrics:
    """What Prometheus is told."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        named: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("svdiff_requests", "Answers by path and status", ["path", "status"], **named)
        self.seconds = Histogram(
            "svdiff_generation_seconds", "Seconds from a request for pictures to its answer", **named
        )
        self.pictures = Counter("svdiff_pictures", "Pictures drawn", **named)
        sizes = (1, 2, 4, 8, 16, 32, 64)
        self.batch = Histogram("svdiff_batch_pictures", "Size of a picture's batch", buckets=sizes, **named)
        self.waiting = Gauge("svdiff_waiting_pictures", "Pictures that wait or are drawn", **named)
        self.models = Gauge("svdiff_models", "Names that can be asked for", **named)
        self.age = Gauge("svdiff_registry_age_seconds", "Seconds since the registry was read", **named)


class Queue:
    """Counts the pictures that wait or are drawn, and refuses more than there is room for."""

    def __init__(self, room: int, gauge: Gauge) -> None:
        self._room, self._gauge, self.length = room, gauge, 0

    @contextmanager
    def places(self, count: int) -> Iterator[None]:
        """Room for `count` pictures. Raises Refusal if there is none."""
        if self.length + count > self._room:
            raise Refusal(
                f"{self.length} pictures wait already, {count} more do not fit into the queue of {self._room}: try again later",
                status=429,
                code="rate_limit_exceeded",
            )
        self._add(count)
        try:
            yield
        finally:
            self._add(-count)

    def _add(self, count: int) -> None:
        self.length += count
        self._gauge.set(self.length)


def pictures_of(wanted: ImagesRequest, mix: Mix, facts: Facts, max_steps: int) -> list[Picture]:
    """The pictures that a request asks for. Raises Refusal, naming the field."""
    size = f"{facts.side}x{facts.side}"
    if wanted.size not in ("auto", size):
        raise Refusal(
            f"size '{wanted.size}': the base {facts.base} draws pictures of {size}; say that or auto", param="size"
        )
    steps = facts.steps if wanted.steps is None else wanted.steps
    if steps > max_steps:
        raise Refusal(f"steps is {steps}; this server takes at most {max_steps}", param="steps")
    guidance = facts.guidance if wanted.guidance is None else wanted.guidance
    prompt = wanted.prompt
    if "{subject}" in prompt:
        if not mix:
            raise Refusal("prompt: {subject} stands for a concept, and the base alone has none", param="prompt")
        prompt = prompt.replace("{subject}", mix[0][0].subject)
    first = secrets.randbelow(2**32) if wanted.seed is None else wanted.seed
    return [Picture(prompt, (first + i) % (LAST_SEED + 1), mix, steps, guidance) for i in range(wanted.n)]


def make_app(server: Server, settings: Settings) -> FastAPI:
    """The application before `server`."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await server.start()
        yield

    app = FastAPI(title="SVDiff", description="Registered concepts, drawn in common batches.", lifespan=lifespan)
    metrics = Metrics()
    queue = Queue(settings.queue, metrics.waiting)
    _add_errors(app)

    @app.middleware("http")
    async def count(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        status = 500  # of a failure, whose answer is made outside of this
        try:
            if int(request.headers.get("content-length") or 0) > LARGEST_BODY:
                response: Response = error_response(413, f"the body is larger than {LARGEST_BODY} bytes")
            else:
                response = await call_next(request)
            status = response.status_code
        except asyncio.CancelledError:  # nobody waits for an answer
            status = 499
            raise
        finally:
            route = request.scope.get("route")
            metrics.requests.labels(getattr(route, "path", "none"), status).inc()
        return response

    @app.post("/v1/images/generations")
    async def generate(wanted: ImagesRequest) -> ImagesResponse:
        """Draw pictures; each depends on its own prompt, model and seed only."""
        mix = server.models.mix(wanted.model)
        pictures = pictures_of(wanted, mix, server.facts, settings.max_steps)
        with queue.places(len(pictures)), metrics.seconds.time():
            results = await asyncio.gather(*map(server.draw, pictures), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        drawn = [result for result in results if isinstance(result, Drawn)]
        metrics.pictures.inc(len(drawn))
        for result in drawn:
            metrics.batch.observe(result.batch)
        model = written(mix)
        data = [
            ImageData(b64_json=base64.b64encode(result.png).decode(), seed=picture.seed, model=model)
            for picture, result in zip(pictures, drawn, strict=True)
        ]
        return ImagesResponse(created=int(time.time()), data=data)

    @app.get("/v1/models")
    async def models() -> ModelList:
        """Every alias, with the version that it stands for now, and the base."""
        named = server.models.named
        return ModelList(data=[_base_model(), *(_model(name, named[name]) for name in sorted(named))])

    @app.get("/v1/models/{name}")
    async def model(name: str) -> ModelData:
        """One name that can be asked for: an alias or a version."""
        mix = server.models.mix(name)
        if len(mix) > 1:
            raise Refusal(f"'{name}' is a mix; ask for one of its concepts", param="model")
        return _model(name, mix[0][0]) if mix else _base_model()

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Whether pictures can be drawn, and how old our knowledge of the registry is."""
        read = server.models
        age = round(time.monotonic() - read.read_at, 1)
        return {"status": "ok", "models": len(read.named), "waiting": queue.length, "registry_age_seconds": age}

    @app.get("/metrics")
    async def prometheus() -> Response:
        """For Prometheus."""
        read = server.models
        metrics.models.set(len(read.named))
        metrics.age.set(time.monotonic() - read.read_at)
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text())

    return app


def _model(name: str, version: Version) -> ModelData:
    return ModelData(id=name, created=version.created, version=version.number, subject=version.subject)


def _base_model() -> ModelData:
    return ModelData(id=BASE, created=0)


def error_response(status: int, message: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    """An error in OpenAI's form."""
    error = {"message": message, "type": KINDS.get(status, "invalid_request_error"), "param": param, "code": code}
    return JSONResponse({"error": error}, status, {"Retry-After": "1"} if status in (429, 503) else None)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Refusal)
    async def refused(_: Request, error: Refusal) -> JSONResponse:
        return error_response(error.status, str(error), error.param, error.code)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"][1:])
        if problem["type"] == "extra_forbidden":
            message = f"{where} is not known here; there are: {', '.join(ImagesRequest.model_fields)}"
        elif problem["type"] in ("missing", "json_invalid") or not where:
            message = f"{where or 'the body'}: {problem['msg']}"
        else:
            message = f"{where}: {problem['msg']} (found {problem['input']!r:.200})"
        return error_response(400, message, where or None)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        return error_response(error.status_code, f"{request.method} {request.url.path}: {error.detail}")

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        logger.error("a picture could not be drawn", exc_info=error)
        return error_response(500, f"the server failed: {type(error).__name__}")
