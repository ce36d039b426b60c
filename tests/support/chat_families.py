"""Small tokenizers and chat templates in the shapes of well-known model families."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "What is the capital of France?",
    "It is Paris.",
    "Be kind. How are you? I am fine.",
    "user assistant system",
]

_TURNS = "{% for m in messages %}"
_CHATML = (
    _TURNS + "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set start = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set rest = messages %}{% set start = '' %}{% endif %}"
    "{% for m in rest %}{% if loop.first %}{% set said = start + m['content'] %}"
    "{% else %}{% set said = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + said.strip() + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + said.strip() + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('no such role') }}{% endif %}{% endfor %}"
)
_LLAMA3 = (
    "{{ bos_token }}" + _TURNS + "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{% if loop.last and system is defined %}"
    "{{ '[INST] ' + system + '\n\n' + m['content'] + '[/INST]' }}{% else %}"
    "{{ '[INST] ' + m['content'] + '[/INST]' }}{% endif %}"
    "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
_GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m['role'] == 'assistant' %}{% set role = 'model' %}"
    "{% else %}{% set role = m['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') + m['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
_PHI = (
    _TURNS + "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
_DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}{% endif %}{% endfor %}"
    + _TURNS
    + "{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{% elif m['role'] == 'assistant' %}"
    "{% set said = m['content'] %}{% if '</think>' in said %}{% set said = said.split('</think>')[-1] %}{% endif %}"
    "{{ '<｜Assistant｜>' + said + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
_QWEN3 = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% if messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'] + '\n\n' }}{% endif %}{{ '# Tools\n<tools>' }}"
    "{% for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}{{ '\n</tools><|im_end|>\n' }}{% endif %}"
    + _TURNS
    + "{% set said = m['content'] if m['content'] is string else '' %}"
    "{% if m['role'] == 'assistant' %}{% set thought = '' %}{% if '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\n' }}{% if loop.last or thought %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}{{ said.lstrip('\n') }}"
    "{% if m.tool_calls %}{% for call in m.tool_calls %}"
    "{% if (loop.first and said) or not loop.first %}{{ '\n' }}{% endif %}"
    '{{ \'<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{ call.function.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}"
    "{% elif m['role'] == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + said + '\n</tool_response><|im_end|>\n' }}"
    "{% elif not (tools and loop.first and m['role'] == 'system') %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + said + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Family:
    """A chat template, and the tokenizer of its models in small."""

    name: str
    template: str
    special: tuple[str, ...]
    """Names of the special tokens; the first is written before every text, if the tokenizer adds one."""
    eos: str
    end: str
    """The token that ends a turn."""
    spaces: str = "bytes"
    """`bytes`, `digits` (bytes, every digit by itself), or marks before words as SentencePiece has them: `always`,
    `first` or `legacy`."""
    bos: str | None = None
    plain: tuple[str, ...] = ()
    """Added tokens that are not special."""

    def tokenizer(self, **flags: bool) -> PreTrainedTokenizerFast:
        """The trained tokenizer; `flags` are those of its special tokens, but for the first of every text."""
        base = _trained(self.spaces, self.special)
        if flags:
            kept = json.loads(base.to_str())
            for token in kept["added_tokens"]:
                token |= flags if token["content"] != self.bos else {}
            base = Tokenizer.from_str(json.dumps(kept))
        base.add_tokens([AddedToken(name, normalized=False) for name in self.plain])
        if self.bos:
            numbered = [(self.bos, base.token_to_id(self.bos))]
            base.post_processor = processors.TemplateProcessing(single=f"{self.bos} $A", special_tokens=numbered)
        made = PreTrainedTokenizerFast(
            tokenizer_object=base, bos_token=self.bos, eos_token=self.eos, clean_up_tokenization_spaces=False
        )
        made.chat_template = self.template
        return made

    def save(self, directory: Path) -> PreTrainedTokenizerFast:
        """Write a model directory that has everything but weights; returns its tokenizer."""
        tokenizer = self.tokenizer()
        tokenizer.save_pretrained(directory)
        ends = [tokenizer.convert_tokens_to_ids(name) for name in dict.fromkeys((self.eos, self.end))]
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        config |= {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
        config |= {"num_key_value_heads": 1, "max_position_embeddings": 2048, "vocab_size": len(tokenizer)}
        (directory / "config.json").write_text(json.dumps(config))
        return tokenizer


def _trained(spaces: str, special: tuple[str, ...]) -> Tokenizer:
    trainer_options: dict[str, Any] = {"vocab_size": 700, "show_progress": False}
    if spaces in ("bytes", "digits"):
        base = Tokenizer(models.BPE())
        base.pre_tokenizer, base.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        if spaces == "digits":
            digits = pre_tokenizers.Digits(individual_digits=True)
            base.pre_tokenizer = pre_tokenizers.Sequence([digits, base.pre_tokenizer])
        trainer_options |= {
            "initial_alphabet": pre_tokenizers.ByteLevel.alphabet(),
            "special_tokens": list(special),
        }
    else:
        base = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True))
        pieces = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer_options |= {"special_tokens": [*special, *pieces], "vocab_size": 900}
        if spaces == "legacy":
            base.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            base.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=spaces, split=True)
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        base.decoder = decoders.Sequence(parts)
    base.train_from_iterator(TEXTS * 20, trainers.BpeTrainer(**trainer_options))
    if spaces != "bytes":  # the pieces of bytes are no special tokens
        kept = json.loads(base.to_str())
        kept["added_tokens"] = [token for token in kept["added_tokens"] if not token["content"].startswith("<0x")]
        base = Tokenizer.from_str(json.dumps(kept))
    return base


_IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
FAMILIES = [
    Family("chatml", _CHATML, _IM, "<|im_end|>", "<|im_end|>"),
    Family("smollm", _SMOLLM, _IM, "<|im_end|>", "<|im_end|>", "digits"),
    Family("llama2", _LLAMA2, ("<unk>", "<s>", "</s>"), "</s>", "</s>", "legacy", "<s>"),
    Family(
        "llama3",
        _LLAMA3,
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|end_of_text|>",
        "<|eot_id|>",
        bos="<|begin_of_text|>",
    ),
    Family("mistral", _MISTRAL, ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"), "</s>", "</s>", "first", "<s>"),
    Family(
        "gemma",
        _GEMMA,
        ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        "<eos>",
        "<end_of_turn>",
        "first",
        "<bos>",
    ),
    Family(
        "phi",
        _PHI,
        ("<unk>", "<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<|endoftext|>",
        "<|end|>",
        "always",
    ),
    Family(
        "deepseek",
        _DEEPSEEK,
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
        "<｜end▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        bos="<｜begin▁of▁sentence｜>",
        plain=("<think>", "</think>"),
    ),
    Family("qwen3", _QWEN3, _IM, "<|im_end|>", "<|im_end|>", plain=_MARKS),
]
