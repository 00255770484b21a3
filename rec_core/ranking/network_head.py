"""What ends a click model whose dense network is not the plain one: a gate, then a network of the registry."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from rec_core.ranking.gates import EPNet, FRNet, PPNet
from rec_core.ranking.head import tamed
from rec_core.ranking.networks import NETWORKS, Inputs, Network

GATES = {"": (), "frnet": ("attention", "hidden"), "pepnet": ("hidden",)}  # and their options


def make_network(
    kind: str, hidden: tuple[int, ...], own: tuple[tuple[str, Any], ...], domains: int = 0, **shared: Any
) -> Network:
    """The member of `NETWORKS` with its own options; it is told the number of domains where it asks for it."""
    network = NETWORKS[kind]
    known = network.__dataclass_fields__.keys() - Network.__dataclass_fields__.keys()
    unknown = dict(own).keys() - known
    if unknown:
        raise ValueError(f"network_options names {sorted(unknown)}; network {kind!r} has {sorted(known)}")
    if "domains" in dict(own) and domains not in (0, dict(own)["domains"]):
        raise ValueError(
            f"network_options gives {dict(own)['domains']} domains, config.domains is {domains}; leave it out"
        )
    told = {"domains": domains} if "domains" in known and domains else {}
    return network(hidden, **told | dict(own), **shared)


class NetworkHead(nn.Module):
    """The parts of an impression as a network's inputs: side by side, and as fields of one width.

    A part's features are fields of `field_width`. The interest module's answer and the float features, which are no
    feature's vector, count as so many fields as their width has; where it is no multiple, a linear layer makes it one.
    """

    hidden: tuple[int, ...]
    dropout: float = 0.0
    tasks: int = 1
    dense_width: int = 32
    dtype: str = "float32"
    network: str = "dnn"
    network_options: tuple[tuple[str, Any], ...] = ()
    gate: str = ""
    gate_options: tuple[tuple[str, Any], ...] = ()
    field_width: int | None = None
    domains: int = 0

    @nn.compact
    def __call__(
        self,
        parts: Sequence[Float[Array, "B _"] | None],
        dense: Float[Array, "B F"] | None = None,
        deterministic: bool = True,
        *,
        domain: Float[Array, "B d_D"] | None = None,
        domain_id: Int[Array, " B"] | None = None,
        prior: Float[Array, "B d_P"] | None = None,
    ) -> Float[Array, "B tasks"]:
        """Logits, float32.

        Args:
          parts, dense: as for `rec_core.ranking.head.Head`.
          domain: E_D, which is among the parts too. domain_id: the explicit domain.
          prior: what PPNet's gates read, the embeddings of user and item.
        """
        given = [part.astype(self.dtype) for part in parts if part is not None]
        if dense is not None:
            given.append(nn.Dense(self.dense_width, dtype=self.dtype, name="dense")(tamed(dense)))
        x = jnp.concatenate(given, axis=-1)
        shared: dict[str, Any] = {"tasks": self.tasks, "dropout": self.dropout, "dtype": self.dtype}
        if self.gate == "pepnet":
            if domain is None or prior is None:
                raise ValueError("gate is 'pepnet', which reads domain and prior; one of them is None")
            hidden = dict(self.gate_options).get("hidden", 32)
            x = EPNet(hidden, self.dtype, name="epnet")(x, domain)
            return PPNet(self.hidden, **shared, gate_hidden=hidden, name="ppnet")(x, prior, deterministic)
        network = make_network(self.network, self.hidden, self.network_options, self.domains, **shared, name="network")
        fields = self._fields(given) if self.gate == "frnet" or "fields" in network.needs else None
        if self.gate == "frnet":
            if fields is None:
                raise ValueError("gate is 'frnet', which reads fields of one width; field_width is None")
            fields = FRNet(**dict(self.gate_options), dtype=self.dtype, name="frnet")(fields)
            x = fields.reshape(len(fields), -1)
        return network(Inputs(x, fields, domain, domain_id), deterministic)

    def _fields(self, given: list[Float[Array, "B _"]]) -> Float[Array, "B F k"] | None:
        k = self.field_width
        if k is None:
            return None
        fields = []
        for i, part in enumerate(given):
            if part.shape[-1] % k:
                part = nn.Dense(k * -(-part.shape[-1] // k), dtype=self.dtype, name=f"field_{i}")(part)
            fields.append(part.reshape(len(part), -1, k))
        return jnp.concatenate(fields, axis=1)
