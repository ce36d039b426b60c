import pytest

from core import dpo_slices


@pytest.fixture(autouse=True)
def _small_head_chunks(monkeypatch) -> None:
    """The test pairs are short: with these chunks their heads take several slices."""
    monkeypatch.setattr(dpo_slices, "HEAD_CHUNK_TOKENS", 7)
