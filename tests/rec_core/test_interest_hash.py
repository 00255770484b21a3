"""SimHash, and ETA and SDIM, which search by it: exact against NumPy, and recall of the exact nearest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rec_core.interest import ETA, SDIM, MultiHead
from rec_core.interest.base import newest_top_k
from rec_core.interest.simhash import SimHash, hamming

B, T, D = 3, 6, 4
MASK = np.array([[1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]], bool)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def angle(a, b):
    cosine = np.sum(a * b, -1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    return np.arccos(np.clip(cosine, -1, 1))


@pytest.mark.portable
def test_hamming_distance_measures_the_angle():
    bits, x = 4100, draw(5, 8)  # not a whole number of words
    module = SimHash(bits)
    params = module.init(jax.random.key(0), x)
    code = module.apply(params, x)[:, 0]
    assert code.shape == (5, 129) and code.dtype == jnp.uint32
    signs = np.unpackbits(np.asarray(code).view(np.uint8), axis=-1, bitorder="little")
    np.testing.assert_array_equal(signs[:, :bits], x @ params["params"]["directions"][:, 0] > 0)
    np.testing.assert_array_equal(signs[:, bits:], 0)
    distance = np.asarray(hamming(code[:, None], code[None]))
    np.testing.assert_array_equal(distance, (signs[:, None] != signs[None]).sum(-1))
    expected = angle(x[:, None], x[None]) / np.pi
    np.testing.assert_allclose(distance / bits, expected, atol=5 * 0.5 / np.sqrt(bits))  # five standard deviations


def test_hashes_know_directions_only_and_stop_gradients():
    module, x = SimHash(bits=16, rounds=3), draw(5, 8)
    params = module.init(jax.random.key(0), x)
    np.testing.assert_array_equal(module.apply(params, 1e-3 * x), module.apply(params, 1e3 * x))
    np.testing.assert_array_equal(module.apply(params, jnp.zeros((1, 8))), 0)
    gradient = jax.grad(lambda p, x: module.apply(p, x).astype(jnp.float32).sum(), argnums=(0, 1))(params, x)
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradient))


def test_of_equal_scores_the_newest_goes_first():
    score = jnp.array([[1, 3, 3, 2, 3, 9]])
    position, found = newest_top_k(score, jnp.array([[True] * 5 + [False]]), 4)
    np.testing.assert_array_equal(position, [[4, 2, 1, 3]])
    assert found.all()
    position, found = newest_top_k(score.astype(jnp.float32), jnp.array([[False, True] + [False] * 4]), 9)
    assert position.shape == (1, 6) and position[0, 0] == 1
    np.testing.assert_array_equal(found[0], [True] + [False] * 5)


def eta(module, sequence, target):
    shapes = jax.eval_shape(module.init, jax.random.key(0), target, sequence, np.ones(sequence.shape[:2], bool))
    params = jax.tree.map(lambda x: draw(*x.shape, seed=x.size), shapes)
    return params, lambda mask: module.apply(params, sequence, mask, method="encode")


def test_eta_searches_the_least_hamming_distance():
    module, target, sequence = ETA(top=2, bits=64), draw(B, D), draw(B, T, D, seed=1)
    params, encode = eta(module, sequence, target)
    position, found = module.apply(params, encode(MASK), target, method="search")
    directions = params["params"]["hash"]["directions"][:, 0]
    distance = ((sequence @ directions > 0) != (target @ directions > 0)[:, None]).sum(-1)
    for b in range(2):
        rows = np.flatnonzero(MASK[b])
        best = sorted(rows, key=lambda t: (distance[b, t], -t))[:2]  # of ties the newer
        np.testing.assert_array_equal(position[b], best)
    np.testing.assert_array_equal(found, [[True, True], [True, True], [False, False]])


def test_eta_attends_to_what_it_found_and_to_nothing_else():
    module, target, sequence = ETA(top=2, heads=2, width=3), draw(B, D), draw(B, T, D, seed=1)
    params, encode = eta(module, sequence, target)
    position, found = module.apply(params, encode(MASK), target, method="search")
    chosen = np.zeros_like(MASK)
    np.put_along_axis(chosen, np.asarray(position), np.asarray(found), axis=1)
    whole = MultiHead(heads=2, width=3).apply({"params": params["params"]["attention"]}, target, sequence, chosen)
    out = module.apply(params, target, sequence, MASK)
    np.testing.assert_allclose(out, whole, rtol=1e-5, atol=1e-6)
    # One query per item goes with its item.
    queries = draw(B, T, D, seed=4)
    at_all = module.clone(top=T).apply(params, queries, sequence, MASK)
    heads = MultiHead(heads=2, width=3).apply({"params": params["params"]["attention"]}, queries, sequence, MASK)
    np.testing.assert_allclose(at_all, heads, rtol=1e-5, atol=1e-6)


def interests(count=400, groups=12, width=16, users=8, seed=0):
    """Behaviours around some directions, as a user's interests are, and targets of one of them."""
    draw = np.random.default_rng(seed)
    centres = draw.normal(size=(users, groups, width))
    which = draw.integers(groups, size=(users, count))
    sequence = np.take_along_axis(centres, which[..., None], axis=1) + 0.6 * draw.normal(size=(users, count, width))
    target = centres[:, 0] + 0.6 * draw.normal(size=(users, width))
    return target.astype(np.float32), sequence.astype(np.float32)


def recall(found, target, sequence, top):
    """Share of the `top` nearest by angle among the `top` found."""
    exact = np.argsort(angle(sequence, target[:, None]), axis=-1)[:, :top]
    return np.mean([len(set(a) & set(b)) / top for a, b in zip(np.asarray(found), exact)])


def test_etas_recall_grows_with_its_bits():
    target, sequence = interests()
    mask, shares = np.ones(sequence.shape[:2], bool), []
    for bits in (8, 64, 1024):
        module = ETA(top=32, bits=bits)
        params, encode = eta(module, sequence, target)
        position, _ = module.apply(params, encode(mask), target, method="search")
        shares.append(recall(position, target, sequence, 32))
    assert shares == sorted(shares) and shares[0] > 3 * 32 / 400 and shares[1] > 0.55 and shares[2] > 0.85


def test_sdim_by_hand():
    """Directions (1, 0) and (0, 1), one bit each: round 0 looks at the first entry's sign, round 1 at the second's."""
    params = {"params": {"hash": {"directions": jnp.array([[[1.0], [0.0]], [[0.0], [1.0]]])}}}
    sequence = jnp.array([[[3.0, 1.0], [1.0, -2.0], [-5.0, -1.0], [7.0, 7.0]]])
    mask, target = jnp.array([[True, True, True, False]]), jnp.array([[2.0, -0.1]])
    module = SDIM(rounds=2, bits=1)
    out = module.apply(params, target, sequence, mask)
    first, second = np.array([4, -1]), np.array([-4, -3])  # the sums of those on the target's side
    np.testing.assert_allclose(out[0], (first / np.sqrt(17) + second / 5) / 2, rtol=1e-6)
    encoded = module.apply(params, sequence, mask, method="encode")
    hits = module.apply(params, encoded, target, method="collisions")
    np.testing.assert_array_equal(hits[0], [[True, False], [True, True], [False, True], [False, False]])


def test_sdims_share_of_collisions_is_the_papers_attention():
    """`(1 - theta / pi)^bits`, from many rounds; and it ranks as the angle does."""
    target, sequence = interests(count=200)
    mask = np.ones(sequence.shape[:2], bool)
    module = SDIM(rounds=2000, bits=3)
    encoded_shape = jax.eval_shape(module.init, jax.random.key(0), target, sequence, mask)
    directions = draw(*encoded_shape["params"]["hash"]["directions"].shape)
    params = {"params": {"hash": {"directions": directions}}}

    def share(target, sequence):
        mine = module.apply(params, sequence, method="bucket")
        return np.mean(mine == module.apply(params, target, method="bucket")[:, None], axis=-1)

    got = share(target, sequence)
    np.testing.assert_allclose(got, (1 - angle(sequence, target[:, None]) / np.pi) ** 3, atol=5 * 0.5 / np.sqrt(2000))
    assert recall(np.argsort(-got, axis=-1)[:, :16], target, sequence, 16) > 0.85
