import sys
from collections.abc import Iterator

import pytest

from core import dpo_slices


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The test models' matrices are too small to share: on a busy machine threads cost ten times the work."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _small_head_chunks(monkeypatch) -> None:
    """The test pairs are short: with these chunks their heads take several slices."""
    monkeypatch.setattr(dpo_slices, "HEAD_CHUNK_TOKENS", 7)
