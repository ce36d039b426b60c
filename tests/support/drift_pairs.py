"""Streams of scored pairs of which it is known where they change."""

import numpy as np

from alignment.drift.streams import ScoredPair

TOPICS = {
    "cooking": "soup bread oven salt pepper onion pan boil roast sauce dough recipe butter garlic stew",
    "code": "python function loop compile error stack thread memory pointer class import test branch merge bug",
}
_ASKING = "how do I make the best of my please tell me what is a good way to use and why"


def scored(seq, margin, *, user=None, tags=None, weight=1.0, prompt="what is it?", name="p"):
    """A pair with the DPO loss that belongs to the margin."""
    loss = float(np.logaddexp(0, -margin)) if np.isfinite(margin) else abs(margin)
    return ScoredPair(f"{name}{seq}", seq, loss, float(margin), prompt, user, tags or {}, weight, float(seq))


def margins(rng, count, *, mean=3.0, std=1.3, flipped=0.0):
    """Normal margins, of which a share (or a share for each) has the wrong sign."""
    return rng.normal(mean, std, count) * np.where(rng.random(count) < flipped, -1, 1)


def asked(rng, topic, num_words=12):
    """A prompt about a topic."""
    words = [
        *rng.choice(TOPICS[topic].split(), num_words // 2),
        *rng.choice(_ASKING.split(), num_words - num_words // 2),
    ]
    rng.shuffle(words)
    return " ".join(words)


def feed(tracker, values, *, start=1, **fields):
    """All events of a run of margins, each with the sequence number at which it came."""
    found = []
    for seq, margin in enumerate(values, start):
        found += [(seq, event) for event in tracker.observe(scored(seq, margin, **fields))]
    return found
