"""Random bodies for vLLM's routes: fields and types are those of vLLM's own request models."""

import json
import types
import typing
from typing import Any, Literal, Union

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

ROUTES = {
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/chat/completions/batch": ChatCompletionRequest,
    "/v1/messages": ChatCompletionRequest,
    "/invocations": CompletionRequest,
}

USUAL = {
    "n": [1, 2, 3],
    "temperature": [0, 0.5, 1.0, 2.0],
    "top_p": [0.1, 0.9, 1],
    "top_k": [-1, 0, 1, 5],
    "min_p": [0, 0.1],
    "seed": [0, 1, 2**31],
    "stop": ["a", ["a", "the"]],
    "stop_token_ids": [[1], [5, 6]],
    "min_tokens": [0, 2],
    "repetition_penalty": [0.5, 1.0, 1.5],
    "presence_penalty": [-1, 1],
    "frequency_penalty": [-1, 1],
    "logit_bias": [{"5": 1}, {"5": -100}],
    "allowed_token_ids": [[5, 6, 7], [9]],
    "bad_words": [["the"], ["a", "b"]],
    "prompt_logprobs": [0, 1, 5],
    "logprobs": [0, 1, 3, True],
    "top_logprobs": [0, 1, 5],
    "echo": [True],
    "ignore_eos": [True],
    "skip_special_tokens": [False],
    "structured_outputs": [{"regex": "[a-z]+"}, {"choice": ["a", "b"]}, {"json": {"type": "object"}}],
    "response_format": [{"type": "json_object"}, {"type": "text"}],
    "cache_salt": ["salt"],
    "priority": [0, 1, 5],
    "stream": [True],
    "user": ["ann", "bob"],
    "truncate_prompt_tokens": [3],
    "return_token_ids": [True],
    "include_stop_str_in_output": [True],
}
"""Values that a client may mean, by field; others come from the field's type."""

_ODD: dict[Any, list[Any]] = {
    int: [0, 1, -1, 3, 10**9, 2**31, 2**63, 1e30, -(2**63), "5"],
    float: [0, 0.5, -1, 1e30, 1e-30, 1e308, 3],
    str: ["", "x", "a" * 300, "\x00", "\u20ac"],
    bool: [True, False],
    list: [[], [1], ["a"], [-1], [10**9], [None]],
    dict: [{}, {"a": 1}, {"5": 5}, {"-1": 1e9}],
}
_ANYTHING = [None, 0, -1, "x", [], {}, [[1]], {"a": None}, True, 1e30]
_FIXED = {"model", "messages", "prompt", "input", "max_tokens", "max_completion_tokens", "max_output_tokens"}


def random_request(random, models):
    """A route and a body: mostly what a client may mean, now and then what nobody means."""
    route = random.choice(list(ROUTES))
    body: dict[str, Any] = {}
    fields = {name: field for name, field in ROUTES[route].model_fields.items() if name not in _FIXED}
    for name in random.sample([name for name in fields if name in USUAL], random.randint(0, 4)):
        body[name] = random.choice(USUAL[name])
    if random.random() < 0.25:
        name = random.choice(list(fields))
        body[name] = random.choice(_values(fields[name].annotation) if random.random() < 0.8 else _ANYTHING)
    return route, {**body, "model": random.choice(models), **_content(random, route)}


def _content(random, route):
    words = random.choice(["What is the capital of France?", "Hi", "x " * random.randint(1, 400)])
    limit = random.choice([1, 4, 16])
    chat = [{"role": "user", "content": words}]
    if route == "/v1/responses":
        return {"input": words, "max_output_tokens": limit}
    if route in ("/v1/completions", "/invocations"):
        return {"prompt": random.choice([words, words, [5, 6, 7], ["a", "b"], [[5, 6], [7]]]), "max_tokens": limit}
    return {"messages": [chat, chat] if route.endswith("/batch") else chat, "max_tokens": limit}


def _values(annotation):
    origin = typing.get_origin(annotation)
    if origin in (Union, types.UnionType, typing.Annotated):
        return [value for part in typing.get_args(annotation) for value in _values(part)] or _ANYTHING
    if origin is Literal:
        return list(typing.get_args(annotation))
    return _ODD.get(origin or annotation, _ANYTHING)


def encode(body):
    """The JSON of a body; numbers stay as they are, however large."""
    return json.dumps(body).encode()
