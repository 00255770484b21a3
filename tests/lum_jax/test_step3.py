"""LUM step 3: features for ranking, and the two towers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lum_jax import two_tower, utilization


def vectors(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.portable
def test_features_by_hand():
    answers, item, own = vectors(2, 3, 4), vectors(2, 4, seed=1), np.array([2, 0])
    made = utilization.features(answers, item, own)
    assert made.shape == (2, utilization.feature_width(3, 4, own=True))
    for b in range(2):
        cosine = [a @ item[b] / np.linalg.norm(a) / np.linalg.norm(item[b]) for a in answers[b]]
        unit = [answers[b, own[b]] / np.linalg.norm(answers[b, own[b]]), item[b] / np.linalg.norm(item[b])]
        np.testing.assert_allclose(made[b], [*unit[0], *unit[1], *cosine, cosine[own[b]]], rtol=1e-5)
    plain = utilization.features(answers, item, own, kind="dot")
    dot = answers @ item[:, :, None]
    np.testing.assert_allclose(plain[0], [*answers[0, 2], *item[0], *dot[0, :, 0], dot[0, 2, 0]], rtol=1e-5)


@pytest.mark.parametrize("use", [("direct",), ("matching",), ("direct", "matching")])
@pytest.mark.parametrize("own", [None, np.array([1, 1])])
def test_width_is_as_announced_and_no_gradient_enters_lum(use, own):
    answers, item = vectors(2, 3, 4), vectors(2, 4)
    assert utilization.features(answers, item, own, use=use).shape[1] == utilization.feature_width(
        3, 4, own is not None, use
    )
    gradient = jax.grad(lambda a: utilization.features(a, item, own, use=use).sum())(jnp.asarray(answers))
    assert (np.asarray(gradient) == 0).all()


def test_an_absent_answer_gives_finite_features():
    made = utilization.features(np.zeros((1, 3, 4), np.float32), vectors(1, 4), np.array([0]))
    assert np.isfinite(made).all()
    with pytest.raises(ValueError, match="use=\\('matchin',\\)"):
        utilization.features(vectors(1, 3, 4), vectors(1, 4), use=("matchin",))


def test_two_tower_loss_by_hand_and_what_each_tower_reads():
    config, batch = two_tower.example(6)
    params = two_tower.init(jax.random.key(0), config)
    ids = np.array([5, 7, 5, 9, 11, 13], np.int32)
    batch = batch.replace(item={"item": ids}, weight=np.array([1, 1, 1, 1, 1, 0], np.float32))
    out = two_tower.apply(params, batch, config)
    np.testing.assert_allclose(np.linalg.norm(out.user, axis=-1), 1, rtol=1e-5)
    scores = np.asarray(out.user, np.float64) @ np.asarray(out.item, np.float64).T / config.temperature
    terms = []
    for n in range(5):
        rivals = [k for k in range(5) if ids[k] != ids[n]]
        terms.append(np.log1p(np.exp(scores[n, rivals] - scores[n, n]).sum()))
    loss, _ = two_tower.loss(params, batch, config)
    np.testing.assert_allclose(loss, np.mean(terms), rtol=1e-4)

    # The catalogue can be encoded without users, users without items, and LUM's vectors matter to both.
    alone = two_tower.item_tower(params, batch.item, config, batch.knowledge)
    np.testing.assert_allclose(alone, out.item, atol=1e-6)
    other = two_tower.apply(params, batch.replace(answers=batch.answers + 1, knowledge=-batch.knowledge), config)
    assert not np.allclose(other.user, out.user) and not np.allclose(other.item, out.item)


def test_towers_refuse_missing_knowledge_by_name():
    config, batch = two_tower.example()
    two_tower.check(batch, config)
    with pytest.raises(ValueError, match="answers is missing"):
        two_tower.check(batch.replace(answers=None), config)
    broken = np.array(batch.knowledge)
    broken[3, 1] = np.inf
    with pytest.raises(ValueError, match=r"knowledge.*inf.*row 3, position 1"):
        two_tower.check(batch.replace(knowledge=broken), config)
    with pytest.raises(ValueError, match="conditions=2 and knowledge_width=0"):
        two_tower.Config(user=(), item=config.item, conditions=2)
