"""One user who sends more than everybody else together.

Anonymous pairs count as one user here: if leaving out the name were a way around the rule, it would hold nobody back.
"""

from collections.abc import Mapping

from alignment.quality.findings import Finding, make_finding, name_of

MIN_WINDOW = 20
"""Pairs before anybody's share means something."""
_NOT_WORTH_SAYING = 0.95


def judge_volume(user: str | None, counts: Mapping[str, int], present: int, max_share: float) -> Finding | None:
    """What is left of a user's pairs so that they weigh at most `max_share` of a window.

    Args:
        counts: pairs of each user in the window; "" named no user.
        present: users that send at all, in the window or not long before; two others are needed to compare with.
        max_share: bound; among n users nobody is held below 1/n.
    """
    number, total = counts.get(user or "", 0), sum(counts.values())
    if total < MIN_WINDOW or present < 3:
        return None
    bound = max(max_share, 1 / present)
    others = max(1, total - number)
    share = number / total
    if share <= bound or bound >= 1:
        return None
    # w * number is the share `bound` of w * number + others
    factor = bound * others / ((1 - bound) * number)
    if factor > _NOT_WORTH_SAYING:
        return None
    words = f"{name_of(user)} sent {share:.0%} of the newest {total} pairs, at most {bound:.0%} count"
    return make_finding("flooding", words, factor)
