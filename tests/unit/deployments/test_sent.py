"""A router's own books: what is under way to each replica, and the prefixes that it was sent."""

from deployments.routing.prefix_names import TextPrefixes, prefixes_of
from deployments.routing.sent import Bookings, SentPrefixes


def test_a_booked_request_counts_until_a_report_knows_of_it():
    bookings = Bookings()
    bookings.book("r1", "a", 100, 1.0)
    bookings.book("r2", "a", 50, 2.0)
    assert bookings.tokens_since("a", 0.5) == 150
    assert bookings.tokens_since("a", 1.0) == 50
    assert bookings.tokens_since("b", 0.0) == 0


def test_a_request_that_is_proposed_again_counts_once():
    bookings = Bookings()
    bookings.book("r1", "a", 100, 1.0)
    bookings.book("r1", "b", 80, 2.0)
    assert (bookings.tokens_since("a", 0.0), bookings.tokens_since("b", 0.0)) == (0, 80)


def test_a_request_counts_where_it_went():
    bookings = Bookings()
    bookings.book("r1", "a", 100, 1.0)
    bookings.book("r2", "a", 7, 1.0)
    assert not bookings.settle("r1", "b", 2.0)
    assert bookings.settle("r2", "a", 2.0)
    assert (bookings.tokens_since("a", 0.0), bookings.tokens_since("b", 0.0)) == (7, 100)
    assert bookings.settle("r1", "b", 3.0)  # a second word on it changes nothing
    assert bookings.tokens_since("b", 0.0) == 100


def test_a_request_that_was_answered_counts_no_more_whatever_the_age_of_the_report():
    bookings = Bookings()
    bookings.book("r1", "a", 100, 1.0)
    bookings.book("r2", "a", 7, 1.0)
    assert bookings.settle("r1", "a", 1.5)
    bookings.finish("r1", "a")
    bookings.finish("r1", "a")
    bookings.finish("never booked", "a")
    assert bookings.tokens_since("a", 0.0) == 7


def test_an_answer_ends_a_request_where_it_went_and_a_late_refusal_does_not_end_it_elsewhere():
    bookings = Bookings()
    bookings.book("r1", "a", 100, 1.0)
    bookings.settle("r1", "b", 2.0)
    bookings.book("r2", "a", 7, 2.0)
    bookings.book("r2", "c", 7, 2.5)
    bookings.finish("r2", "a")
    bookings.finish("r1", "b")
    assert [bookings.tokens_since(name, 0.0) for name in "abc"] == [0, 0, 7]


def test_of_very_many_requests_without_an_answer_the_oldest_wait_for_a_report():
    bookings = Bookings()
    for number in range(5000):
        bookings.book(f"r{number}", "a", 1, 1.0)
    bookings.finish("r0", "a")
    bookings.finish("r4999", "a")
    assert bookings.tokens_since("a", 0.0) == 4999
    assert bookings.tokens_since("a", 1.0) == 0


def test_replicas_that_are_gone_are_forgotten():
    bookings = Bookings()
    for name in "abc":
        bookings.book(f"r-{name}", name, 1, 1.0)
    bookings.keep_only({"a"})
    assert [bookings.tokens_since(name, 0.0) for name in "abc"] == [1, 0, 0]
    assert not bookings.settle("r-b", "a", 2.0)
    assert bookings.tokens_since("a", 0.0) == 2


def test_sent_prefixes_count_until_a_report_had_time_to_name_them():
    sent, prefixes = SentPrefixes(), prefixes_of({"prompt": "x" * 1000})
    sent.note("a", prefixes, 10.0)
    assert sent.since("a", 9.0, prefixes) == set(prefixes.digests)
    assert sent.since("a", 12.0, prefixes) == set(prefixes.digests)
    assert sent.since("a", 13.5, prefixes) == set()
    assert sent.since("b", 9.0, prefixes) == set()


def test_sent_prefixes_are_bounded_and_the_oldest_go_first():
    sent = SentPrefixes()
    for number in range(70_000):
        sent.note("a", TextPrefixes(256, (str(number),)), float(number))
    assert sent.since("a", 0.0, TextPrefixes(256, ("69999",))) == {"69999"}
    assert sent.since("a", 0.0, TextPrefixes(256, ("10",))) == set()
