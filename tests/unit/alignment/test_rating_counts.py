"""Thumbs by version."""

from sqlalchemy import insert

from alignment.store.schema import ratings


def test_thumbs_are_counted_by_version_since_a_time_without_replaced_ones(store):
    rows = [
        ("v0001", 1, "open", 10.0),
        ("v0001", 1, "paired", 11.0),
        ("v0001", -1, "unusable", 12.0),  # no pair can be made of it, but it is an opinion
        ("v0001", -1, "replaced", 12.0),
        ("v0002", -1, "open", 12.0),
        ("v0002", -1, "open", 9.9),
        (None, 1, "open", 12.0),
    ]
    assert store.feedback.rating_counts(0.0) == {}
    for number, (adapter, direction, state, received_at) in enumerate(rows):
        row = {"feedback_id": f"f{number}", "response_id": "r", "choice_index": 0, "direction": direction}
        row |= {"user_id": "", "prompt": "p", "prompt_key": "p", "text": "t", "text_key": "t"}
        row |= {"adapter": adapter, "state": state, "received_at": received_at}
        store.database.write(lambda connection, row=row: connection.execute(insert(ratings), row))
    assert store.feedback.rating_counts(10.0) == {"v0001": (2, 1), "v0002": (0, 1), None: (1, 0)}
