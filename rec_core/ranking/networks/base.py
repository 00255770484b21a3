"""The face of the networks, what they read, and what they share: the MLP, its last layer, and counting."""

from itertools import pairwise

import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float, Int

from rec_core.interest.base import check_positive
from rec_core.interest.din import Dice


@struct.dataclass
class Inputs:
    """What is known of B impressions, as vectors. A network says in `needs` which of the optional parts it reads."""

    x: Float[Array, "B D"]  # everything side by side: interest, user, target, context, float features
    fields: Float[Array, "B F k"] | None  # the same impression as F vectors of one width; None where widths differ
    domain: Float[Array, "B d_D"] | None = None  # the domain features' vectors, E_D
    domain_id: Int[Array, " B"] | None = None  # the explicit domain, 0 <= id < domains; clipped to it


_MEANING = {
    "fields": "the impression as vectors of one width, [B, F, k]; give all features one width",
    "domain": "the vector of the domain features, [B, d_D]; name domain features",
    "domain_id": "the explicit domain of each impression, [B]; name the field that holds it",
}


class Network(nn.Module):
    """What every network is: logits of all tasks from the vectors of an impression.

    Attributes:
      hidden: widths of the hidden layers; each network says what it makes of them.
      tasks: number of logits.
      dropout: after each hidden layer, in training.
      dtype: of the computation; parameters and logits are float32.
    """

    hidden: tuple[int, ...]
    tasks: int = 1
    dropout: float = 0.0
    dtype: str = "float32"

    @property
    def needs(self) -> tuple[str, ...]:
        """The optional parts of `Inputs` that the network reads."""
        return ()

    def __call__(self, inputs: Inputs, deterministic: bool = True) -> Float[Array, "B tasks"]:
        """Logits, float32.

        Raises:
          ValueError: a part that the network reads is missing, or an option is out of range.
        """
        check_positive(self, "hidden", "tasks")
        for part in self.needs:
            if getattr(inputs, part) is None:
                raise ValueError(f"{type(self).__name__}: inputs.{part} is None, it reads {_MEANING[part]}")
        if inputs.fields is not None and inputs.fields.ndim != 3:
            raise ValueError(f"{type(self).__name__}: inputs.fields has shape {inputs.fields.shape}, must be [B, F, k]")
        cast = {
            part: None if (value := getattr(inputs, part)) is None else value.astype(self.dtype)
            for part in ("x", "fields", "domain")
        }
        return self.logits(inputs.replace(**cast), deterministic)  # type: ignore[attr-defined]

    def logits(self, inputs: Inputs, deterministic: bool) -> Float[Array, "B tasks"]:
        """The network itself, on parts in its own dtype."""
        raise NotImplementedError(f"{type(self).__name__} defines no logits(inputs, deterministic); every network does")

    def flops(self, D: int, F: int = 0, k: int = 0, d_D: int = 0) -> int:
        """Operations of the matrix products for one example, two a multiply-add.

        Elementwise work, and what is computed from parameters alone (once a batch), is left out.

        Args:
          D, F, k, d_D: the shapes of `Inputs`.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no flops(D, F, k, d_D); every network does")

    def choose(self, name: str, allowed: tuple[str, ...]) -> str:
        """The option's value; ValueError unless it is one of these."""
        value: str = getattr(self, name)
        if value not in allowed:
            raise ValueError(f"{type(self).__name__}: {name} is {value!r}, must be one of {allowed}")
        return value


def mlp(
    x: Float[Array, "B D"],
    hidden: tuple[int, ...],
    dropout: float = 0.0,
    dtype: str = "float32",
    deterministic: bool = True,
) -> Float[Array, "B h"]:
    """Linear layers, each with Dice and dropout; `mlp_0`, `dice_0`, ... of the module in whose method it is called."""
    for i, units in enumerate(hidden):
        x = activate(nn.Dense(units, dtype=dtype, name=f"mlp_{i}")(x), i, dropout, dtype, deterministic)
    return x


def activate(x: Float[Array, "B h"], i: int, dropout: float, dtype: str, deterministic: bool) -> Float[Array, "B h"]:
    """What follows hidden layer i: Dice and dropout."""
    return nn.Dropout(dropout)(Dice(dtype, name=f"dice_{i}")(x), deterministic=deterministic)


def last(x: Float[Array, "B h"], tasks: int) -> Float[Array, "B tasks"]:
    """The linear layer `logit`, in float32, of the module in whose method it is called."""
    return nn.Dense(tasks, dtype=jnp.float32, name="logit")(x.astype(jnp.float32))


def take_domain(x: Float[Array, "B domains *n"], domain_id: Int[Array, " B"]) -> Float[Array, "B *n"]:
    """Each example's own domain; an id out of range is clipped."""
    index = jnp.clip(domain_id, 0, x.shape[1] - 1)
    return jnp.take_along_axis(x, index.reshape(-1, *[1] * (x.ndim - 1)), axis=1)[:, 0]


def dense_flops(*widths: int) -> int:
    """Of linear layers from each width to the next, for one example."""
    return sum(2 * a * b for a, b in pairwise(widths))
