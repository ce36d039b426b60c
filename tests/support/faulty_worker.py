"""A worker whose model fails on certain requests, known by the first token of their prompts, or by `FAULTY_TOP_P`.

It is the real worker: the exceptions come out of the model's forward pass, of vLLM's sampler, and of a logits processor
that vLLM calls while it puts a batch together.
"""

from vllm.v1.sample.logits_processor import LogitsProcessor

from engine.vllm.worker_cpu import HybridCpuWorker

FAULTY_TOP_P = 0.987654
PREPARE, PREFILL, DECODE, SAMPLING, ONCE, EVERYBODY = range(40, 46)


class FaultyProcessor(LogitsProcessor):
    def __init__(self, vllm_config, device, is_pin_memory):
        pass

    def is_argmax_invariant(self):
        return True

    def apply(self, logits):
        return logits

    def update_state(self, batch_update):
        for _, _, prompt, _ in batch_update.added if batch_update else ():
            if prompt and prompt[0] == PREPARE:
                raise IndexError("a parameter that does not fit")


class FaultyWorker(HybridCpuWorker):
    has_failed_once = is_broken = False

    def load_model(self, **kwargs):
        super().load_model(**kwargs)
        self.model_runner.model.register_forward_pre_hook(lambda *_: self.fail_in_forward())
        self.model_runner.sampler.register_forward_pre_hook(lambda *_: self.fail_in_sampling())

    def rows(self):
        batch = self.model_runner.input_batch
        for row in batch.req_id_to_index.values():
            yield (
                int(batch.token_ids_cpu[row, 0]),
                bool(batch.num_computed_tokens_cpu[row] < batch.num_prompt_tokens[row]),
            )

    def fail_in_forward(self):
        for first, is_prefill in self.rows():
            if first == ONCE and not self.has_failed_once:
                self.has_failed_once = True
                raise RuntimeError("once")
            self.is_broken |= first == EVERYBODY
            if first == (PREFILL if is_prefill else DECODE):
                raise RuntimeError("size 4 and size 16\nof two tensors")
        if self.is_broken:
            raise RuntimeError("the device is gone")

    def fail_in_sampling(self):
        top_p = self.model_runner.input_batch.top_p_cpu
        is_faulty = [abs(top_p[row] - FAULTY_TOP_P) < 1e-5 for row, _ in enumerate(self.rows())]
        if any(is_faulty) or any(first == SAMPLING for first, _ in self.rows()):
            raise ValueError("probabilities are no numbers")
