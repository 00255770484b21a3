"""Plain causal attention is range attention over all rows before, whoever computes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rec_core.attention import causal, causal_attention
from rec_core.attention.reference import range_attention_reference

B, T, H, K, D = 2, 6, 4, 2, 128


def draw():
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, (B, T, heads, D)) for key, heads in zip(keys, (H, K, K))]


def literal(q, k, v):
    place = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    return range_attention_reference(q, k, v, 0 * place, place, k, v, scale=D**-0.5)[0]


@pytest.mark.portable
@pytest.mark.parametrize("by_cudnn", [False, True])
def test_values_and_gradients_are_the_references(by_cudnn, monkeypatch):
    asked = []
    if by_cudnn:  # JAX's own attention stands for cuDNN's, which has the same face
        real = jax.nn.dot_product_attention

        def attend(*arrays, implementation, **options):
            asked.append(implementation)
            return real(*arrays, **options)

        monkeypatch.setattr(causal, "_cudnn_trains", lambda q, k: True)
        monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    data = draw()
    np.testing.assert_allclose(causal_attention(*data), literal(*data), rtol=1e-5, atol=1e-6)
    assert not asked, "what is not differentiated is ours"

    def gradients(function):
        return jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(function(*x))), (0, 1, 2)))(*data)

    found, expected = gradients(causal_attention), gradients(literal)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert asked == ["cudnn"] * by_cudnn


def test_cudnn_is_asked_at_its_widths_and_even_lengths_on_hopper_alone(monkeypatch):
    shape = jax.ShapeDtypeStruct((B, T, H, D), jnp.bfloat16)
    assert not causal._cudnn_trains(shape, shape), "here is no GPU"
    monkeypatch.setattr(causal, "choose", lambda call: "mosaic_gpu")
    assert causal._cudnn_trains(shape, shape)
    for other in ((B, T, H, 64), (B, T + 1, H, D)):
        other = jax.ShapeDtypeStruct(other, jnp.bfloat16)
        assert not causal._cudnn_trains(other, other)


def test_shapes_that_do_not_go_together_are_refused():
    q, k, v = draw()
    with pytest.raises(ValueError, match=r"q has shape \(6, 4, 128\)"):
        causal_attention(q[0], k, v)
    with pytest.raises(ValueError, match="k has 5 rows and q 6"):
        causal_attention(q, k[:, 1:], v[:, 1:])
