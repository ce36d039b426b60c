"""Structured outputs in the process that checks them, without an engine."""

import asyncio

import pytest

from core.config import AppArgs
from engine.vllm.compat import configure_environment, make_engine_args
from engine.vllm.grammars import GrammarCheck

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def config(tiny_assistant):
    args = AppArgs.model_validate({"model": {"model_id": "tiny", "model_source": str(tiny_assistant)}})
    configure_environment(args, tiny_assistant)
    return make_engine_args(args, str(tiny_assistant)).create_engine_config()


def test_a_constraint_is_checked_again_by_another_process_if_the_first_one_ends(config):
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import StructuredOutputsParams

    async def run():
        grammars = GrammarCheck(config)
        try:
            lost = asyncio.ensure_future(grammars.check(StructuredOutputsParams(regex="a+")))
            await asyncio.sleep(1)
            grammars.process.kill()
            with pytest.raises(VLLMValidationError, match="try again"):
                await lost
            again = await asyncio.gather(
                *(grammars.check(StructuredOutputsParams(regex=regex)) for regex in ("a+", "b+", "a+"))
            )
            with pytest.raises(VLLMValidationError, match="no text that it allows"):
                await grammars.check(StructuredOutputsParams(grammar="root ::= root"))
            return [one._backend for one in again]  # noqa: SLF001 - vLLM's own name
        finally:
            grammars.close()

    assert asyncio.run(asyncio.wait_for(run(), 120)) == ["xgrammar"] * 3
