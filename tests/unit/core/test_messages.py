import pytest

from core.wire import TrainingBatch, TrainingPair


def pair(loss):
    return TrainingPair("p", "q", "a", "b", dpo_loss=loss)


def test_a_batch_has_the_mean_loss_of_its_scored_pairs():
    assert TrainingBatch("t", (pair(0.2), pair(None), pair(0.6))).dpo_loss == pytest.approx(0.4)
    assert TrainingBatch("t", (pair(None),)).dpo_loss is None
