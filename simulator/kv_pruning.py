"""KV pruning as the engine does it (`engine.pruning.pruner`), by number of blocks: which ones does not matter here.

Harm is the share of a request's blocks that are gone, so it is known without keys. Blocks are offered one iteration
after the planner asks for scores.
"""

from core.config import KvPruningConfig
from scheduler.view import PruneOffer
from simulator.running import RunningSet, SimRequest


class KvPruner:
    """Offers and drops blocks of the decoding requests of one executor."""

    def __init__(self, config: KvPruningConfig, block_tokens: int) -> None:
        self.is_asked = False
        """The planner has asked for scores in the last iteration."""
        self._max_fraction = config.max_fraction
        self._num_kept = sum(-(-tokens // block_tokens) for tokens in (config.sink_tokens, config.recent_tokens))
        self._offered: list[tuple[float, int, SimRequest]] = []

    def offer(self, running: RunningSet) -> PruneOffer | None:
        """What may be dropped now, least harm first; None if nothing, or if nobody has asked."""
        self._offered = []
        if self.is_asked:
            for order, request in enumerate(running.decodes):
                full = running.cached_tokens(request) // running.blocks.block_tokens
                most = min(int(self._max_fraction * full), full - self._num_kept)
                self._offered += [(gone / full, order, request) for gone in range(request.num_dropped, most)]
            self._offered.sort(key=lambda entry: entry[:2])
        return PruneOffer([harm for harm, _, _ in self._offered]) if self._offered else None

    def prune(self, count: int, running: RunningSet) -> int:
        """Drop the first `count` blocks of the last offer, less if there are not as many; returns how many."""
        dropped, self._offered = self._offered[:count], self._offered[count:]
        for _, _, request in dropped:
            running.drop_block(request)
        return len(dropped)
