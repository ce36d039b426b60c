"""The feedback routes over a real store, on a real socket, that can be made to go away."""

import asyncio
import threading
import time
from dataclasses import asdict

import uvicorn
from fastapi import FastAPI
from starlette.responses import JSONResponse

from alignment.store.feedback_store import FeedbackStore
from alignment.store.formats import import_jsonl
from app.http.errors import install_error_handlers
from app.http.request import RequestChain
from app.http.routes import feedback
from benchmarks.harness.server import free_port
from core.alignment_config import FeedbackConfig


class _Control:
    def __init__(self, store):
        self._store = store

    async def import_feedback(self, body, dry_run):
        assert not dry_run
        return asdict(await asyncio.to_thread(import_jsonl, body.splitlines(), self._store.feedback.add))

    async def feedback_page(self, after, limit, kind):
        return asdict(await asyncio.to_thread(self._store.feedback.page, after=after, limit=limit, type=kind))


class _Executor:
    def __init__(self, control):
        self.control = control


class FeedbackServer:
    """`answers` are taken one by one before the real route: a status to answer instead, or a function to call."""

    def __init__(self, directory, max_body_bytes=8 << 20):
        self.store = FeedbackStore.open(FeedbackConfig(max_text_chars=2000), directory)
        self.answers = []
        self.num_imports = 0
        app = FastAPI()
        app.middleware("http")(self._answer)
        app.include_router(feedback.router)
        app.state.executor = _Executor(_Control(self.store))
        install_error_handlers(app)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._app = RequestChain(app, [], max_body_bytes, lambda _: None)
        self._server = None

    def start(self):
        self._server = uvicorn.Server(uvicorn.Config(self._app, port=self.port, log_level="warning"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        return self

    def stop(self):
        if self._server:
            self._server.should_exit = True
            self._thread.join(10)
            self._server = None

    def num_pairs(self):
        counts = self.store.counts().pairs
        return counts["train"] + counts["heldout"]

    async def _answer(self, request, call_next):
        if request.url.path.endswith("/import"):
            self.num_imports += 1
            answer = self.answers.pop(0) if self.answers else None
            if callable(answer):
                answer = await asyncio.to_thread(answer)
            if isinstance(answer, int):
                body = {"error": {"message": "busy"}}
                return JSONResponse(body, answer, {"Retry-After": "1"} if answer == 503 else None)
        return await call_next(request)
