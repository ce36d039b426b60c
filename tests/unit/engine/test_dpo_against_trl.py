"""The sliced step against the real `DPOTrainer`: same tokens, loss and every LoRA gradient."""

from dataclasses import replace

import peft
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from core.types import FineTuneTask, TaskKind, TokenizedPair
from engine.training.trainable import TARGET_MODULES
from tests.support.trainable_models import VOCAB, make_training, run, run_to_loss, save_model, start

MAX_LENGTH = 16


def _tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    core = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", bos_token="<s>")


def _rows() -> Dataset:
    """TRL adds EOS where it is missing; the last row is longer than MAX_LENGTH and loses it again."""

    def text(start: int, count: int) -> str:
        return " ".join(f"w{3 + (start + 7 * i) % (VOCAB - 3)}" for i in range(count))

    sizes = [(3, 4, 2), (5, 1, 6), (2, 7, 7), (6, 20, 12)]
    return Dataset.from_list(
        [
            {"prompt": text(i, p) + " ", "chosen": text(11 * i, c) + " ", "rejected": text(5 * i + 1, r) + " "}
            for i, (p, c, r) in enumerate(sizes)
        ]
    )


def _trainer(directory: str, out: str, sft_weight: float, kind: str) -> DPOTrainer:
    """Without the loss that keeps a router's load even, which TRL adds to that of DPO: the router is frozen here."""
    arguments = DPOConfig(
        output_dir=out,
        beta=0.3,
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, sft_weight],
        max_length=MAX_LENGTH,
        per_device_train_batch_size=4,
        gradient_checkpointing=False,
        precompute_ref_log_probs=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        router_aux_loss_coef=0.0,
    )
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(TARGET_MODULES[kind]), task_type="CAUSAL_LM")
    return DPOTrainer(
        AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32),
        args=arguments,
        train_dataset=_rows(),
        processing_class=_tokenizer(),
        peft_config=lora,
    )


@pytest.mark.parametrize("kind", ["gemma3_text", "llama", "phi3", "qwen2", "qwen3_moe"])
@pytest.mark.parametrize(
    ("max_slice_tokens", "is_cached"),
    [(1024, False), (40, False), (40, True)],
    ids=["one_batch", "micro_batches", "cached_reference"],
)
@pytest.mark.parametrize("sft_weight", [0.0, 0.7], ids=["dpo", "dpo_and_sft"])
def test_loss_and_gradients_equal_trl(tmp_path, kind, max_slice_tokens, is_cached, sft_weight):
    directory = save_model(tmp_path / "model", kind)
    trainer = _trainer(directory, str(tmp_path / "out"), sft_weight, kind)
    rows = list(trainer.train_dataset)
    assert rows[0]["chosen_ids"][-1] == 2
    task = FineTuneTask(
        "t",
        TaskKind.TRAIN,
        tuple(
            TokenizedPair(str(i), *(tuple(row[key]) for key in ("prompt_ids", "chosen_ids", "rejected_ids")))
            for i, row in enumerate(rows)
        ),
    )
    config = make_training(
        beta=0.3, sft_weight=sft_weight, max_length_tokens=MAX_LENGTH, max_slice_tokens=max_slice_tokens
    )
    if is_cached:
        scores = run(start(directory, replace(task, kind=TaskKind.EVALUATE), config)[2]).result()[1]
        known = [(score.reference_chosen_logp, score.reference_rejected_logp) for score in scores]
        pairs = [replace(pair, reference=values) for pair, values in zip(task.pairs, known, strict=True)]
        task = replace(task, pairs=tuple(pairs))
    model, _, step = start(directory, task, config)
    theirs = {
        name.replace(".default.", "."): parameter
        for name, parameter in trainer.model.named_parameters()
        if "lora_" in name
    }
    assert theirs.keys() == model.lora_parameters().keys()
    with torch.no_grad():
        for name, parameter in model.lora_parameters().items():
            theirs[name].copy_(parameter)
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    loss.backward()
    run_to_loss(step)
    ours = step.gradients()
    for name, parameter in theirs.items():
        difference = (ours[name] - parameter.grad).norm() / parameter.grad.norm()
        assert difference < 1e-4, (name, difference)
    norm = torch.stack([p.grad.norm() for p in theirs.values()]).norm().item()
    step.run_slice()
    metrics, _ = step.result()
    if sft_weight == 0:  # the reported loss is DPO's alone
        assert metrics.loss == pytest.approx(loss.item(), rel=1e-5)
    assert metrics.grad_norm == pytest.approx(norm, rel=1e-4)
