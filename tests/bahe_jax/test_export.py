"""Q_u and Q_i for a downstream ranker: those of the model, by id."""

import numpy as np
import pytest
from bahe_examples import K, case, params_of, same, settings, vectors

from bahe_jax import catalogue, export


def test_vectors_are_the_models_and_come_by_id():
    config = settings("llm_ctr")
    params, batch = params_of(config), case().batch
    user, _ = vectors(config, batch)
    ids = np.array([70, 10, 40, 20])
    batches = [(ids, batch), (ids[::-1], batch), (np.array([5, 10, 10, 10]), batch)]
    found = export.export(params, config, batches, of="user")
    assert found.ids.tolist() == [5, 10, 20, 40, 70] and found.values.dtype == np.float32
    same(found.of(np.array([[70, 10], [40, 20]])), user.reshape(2, 2, -1))  # the first of an id counts
    same(found.of(np.array([5])), user[:1])
    with pytest.raises(ValueError, match=r"id 71 at \(1,\) was not exported \(2 such of 3\)"):
        found.of(np.array([5, 71, 0]))


def test_items_do_not_depend_on_the_user_that_came_with_them():
    config = settings("llm_ctr")
    nobody = catalogue(case().texts).batch(np.full((4, 2, 3), -1), case().item, np.zeros(4))
    assert nobody.tokens.shape[-1] == K
    for batch in (case().batch, nobody):
        found = export.export(params_of(config), config, [(np.arange(4), batch)], of="item")
        same(found.values, vectors(config, nobody)[1])


def test_wrong_calls_are_refused():
    config, batch = settings("ba"), case().batch
    params = params_of(config)
    with pytest.raises(ValueError, match="no batches"):
        export.export(params, config, [], of="user")
    with pytest.raises(ValueError, match="of is 'users'"):
        export.export(params, config, [(np.arange(4), batch)], of="users")
    with pytest.raises(ValueError, match=r"batch 0: ids are float64\(4,\)"):
        export.export(params, config, [(np.arange(4.0), batch)], of="item")
