import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rec_core import embedding, features
from rec_core.embedding import Categorical, Continuous, Cross, Hashed, Rows

gather, lookup, scatter = map(jax.jit, (embedding.gather_rows, embedding.lookup, embedding.scatter_rows))
SPECS = (
    Categorical("item", 50, 4),
    Categorical("last_item", 50, 4, table="item"),
    Hashed("word", 32, 6, hashes=3),
    Hashed("query", 32, 6, hashes=3, combine="concat"),
    Continuous("age", (18.0, 30.5, 60.0), 5),
    Cross("item_x_age", ("item", Continuous("age", (30.0,), 1)), 40, 3),
)


def raw_values(count, seed=0):
    draw = np.random.default_rng(seed)
    ids = {name: draw.integers(0, 50, count).astype(np.int32) for name in ("item", "last_item")}
    words = {name: draw.integers(-(2**31), 2**31, count).astype(np.int32) for name in ("word", "query")}
    return ids | words | {"age": draw.uniform(0, 90, count).astype(np.float32)}


def mix(x):
    """The hash again, in Python integers."""
    x ^= x >> 16
    x = x * 0x85EBCA6B % 2**32
    x ^= x >> 13
    x = x * 0xC2B2AE35 % 2**32
    return x ^ (x >> 16)


def rows_of(hashed, hashes, buckets):
    return [mix(hashed ^ (0x9E3779B9 * (i + 1) % 2**32)) % buckets for i in range(hashes)]


@pytest.mark.portable
def test_embed_is_the_rows_of_the_tables_in_order():
    tables = embedding.init_tables(jax.random.key(0), SPECS)
    raw = raw_values(7)
    out = np.asarray(jax.jit(embedding.embed, static_argnums=1)(tables, SPECS, raw))
    assert out.shape == (7, embedding.width(SPECS)) == (7, 4 + 4 + 6 + 6 + 5 + 3)
    for row in range(7):
        item, word, query = int(raw["item"][row]), int(raw["word"][row]) % 2**32, int(raw["query"][row]) % 2**32
        age = float(raw["age"][row])
        crossed = mix((mix(0 ^ mix(item)) * 0x01000193 + mix(int(age >= 30))) % 2**32)
        expected = [
            tables["item"][item],
            tables["item"][raw["last_item"][row]],
            tables["word"][np.array(rows_of(mix(word), 3, 32))].sum(0),
            tables["query"][np.array(rows_of(mix(query), 3, 32))].reshape(-1),
            tables["age"][sum(age >= cut for cut in (18.0, 30.5, 60.0))],
            tables["item_x_age"][np.array(rows_of(crossed, 2, 40))].sum(0),
        ]
        np.testing.assert_allclose(out[row], np.concatenate(expected), rtol=1e-6)


def test_serving_one_example_reads_the_rows_of_training():
    raw = raw_values(16)
    for spec in SPECS:
        batched = np.asarray(embedding.indices(spec, raw))
        for row in (0, 9, 15):
            single = embedding.indices(spec, {name: column[row] for name, column in raw.items()})
            np.testing.assert_array_equal(single, batched[row])


def test_hashes_are_spread_and_independent():
    spec = Hashed("word", 64, 2)
    ids = np.asarray(embedding.indices(spec, {"word": np.arange(64_000, dtype=np.int32)}))
    for hashed in ids.T:  # chi-square with 63 degrees of freedom: mean 63, standard deviation 11.2
        assert ((np.bincount(hashed, minlength=64) - 1000.0) ** 2 / 1000).sum() < 63 + 5 * 11.3
    assert abs(np.mean(ids[:, 0] == ids[:, 1]) - 1 / 64) < 0.003


def test_a_cross_depends_on_order_and_on_every_part():
    spec, swapped = Cross("c", ("a", "b"), 2**20, 2), Cross("c", ("b", "a"), 2**20, 2)
    raw = {"a": np.int32(3), "b": np.int32(5)}
    rows = [embedding.indices(spec, raw), embedding.indices(swapped, raw)]
    rows += [embedding.indices(spec, raw | {"a": np.int32(4)}), embedding.indices(spec, raw | {"b": np.int32(4)})]
    assert len({tuple(map(int, row)) for row in rows}) == 4


def test_infinities_fall_in_the_end_buckets():
    spec = Continuous("x", (0.0, 1.0), 2)
    values = np.array([-np.inf, -1, 0, 0.5, 1, np.inf], np.float32)
    np.testing.assert_array_equal(embedding.indices(spec, {"x": values}), [0, 0, 1, 1, 2, 2])


@pytest.mark.portable
@pytest.mark.parametrize("count", [5, 200])  # fewer and more ids than rows
def test_gradient_of_rows_is_the_touched_part_of_the_dense_gradient(count):
    specs = SPECS[:3]
    tables, raw = embedding.init_tables(jax.random.key(1), specs), raw_values(count)

    def loss(tables):
        return jnp.sum(jnp.sin(3 * embedding.embed(tables, specs, raw)) ** 2)

    ids = embedding.touched((specs, raw))
    assert ids.keys() == tables.keys() and ids["item"].shape == (2 * count,)
    rows = {name: gather(tables[name], ids[name]) for name in tables}

    def loss_of_values(values):
        return loss({name: rows[name].replace(values=values[name]) for name in rows})

    dense_loss, dense = jax.jit(jax.value_and_grad(loss))(tables)
    sparse_loss, sparse = jax.jit(jax.value_and_grad(loss_of_values))({name: r.values for name, r in rows.items()})
    np.testing.assert_allclose(dense_loss, sparse_loss, rtol=1e-6)
    for name, gradient in dense.items():
        spread = scatter(jnp.zeros_like(gradient), rows[name].replace(values=sparse[name]))
        assert np.abs(gradient).max() > 0
        np.testing.assert_allclose(spread, gradient, rtol=1e-5, atol=1e-7)
        untouched = np.setdiff1d(np.arange(gradient.shape[0]), ids[name])
        np.testing.assert_array_equal(gradient[untouched], 0)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30))
def test_gathered_and_scattered_rows_give_the_table_back(ids):
    table = jnp.arange(20.0).reshape(10, 2)
    padded = jnp.array(ids + ids[:1] * (30 - len(ids)))  # one shape, one compilation
    rows = gather(table, padded)
    kept = np.asarray(rows.ids) < 10
    np.testing.assert_array_equal(np.asarray(rows.ids)[kept], np.unique(ids))
    np.testing.assert_array_equal(lookup(rows, padded), np.asarray(table)[padded])
    changed = scatter(table, rows.replace(values=rows.values + 100))
    np.testing.assert_array_equal(changed - table, np.isin(np.arange(10), ids)[:, None] * 100.0 * np.ones(2))


def test_a_row_that_was_not_gathered_is_not_taken_for_another():
    rows = Rows(jnp.array([2, 5]), jnp.ones((2, 3)))
    out = np.asarray(embedding.lookup(rows, jnp.array([1, 2, 3, 5, 9])))
    np.testing.assert_array_equal(np.isnan(out[:, 0]), [True, False, True, False, True])


@pytest.mark.parametrize("size", [None, 10, 300 * 7], ids=["size unknown", "mapped", "searched"])
def test_rows_in_any_order_are_found(size):
    """As several owners send them: each in order, with filler between."""
    end = size or 10
    rows = Rows(jnp.array([4, 6, end, end, 0, 3, end]), jnp.arange(14.0).reshape(7, 2), size, ordered=False)
    found = embedding.lookup(rows, jnp.array([[0, 3, 4], [6, 5, 4]]))
    np.testing.assert_array_equal(found[..., 0], [[8, 10, 0], [2, np.nan, 0]])


@pytest.mark.parametrize("rows", [9, 200], ids=["few rows", "many"])
@pytest.mark.parametrize("sparse", [False, True], ids=["table", "rows"])
def test_padding_is_zeros_and_gives_no_gradient(rows, sparse):
    draw = np.random.default_rng(0)
    table = jnp.asarray(draw.normal(size=(rows, 2)), jnp.float32)
    ids, where = draw.integers(0, rows, (4, 70)), draw.random((4, 70)) < 0.6
    specs = (Categorical("item", rows, 2), Hashed("item", rows, 2, hashes=2, table="item"))
    slope = jnp.asarray(draw.normal(size=(4, 70, 4)), jnp.float32)

    def apply(values, there):
        read = Rows(jnp.arange(rows), values, rows) if sparse else values
        vectors = embedding.embed({"item": read}, specs, {"item": ids}, where=there)
        return jnp.sum(vectors * slope * where[..., None]), vectors

    (_, got), of_table = jax.value_and_grad(apply, has_aux=True)(table, jnp.asarray(where))
    (_, want), of_all = jax.value_and_grad(apply, has_aux=True)(table, None)
    np.testing.assert_allclose(got, np.where(where[..., None], want, 0), rtol=1e-6)
    np.testing.assert_allclose(of_table, of_all, rtol=1e-5, atol=1e-5)

    def at_padding(values):
        read = Rows(jnp.arange(rows), values, rows) if sparse else values
        vectors = embedding.embed({"item": read}, specs, {"item": ids}, where=jnp.asarray(where))
        return jnp.sum(jnp.where(where[..., None], 0, vectors + 1))

    assert not np.any(jax.grad(at_padding)(table))


@pytest.mark.parametrize("rows", [5, 200], ids=["few rows", "many"])
def test_derivatives_of_either_mode_are_those_of_the_plain_look_up(rows):
    draw = np.random.default_rng(1)
    table, step = (jnp.asarray(draw.normal(size=(rows, 3)), jnp.float32) for _ in range(2))
    ids = draw.integers(0, rows, (4, 60))

    def cubes(read):
        return lambda table: jnp.sum(read(table) ** 3)

    ours, plain = cubes(lambda table: embedding.lookup(table, ids)), cubes(lambda table: table[ids])
    for derivative in (jax.grad, lambda f: lambda x: jax.jvp(f, (x,), (step,))[1]):
        np.testing.assert_allclose(derivative(ours)(table), derivative(plain)(table), rtol=2e-5)
    forward_over_reverse = [jax.jvp(jax.grad(f), (table,), (step,))[1] for f in (ours, plain)]
    np.testing.assert_allclose(*forward_over_reverse, rtol=2e-5)


def test_a_table_does_not_change_when_a_feature_is_added():
    one = embedding.init_tables(jax.random.key(3), SPECS[:1])
    all_of_them = embedding.init_tables(jax.random.key(3), SPECS)
    np.testing.assert_array_equal(one["item"], all_of_them["item"])
    assert not np.allclose(all_of_them["word"][:, :4], all_of_them["query"][:, :2].repeat(2, 1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Categorical("item", 0, 4), "'item': size is 0"),
        (lambda: Continuous("age", (1.0, 1.0), 4), "strictly increasing"),
        (lambda: Continuous("age", (16777216.0, 16777217.0), 4), "in float32"),
        (lambda: Continuous("age", (), 4), "at least one number"),
        (lambda: Hashed("word", 8, 5, combine="concat"), "width 5 is no multiple of 2"),
        (lambda: Hashed("word", 8, 4, combine="mean"), "combine is 'mean'"),
        (lambda: Cross("c", ("a",), 8, 4), "two fields or more"),
        (lambda: embedding.tables((Categorical("a", 9, 4), Categorical("b", 8, 4, table="a"))), "table 'a'.*'b'"),
        (lambda: embedding.indices(Hashed("word", 8, 4), {"other": np.zeros(3, int)}), r"'word'.*present: \['other'\]"),
        (lambda: embedding.indices(Hashed("word", 8, 4), {"word": np.zeros(3)}), "stable_ids"),
    ],
)
def test_wrong_specs_and_fields_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_vocabulary_keeps_frequent_values_in_order_and_survives_a_file(tmp_path):
    column = np.array(["b", "c", "a", "c", "b", "c", "rare", "a"])
    vocabulary = features.vocabulary_from_values(column, min_count=2)
    assert list(vocabulary.values) == ["c", "a", "b"] and list(vocabulary.counts) == [3, 2, 2] and vocabulary.size == 5
    np.testing.assert_array_equal(vocabulary.encode([["c", "a"], ["rare", "never seen"]]), [[2, 3], [1, 1]])
    np.testing.assert_array_equal(vocabulary.decode([2, 4]), ["c", "b"])
    vocabulary.save(tmp_path / "vocabulary.npz")
    again = features.load_vocabulary(tmp_path / "vocabulary.npz")
    np.testing.assert_array_equal(again.encode(column), vocabulary.encode(column))


@given(st.dictionaries(st.integers(-(2**62), 2**62), st.integers(1, 5), min_size=1, max_size=20), st.integers(1, 4))
def test_vocabulary_is_a_bijection_on_what_it_keeps(counts, min_count):
    values = np.array(list(counts), np.int64)
    vocabulary = features.vocabulary_from_counts(values, list(counts.values()), min_count=min_count)
    ids = vocabulary.encode(values)
    kept = np.array(list(counts.values())) >= min_count
    assert (ids[~kept] == 1).all() and sorted(ids[kept]) == list(range(2, vocabulary.size))
    np.testing.assert_array_equal(vocabulary.decode(ids[kept]), values[kept])


def test_vocabulary_refuses_what_it_cannot_encode(tmp_path):
    vocabulary = features.vocabulary_from_values(np.array([3, 3, 5]))
    for make, message in (
        (lambda: vocabulary.encode(["3"]), "int64 values cannot encode <U1"),
        (lambda: vocabulary.encode([1.5]), "integers or strings"),
        (lambda: vocabulary.encode(np.array([1, None], object)), "None at row 1"),
        (lambda: vocabulary.decode([1]), "id 1 has no raw value"),
        (lambda: features.vocabulary_from_counts([1, 1], [2, 2]), "value .*1.* occurs twice"),
        (lambda: features.vocabulary_from_values([1], min_count=0), "min_count is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    (tmp_path / "bad.npz").write_bytes(b"not a vocabulary")
    with pytest.raises(ValueError, match="not a vocabulary"):
        features.load_vocabulary(tmp_path / "bad.npz")


def test_stable_ids_do_not_depend_on_the_column_they_stand_in():
    short, long = features.stable_ids(["ab", "c"]), features.stable_ids(["c", "a much longer text", "ab"])
    assert short[0] == long[2] and short[1] == long[0] and short.dtype == np.int32
    np.testing.assert_array_equal(features.stable_ids(np.array(["c", "ab"], object)), short[::-1])
    many = features.stable_ids(np.arange(2**40, 2**40 + 20_000))
    assert len(np.unique(many)) > 19_990  # 0.1 collisions expected among 2^31
    # Stored tables depend on these numbers: a change here makes them useless.
    np.testing.assert_array_equal(features.stable_ids(["shoe", ""]), GOLDEN_STRINGS)
    np.testing.assert_array_equal(features.stable_ids([7, -1]), GOLDEN_INTEGERS)


def fold(words):
    hashed = 0xCBF29CE484222325
    for word in words:
        hashed = (hashed ^ word) * 0x100000001B3 % 2**64
    hashed ^= hashed >> 33
    return hashed * 0xFF51AFD7ED558CCD % 2**64 >> 33


GOLDEN_STRINGS = [fold(map(ord, "shoe")), fold("")]
GOLDEN_INTEGERS = [fold([7]), fold([2**64 - 1])]


def test_quantile_boundaries_fill_buckets_evenly():
    values = np.random.default_rng(0).lognormal(size=4000)
    spec = Continuous("price", features.quantile_boundaries(values, 8), 2)
    counts = np.bincount(np.asarray(embedding.indices(spec, {"price": values})), minlength=8)
    assert counts.min() > 490 and counts.max() < 510
    assert features.quantile_boundaries([0, 0, 0, 0, 0, 9], 4) == (0.0,)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("item", np.array([1, 50, 3]), r"request\['item'\]: id 50 at row 1 is outside \[0, 50\)"),
        ("item", np.array([1, 2, -1]), "id -1 at row 2"),
        ("item", np.array([1.0, 2.0, 3.0]), "integers"),
        ("age", np.array([1, np.nan, 3], np.float32), r"request\['age'\]: nan at row 1"),
        ("word", np.array([1, 2**31, 3]), "2147483648 at row 1 does not fit 32 bits"),
        ("word", np.array(["a", "b", "c"]), "stable_ids"),
        ("age", np.zeros(4, np.float32), r"shape \(4,\), must be \(3,\)"),
        ("age", None, r"'age' is missing"),
    ],
)
def test_checks_name_field_row_and_value(field, value, message):
    raw = raw_values(3)
    features.check_features("request", SPECS, raw, (3,))
    raw = {name: column for name, column in (raw | {field: value}).items() if column is not None}
    with pytest.raises(ValueError, match=message):
        features.check_features("request", SPECS, raw, (3,))
