"""The model in its four settings: each against the language model or another setting, where the two must agree."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bahe_examples import BASE, KEY, LM, SIZE, K, N, case, language, params_of, same, settings, vectors

import bahe_jax
from bahe_jax import Config, Lora, catalogue, language_model, model, newest, pack_texts


def history(sample, kind):
    return [n for n in case().sequences[sample, kind] if n >= 0]


def joined(numbers):
    return np.concatenate([case().texts[n] for n in numbers])


@functools.cache
def expected(text):
    """F_d(F_p(norm(LLM(text)))) of one text by the whole language model; an empty text is F_d(0)."""
    reduce = params_of(BASE)["net"]["reduce"]
    if not text:
        return np.asarray(reduce["bias"])
    states = whole(language(), pack_texts([np.array(text)], 21).batch())
    pooled = np.asarray(states)[0, : len(text)].mean(axis=0)
    return pooled @ np.asarray(reduce["kernel"]) + np.asarray(reduce["bias"])


@jax.jit
def whole(params, batch):
    return language_model.normalize(params, language_model.hidden(params, batch, LM), LM)


@pytest.mark.portable
def test_fp_runs_each_sequence_and_the_item_through_the_whole_model():
    user, item = vectors(settings("fp"), case().batch)
    for sample in range(SIZE):
        parts = [expected(tuple(joined(h).tolist()) if (h := history(sample, n)) else ()) for n in range(N)]
        same(user[sample], np.concatenate(parts))
        same(item[sample], expected(tuple(case().texts[case().item[sample]].tolist())))


def test_llm_ctr_is_one_text_whose_user_part_does_not_see_the_item():
    config = settings("llm_ctr")
    user, item = vectors(config, case().batch)
    for sample in range(SIZE):
        numbers = [n for kind in range(N) for n in history(sample, kind)]
        same(user[sample], expected(tuple(joined(numbers).tolist()) if numbers else ()))
    same(item[3], expected(tuple(case().texts[case().item[3]].tolist())))  # of a user without behaviours
    assert np.abs(item[0] - expected(tuple(case().texts[case().item[0]].tolist()))).max() > 1e-3
    # One sequence alone is the same text in "llm_ctr" and "fp".
    lengths = case().batch.lengths.copy()
    lengths[:, 1] = 0
    one = case().batch.replace(lengths=lengths)
    same(vectors(config, one)[0], vectors(settings("fp"), one)[0][:, : config.reduced])


def test_abe_is_fp_where_a_sequence_is_one_behavior_and_not_else():
    lengths = case().batch.lengths.copy()
    lengths[:, :, 1:] = 0
    one = case().batch.replace(lengths=lengths)
    for ours, theirs in zip(vectors(settings("abe"), one), vectors(settings("fp"), one)):
        same(ours, theirs)
    more = case().batch
    assert np.abs(vectors(settings("abe"), more)[0] - vectors(settings("fp"), more)[0]).max() > 1e-3


def test_abe_without_lower_layers_is_fp():
    """Then the lower part is the token's vector, which knows no neighbour."""
    for ours, theirs in zip(vectors(settings("abe", split=0), case().batch), vectors(settings("fp"), case().batch)):
        same(ours, theirs)


@pytest.mark.portable
def test_ba_is_abe_where_behaviors_are_one_token():
    batch = case().batch
    texts = catalogue([text[:1] for text in case().texts])
    batch = batch.replace(
        lengths=np.minimum(batch.lengths, 1), item_length=np.minimum(batch.item_length, 1)
    )  # fmt: skip
    assert texts.tokens.shape == (12, 1)
    for ba, abe in zip(vectors(settings("ba"), batch), vectors(settings("abe"), batch)):
        same(ba, abe)


@pytest.mark.parametrize("name", ["ba", "abe", "llm_ctr"])
def test_padding_and_neighbours_do_not_matter(name):
    config, batch = settings(name), case().batch
    user, item = vectors(config, batch)
    # other tokens behind each text; behaviours moved to the other end of their sequence; samples in another order
    behind = np.arange(K) >= batch.lengths[..., None]
    turned = np.argsort(batch.lengths > 0, axis=2, kind="stable")[..., None]
    moved = batch.replace(
        tokens=np.take_along_axis(np.where(behind, 7, batch.tokens), turned, axis=2),
        item_tokens=np.where(np.arange(K) >= batch.item_length[:, None], 9, batch.item_tokens),
        lengths=np.take_along_axis(batch.lengths, turned[..., 0], axis=2),
        ids=np.take_along_axis(batch.ids, turned[..., 0], axis=2),
    )
    order = np.array([2, 0, 3, 1])
    again = vectors(config, jax.tree.map(lambda x: x[order], moved))
    same(again[0], user[order])
    same(again[1], item[order])


def test_half_precision_is_near():
    half = settings("ba", language_model=LM.running(dtype="bfloat16"))
    user, item = vectors(half, case().batch, params_of(BASE))
    assert user.dtype == jnp.bfloat16
    for ours, theirs in zip((user, item), vectors(settings("ba"), case().batch)):
        np.testing.assert_allclose(ours.astype(np.float32), theirs, atol=0.05)


# ---- batches and settings --------------------------------------------------------------------------------------------


def test_slots_hold_the_text_or_check_says_so():
    batch = case().batch
    used = int((batch.lengths.sum((1, 2)) + batch.item_length).max())
    config = settings("fp", slots=used)
    for ours, theirs in zip(vectors(config, batch), vectors(settings("fp"), batch)):
        same(ours, theirs)
    with pytest.raises(
        ValueError, match=rf"lengths: row \d has {used} tokens with its item, more than slots={used - 1}"
    ):
        model.check(batch, settings("fp", slots=used - 1))


def test_newest_behaviors_are_kept():
    histories = [[np.arange(5), np.arange(2)], [np.arange(0), np.array([7])]]
    kept = newest(histories, bahe_jax.behaviors_that_fit(30, 2, 5))
    np.testing.assert_array_equal(kept, [[[2, 3, 4], [0, 1, -1]], [[-1, -1, -1], [7, -1, -1]]])
    with pytest.raises(ValueError, match=r"histories\[1\] has 1 sequences and the first user 2"):
        newest([histories[0], histories[1][:1]], 3)
    with pytest.raises(ValueError, match="cannot hold 6 behaviours of 50 tokens"):
        bahe_jax.behaviors_that_fit(256, 6, 50)
    with pytest.raises(ValueError, match="text 1 has no tokens"):
        catalogue([np.arange(3), np.arange(0)])
    with pytest.raises(ValueError, match=r"sequences\[0, 1, 2\] is 12: must be from -1 to 11"):
        catalogue(case().texts).batch(np.full((1, 2, 3), -1) + 13 * (np.arange(6) == 5).reshape(1, 2, 3), [0], [1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": lambda x: x + 1}, r"lengths\[0, 0, 2\] is 4: must be from 0 to 3|lengths\[.*\] is 4"),
        ({"item_length": lambda x: x * 0}, r"item_length\[0\] is 0: must be from 1 to 3"),
        ({"tokens": lambda x: x + 20}, r"tokens\[.*: must be from 0 to 31"),
        ({"tokens": lambda x: None}, "tokens, item_tokens: missing; lower='frozen' reads tokens"),
        ({"ids": lambda x: x * 0}, "ids: 0 stands for two texts"),
        ({"ids": lambda x: x - 100}, r"ids\[0, 0, 0\] is -\d+: must be from 0"),
        ({"item": lambda x: None}, "item: missing"),
        ({"lengths": lambda x: x[:, :1]}, r"lengths: shape \(4, 1, 3\), must be \[B, sequences=2, M\]"),
        ({"label": lambda x: x * np.nan}, "label: nan"),
        ({"item_tokens": lambda x: x * 1.0}, "item_tokens: must be integers, got float"),
    ],
)
def test_check_names_what_is_wrong(change, message):
    [(name, of)] = change.items()
    with pytest.raises(ValueError, match=message):
        model.check(case().batch.replace(**{name: of(getattr(case().batch, name))}), settings("ba"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"setting": "dnn"}, "setting is 'dnn', must be one of"),
        ({"setting": "fp", "lower": "table"}, 'needs setting "abe" or "ba"'),
        ({"split": 3}, "split is 3, must be from 0 to the model's 2 layers"),
        ({"slots": 4}, "slots is 4, must be 0 with"),
        ({"pooling": "max"}, "pooling is 'max'"),
        ({"hidden": ()}, "hidden is"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_config_says_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BASE, **changes)


def test_other_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match="projections=\\('head',\\)"):
        Lora(projections=("head",))
    with pytest.raises(ValueError, match="shapes differ"):
        model.from_language_model(KEY, language_model.cut(language(), 1), BASE)
    with pytest.raises(ValueError, match=r"needs a key: dropout is 0.5"):
        model.apply(params_of(BASE), case().batch, dataclasses.replace(BASE, dropout=0.5), train=True)
    assert Config(LM, sequences=1).lower_layers == 1 and jnp.dtype(BASE.dtype) == jnp.float32
