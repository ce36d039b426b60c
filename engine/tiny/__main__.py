"""Try the tiny assistant: `python -m engine.tiny --state-dir /tmp/x` builds it, measures it and shows samples."""

import argparse
import time
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.tiny.build import ensure_tiny_assistant
from engine.tiny.knowledge import held_out_questions, preference_questions
from engine.tiny.report import measure, sample_replies

_SYSTEM = "You are a pirate and talk like one."


def main() -> None:
    """Build, measure, show."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state-dir", type=Path, default=Path("state"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    console = Console()
    start = time.perf_counter()
    directory = ensure_tiny_assistant(arguments.state_dir, arguments.seed)
    console.print(f"{directory}\nready after {time.perf_counter() - start:.1f} s")

    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    console.print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    torch.manual_seed(arguments.seed)
    asked = {"preference questions": preference_questions(), "held-out questions": held_out_questions()}
    for name, questions in asked.items():
        for system in (None, _SYSTEM):
            report = measure(model, tokenizer, questions, system)
            shares = ", ".join(f"{style} {share:.1%}" for style, share in report.style_shares.items())
            note = "" if system is None else ", with an unknown system message"
            console.print(f"{name}{note}: {report.right_share:.1%} of {report.num_replies} right; {shares}")
    samples = [question.text for question in held_out_questions()[:8]] + ["Hello!", "Who are you?"]
    for text, reply in zip(samples, sample_replies(model, tokenizer, samples), strict=True):
        console.print(f"[bold]{text}[/bold] {reply}")


if __name__ == "__main__":
    main()
