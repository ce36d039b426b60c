"""What every request passes on its way to the engine and back, whatever route it came by.

A request that the engine could not take is refused here with vLLM's own error, which its routes answer with 400. And
the engine learns who sent it, so that clients take turns (`scheduler.queues.waiting`). On the way back, one that the
engine ended because it failed is told so with vLLM's own error too: 500, or the last event of a stream.
"""

import copy
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any

import msgspec

from engine.vllm.directive import CLIENT_KEY
from engine.vllm.grammars import GrammarCheck

CLIENT: ContextVar[str | None] = ContextVar("mace_client", default=None)
"""Who sent the HTTP request that is being handled; None for requests of our own."""

FAILED = "the engine failed on this request and has ended it; the server's log says why"


def check_requests(client: Any) -> GrammarCheck:
    """Look at each request that comes to a started `AsyncLLM` from now on; returns the check, to be closed with it.

    vLLM's own checks of structured outputs in this process, which compile on the event loop, do nothing from here on.
    """
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.structured_output import backend_xgrammar

    grammars, add_request = GrammarCheck(client.vllm_config), client.add_request

    async def checked(request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        check_sendable((request_id, params, kwargs.get("priority")))
        if isinstance(params, SamplingParams):
            constraint = params.structured_outputs
            if constraint is not None and not constraint.all_constraints_none():
                if params.allowed_token_ids:  # most often the two leave no token, which fails in the middle
                    reason = "allowed_token_ids and a structured output cannot be asked for together"
                    raise VLLMValidationError(reason, parameter="allowed_token_ids")
                params.structured_outputs = copy.copy(await grammars.check(constraint))  # vLLM writes into it
            if name := CLIENT.get():
                params.extra_args = {**(params.extra_args or {}), CLIENT_KEY: name}
        return await add_request(request_id, prompt, params, *args, **kwargs)

    client.add_request = checked
    SamplingParams._validate_structured_outputs = _leave_to_check  # noqa: SLF001
    backend_xgrammar.validate_xgrammar_grammar = _leave_to_check
    return grammars


def watch_failures(client: Any, note: Callable[[str], None]) -> None:
    """Raise `GenerationError` out of a started `AsyncLLM` for each request that the engine ended because it failed.

    `note` is called with the request's id. Without this vLLM's routes say "Internal server error".
    """
    from vllm.exceptions import GenerationError

    generate = client.generate

    async def watched(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        async with aclosing(generate(*args, **kwargs)) as outputs:
            async for output in outputs:
                if any(answer.finish_reason == "error" for answer in output.outputs):
                    note(output.request_id)
                    raise GenerationError(FAILED)
                yield output

    client.generate = watched


def check_sendable(value: Any) -> None:
    """Refuse what cannot be sent to the engine: a number of more than 64 bits, or half of a character.

    vLLM finds out after it has registered the request, which would then stay for ever.

    Raises:
        VLLMValidationError: saying so.
    """
    from vllm.exceptions import VLLMValidationError

    try:
        msgspec.msgpack.encode(value, enc_hook=lambda _: None)  # vLLM's encoder knows more types
    except (OverflowError, UnicodeEncodeError, RecursionError) as error:
        raise VLLMValidationError(f"a parameter cannot be sent to the engine: {error}") from error


def _leave_to_check(*_: Any) -> None:
    """Stands for vLLM's checks of a constraint in the front end."""
