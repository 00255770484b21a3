"""LUM step 3, knowledge utilization in ranking: `y = f(u, i, s, {o_q, sim(o_q, e_i)}, e_i)` (arXiv 2502.08309, 4.3).

Answers and item embeddings come from the knowledge store and are fixed: no gradient enters LUM. What is returned is a
block of extra dense features, so that the ranking model can be any function that takes such a block.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rec_core.losses import normalize

USES = ("direct", "matching")


def similarity(
    answers: Float[Array, "... d"], item: Float[Array, "... d"], kind: str = "cosine"
) -> Float[Array, "..."]:
    """`sim(o_q, e_i)`, as in step 1's loss: "cosine" or "dot"; 0 where either vector is zero."""
    if kind == "cosine":
        answers, item = normalize(answers), normalize(item)
    return (answers * item).sum(-1)


def features(
    answers: Float[Array, "B N d"],
    item: Float[Array, "B d"],
    own: Int[Array, " B"] | None = None,
    *,
    use: tuple[str, ...] = USES,
    kind: str = "cosine",
) -> Float[Array, "B F"]:
    """Extra features of B (user, item) pairs.

    Args:
      answers: o_q for N conditions, zeros where the store has none.
      item: e_i of the target, of the same model version.
      own: which of the N conditions the candidate itself implies (its category), whose answer enters the direct
        features; None takes all N answers.
      use: "direct" gives o_q and e_i, "matching" gives `sim(o_q, e_i)` for all N conditions (and that of `own`).
      kind: the similarity of step 1. With "cosine" the direct features are L2-normalised too: the loss never saw their
        length.

    Returns:
      `[B, feature_width(N, d, own is not None, use)]`, float32.
    """
    unknown = set(use) - set(USES)
    if unknown or not use:
        raise ValueError(f"lum_jax.utilization: use={use} must be some of {USES}")
    answers, item = jax.lax.stop_gradient((answers.astype(jnp.float32), item.astype(jnp.float32)))
    if kind == "cosine":
        answers, item = normalize(answers), normalize(item)
    chosen = answers
    if own is not None:
        chosen = jnp.take_along_axis(answers, own[:, None, None], axis=1)
    parts = []
    if "direct" in use:
        parts += [chosen.reshape(chosen.shape[0], -1), item]
    if "matching" in use:
        parts.append(similarity(answers, item[:, None], "dot"))
        if own is not None:
            parts.append(similarity(chosen, item[:, None], "dot"))
    return jnp.concatenate(parts, axis=-1)


def feature_width(conditions: int, width: int, own: bool, use: tuple[str, ...] = USES) -> int:
    """How many features `features` gives: what a ranking model's config needs to know."""
    direct = (1 if own else conditions) * width + width
    return ("direct" in use) * direct + ("matching" in use) * (conditions + own)
