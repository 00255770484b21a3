"""PLE: progressive layered extraction (Tang et al., RecSys 2020)."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from rec_core.interest.base import check_positive
from rec_core.ranking.networks.base import Inputs, Network, dense_flops, take_domain


class PLE(Network):
    """Levels of experts, some of a group and some shared; a group is a task of a domain.

    At each level, expert: `relu(W g + b)` of what the level before gave its group (the shared ones: the shared state).
    A group's gate, `softmax(W g)`, mixes its own experts and the shared ones; the shared gate, of all levels but the
    last, mixes all experts there are. A tower a group, `relu` layers and a linear one, makes the logit.

    With `domains` > 1, domains are treated as tasks, as the multi-domain use of PLE has it: every group is computed,
    and an example takes those of its domain. With one domain it is the paper's model of `tasks` tasks.

    Attributes:
      hidden: width of the experts of each level.
      domains: number of domains.
      own, shared: experts of each group, and shared experts, per level.
      tower: hidden layers of each tower.
    """

    domains: int = 1
    own: int = 1
    shared: int = 1
    tower: tuple[int, ...] = (32,)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("domain_id",) if self.domains > 1 else ()

    @nn.compact
    def logits(self, inputs: Inputs, deterministic: bool) -> Float[Array, "B tasks"]:
        check_positive(self, "domains", "own", "shared", "tower")
        groups = self.domains * self.tasks
        drop = nn.Dropout(self.dropout, deterministic=deterministic)
        of_group = jnp.broadcast_to(inputs.x[:, None], (len(inputs.x), groups, inputs.x.shape[-1]))
        state = inputs.x
        for i, units in enumerate(self.hidden):
            own = self._linear("bgi,gmio->bgmo", of_group, (groups, self.own), units, f"own_{i}")
            shared = self._linear("bi,mio->bmo", state, (self.shared,), units, f"shared_{i}")
            own, shared = drop(nn.relu(own)), drop(nn.relu(shared))
            gate = self._gate("bgi,gin->bgn", of_group, (groups,), self.own + self.shared, f"gate_{i}")
            of_own, of_shared = gate[..., : self.own], gate[..., self.own :]
            of_group = jnp.einsum("bgm,bgmo->bgo", of_own, own) + jnp.einsum("bgm,bmo->bgo", of_shared, shared)
            if i < len(self.hidden) - 1:
                every = jnp.concatenate([own.reshape(len(own), -1, units), shared], axis=1)
                gate = self._gate("bi,in->bn", state, (), every.shape[1], f"shared_gate_{i}")
                state = jnp.einsum("bn,bno->bo", gate, every)
        for i, units in enumerate(self.tower):
            of_group = drop(nn.relu(self._linear("bgi,gio->bgo", of_group, (groups,), units, f"tower_{i}")))
        logits = self._linear("bgi,gio->bgo", of_group.astype(jnp.float32), (groups,), 1, "logit")
        logits = logits.reshape(-1, self.domains, self.tasks)
        return logits[:, 0] if self.domains == 1 else take_domain(logits, jnp.asarray(inputs.domain_id))

    def _linear(self, product: str, x: Array, stack: tuple[int, ...], units: int, name: str) -> Array:
        """A stack of linear layers, each with its own kernel and bias."""
        init = nn.initializers.lecun_normal(batch_axis=tuple(range(len(stack))))
        kernel = self.param(f"{name}_kernel", init, (*stack, x.shape[-1], units), jnp.float32)
        bias = self.param(f"{name}_bias", nn.initializers.zeros, (*stack, units), jnp.float32)
        return jnp.einsum(product, x, kernel.astype(x.dtype)) + bias.astype(x.dtype)

    def _gate(self, product: str, x: Array, stack: tuple[int, ...], experts: int, name: str) -> Array:
        init = nn.initializers.lecun_normal(batch_axis=tuple(range(len(stack))))
        kernel = self.param(name, init, (*stack, x.shape[-1], experts), jnp.float32)
        return jax.nn.softmax(jnp.einsum(product, x.astype(jnp.float32), kernel)).astype(self.dtype)

    @nn.nowrap
    def flops(self, D: int, F: int = 0, k: int = 0, d_D: int = 0) -> int:
        groups, mixed, total = self.domains * self.tasks, self.own + self.shared, 0
        every = groups * self.own + self.shared
        for i, (a, b) in enumerate(zip((D, *self.hidden), self.hidden)):
            total += every * dense_flops(a, b) + groups * dense_flops(a, mixed, b)
            total += dense_flops(a, every, b) if i < len(self.hidden) - 1 else 0
        return total + groups * dense_flops(self.hidden[-1], *self.tower, 1)
