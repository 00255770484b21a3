"""BAHE on texts: what each part may read, what a batch holds, and the command in small."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bahe_jax
from bahe_jax import Config
from bahe_jax.export import Vectors
from experiments import bahe_text, bahe_text_models, results
from experiments.bahe_text_models import FAMILY, QUICK, BaheText, Outcome, model_config, plan
from experiments.steps import bahe_text as steps
from experiments.steps.bahe_text import Language, Words
from experiments.steps.bahe_text_data import LATELY, make_texts, sequences_of
from experiments.steps.problem import Problem
from experiments.steps.runs import Run
from rec_core import metrics, partition
from rec_core.data.samples import DISLIKED, LIKED, Behaviors, Samples
from rec_core.data.schema import DataError

ITEMS, DAY = 30, 86_400
PARTS = {"limit": 4, "train": 40, "rank": 30, "test": 20, "rank_share": 0.25}
TEXTS = ["", "", *(" ".join(f"w{item}" for _ in range(1 + item % 4)) for item in range(2, ITEMS))]


def made(feedback: bool) -> Problem:
    """12 users of 30 behaviours, two at each time; each is a labelled sample."""
    draw = np.random.default_rng(0)
    user = np.repeat(np.arange(12), 30)
    time = np.concatenate([np.sort(np.repeat(draw.choice(600, 15, replace=False), 2)) for _ in range(12)]) * DAY
    columns = {"item": draw.integers(2, ITEMS, 360).astype(np.int32), "time": time}
    sizes = {"item": ITEMS, "category": 1}
    label = draw.integers(0, 2, 360).astype(np.uint8)
    if feedback:
        columns["feedback"], sizes["feedback"] = np.where(label == 1, LIKED, DISLIKED).astype(np.int32), 3
    columns["category"] = np.zeros(360, np.int32)
    offsets = np.arange(0, 361, 30)
    sequences = Behaviors(offsets, columns, sizes)
    samples = Samples(
        user=user, item=columns["item"], category=columns["category"], domain=columns["category"], time=time,
        label=label, start=offsets[user], end=sequences.before(user, time),
    )  # fmt: skip
    return Problem("made", sequences, samples, np.zeros(ITEMS, np.int32), 400 * DAY, 450 * DAY, {}, {}, False, False)


@pytest.fixture(scope="module", params=[True, False], ids=["liked and disliked", "lately and before"])
def texts(request):
    return make_texts(made(request.param), TEXTS, Words(64), **PARTS)


def test_each_part_is_later_than_the_one_before_and_equal_moments_have_one_number(texts):
    samples, problem = texts.problem.samples, texts.problem
    time = [samples.time[index] for index in (texts.train, texts.rank, texts.test)]
    assert time[0].max() < time[1].min() and time[1].max() < problem.train_end <= problem.valid_end <= time[2].min()
    assert [len(x) for x in time] == [40, 30, 20]
    seen = {}
    for user, when, moment in zip(samples.user, samples.time, texts.moment):
        assert seen.setdefault(moment, (user, when)) == (user, when)
    assert len(seen) == len(np.unique(np.stack([samples.user, samples.time]), axis=1).T)


def test_sequences_hold_the_newest_of_each_kind_that_are_older_and_fit(texts):
    """Against a plain loop over each sample's behaviours."""
    samples, sequences = texts.problem.samples, texts.problem.behaviors
    lengths, kinds, columns = texts.catalogue.lengths, len(texts.kinds), sequences.columns
    length = 40
    found = sequences_of(texts, length)
    room = (length - 4 - int(lengths[ITEMS:].sum())) // kinds
    most = length // (kinds * texts.tokens)
    for row in range(0, len(samples), 3):
        older = np.arange(360)[(np.arange(360) // 30 == samples.user[row]) & (columns["time"] < samples.time[row])]
        late = columns["time"][older] >= samples.time[row] - LATELY
        if kinds == 3:
            liked = columns["feedback"][older] == LIKED
            wanted = [older[liked], older[~liked], older]
        else:
            wanted = [older[late], older[~late]]
        for kind, places in enumerate(wanted):
            items, used = [], 0
            for place in places[::-1][:most]:
                used += lengths[columns["item"][place]]
                if used > room:
                    break
                items.insert(0, columns["item"][place])
            held = found[row, kind]
            assert held[0] == ITEMS + kind and texts.texts[held[0]] == f"{texts.kinds[kind]}\n"
            np.testing.assert_array_equal(held[1:][held[1:] >= 0], items)
    total = np.where(found >= 0, lengths[np.maximum(found, 0)], 0).sum(axis=(1, 2)) + lengths[samples.item]
    assert 0.5 * length < total.max() <= length
    with pytest.raises(ValueError, match=r"a text of 12 tokens has room for .* give longer texts, or a lower limit"):
        sequences_of(texts, 12)


def test_a_batch_on_the_device_is_the_catalogues(texts):
    index = np.array([3, 50, 3, 80])
    rows, samples = sequences_of(texts, 40)[index], texts.problem.samples.take(index)
    states = np.random.default_rng(1).normal(size=(len(texts.texts), 5)).astype(np.float32)
    for held in (None, states):
        device = steps.put(texts, 40, None if held is None else jnp.asarray(held))
        found = steps.make_batch(device, jnp.asarray(index))
        wanted = texts.catalogue.batch(rows, samples.item, samples.label, states=held)
        for name, value in vars(wanted).items():
            np.testing.assert_array_equal(getattr(found, name), value, err_msg=name)


def test_popularity_and_known_users_look_at_the_training_period_alone(texts):
    columns, samples = texts.problem.behaviors.columns, texts.problem.samples
    before = columns["time"] < 400 * DAY
    for row in range(0, 90, 7):
        assert texts.popularity[row] == (columns["item"][before] == samples.item[row]).sum()
        assert texts.known_user[row] == before[samples.user[row] * 30]


def test_no_events_of_a_part_is_an_error():
    problem = made(False)
    with pytest.raises(DataError, match="made: no samples in the period of 'test'"):
        late = dataclasses.replace(problem, train_end=900 * DAY, valid_end=1000 * DAY)
        make_texts(late, TEXTS, Words(64), **PARTS)


def test_the_plan_has_every_quoted_point_and_one_thing_differs_at_a_time():
    points = {point.name: point for point in plan(BaheText(amazon=Path("x")))}
    quoted = {
        "dnn_auc",
        "llm_ctr_auc_1024",
        "llm_ctr_auc_2048",
        "bahe_auc_1024",
        "bahe_auc_2048",
        "amazon_bahe_auc_256",
    }
    assert quoted <= {point.figure for point in points.values()}
    for point in points.values():
        if point.variation:
            base = points[point.like(point.setting)]
            differing = [
                n for n in ("length", "pooling", "split", "pretrained") if getattr(point, n) != getattr(base, n)
            ]
            assert len(differing) == 1 and not point.downstream and base.downstream
    assert {point.length for point in points.values() if point.setting == "fp" and point.data == "ml1m"} == {
        256, 512, 1024, 2048,
    }  # fmt: skip


def test_answers_are_those_of_the_samples_own_moment_and_item(texts, monkeypatch):
    """What would be run is put in the place of what it gives."""

    def export(params, config, batches, of):
        found = {}
        for ids, batch in batches:
            values = np.asarray(batch.ids).sum(axis=(1, 2)) if of == "user" else np.asarray(batch.item)
            for name, value in zip(ids.tolist(), values.tolist()):
                assert found.setdefault(name, value) == value
        ids = np.array(sorted(found))
        return Vectors(ids, np.array([[float(found[name])] for name in ids]))

    monkeypatch.setattr(steps, "export", export)
    asked = np.concatenate([texts.rank, texts.test])
    device = steps.put(texts, 40, None)
    dense = steps.answers(device, {}, texts, asked, Config(bahe_text.TINY, len(texts.kinds)), batch_size=16)
    users = np.maximum(sequences_of(texts, 40), 0).sum(axis=(1, 2))
    np.testing.assert_array_equal(dense[asked], np.stack([users, texts.problem.samples.item], axis=1)[asked])
    assert not dense[texts.train].any()


def test_the_report_of_a_whole_plan(tmp_path):
    """Logits that were not trained for: every figure, difference and panel is there under its name."""
    texts, config = make_texts(made(True), TEXTS, Words(64), **PARTS), BaheText(amazon=Path("x"), resamples=20)
    draw, outcomes = np.random.default_rng(5), {}
    for data in ("ml1m", "amazon"):
        points = tuple(point for point in plan(config) if point.data == data)
        outcome = outcomes[data] = Outcome(texts, points, {point.name: 250e12 for point in points})
        for point in points:
            own = ("answers",) * point.downstream if point.length else ("rank", "both")
            for seed in range(2 + (point.setting == "ba")):
                more = {what: draw.normal(size=20) for what in own}
                logits = draw.normal(size=20)
                outcome.runs.setdefault(point.name, {})[seed] = Run({"seconds": 2.0, **more}, np.ones(50), logits)
    found = bahe_text.summarize(outcomes)
    keys = [key for key, _ in FAMILY.values()]
    wanted = {
        "train_samples",
        "popularity_auc",
        "dnn_auc",
        "dnn_auc_d",
        "dnn_both_auc_d",
        *(f"{key}_auc_d" for key in keys),
    }
    varied = ("bahe_auc_1024_random", "bahe_auc_1024_last", "bahe_auc_1024_split_quarter", "llm_ctr_auc_1024_random")
    ml1m = wanted | {f"{key}_auc_{length}" for key in keys for length in (256, 512, 1024, 2048)} | set(varied)
    ml1m |= {"bahe_auc_1024_split_three_quarters", "llm_ctr_auc_1024_last"}
    amazon = {f"amazon_{name}" for name in wanted | {f"{key}_auc_256" for key in keys}}
    assert found.keys() == ml1m | amazon
    label, runs = outcomes["ml1m"].test["label"], outcomes["ml1m"].runs
    by_hand = np.mean([metrics.auc(label, run.logits) for run in runs["bahe_2048"].values()])
    assert found["bahe_auc_2048"] == pytest.approx(by_hand)
    rows = [row for data, outcome in outcomes.items() for row in bahe_text.point_rows(outcome, data)]
    assert len([row for row in rows if row.get("estimated_s") == 1.0]) == sum(
        len(x) for o in outcomes.values() for x in o.runs.values()
    )
    gains = {data: bahe_text.differences(outcome, 20) for data, outcome in outcomes.items()}
    assert gains["ml1m"]["bahe_512 - llm_ctr_512"].seeds == 2
    by_hand = np.diff([np.mean([metrics.auc(label, runs[n][s].logits) for s in (0, 1)]) for n in ("fp_256", "dnn")])
    assert gains["ml1m"]["fp_256 - dnn"].mean == pytest.approx(-by_hand[0])
    assert {"llm_ctr_1024_last - llm_ctr_1024", "abe_2048 - llm_ctr_2048"} <= gains["ml1m"].keys()
    assert "AUC_d: DNN with answers of amazon_fp_256 - DNN" in gains["amazon"]
    made_of = results.record("bahe_text", started=results.begin(), seeds=range(3), rows=rows, figures=found)
    page = bahe_text.page(config, made_of, outcomes, gains)
    for title in ("AUC by setting and length, made", "AUC by setting, made", *bahe_text.VARIED.values()):
        assert f"<h2>{title}" in page


def test_the_four_settings_train_the_same_part():
    texts = make_texts(made(True), TEXTS, Words(64), **PARTS)
    language, trained = Language({}, bahe_text.TINY, Words(256)), []
    for point in plan(BaheText(**QUICK)):
        if point.setting in FAMILY and not point.variation:
            config = model_config(texts, language, point)
            params = jax.eval_shape(lambda config=config: bahe_jax.init(jax.random.key(0), config))
            moved = jax.tree.leaves_with_path(partition.split(params, bahe_jax.trainable(params, config))[0])
            named = {jax.tree_util.keystr(path): leaf.shape for path, leaf in moved}
            trained.append({name: shape for name, shape in named.items() if "'head'" not in name})
    assert len(trained) == 4 and all(found == trained[0] for found in trained)
    assert all(shape[0] == 2 for name, shape in trained[0].items() if "'upper'" in name)
    assert not any("'lower'" in name or "'tables'" in name for name in trained[0])


def test_the_command_in_small(tmp_path, monkeypatch):
    """The click models, which other tests train, are in the place of a sum here."""
    asked = []

    def ranker(texts, index, seed, config, dense=None):
        asked.append((index, dense))
        score = np.sin(seed + np.arange(len(texts.test))) if dense is None else dense[texts.test].sum(axis=1)
        return Run({}, np.ones(3), score.astype(np.float32))

    monkeypatch.setattr(bahe_text_models, "_ranker", ranker)
    only = ("dnn", "bahe_48", "bahe_48_random")
    settings = BaheText(quick=True, out=tmp_path, only=only)
    outcome = bahe_text.run(settings)
    assert results.read(tmp_path / "result.json") == outcome
    assert set(outcome.figures) == {f"small_{name}" for name in (
        "train_samples", "popularity_auc", "dnn_auc", "dnn_auc_d", "dnn_both_auc_d", "bahe_auc_48", "bahe_auc_d",
        "bahe_auc_48_random",
    )}  # fmt: skip
    rows = [row for row in outcome.rows if "point" in row]
    assert [(row["point"], row["seed"]) for row in rows] == [(name, seed) for name in only for seed in (0, 1)]
    assert all(0 < float(row["last_loss"] or 0) < 10 for row in rows) and rows[2]["test_auc"] != rows[3]["test_auc"]
    gains = {row["difference"] for row in outcome.rows if "difference" in row}
    assert {"bahe_48 - dnn", "bahe_48_random - bahe_48", "AUC_d: DNN with answers of bahe_48 - DNN"} <= gains
    ranked = [(index, dense) for index, dense in asked if dense is not None]
    assert len(ranked) == 2, "a ranker for each seed of the base"
    for index, dense in ranked:
        assert dense[index].any(axis=1).all() and not dense[: index[0]].any() and np.isfinite(dense).all()
    page = (tmp_path / "report.html").read_text()
    assert all(text in page for text in ("Pre-trained and random weights", "Training losses", "downstream ranker"))
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "points").iterdir()}
    again = bahe_text.run(dataclasses.replace(settings, only=("dnn",), remat="full"))
    assert again.figures == outcome.figures and len(kept) == 6
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "points").iterdir()} == kept


def test_settings_say_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match=r"only=\['bahe'\]: there is no such point; there are dnn, bahe_256, "):
        bahe_text.run(BaheText(only=("bahe",), out=tmp_path))
    with pytest.raises(ValueError, match=r"model is not given: name the folder or \.gguf file of SmolLM2-135M"):
        bahe_text.run(BaheText(out=tmp_path))
    for change in ({"seeds": 0}, {"rank_share": 1.0}, {"base": 300}):
        with pytest.raises(ValueError, match=next(iter(change))):
            BaheText(**change)
