"""Networks that refine embeddings between an attention and the dense network: FRNet and PEPNet.

Both read an impression's embeddings as they stand before the dense network, the attention's answer among them.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from rec_core.interest import Dice
from rec_core.interest.base import check_positive
from rec_core.ranking.networks.base import dense_flops


class InformationExtraction(nn.Module):
    """FRNet's information extraction unit: `O_vec * O_bit`, each field seen in the light of all others.

        O_vec = softmax(Q K^T) V W_P;  Q, K, V = E W_Q, E W_K, E W_V          self-attention between the fields
        O_bit = PReLU(W_2 PReLU(W_1 E_con + b_1) + b_2)                       one vector for all fields

    E_con is the fields side by side. As in the paper the attention is not scaled.
    """

    attention: int = 16
    hidden: int = 64
    dtype: str = "float32"

    @nn.compact
    def __call__(self, fields: Float[Array, "B F k"]) -> Float[Array, "B F k"]:
        check_positive(self, "attention", "hidden")

        def linear(units: int, name: str) -> nn.Dense:
            return nn.Dense(units, use_bias=False, dtype=self.dtype, name=name)

        query, key, value = (linear(self.attention, name)(fields) for name in ("queries", "keys", "values"))
        score = jnp.einsum("bfa,bga->bfg", query, key, preferred_element_type=jnp.float32)
        mixed = jnp.einsum("bfg,bga->bfa", jax.nn.softmax(score).astype(self.dtype), value)
        context = fields.reshape(len(fields), -1)
        for layer, units in (("first", self.hidden), ("second", fields.shape[-1])):
            context = nn.PReLU(name=f"{layer}_slope")(nn.Dense(units, dtype=self.dtype, name=layer)(context))
        return linear(fields.shape[-1], "back")(mixed) * context[:, None]


class FRNet(nn.Module):
    """Context-aware feature refinement (Wang et al., SIGIR 2022, arXiv 2204.08758), with bit-level weights.

        W = sigmoid(IEU_W(E));  E_g = IEU_G(E);  E' = W * E + (1 - W) * E_g

    Two information extraction units: one weighs each bit of the embeddings, the other makes the complementary features
    that stand in for what the weights take away.
    """

    attention: int = 16
    hidden: int = 64
    dtype: str = "float32"

    @nn.compact
    def __call__(self, fields: Float[Array, "B F k"]) -> Float[Array, "B F k"]:
        fields = fields.astype(self.dtype)
        options = (self.attention, self.hidden, self.dtype)
        weight = nn.sigmoid(InformationExtraction(*options, name="weight")(fields))
        complementary = InformationExtraction(*options, name="complementary")(fields)
        return weight * fields + (1 - weight) * complementary

    @nn.nowrap
    def flops(self, F: int, k: int) -> int:
        """Operations of the matrix products for one example of F fields k wide, two a multiply-add."""
        a = self.attention
        mixed = F * (3 * dense_flops(k, a) + dense_flops(a, k)) + 2 * F * dense_flops(F, a)
        return 2 * (mixed + dense_flops(F * k, self.hidden, k))


class Gate(nn.Module):
    """PEPNet's gate unit: `2 sigmoid(relu(x W + b) W' + b')`, a factor in (0, 2) for each of `size` units."""

    size: int
    hidden: int = 32
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B d"]) -> Float[Array, "B size"]:
        check_positive(self, "hidden")
        hidden = nn.relu(nn.Dense(self.hidden, dtype=self.dtype, name="first")(x))
        return 2 * nn.sigmoid(nn.Dense(self.size, dtype=self.dtype, name="second")(hidden))


class EPNet(nn.Module):
    """Embeddings made personal by the domain: `O_ep = Gate(E_domain + stop(E)) * E`, `+` being concatenation.

    The gate reads the embeddings but does not teach them. Chang et al., KDD 2023, arXiv 2302.01115.
    """

    hidden: int = 32
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B D"], domain: Float[Array, "B d_D"]) -> Float[Array, "B D"]:
        x = x.astype(self.dtype)
        read = jnp.concatenate([domain.astype(self.dtype), jax.lax.stop_gradient(x)], axis=-1)
        return Gate(x.shape[-1], self.hidden, self.dtype, name="gate")(read) * x

    @nn.nowrap
    def flops(self, D: int, d_D: int) -> int:
        """Operations of the matrix products for one example, two a multiply-add."""
        return dense_flops(d_D + D, self.hidden, D)


class PPNet(nn.Module):
    """A tower a task, whose every layer's input is gated by who and what is asked about (PEPNet, arXiv 2302.01115).

        O_pp^(l) = Gate_l(O_prior + stop(O_ep)) * H^(l);  H^(l+1) = f(O_pp^(l) W^(l) + b^(l));  H^(0) = O_ep

    O_prior is the embeddings of user, item and author; f is Dice, as in the MLP of `rec_core.ranking.head`. A layer's
    gates of all tasks come from one unit.
    """

    hidden: tuple[int, ...]
    tasks: int = 1
    dropout: float = 0.0
    gate_hidden: int = 32
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B D"], prior: Float[Array, "B d_P"], deterministic: bool = True
    ) -> Float[Array, "B tasks"]:
        """Logits, float32."""
        x = x.astype(self.dtype)
        read = jnp.concatenate([prior.astype(self.dtype), jax.lax.stop_gradient(x)], axis=-1)

        def gated(towers: list[Array], layer: int) -> list[Array]:
            width = towers[0].shape[-1]
            gates = Gate(width * self.tasks, self.gate_hidden, self.dtype, name=f"gate_{layer}")(read)
            return [h * gate for h, gate in zip(towers, jnp.split(gates, self.tasks, axis=-1), strict=True)]

        towers = [x] * self.tasks
        for i, units in enumerate(self.hidden):
            towers = [
                Dice(self.dtype, name=f"dice_{i}_{task}")(nn.Dense(units, dtype=self.dtype, name=f"mlp_{i}_{task}")(h))
                for task, h in enumerate(gated(towers, i))
            ]
            towers = [nn.Dropout(self.dropout)(h, deterministic=deterministic) for h in towers]
        last = gated(towers, len(self.hidden))
        logits = [
            nn.Dense(1, dtype=jnp.float32, name=f"logit_{task}")(h.astype(jnp.float32)) for task, h in enumerate(last)
        ]
        return jnp.concatenate(logits, axis=-1)

    @nn.nowrap
    def flops(self, D: int, d_P: int) -> int:
        """Operations of the matrix products for one example, gates and towers, two a multiply-add."""
        gates = sum(dense_flops(d_P + D, self.gate_hidden, self.tasks * width) for width in (D, *self.hidden))
        return gates + self.tasks * dense_flops(D, *self.hidden, 1)
