"""Settings of the click model."""

import math
from dataclasses import dataclass, fields
from typing import Any

from flax import linen as nn

from rec_core import embedding
from rec_core.embedding import Feature
from rec_core.interest import INTEREST
from rec_core.ranking.head import Head
from rec_core.ranking.network_head import GATES, NetworkHead, make_network
from rec_core.ranking.networks import NETWORKS

_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Config:
    """Settings of the click model. `context_features` may cross fields of user and target: they see all fields.

    Attributes:
      interest: a name in `rec_core.interest.INTEREST`. interest_options: its fields, such as (("softmax", True),).
      pooled: whether the mean of the behaviours stands beside the interest in the dense network. A co-action unit only
        tells what target and behaviours are together; in its paper the behaviours' own vectors stand beside it (CAN,
        arXiv 2011.05625).
      query_features: what the interest module reads of the candidate, from the target's fields, where that is not the
        item's vector (CAN's co-action embedding); empty for the item's vector.
      domain_features: E_D, explicit indicators (which scenario) and implicit ones (bucketed statistics that mark a
        group, such as a user's activity), from fields of context, user or target. They stand beside the context's
        vectors, and apart for what reads the domain: gates, multi-domain networks, ADS.
      domain_field, domains: the field that holds the explicit domain's id, 0 <= id < domains, for networks with
        parameters of each domain; "" for none.
      network: "dnn", or another name in `rec_core.ranking.networks.NETWORKS`. network_options: its fields.
      gate: "" for none; "frnet" refines the fields' vectors; "pepnet" gates embeddings by the domain (EPNet) and the
        layers of "dnn" by user and item (PPNet). gate_options: fields of `rec_core.ranking.gates`' modules.
    """

    item_features: tuple[Feature, ...]
    user_features: tuple[Feature, ...] = ()
    context_features: tuple[Feature, ...] = ()
    interest: str = "din"
    interest_options: tuple[tuple[str, Any], ...] = ()
    hidden: tuple[int, ...] = (200, 80)
    dense: int = 0  # number of float features
    dense_width: int = 32  # width of their linear layer
    tasks: int = 1
    dropout: float = 0.0
    embedding_scale: float = 0.05  # standard deviation of new tables
    dtype: str = "float32"  # of the computation; parameters and logits are float32
    pooled: bool = False
    query_features: tuple[Feature, ...] = ()
    domain_features: tuple[Feature, ...] = ()
    domain_field: str = ""
    domains: int = 0
    network: str = "dnn"
    network_options: tuple[tuple[str, Any], ...] = ()
    gate: str = ""
    gate_options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if not self.item_features:
            raise ValueError("item_features is empty; the target needs at least one feature")
        for name, known in (("interest", INTEREST), ("network", NETWORKS), ("gate", GATES), ("dtype", _DTYPES)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} is {value!r}, must be one of {sorted(known)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, must be in [0, 1)")
        for name, least in (("dense", 0), ("dense_width", 1), ("tasks", 1), ("domains", 0)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name} is {value}, must be at least {least}")
        if not 0 <= self.embedding_scale < math.inf:
            raise ValueError(f"embedding_scale is {self.embedding_scale}, must be at least 0 and finite")
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"hidden is {self.hidden}, must be widths of at least one layer")
        if bool(self.domain_field) != bool(self.domains):
            raise ValueError(f"domain_field is {self.domain_field!r} and domains {self.domains}; give both or none")
        self._check_needs()
        embedding.tables(self.features)
        both = set(embedding.fields(self.user_features)) & set(embedding.fields(self.item_features))
        if both:
            raise ValueError(f"fields {sorted(both)} are in user_features and item_features; rename one of each")

    def _check_needs(self) -> None:
        """What interest, gate and network are told must be theirs, and what they read must be there."""
        options = {field.name for field in fields(INTEREST[self.interest])} - {"parent", "name", "dtype"}
        if unknown := set(dict(self.interest_options)) - options:
            raise ValueError(
                f"interest_options names {sorted(unknown)}; interest {self.interest!r} has {sorted(options)}"
            )
        unknown = set(dict(self.gate_options)) - set(GATES[self.gate])
        if unknown:
            raise ValueError(f"gate_options names {sorted(unknown)}; gate {self.gate!r} has {sorted(GATES[self.gate])}")
        if self.gate == "pepnet" and self.network != "dnn":
            raise ValueError(f"gate is 'pepnet' with network {self.network!r}; it gates the layers of 'dnn'")
        network = make_network(self.network, self.hidden, self.network_options, self.domains)
        readers = {"gate": {"frnet": ("fields",), "pepnet": ("domain",)}.get(self.gate, ()), "network": network.needs}
        missing = {
            "fields": self.field_width is None
            and f"fields of one width, and the features' are {sorted({spec.width for spec in self.network_features})}",
            "domain": not self.domain_features and "the domain, and domain_features is empty",
            "domain_id": not self.domain_field and 'the domain\'s id, and domain_field is ""',
        }
        for reader, needs in readers.items():
            for need in needs:
                if missing[need]:
                    raise ValueError(f"{reader} is {getattr(self, reader)!r}, which reads {missing[need]}; give them")

    @property
    def features(self) -> tuple[Feature, ...]:
        return self.network_features + self.query_features

    @property
    def network_features(self) -> tuple[Feature, ...]:
        """Features whose vectors go into the dense network."""
        return self.user_features + self.item_features + self.context_features + self.domain_features

    @property
    def field_width(self) -> int | None:
        """The width of all features' vectors; None where they differ."""
        widths = {spec.width for spec in self.network_features}
        return widths.pop() if len(widths) == 1 else None

    @property
    def context_fields(self) -> tuple[str, ...]:
        """Fields that the batch's `context` holds: what context and domain read and user and target do not give."""
        given = {*embedding.fields(self.user_features), *embedding.fields(self.item_features + self.query_features)}
        read = embedding.fields(self.context_features + self.domain_features)
        read += (self.domain_field,) if self.domain_field and self.domain_field not in read else ()
        return tuple(name for name in read if name not in given)

    @property
    def reads_time(self) -> bool:
        """Whether the interest module has parameters of a behaviour's age, for which `time` must be there."""
        return INTEREST[self.interest].reads_time

    @property
    def personal(self) -> bool:
        """Whether the interest module reads the domain: `encode(sequence, mask, domain)`, `read(encoded, target,
        domain)`."""
        return False

    def make_interest(self) -> Any:
        """The interest module. A model around another one (`ads_jax`) gives its own here."""
        return INTEREST[self.interest](**dict(self.interest_options), dtype=self.dtype)

    def make_head(self) -> nn.Module:
        """What ends the model: `Head`, or a network of the registry and a gate."""
        shared = (self.hidden, self.dropout, self.tasks, self.dense_width, self.dtype)
        if self.network == "dnn" and not self.gate and not self.network_options:
            return Head(*shared)
        return NetworkHead(
            *shared, self.network, self.network_options, self.gate, self.gate_options, self.field_width, self.domains
        )
