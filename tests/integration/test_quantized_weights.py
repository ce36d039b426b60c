"""A quantized checkpoint is served by vLLM's kernels and trained on in the same worker: both compute one model."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm.model_executor.layers.linear import LinearBase

from tests.support.engine_thread import EngineThread
from tests.support.quantized_models import FORMS, quantize, with_groups
from tests.support.shared_weights import SameModel, ask, judged, pairs_of

pytestmark = pytest.mark.vllm

PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class PackedProbe:
    """Methods that the worker gets besides its own (`worker_extension_cls`)."""

    def probe_linears(self):
        """How many linear layers of vLLM's give other weights than the trainer's, and the largest relative difference.

        vLLM's kernels take identity matrices, so that what comes out are the weights that they compute with.
        """
        ours = dict(self._runner.model.causal_lm.named_modules())
        count, worst = 0, 0.0
        with torch.inference_mode():
            for name, layer in self.get_model().named_modules():
                if not isinstance(layer, LinearBase):
                    continue
                name = name.removesuffix(".base_layer")
                fused = name.rpartition(".")[2]
                names = [name.replace(fused, part) for part in PARTS.get(fused, (fused,))]
                mine = torch.cat([ours[one].base_layer.unpacked() for one in names]).float()
                identity = torch.eye(mine.shape[1], dtype=self._runner.model.dtype)
                theirs = layer.quant_method.apply(layer, identity).t().float()
                count += len(names)
                worst = max(worst, float(((mine - theirs).abs() / theirs.abs().clamp(min=1e-9)).max()))
        return count, worst

    def probe_memory(self):
        """What the trainer says of its weights, and what its packed layers unpack to within a slice."""
        return self._runner.describe(), self._runner.model.unpacked_bytes


@pytest.fixture(
    scope="module",
    params=[
        "compressed",
        *(pytest.param(form, marks=pytest.mark.slow) for form in ("compressed_zeros", "gptq", "awq")),
    ],
)
def meant_and_engine(request, tiny_assistant, tmp_path_factory):
    directory = tmp_path_factory.mktemp("quantized") / "packed"
    form = with_groups(FORMS[request.param], 32)
    meant = quantize(tiny_assistant, directory, form, dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_INT4_W4A8", "0")  # where a CPU could, its activations would have 8 bits
        thread = EngineThread(
            directory,
            model={"model_source": str(directory), "dtype": "bfloat16"},
            engine={
                "share_base_weights": "always",
                "engine_kwargs": {"worker_extension_cls": f"{PackedProbe.__module__}.{PackedProbe.__name__}"},
            },
            training={"learning_rate": 3e-3},
        )
    yield meant, thread
    thread.close()


class TestOnCpu(SameModel):
    @pytest.fixture(scope="class")
    def engine(self, meant_and_engine):
        return meant_and_engine[1]

    def test_vllm_serves_the_model_that_the_checkpoint_means(self, meant_and_engine, tolerance):
        meant, engine = meant_and_engine
        model = AutoModelForCausalLM.from_pretrained(meant, dtype=torch.float32)
        for pair in pairs_of(engine)[:4]:
            ids = torch.tensor([*pair.prompt_ids, *pair.chosen_ids])
            with torch.no_grad():
                log_probs = model(ids[None, :-1]).logits[0].log_softmax(-1)
            wanted = log_probs.gather(1, ids[1:, None])[len(pair.prompt_ids) - 1 :, 0]
            found = torch.tensor(judged(engine, pair.prompt_ids, pair.chosen_ids))
            assert wanted.mean() < -0.01
            assert (found - wanted).abs().mean() < tolerance

    def test_the_trainer_unpacks_the_weights_that_vllms_kernels_compute_with(self, engine):
        count, worst = ask(engine, "probe_linears")
        assert count >= 7
        assert worst <= 2**-8  # a difference of the last bit

    def test_only_what_is_not_quantized_is_shared(self, engine):
        weights, unpacked_bytes = ask(engine, "probe_memory")
        assert 0 < weights["shared_bytes"] < weights["base_weight_bytes"]
        assert unpacked_bytes > 0
