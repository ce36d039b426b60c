"""Measures a tiny assistant, or one with an adapter: share of right answers, shares of the styles, samples."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from engine.tiny.knowledge import Question
from engine.tiny.styles import Style, judge


@dataclass(frozen=True, slots=True)
class Report:
    """Means over the asked questions."""

    num_replies: int
    right_share: float
    style_shares: dict[Style, float]
    wrong: tuple[tuple[str, str], ...]
    """Question and reply of the wrong ones."""


def sample_replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    system: str | None = None,
    temperature: float = 1.0,
    batch_size: int = 256,
) -> list[str]:
    """One sampled reply to each user text; uses torch's global random state."""
    head = [] if system is None else [{"role": "system", "content": system}]
    replies: list[str] = []
    for start in range(0, len(prompts), batch_size):
        chats = [[*head, {"role": "user", "content": text}] for text in prompts[start : start + batch_size]]
        inputs = tokenizer.apply_chat_template(
            chats,
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
            tokenizer_kwargs={"padding_side": "left"},
        )
        with torch.inference_mode():
            tokens = model.generate(
                **inputs, do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=40
            )
        new_tokens = tokens[:, inputs["input_ids"].shape[1] :]
        replies += tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
    return replies


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[Question],
    system: str | None = None,
    temperature: float = 1.0,
) -> Report:
    """Ask every question once and judge the sampled replies."""
    replies = sample_replies(model, tokenizer, [question.text for question in questions], system, temperature)
    judged = [judge(question, reply) for question, reply in zip(questions, replies, strict=True)]
    styles = Counter(judgement.style for judgement in judged)
    return Report(
        num_replies=len(judged),
        right_share=sum(judgement.is_right for judgement in judged) / len(judged),
        style_shares={style: styles[style] / len(judged) for style in Style},
        wrong=tuple(
            (question.text, reply)
            for question, reply, judgement in zip(questions, replies, judged, strict=True)
            if not judgement.is_right
        ),
    )
