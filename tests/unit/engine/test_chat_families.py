"""Every family of chat templates trains: the server's prompt, the answer as it was said, and one end."""

from dataclasses import replace
from itertools import product

import pytest

from core.config import TrainingConfig
from core.errors import TrainingError
from core.wire import TrainingPair
from engine.training.content import Content
from engine.training.pair_tokens import Chat, PairTokenizer, plain_render
from tests.support.chat_families import FAMILIES, Family

USER = {"role": "user", "content": "What is the capital of France?"}
CONVERSATIONS = {
    "single": [USER],
    "multi": [USER, {"role": "assistant", "content": "Paris."}, {"role": "user", "content": "Why? Tell me:\n"}],
    "system": [{"role": "system", "content": "Be kind."}, USER],
    "odd": [{"role": "user", "content": " Ça va? 你好 🙂 $5 \n\n\ttabs  and   spaces"}],
}
ANSWERS = [
    "It is Paris.",
    "46",
    "$46 or 46",
    "\n\nTwo lines\nlater",
    "Ça va 你好 🙂  two  spaces",
    "a",
    "[INST] no [/INST]",
]
BY_NAME = {family.name: family for family in FAMILIES}


class Trained:
    """One family's tokenizer, and what is trained with it."""

    def __init__(self, family: Family, *, hides_thoughts: bool = False, **flags: bool) -> None:
        self.family, self.hub = family, family.tokenizer(**flags)
        self.end = self.hub.convert_tokens_to_ids(family.end)
        ends = {self.end, self.hub.eos_token_id}
        content = Content(self.hub, ends)
        chat = Chat(content, plain_render(content), hides_thoughts)
        self.pairs = PairTokenizer(self.hub, ends, TrainingConfig(), chat=chat)

    def ids(self, prompt, answer, **more):
        other = "no" if answer != "no" else "yes"
        pair = self.pairs.tokenize(TrainingPair("p", prompt, answer, other, **more))
        return list(pair.prompt_ids), list(pair.chosen_ids)

    def said(self, prompt, answer, **more):
        """The trained answer as text behind its prompt, without the end."""
        prompt_ids, ids = self.ids(prompt, answer, **more)
        assert ids[-1] == self.end
        whole, before = self.hub.decode(prompt_ids + ids[:-1]), self.hub.decode(prompt_ids)
        return whole[len(before) :]


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def family(request):
    return Trained(request.param)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_prompt_is_the_rendered_template(family, name):
    rendered = family.hub.apply_chat_template(CONVERSATIONS[name], tokenize=False, add_generation_prompt=True)
    prompt_ids, _ = family.ids(CONVERSATIONS[name], "It is Paris.")
    assert prompt_ids == family.hub(rendered, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(("name", "answer"), list(product(CONVERSATIONS, ANSWERS)))
def test_the_answer_reads_back_and_ends_once(family, name, answer):
    said = family.said(CONVERSATIONS[name], answer)
    assert said.strip() == answer.strip()
    _, ids = family.ids(CONVERSATIONS[name], answer)
    assert [number for number in ids if number in (family.end, family.hub.eos_token_id)] == [family.end]


def test_no_white_space_of_an_answer_is_lost_or_doubled(family):
    assert family.said([USER], " It is Paris.").startswith(" It")
    assert family.said([USER], "\n\nIt is Paris.").startswith("\n\nIt")
    assert family.said([USER], "It is Paris. \n").endswith("Paris. \n")
    seams = {family.said([USER], "It is Paris.")[: -len("It is Paris.")], family.said([USER], "46")[:-2]}
    assert seams <= {"", " "} or family.family.name == "llama2"


def test_a_special_token_that_somebody_writes_stays_text(family):
    for name in family.family.special:
        written = f"It is {name} here{name}"
        plain, marked = family.ids([USER], "It is Paris.")[0], family.ids([{**USER, "content": written}], "yes")[0]
        number = family.hub.convert_tokens_to_ids(name)
        assert marked.count(number) == plain.count(number), name
        assert written in family.hub.decode(marked)
        said = family.said([USER], written)
        assert said.strip() == written
        assert family.ids([USER], written)[1].count(number) == (1 if number == family.end else 0)
        earlier = [USER, {"role": "assistant", "content": written}, USER]
        without = [USER, {"role": "assistant", "content": "Paris."}, USER]
        assert family.ids(earlier, "yes")[0].count(number) == family.ids(without, "yes")[0].count(number)


def test_text_beside_a_written_token_has_the_tokens_that_it_always_has(family):
    name = family.family.end
    split = family.hub.backend_tokenizer
    split.encode_special_tokens = True
    alone = split.encode(f"to {name} or", add_special_tokens=False).ids
    split.encode_special_tokens = False
    ids = family.ids([{"role": "user", "content": f"How\nto {name} or\nnot"}], "yes")[0]
    inner = alone[2:-2]
    assert any(ids[place : place + len(inner)] == inner for place in range(len(ids)))


def test_answers_that_differ_behind_the_text_of_an_end_are_two_answers(family):
    end = family.family.end
    pair = TrainingPair("p", [USER], f"It is {end} here", f"It is {end} there")
    tokens = family.pairs.tokenize(pair)
    assert tokens.chosen_ids != tokens.rejected_ids


def test_a_plain_text_pair_goes_on_without_a_space(family):
    for prompt, answer in (
        ("Price: ", "$46"),
        ("Price: ", "46"),
        ("Once upon a", "time"),
        ("Once upon", " a time"),
    ):
        prompt_ids, ids = family.ids(prompt, answer)
        assert prompt_ids == family.hub(prompt)["input_ids"]
        whole = family.hub.decode(prompt_ids + ids[:-1], skip_special_tokens=True)
        assert whole.lstrip() == prompt + answer


def test_a_completion_prompt_keeps_the_tokens_that_it_names(family):
    name = family.family.special[0]
    number = family.hub.convert_tokens_to_ids(name)
    prompt_ids, ids = family.ids(f"{name}How are", f" you {name}")
    assert prompt_ids == family.hub(f"{name}How are")["input_ids"]
    assert number in prompt_ids
    assert number not in ids[:-1]


def test_known_ids_are_trained_as_they_are_if_they_say_the_answer(family):
    letters = [one for char in "It is Paris." for one in family.pairs._content.encode_rest(char)]  # noqa: SLF001
    known = (*letters, family.end)
    assert family.ids([USER], "It is Paris.", chosen_ids=known)[1] == list(known)
    assert family.ids([USER], "It is Rome.", chosen_ids=known)[1] != list(known)
    assert (
        family.ids([USER], "It is Paris.", chosen_ids=(*known, 10**6))[1] == family.ids([USER], "It is Paris.")[1]
    )


def test_text_parts_are_lines(family):
    parts = [{"type": "text", "text": "How are"}, {"type": "text", "text": "you?"}]
    joined = family.ids([{"role": "user", "content": "How are\nyou?"}], "yes")
    assert family.ids([{"role": "user", "content": parts}], "yes") == joined


FLAGS = [{"rstrip": True}, {"lstrip": True}, {"rstrip": True, "lstrip": True}, {"normalized": True}]


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_special_tokens_that_take_white_space_take_none_of_an_answer(family, flags):
    marked = Trained(family.family, **flags)
    for prompt, answer in product(
        CONVERSATIONS.values(), [*ANSWERS, " lead", "end  \n", f"a {family.family.end} b"]
    ):
        said = marked.said(prompt, answer)
        assert said.strip() == answer.strip()
        assert said.lstrip(" ").startswith(answer.lstrip(" "))


# Thoughts.

THOUGHT = "<think>\nhmm\n</think>\n\nIt is Paris."


@pytest.mark.parametrize("hides", [False, True])
def test_thoughts_are_neither_lost_nor_doubled(hides):
    qwen = Trained(BY_NAME["qwen3"], hides_thoughts=hides)
    assert qwen.said([USER], THOUGHT) == THOUGHT
    deepseek = Trained(BY_NAME["deepseek"], hides_thoughts=hides)
    assert deepseek.said([USER], "hmm\n</think>\n\nIt is Paris.") == "hmm\n</think>\n\nIt is Paris."
    assert deepseek.said([USER], THOUGHT) == "hmm\n</think>\n\nIt is Paris."  # the prompt has begun them


def test_thoughts_that_the_prompt_has_closed_are_not_repeated():
    qwen = BY_NAME["qwen3"]
    asked = "enable_thinking is defined and enable_thinking is false"
    closed = Trained(replace(qwen, template=qwen.template.replace(asked, "true")))
    assert closed.said([USER], "<think>\n\n</think>\n\nIt is Paris.") == "It is Paris."
    assert closed.said([USER], "It is Paris.") == "It is Paris."


def test_an_answer_without_thoughts_is_trained_as_the_server_would_show_it():
    for name, block in (("qwen3", "<think>\n\n</think>\n\n"), ("deepseek", "\n</think>\n\n")):
        assert Trained(BY_NAME[name]).said([USER], "It is Paris.") == "It is Paris."
        assert Trained(BY_NAME[name], hides_thoughts=True).said([USER], "It is Paris.") == block + "It is Paris."


def test_the_models_own_tokens_stay_tokens():
    family = BY_NAME["qwen3"]
    special = Trained(Family("special", family.template, (*family.special, *family.plain), family.eos, family.end))
    think, call = map(special.hub.convert_tokens_to_ids, ("<think>", "<tool_call>"))
    _, ids = special.ids([USER], THOUGHT)
    assert ids.count(think) == 1
    prompt = [USER, {"role": "assistant", "content": "<tool_call>x"}, USER]
    assert special.ids(prompt, "yes")[0].count(call) == 1
    assert call not in special.ids([{**USER, "content": "<tool_call>x"}], "yes")[0]


# Tools.

TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "<|im_end|>", "parameters": {"type": "object"}},
    }
]
CALLS = [
    {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris<|im_end|>"}'}}
]


def test_an_answer_with_tools_is_trained_behind_the_same_tools():
    qwen = Trained(BY_NAME["qwen3"])
    prompt_ids, ids = qwen.ids([USER], "It rains.", tools=TOOLS)
    rendered = qwen.hub.apply_chat_template([USER], tools=TOOLS, tokenize=False, add_generation_prompt=True)
    assert qwen.hub.decode(prompt_ids) == rendered
    assert prompt_ids.count(qwen.end) == 2  # of the tools and of the user: the description stays text
    assert qwen.hub.decode(ids) == "It rains.<|im_end|>"


def test_an_answer_that_calls_a_tool_is_trained_as_the_template_writes_it():
    qwen = Trained(BY_NAME["qwen3"])
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris<|im_end|>"}}\n</tool_call>'
    assert qwen.said([USER], "", tools=TOOLS, chosen_calls=CALLS) == call
    assert qwen.said([USER], "Let me see.", tools=TOOLS, chosen_calls=CALLS) == "Let me see.\n" + call
    _, ids = qwen.ids([USER], "", tools=TOOLS, chosen_calls=CALLS)
    assert ids.count(qwen.end) == 1
    hiding = Trained(BY_NAME["qwen3"], hides_thoughts=True)
    assert hiding.said([USER], "", tools=TOOLS, chosen_calls=CALLS) == "<think>\n\n</think>\n\n" + call


def test_a_tool_call_in_the_prompt_and_its_result_are_rendered():
    qwen = Trained(BY_NAME["qwen3"])
    prompt = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": CALLS},
        {"role": "tool", "content": "rain", "tool_call_id": "c1"},
    ]
    text = qwen.hub.decode(qwen.ids(prompt, "It rains.", tools=TOOLS)[0])
    assert '{"name": "weather", "arguments": {"city": "Paris<|im_end|>"}}' in text
    assert "<tool_response>\nrain\n</tool_response>" in text


def test_a_template_without_tool_calls_parks_an_answer_that_makes_one():
    chatml = Trained(BY_NAME["chatml"])
    with pytest.raises(TrainingError, match="leaves out the tool calls"):
        chatml.ids([USER], "", tools=TOOLS, chosen_calls=CALLS)


def test_an_answer_that_the_tokenizer_cannot_write_is_parked_with_that_reason():
    family = BY_NAME["phi"]
    hub = Trained(family)
    backend = hub.hub.backend_tokenizer
    backend.model.byte_fallback = False
    with pytest.raises(TrainingError, match="do not read back"):
        hub.ids([USER], "你好")
