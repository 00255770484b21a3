"""Behaviours at the end of their slots: moved where they do not lie there, and queries in the order of the slots."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ads_jax
from ads_jax.order import newest_last

MASKS = {
    "left": [[0, 0, 1, 1], [0, 1, 1, 1]],
    "right": [[1, 1, 0, 0], [1, 0, 0, 0]],
    "holes": [[1, 0, 1, 0], [0, 0, 0, 0]],
    "one row of many": [[0, 0, 1, 1], [0, 1, 1, 0]],
}
run = jax.jit(newest_last)


@pytest.mark.portable
@pytest.mark.parametrize("name", MASKS)
def test_padding_goes_first_and_behaviours_keep_their_order(name):
    mask = np.array(MASKS[name], bool)
    ids = np.arange(1, 9).reshape(2, 4)
    vectors = np.stack([ids, -ids], axis=-1).astype(np.float32)
    found_ids, found_vectors, found_mask, nothing = run(mask, (ids, vectors, mask, None))
    assert nothing is None
    for row in range(2):
        count = mask[row].sum()
        np.testing.assert_array_equal(found_mask[row], np.arange(4) >= 4 - count)
        np.testing.assert_array_equal(found_ids[row][4 - count :], ids[row][mask[row]])
        np.testing.assert_array_equal(found_vectors[row], np.stack([found_ids[row], -found_ids[row]], axis=-1))


def test_a_model_reads_the_same_wherever_the_padding_is_and_says_so_where_it_must_not_be():
    config, batch = ads_jax.example(batch_size=6, seed=3)
    params = jax.tree.map(
        lambda x: 0.5 * np.random.default_rng(x.size).normal(size=x.shape).astype(np.float32),
        jax.eval_shape(lambda: ads_jax.init(jax.random.key(0), config)),
    )
    apply = jax.jit(ads_jax.apply, static_argnames="config")
    wanted = apply(params, batch, config)
    turned = np.argsort(~batch.mask, axis=1, kind="stable")  # behaviours first
    right = replace(
        batch,
        sequence={name: np.take_along_axis(x, turned, axis=1) for name, x in batch.sequence.items()},
        mask=np.take_along_axis(batch.mask, turned, axis=1),
    )
    assert (right.mask != batch.mask).any()
    np.testing.assert_allclose(apply(params, right, config), wanted, rtol=1e-5, atol=1e-6)
    promised = replace(config, arranged=True)
    ads_jax.check(batch, promised)
    np.testing.assert_allclose(apply(params, batch, promised), wanted, rtol=1e-5, atol=1e-6)
    row = np.flatnonzero((right.mask[:, :-1] > right.mask[:, 1:]).any(axis=1))[0]
    with pytest.raises(ValueError, match=f"mask: padding after a behaviour at row {row}, and config.arranged"):
        ads_jax.check(right, promised)


@pytest.mark.portable
def test_queries_oldest_first_are_those_newest_first_turned_round():
    draw = np.random.default_rng(0)
    domain, target = (jnp.asarray(draw.normal(size=(2, n)), jnp.float32) for n in (3, 4))
    module = ads_jax.PCRG(chunks=5, hidden=6)
    params = module.init(jax.random.key(0), domain, target)
    params = jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape), jnp.float32), params)
    newest_first = module.apply(params, domain, target)
    for taken in (5, 3):
        got = module.apply(params, domain, target, oldest_of=taken)
        np.testing.assert_allclose(got, newest_first[:, :taken][:, ::-1], rtol=1e-5, atol=1e-6)
