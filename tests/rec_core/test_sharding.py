"""The rules table, and `constrain` in every place that a model may run."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_model
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from rec_core.sharding import constrain, make_mesh, put_batch, shardings, spec_for
from rec_core.training import TrainConfig, init_state


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("params/tables/item", (64, 8), P(("data", "model"), None)),
        ("opt_state/whole/0/mu/tables/item", (64, 8), P(("data", "model"), None)),
        ("opt_state/tables/item/nu", (64, 8), P(("data", "model"), None)),
        ("params/net/block/query/kernel", (8, 16), P(None, "model")),
        ("params/net/layers/query/kernel", (3, 8, 16), P(None, None, "model")),
        ("params/net/layers/gate/kernel", (3, 8, 16), P(None, None, "model")),
        ("params/net/layers/down/kernel", (3, 16, 8), P(None, "model", None)),
        ("params/net/output/kernel", (16, 8), P("model", None)),
        ("params/net/query/bias", (16,), P(None)),
        ("params/net/mlp_0/kernel", (16, 16), P(None, None)),
        ("params/tables/odd", (63, 8), P(None, None)),  # 8 does not divide 63
        ("params/net/query/kernel", (8, 3), P(None, None)),
        ("opt_state/whole/0/v_row/tables/item", (64,), P(None)),
        ("opt_state/whole/0/v/tables/item", (1,), P(None)),
        ("step", (), P()),
        ("params/net/equery/kernel", (8, 16), P(None, None)),  # a rule matches whole names
    ],
)
def test_rules(path: str, shape: tuple[int, ...], spec: P) -> None:
    assert tuple(spec_for(path, shape, make_mesh(4, 2))) == tuple(spec)


@pytest.mark.portable
def test_optimizer_state_lies_where_its_parameters_do() -> None:
    config, _ = toy_model.example()
    for train in (TrainConfig(steps=1), TrainConfig(steps=1, sparse_tables=True)):
        state = shardings(jax.eval_shape(partial(init_state, toy_model, config, train)), make_mesh(4, 2))
        tables = state.params["tables"]["item"].spec
        assert tables == P(("data", "model"), None)
        moments = state.opt_state["tables"]["item"] if train.sparse_tables else None
        assert (moments["mu"] if moments else state.opt_state["whole"][0].mu["tables"]["item"]).spec == tables
        gate = state.params["net"]["params"]["gate"]["kernel"].spec
        assert gate == P(None, "model")
        assert state.opt_state["whole"][0].nu["net"]["params"]["gate"]["kernel"].spec == gate


def test_a_large_table_that_cannot_be_split_is_told_of() -> None:
    with pytest.warns(UserWarning, match=r"tables/item \(1000001, 64\) is replicated.*1000008 would be split"):
        spec_for("params/tables/item", (1_000_001, 64), make_mesh(4, 2))


@pytest.mark.portable
def test_constrain_serves_everywhere() -> None:
    x = jnp.arange(16.0).reshape(8, 2)

    def double(x: jax.Array) -> jax.Array:
        return constrain(x * 2, P("data", "model"))

    mesh = make_mesh(4, 2)
    assert all(kind == AxisType.Auto for kind in mesh.axis_types)
    np.testing.assert_array_equal(jax.jit(double)(x), x * 2)  # no mesh
    with jax.set_mesh(mesh):
        split = jax.jit(double)(x)
    assert split.sharding.is_equivalent_to(jax.NamedSharding(mesh, P("data", "model")), 2)
    np.testing.assert_array_equal(split, x * 2)
    pmapped = jax.pmap(double, axis_name="data")(x.reshape(8, 1, 2))
    np.testing.assert_array_equal(pmapped.reshape(8, 2), x * 2)
    mapped = jax.shard_map(double, mesh=mesh, in_specs=P("data", "model"), out_specs=P("data", "model"))
    np.testing.assert_array_equal(jax.jit(mapped)(x), x * 2)


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"data=5 x model=2 needs 10 devices, there are 8"):
        make_mesh(5, 2)
    with pytest.raises(ValueError, match="at least 1, got data=0"):
        make_mesh(0, 1)
    _, batch = toy_model.example(batch_size=6)
    with pytest.raises(ValueError, match=r"batch field user of shape \(6,\).*data axis of 4"):
        put_batch(batch, make_mesh(4, 2))
