"""Comparing fingerprints of models; `engine.fingerprint` makes them."""

PARTS = ("weights", "config", "tokenizer", "chat template")
"""The parts of a fingerprint, in order."""


def differing_parts(one: str, other: str) -> str:
    """What differs between two models, in words: `weights and chat template`; empty if nothing does."""
    pairs = zip(PARTS, one.split("-"), other.split("-"), strict=False)
    differing = [part for part, mine, theirs in pairs if mine != theirs]
    if not differing and one != other:
        return "fingerprint"
    return " and ".join(filter(None, (", ".join(differing[:-1]), *differing[-1:])))
