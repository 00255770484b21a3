"""Histories on the device: what the tree finds, strictly before the moment."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rec_core.data.schema import EventLog
from sim_jax.resident import history, resident, search
from sim_jax.tree_table import TreeTable

find = jax.jit(search, static_argnums=4)
newest = jax.jit(history, static_argnums=3)
START = 1_600_000_000


def world(seed, counts, keys=4, span=60):
    """Users of so many behaviours within `span` seconds, many at the same second; item numbers rise with time."""
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    user = np.repeat(np.arange(len(counts)), counts)
    time = START + rng.integers(0, span, offsets[-1])
    time = time[np.lexsort((time, user))]
    item = np.arange(2, 2 + offsets[-1])
    key = rng.integers(0, keys, offsets[-1])
    return offsets, user, time, item, key


@settings(max_examples=8)  # each is another shape, compiled anew
@given(st.integers(0, 2**31), st.lists(st.integers(0, 20), min_size=4, max_size=4))
def test_search_and_history_are_the_trees(seed, counts):
    offsets, user, time, item, key = world(seed, [*counts, 1])
    data = resident(offsets, time, {"item": item, "key": key}, key=key)
    tree = TreeTable.build(EventLog(user.astype(np.int64), item.astype(np.int64), time, key.astype(np.int32)))
    everyone = TreeTable.build(EventLog(user.astype(np.int64), item.astype(np.int64), time), np.ones(len(item), int))
    rng = np.random.default_rng(seed)
    who, asked, before = rng.integers(0, 5, 8), rng.integers(0, 6, 8), START + rng.integers(0, 70, 8)
    for got, wanted in (
        (find(data, who, asked, data.seconds(before), 3), tree.lookup(who, asked, 3, before)),
        (newest(data, who, data.seconds(before), 3), everyone.lookup(who, np.ones(8, int), 3, before)),
    ):
        # the tree answers newest first from slot 0, the device oldest first up to the last slot
        np.testing.assert_array_equal(got.mask[:, ::-1], wanted.mask)
        np.testing.assert_array_equal(got.fields["item"][:, ::-1], np.where(wanted.mask, wanted.item, 0))
        np.testing.assert_array_equal(got.age[:, ::-1], np.where(wanted.mask, before[:, None] - wanted.time, 0))


def test_a_lifetime_of_54000_behaviors_is_searched_to_its_end():
    offsets, _, time, item, key = world(0, [5, 54_000], keys=3, span=10**7)
    data = resident(offsets, time, {"item": item}, key=key)
    found = find(data, np.array([1, 1]), np.array([2, 2]), data.seconds([time[-1] + 1, time[30_000]]), 200)
    for row, last in enumerate((len(item), 30_000)):
        own = np.arange(5, last)
        own = own[(key[own] == 2) & (time[own] < (time[-1] + 1, time[30_000])[row])][-200:]
        np.testing.assert_array_equal(found.fields["item"][row], item[own])
    whole = newest(data, np.array([1]), data.seconds([time[-1] + 1]), 54_000)
    np.testing.assert_array_equal(whole.fields["item"][0], item[5:])


def test_what_does_not_go_together_is_refused():
    offsets, _, time, item, key = world(1, [3, 4])
    for changes, message in (
        ({"offsets": [0, 3, 6]}, "offsets must rise from 0 to the 7 behaviours"),
        ({"key": key[:3]}, r"key has shape \(3,\), must be \(7,\)"),
        ({"time": time[::-1]}, "time falls from row 0 to the next, of user 0"),
        ({"time": time + np.arange(7) * 10**9}, "must fit 32 bits"),
    ):
        given = {"offsets": offsets, "time": time, "fields": {"item": item}, "key": key} | changes
        with pytest.raises(ValueError, match=message):
            resident(given["offsets"], given["time"], given["fields"], key=given["key"])
    data = resident(offsets, time, {"item": item}, key=key)
    with pytest.raises(ValueError, match="more than 68 years from the first behaviour"):
        data.seconds([0, START + 2**32])
