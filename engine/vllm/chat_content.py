"""How vLLM's server renders conversations: for training, and with what messages say kept apart from special tokens.

`guard` wraps the four methods of one live renderer through which every chat passes, whatever its route: two that render
messages and two that tokenize the rendered text. Completions pass the same tokenization, and are not changed.
"""

from dataclasses import replace
from typing import Any

from engine.training.content import Content
from engine.training.pair_tokens import Chat, Messages, end_token_ids


def make_chat(online: Any, *, messages_are_text: bool) -> Chat | None:
    """How vLLM's `OnlineRenderer` makes tokens of chats; with `messages_are_text` it is guarded from now on.

    None, and nothing is guarded: it does not render templates as text (Mistral's own tokenizer, embeddings as prompts).
    """
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionToolsParam
    from vllm.renderers import ChatParams, merge_kwargs
    from vllm.renderers.hf import HfRenderer

    renderer = online.renderer
    if not isinstance(renderer, HfRenderer) or online.use_harmony or renderer.model_config.enable_prompt_embeds:
        return None
    content = Content(renderer.tokenizer, end_token_ids(renderer.model_config.model, renderer.tokenizer))
    if messages_are_text:
        content.prepare()
        guard(renderer, content)

    def render(messages: Messages, tools: list[dict[str, Any]] | None, options: dict[str, Any]) -> str:
        given = [ChatCompletionToolsParam.model_validate(tool).model_dump() for tool in tools or ()] or None
        fixed = {"tools": given, "tokenize": False}
        variables = merge_kwargs(online.default_chat_template_kwargs, {**fixed, **options})
        params = ChatParams(online.chat_template, online.chat_template_content_format, variables)
        _, prompt = renderer.render_messages(messages, params)
        return str(prompt["prompt"])

    hides_thoughts = online.parser is not None and online.parser.reasoning_parser_cls is not None
    return Chat(content, render, hides_thoughts)


def guard(renderer: Any, content: Content) -> None:
    """Keep the names of special tokens in messages from becoming those tokens, in all chats of an `HfRenderer`."""
    from vllm.utils.async_utils import make_async

    render, render_async = renderer.render_messages, renderer.render_messages_async
    tokenize = renderer._tokenize_prompt  # noqa: SLF001

    def hidden(messages: Any, params: Any) -> tuple[Any, Any]:
        variables = content.hide(params.chat_template_kwargs)
        return content.hide(messages), replace(params, chat_template_kwargs=variables)

    def render_messages(messages: Any, params: Any) -> Any:
        conversation, prompt = render(*hidden(messages, params))
        return content.show(conversation), prompt

    async def render_messages_async(messages: Any, params: Any) -> Any:
        conversation, prompt = await render_async(*hidden(messages, params))
        return content.show(conversation), prompt

    def tokenize_prompt(prompt: Any, params: Any) -> Any:
        text = prompt["prompt"]
        if not content.has_marks(text):
            return tokenize(prompt, params)
        ids = content.encode(text, add_special_tokens=params.add_special_tokens)
        if params.get_encode_kwargs()["truncation"]:
            limit = params.get_encode_kwargs()["max_length"]
            ids = ids[-limit:] if content.tokenizer.truncation_side == "left" else ids[:limit]
        return renderer._build_tokens_prompt(ids, {**prompt, "prompt": content.show(text)})  # noqa: SLF001

    renderer.render_messages, renderer.render_messages_async = render_messages, render_messages_async
    renderer._tokenize_prompt = tokenize_prompt  # noqa: SLF001
    tokenize_async = make_async(tokenize_prompt, executor=renderer._executor)  # noqa: SLF001
    renderer._tokenize_prompt_async = tokenize_async  # noqa: SLF001
