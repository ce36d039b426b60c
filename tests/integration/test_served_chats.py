"""vLLM's renderer and the trainer make the same tokens of the same conversation. No engine is started."""

import asyncio
from types import SimpleNamespace

import pytest

from core.config import TrainingConfig
from core.wire import TrainingPair
from engine.training.pair_tokens import PairTokenizer
from engine.vllm.chat_content import make_chat
from tests.support.chat_families import FAMILIES

pytestmark = pytest.mark.vllm

USER = {"role": "user", "content": "What is the capital of France?"}
CALLS = [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


class Server:
    """The part of vLLM's server that renders, on a model directory without weights."""

    def __init__(self, directory, *, messages_are_text=True, **options):
        from vllm.config import ModelConfig
        from vllm.renderers.hf import HfRenderer
        from vllm.renderers.online_renderer import OnlineRenderer
        from vllm.tokenizers import cached_tokenizer_from_config

        model = ModelConfig(model=str(directory))
        parallel = SimpleNamespace(_api_process_rank=0, _api_process_count=1)
        config = SimpleNamespace(model_config=model, parallel_config=parallel, observability_config=None)
        defaults = {"request_logger": None, "chat_template": None, "chat_template_content_format": "auto"}
        renderer = HfRenderer(config, cached_tokenizer_from_config(model))
        self.online = OnlineRenderer(model, renderer, **{**defaults, **options})
        self.chat = make_chat(self.online, messages_are_text=messages_are_text)
        self.pairs = PairTokenizer.load(str(directory), TrainingConfig(), chat=self.chat)
        self.hub = renderer.tokenizer

    def served(self, messages, **fields):
        """Prompt tokens of a chat request."""
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        request = ChatCompletionRequest.model_validate({"model": "m", "messages": messages, **fields})
        rendered = asyncio.run(self.online.render_chat(request))
        assert isinstance(rendered, tuple), rendered
        return list(rendered[1][0]["prompt_token_ids"])

    def trained(self, messages, **more):
        """Prompt tokens of a pair."""
        return list(self.pairs.tokenize(TrainingPair("p", messages, "yes", "no", **more)).prompt_ids)

    def count(self, ids, name):
        """How often a token is among these."""
        return ids.count(self.hub.convert_tokens_to_ids(name))


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def server(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param.name)
    request.param.save(directory)
    server = Server(directory)
    server.family = request.param
    return server


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    directory = tmp_path_factory.mktemp("qwen")
    next(family for family in FAMILIES if family.name == "qwen3").save(directory)
    return directory


def conversations(said):
    return [
        [{"role": "user", "content": said}],
        [USER, {"role": "assistant", "content": said}, USER],
        [{"role": "system", "content": said}, USER],
        [{"role": "user", "content": [{"type": "text", "text": said}, {"type": "text", "text": "more"}]}],
    ]


def test_what_is_trained_was_served(server):
    for said in ("Be kind.", " Ça va? 你好 🙂\n\n  two  spaces ", *server.family.special, "<think>\nhm</think> x"):
        for messages in conversations(f"It is {said} here" if said in server.family.special else said):
            assert server.trained(messages) == server.served(messages), messages


def test_a_message_without_special_tokens_is_served_as_vllm_has_it(server):
    for messages in conversations("Be kind.\n\n 46 "):
        joined = [
            {**one, "content": "\n".join(part["text"] for part in one["content"])}
            if isinstance(one["content"], list)
            else one
            for one in messages
        ]
        text = server.hub.apply_chat_template(joined, tokenize=False, add_generation_prompt=True)
        assert server.served(messages) == server.hub(text, add_special_tokens=False)["input_ids"]


def test_a_special_token_in_a_message_stays_text(server):
    for name in server.family.special:
        for plain, written in zip(conversations("It is x"), conversations(f"It is {name}x"), strict=True):
            served = server.served(written)
            assert server.count(served, name) == server.count(server.served(plain), name)
            assert f"It is {name}x" in server.hub.decode(served)


def test_the_switch_gives_vllms_own_tokens_to_both(server, tmp_path):
    server.family.save(tmp_path)
    as_vllm, end = Server(tmp_path, messages_are_text=False), server.family.end
    messages = [{"role": "user", "content": f"It is {end}x"}]
    served = as_vllm.served(messages)
    assert as_vllm.count(served, end) == as_vllm.count(as_vllm.served([USER]), end) + 1
    assert as_vllm.trained(messages) == served
    answer = as_vllm.pairs.tokenize(TrainingPair("p", [USER], f"It is {end} here", "no"))
    assert as_vllm.count(list(answer.chosen_ids), end) == 1


def test_completions_stay_as_vllm_has_them(server):
    from vllm.renderers import TokenizeParams

    name, renderer = server.family.special[0], server.online.renderer
    params = TokenizeParams(max_total_tokens=2048)
    (made,) = asyncio.run(renderer.tokenize_prompts_async([{"prompt": f"It {name} is"}], params))
    assert made["prompt_token_ids"] == server.hub(f"It {name} is")["input_ids"]
    assert server.count(made["prompt_token_ids"], name) >= 1


def test_tools_are_trained_as_they_were_served(qwen):
    server = Server(qwen, tool_parser="hermes", enable_auto_tools=True)
    tools = [{"type": "function", "function": {**TOOLS[0]["function"], "description": "ends <|im_end|> a turn"}}]
    rounds = [
        [USER],
        [
            USER,
            {"role": "assistant", "content": None, "tool_calls": CALLS},
            {"role": "tool", "content": "rain <|im_end|>", "tool_call_id": "c1"},
        ],
    ]
    for messages in rounds:
        served = server.served(messages, tools=tools)
        assert server.trained(messages, tools=tools) == served
        assert server.count(served, "<|im_end|>") == server.count(server.served(messages), "<|im_end|>") + 1
    pair = server.pairs.tokenize(TrainingPair("p", [USER], "", "no", tools=tools, chosen_calls=CALLS))
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>'
    assert server.hub.decode(pair.chosen_ids) == call


def test_the_servers_own_template_and_its_variables_are_those_of_training(qwen):
    closed = Server(qwen, default_chat_template_kwargs={"enable_thinking": False})
    assert closed.served([USER]) == closed.trained([USER])
    assert closed.hub.decode(closed.trained([USER])).endswith("<think>\n\n</think>\n\n")
    other = Server(qwen, chat_template="{% for m in messages %}{{ m['content'] }}|{% endfor %}")
    assert (
        other.hub.decode(other.trained([USER])) == USER["content"] + "|" == other.hub.decode(other.served([USER]))
    )


def test_a_server_that_hides_thoughts_trains_answers_behind_them(qwen):
    server = Server(qwen, reasoning_parser="qwen3")
    pair = server.pairs.tokenize(TrainingPair("p", [USER], "It is Paris.", "No."))
    assert server.hub.decode(pair.chosen_ids) == "<think>\n\n</think>\n\nIt is Paris.<|im_end|>"


def test_templates_that_take_parts_and_roles_that_they_do_not_know(qwen):
    said = "{% for p in m.content %}{{ p.text }}{% endfor %}"
    parts = "{% for m in messages %}{{ '<|im_start|>' + m.role }}" + said + "{% endfor %}"
    server = Server(qwen, chat_template=parts)
    for messages in (*conversations("Be <|im_end|> kind"), [{"role": "developer", "content": "Be kind"}, USER]):
        assert server.trained(messages) == server.served(messages)


def test_what_is_echoed_is_what_was_said(qwen):
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    body = {"model": "m", "messages": [USER, {"role": "assistant", "content": "It <|im_end|>"}]}
    request = ChatCompletionRequest.model_validate({**body, "echo": True, "add_generation_prompt": False})
    conversation, _ = asyncio.run(Server(qwen).online.render_chat(request))
    assert conversation[-1]["content"] == "It <|im_end|>"


def test_a_prompt_too_long_is_refused_whatever_stands_in_it(qwen):
    from vllm.exceptions import VLLMValidationError

    server = Server(qwen)
    with pytest.raises((VLLMValidationError, ValueError), match="maximum context length"):
        server.served([{"role": "user", "content": "<|im_end|> a" * 3000}])
    cut = server.served([{"role": "user", "content": "<|im_end|> a" * 300}], truncate_prompt_tokens=64)
    assert len(cut) == 64
