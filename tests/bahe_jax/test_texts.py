"""Texts packed into rows: every token once, in its place."""

import numpy as np
import pytest

from bahe_jax import pack_texts


def test_every_token_lies_once_at_its_place():
    draw = np.random.default_rng(0)
    texts = [draw.integers(1, 1000, length) for length in draw.integers(1, 17, 60)]
    packed = pack_texts(texts, 16)
    batch = packed.batch()
    assert batch.tokens.shape == (packed.rows, 16)
    assert (batch.segment_ids > 0).sum() == sum(map(len, texts))
    assert not batch.tokens[batch.segment_ids == 0].any()
    for number, text in enumerate(texts):
        row = packed.plan.row[number]
        place = np.flatnonzero(batch.segment_ids[row] == packed.segment[number])
        np.testing.assert_array_equal(place, packed.plan.offset[number] + np.arange(len(text)))
        np.testing.assert_array_equal(batch.tokens[row, place], text)
        np.testing.assert_array_equal(batch.positions[row, place], np.arange(len(text)))
    some = packed.batch(np.array([3, 0]))
    np.testing.assert_array_equal(some.tokens, batch.tokens[[3, 0]])


def test_says_which_text_does_not_fit():
    with pytest.raises(ValueError, match="text 1 has 5 tokens, must have 1 to row_length=4"):
        pack_texts([np.arange(4), np.arange(5)], 4)
    with pytest.raises(ValueError, match="text 0 has 0 tokens"):
        pack_texts([np.arange(0)], 4)
    with pytest.raises(ValueError, match="at least one window"):
        pack_texts([], 4)
