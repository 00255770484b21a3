"""Candidates in chunks: each candidate's own answer, one program for all chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rec_core.chunks import map_chunks


@pytest.mark.parametrize(
    ("count", "chunk", "size"), [(1, 4, 1), (7, 1, 1), (7, 3, 3), (8, 4, 4), (9, 8, 5), (5, 99, 5)]
)
def test_each_has_its_own_answer_and_all_chunks_one_size(count, chunk, size):
    rng = np.random.default_rng(count)
    xs = {"a": rng.normal(size=(count, 2, 3)).astype(np.float32), "b": rng.integers(0, 9, count), "c": None}
    shared, seen = jnp.arange(3.0), []

    def one(x):
        seen.append(1)
        return {"y": x["a"] @ shared + x["b"], "even": x["b"] % 2 == 0}

    found = jax.jit(lambda xs: map_chunks(one, xs, chunk))(xs)
    assert len(seen) == 1  # traced once: no second program for what remains
    np.testing.assert_allclose(found["y"], xs["a"] @ np.arange(3) + xs["b"][:, None], rtol=1e-5)
    np.testing.assert_array_equal(found["even"], xs["b"] % 2 == 0)
    program = jax.make_jaxpr(lambda xs: map_chunks(one, xs, chunk))(xs)
    loops = [step for step in program.jaxpr.eqns if step.primitive.name == "scan"]
    assert [step.params["length"] for step in loops] == [-(-count // chunk)]
    assert (size, 2) in {x.aval.shape for step in loops[0].params["jaxpr"].jaxpr.eqns for x in step.outvars}


def test_what_fills_the_last_chunk_has_no_gradient():
    weights = jnp.arange(1.0, 6.0)
    got = jax.grad(lambda w: map_chunks(jnp.square, w, 3).sum())(weights)
    np.testing.assert_allclose(got, 2 * weights)


@pytest.mark.parametrize(
    ("count", "chunk", "said"), [(3, 0, "chunk is 0, must be at least 1"), (0, 3, "nothing to map")]
)
def test_no_candidate_and_no_chunk_are_errors(count, chunk, said):
    with pytest.raises(ValueError, match=said):
        map_chunks(jnp.square, jnp.ones(count), chunk)
