"""Structured outputs, checked before they reach the engine: compiled once in a process of its own, under limits.

A schema, regex or grammar is a program that a client sends. vLLM compiles it on the event loop of the front end, and
again in the engine, where a large one stops every client, fills the memory, or ends the process. Here a warm process
forks a child for each constraint that is not known yet; the child does what the engine will do with it (validate,
compile, and walk some tokens) under `TIME_LIMIT_S` and `MEMORY_LIMIT_BYTES`. Only what comes through goes on; the
engine then repeats a compilation that is known to be harmless.
"""

import asyncio
import contextlib
import logging
import multiprocessing
import os
import resource
import threading
import time
import weakref
from collections import OrderedDict
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

TIME_LIMIT_S = 5.0
"""A schema of a hundred fields takes about 0.05 s."""
MEMORY_LIMIT_BYTES = 512 << 20
"""What compiling may take beside what the warm process has."""

_MAX_KNOWN = 512
_MAX_CHILDREN = 4
_WALKED_TOKENS = 16

Verdict = tuple[Any, str]
"""The constraint as the engine shall have it and an empty text; or None and the reason of the refusal."""


def serve_each_backend(manager: Any) -> None:
    """Let a `StructuredOutputManager` compile each constraint with the backend that its check chose.

    By itself it keeps the backend of the first request for all.
    """
    backends: dict[str, Any] = {}
    grammar_init = manager.grammar_init

    def init(request: Any) -> None:
        if request.structured_output_request is not None:
            name = request.sampling_params.structured_outputs._backend  # noqa: SLF001
            if name not in backends:
                # In this thread: vLLM builds the backend and compiles at once.
                manager.backend, is_async = None, manager._use_async_grammar_compilation  # noqa: SLF001
                manager._use_async_grammar_compilation = False  # noqa: SLF001
                grammar_init(request)
                manager._use_async_grammar_compilation = is_async  # noqa: SLF001
                backends[name] = manager.backend
                return
        grammar_init(request)

    def create(request: Any) -> Any:
        constraint = request.structured_output_request
        backend = backends.get(constraint.params._backend, manager.backend)  # noqa: SLF001
        kind, text = constraint.structured_output_key
        return backend.compile_grammar(kind, text, stop_token_ids=request.sampling_params.all_stop_token_ids)

    manager.grammar_init, manager._create_grammar = init, create  # noqa: SLF001


def contain_failures(manager: Any) -> None:
    """Let an exception of one request's grammar end that request: as if the grammar had refused its token.

    vLLM ends a request whose token is refused, and the engine when a `StructuredOutputManager` raises.
    """
    fill, accept = manager.grammar_bitmask, manager.accept_tokens
    broken: weakref.WeakSet[Any] = weakref.WeakSet()

    def give_up(request: Any, error: Exception) -> None:
        broken.add(request)
        text = f"{type(error).__name__}: {error}"
        logger.warning("request %s is ended: its grammar fails: %s", request.request_id, text)

    def fill_each(requests: dict[str, Any], names: list[str], drafts: dict[str, list[int]]) -> Any:
        try:
            return fill(requests, names, drafts)
        except Exception:  # noqa: BLE001 - one of them; which one, each alone tells
            rows = []
            for name in names:
                try:
                    rows.append(fill(requests, [name], drafts).copy())
                except Exception as error:  # noqa: BLE001
                    give_up(requests[name], error)
                    free = manager.backend.allocate_token_bitmask(1 + len(drafts.get(name, ())))
                    rows.append(np.full(free.shape, -1, np.int32))
            return np.concatenate(rows)

    def accept_all(request: Any, tokens: list[int]) -> bool:
        if request in broken:
            return False
        try:
            return bool(accept(request, tokens))
        except Exception as error:  # noqa: BLE001
            give_up(request, error)
            return False

    manager.grammar_bitmask, manager.accept_tokens = fill_each, accept_all


class GrammarCheck:
    """Tells whether the engine can take a constraint, without waiting for it anywhere but in the caller."""

    def __init__(self, vllm_config: Any) -> None:
        self._config = vllm_config
        self._known: OrderedDict[str, asyncio.Future[Verdict]] = OrderedDict()
        self._waiting: dict[int, asyncio.Future[Verdict]] = {}
        self._number = 0
        self.process: Any = None
        """The warm process; None before the first constraint."""
        self._pipe: Connection

    async def check(self, constraint: Any) -> Any:
        """Compile a `StructuredOutputsParams`, or find that it was compiled before.

        Returns:
            The constraint with its backend chosen.

        Raises:
            VLLMValidationError: it is wrong, or takes too much time or memory, which the message tells (HTTP 400).
        """
        from vllm.exceptions import VLLMValidationError

        key = repr(constraint)
        verdict = self._known.get(key)
        if verdict is None:
            verdict = self._known[key] = self._ask(constraint)
            if len(self._known) > _MAX_KNOWN:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        try:
            checked, refusal = await asyncio.shield(verdict)
        except ConnectionError as error:
            self._known.pop(key, None)
            raise VLLMValidationError("the structured output could not be checked; try again") from error
        if refusal:
            raise VLLMValidationError(f"structured output: {refusal}", parameter="structured_outputs")
        return checked

    def close(self) -> None:
        """End the warm process."""
        if self.process is not None:
            self.process.kill()
            self._pipe.close()
            self.process = None

    def _ask(self, constraint: Any) -> asyncio.Future[Verdict]:
        loop = asyncio.get_running_loop()
        if self.process is None or not self.process.is_alive():
            self._start(loop)
        verdict: asyncio.Future[Verdict] = loop.create_future()
        self._number += 1
        self._waiting[self._number] = verdict
        try:
            self._pipe.send((self._number, constraint))
        except OSError:
            _fail(verdict)
        return verdict

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self._config), name="grammar-check")
        self.process.start()
        theirs.close()
        pipe = self._pipe
        waiting: dict[int, asyncio.Future[Verdict]] = {}
        self._waiting = waiting  # of this process: those of the one before are told by its own listener

        def listen() -> None:
            with contextlib.suppress(RuntimeError):  # the event loop has ended, and with it all who wait
                try:
                    while True:
                        number, verdict = pipe.recv()
                        loop.call_soon_threadsafe(_settle, waiting.pop(number), verdict)
                except (EOFError, OSError):
                    for lost in list(waiting.values()):
                        loop.call_soon_threadsafe(_fail, lost)

        threading.Thread(target=listen, name="grammar-check", daemon=True).start()


def _settle(verdict: "asyncio.Future[Verdict]", value: Verdict) -> None:
    if not verdict.done():
        verdict.set_result(value)


def _fail(verdict: "asyncio.Future[Verdict]") -> None:
    if not verdict.done():
        verdict.set_exception(ConnectionError("the process that checks structured outputs ended"))


def _serve(pipe: Connection, vllm_config: Any) -> None:
    """The warm process: fork a child for each constraint, give back what it says, and end those that take too long."""
    from engine.vllm.compat import exit_with_parent

    exit_with_parent()
    compiler = Compiler(vllm_config)
    children: dict[Any, tuple[int, Any, float]] = {}
    fork = multiprocessing.get_context("fork")
    is_open = True
    while is_open or children:
        sources: list[Any] = [*children, *([pipe] if is_open and len(children) < _MAX_CHILDREN else [])]
        for source in wait(sources, timeout=0.1):
            if source is pipe:
                try:
                    number, constraint = pipe.recv()
                except EOFError:
                    is_open = False
                    continue
                ours, theirs = fork.Pipe(duplex=False)
                child = fork.Process(target=_compile, args=(compiler, theirs, constraint), daemon=True)
                child.start()
                theirs.close()
                children[ours] = number, child, time.monotonic() + TIME_LIMIT_S
            else:
                number, child, _ = children.pop(source)
                pipe.send((number, _verdict_of(source, child)))
        now = time.monotonic()
        for source in [source for source, (_, _, until) in children.items() if until < now]:
            number, child, _ = children.pop(source)
            child.kill()
            child.join()
            pipe.send((number, (None, f"compiling it takes more than {TIME_LIMIT_S:g} s")))


def _verdict_of(source: Any, child: Any) -> Verdict:
    try:
        verdict: Verdict = source.recv()
    except EOFError:  # killed by a signal: out of memory, or a fault of the compiler
        verdict = None, "it cannot be compiled: the compiler ended, or needed more memory than it may have"
    child.join()
    return verdict


def _compile(compiler: "Compiler", pipe: Connection, constraint: Any) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + MEMORY_LIMIT_BYTES, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)  # what a dying compiler prints helps nobody
    try:
        verdict: Verdict = compiler.check(constraint), ""
    except MemoryError:
        verdict = None, f"compiling it takes more than {MEMORY_LIMIT_BYTES >> 20} MiB"
    except Exception as error:  # noqa: BLE001 - whatever a backend raises is a refusal
        verdict = None, str(error).splitlines()[0] if str(error) else type(error).__name__
    pipe.send(verdict)


def _data_bytes() -> int:
    """Private writable memory of this process, which is what `RLIMIT_DATA` counts."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))


class Compiler:
    """What vLLM's front end and engine do with a constraint."""

    def __init__(self, vllm_config: Any) -> None:
        from vllm.sampling_params import StructuredOutputsParams
        from vllm.v1.structured_output import StructuredOutputManager

        self._config = vllm_config
        self._manager = StructuredOutputManager(vllm_config)
        self._manager._use_async_grammar_compilation = False  # noqa: SLF001 - compile in this thread
        self._warm_backend = self.check(StructuredOutputsParams(json={"type": "object"}))._backend  # noqa: SLF001

    def check(self, constraint: Any) -> Any:
        """Validate, compile and walk; returns the constraint with its backend chosen.

        Raises whatever the backends raise, and ValueError for a constraint that no text fulfils.
        """
        from vllm import SamplingParams

        params, config = SamplingParams(structured_outputs=constraint), self._config
        params._validate_structured_outputs(  # noqa: SLF001 - the part of `SamplingParams.verify` that compiles
            config.model_config, config.structured_outputs_config, self._manager.tokenizer
        )
        checked = params.structured_outputs
        if self._manager.backend is not None and checked._backend != self._warm_backend:  # noqa: SLF001
            self._manager.backend = None
        request = _Request(params)
        self._manager.grammar_init(request)
        grammar = request.structured_output_request.grammar
        if isinstance(grammar, Exception):
            raise grammar
        mask = self._manager.backend.allocate_token_bitmask(1)
        for _ in range(_WALKED_TOKENS):
            if grammar.is_terminated():
                break
            grammar.fill_bitmask(mask, 0)
            token = _first_allowed(mask[0])
            if token is None:
                raise ValueError("there is no text that it allows")
            if not grammar.accept_tokens("check", [token]):
                break
        return checked


class _Request:
    """The part of vLLM's request that its manager of structured outputs reads."""

    def __init__(self, params: Any) -> None:
        from vllm.v1.structured_output.request import StructuredOutputRequest

        self.request_id = "check"
        self.sampling_params = params
        self.structured_output_request = StructuredOutputRequest(params=params.structured_outputs)


def _first_allowed(mask: Any) -> int | None:
    for word, bits in enumerate(mask.tolist()):
        if bits:
            bits &= 0xFFFFFFFF
            return word * 32 + (bits & -bits).bit_length() - 1
    return None
