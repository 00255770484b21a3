"""Lifelong sequences on the device: nothing of the future, what the tree finds, and the command in small."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sim_jax
from experiments import results, sim_lifelong
from experiments.sim_lifelong_models import MODELS, QUICK, SimLifelong, Trained, long_term, model_config, recall
from experiments.steps import lifelong, runs
from experiments.steps.lifelong import Feed
from rec_core.data.world import World, generate

WORLD = World(users=12, items=80, categories=8, departments=2, mean_length=30, max_length=60, seed=3)


@pytest.fixture(scope="module")
def problem():
    return lifelong.of_world(WORLD, train=80, test=40)


def test_samples_are_the_worlds_and_the_test_period_is_later(problem):
    log, _, _ = generate(WORLD)
    assert problem.moment[problem.train].max() < problem.moment[problem.test].min()
    columns = (getattr(log, name).tolist() for name in ("user", "item", "time", "label", "probability"))
    known = {row[:3]: row[3:] for row in zip(*columns)}
    for i in range(len(problem.user)):
        row = (int(problem.user[i]), int(problem.target["item"][i]), int(problem.moment[i]))
        assert known[row] == (problem.label[i], problem.probability[i])
    assert len(problem.time) == log.label.sum()
    np.testing.assert_array_equal(problem.category[problem.fields["item"]], problem.fields["category"])


def test_a_file_gives_back_what_was_made(problem, tmp_path):
    calls = []
    for _ in range(2):
        found = lifelong.saved(tmp_path / "kept" / "data.npz", lambda: calls.append(1) or problem)
    assert calls == [1]
    for name, value in vars(problem).items():
        np.testing.assert_equal(getattr(found, name), value)


def test_a_batch_reads_what_is_strictly_older_and_no_more(problem):
    device = lifelong.put(problem)
    config, _ = model_config(problem, "DIEN", SimLifelong(**QUICK))
    index = jnp.asarray(np.arange(0, 120, 7))
    for feed in (Feed("newest", 9), Feed("tree", 4), Feed()):
        batch = lifelong.make_batch(device, index, config, feed, 5, jax.random.key(0))
        for row, sample in enumerate(np.asarray(index)):
            first, last = problem.offsets[problem.user[sample]], problem.offsets[problem.user[sample] + 1]
            older = np.arange(first, last)
            older = older[problem.time[older] < problem.moment[sample]]
            same = older[problem.fields["category"][older] == problem.target["category"][sample]]
            wanted = {"newest": older[-9:], "tree": same[-4:], "none": older[:0]}[feed.kind]
            mask = np.asarray(batch.long_mask[row])
            np.testing.assert_array_equal(np.asarray(batch.long["item"][row])[mask], problem.fields["item"][wanted])
            np.testing.assert_array_equal(
                np.asarray(batch.long_time[row])[mask], problem.moment[sample] - problem.time[wanted]
            )
            recent = np.asarray(batch.sequence["item"][row])[np.asarray(batch.mask[row])]
            np.testing.assert_array_equal(recent, problem.fields["item"][older[-5:]])
        np.testing.assert_array_equal(device.category[batch.negatives["item"]], batch.negatives["category"])


def test_days_since_the_category_by_hand(problem):
    index = problem.test[:20]
    found = lifelong.days_since_category(lifelong.put(problem), index)
    for days, i in zip(found, index):
        own = np.arange(problem.offsets[problem.user[i]], problem.offsets[problem.user[i] + 1])
        own = own[(problem.time[own] < problem.moment[i])]
        own = own[problem.fields["category"][own] == problem.target["category"][i]]
        wanted = (problem.moment[i] - problem.time[own[-1]]) / 86_400 if len(own) else np.inf
        assert days == pytest.approx(wanted, rel=1e-5)


def test_searches_that_keep_everything_find_all_of_each_other_and_clicks_are_ranked(problem):
    settings = SimLifelong(**QUICK | {"seeds": 1, "top": 64, "clicks": 6})
    done = Trained(problem, lifelong.put(problem))
    for name in ("SIM soft, time", "ETA", "SDIM", "SIM hard, time"):
        config, _ = model_config(problem, name, settings)
        params = jax.jit(sim_jax.init, static_argnums=1)(jax.random.key(0), config)
        done.params[name] = jax.tree.map(lambda x: x[None], params)
    assert problem.history_lengths().max() <= 64
    found = recall(done, settings)
    assert found["sdim_of_exact"] == found["eta_of_exact"] == 1.0 and found["hard_of_soft"] == found["same_category"]
    assert 0 < found["same_category"] < 1
    ranked = long_term(done, settings, ("SIM hard, time",), sim_lifelong.DAY_BINS)
    hits = ranked.hits["SIM hard, time"]
    assert hits.shape == (1, len(ranked.days)) and set(np.unique(hits)) <= {0.0, 1.0}


def test_the_command_in_small(tmp_path, capsys, monkeypatch):
    only = ("DIN", "SIM hard, time")
    made = sim_lifelong.run(SimLifelong(quick=True, only=only, out=tmp_path))
    assert results.read(tmp_path / "result.json") == made
    assert {"din_short_auc", "sim_hard_time_auc", "oracle_auc"} <= made.figures.keys()
    assert 0.5 < made.figures["oracle_auc"] < 1
    by_model = {name: [row["test_auc"] for row in made.rows if row.get("model") == name] for name in only}
    assert all(len(set(values)) == 2 for values in by_model.values()), "two seeds gave one number"
    page = (tmp_path / "report.html").read_text()
    assert "AUC on world" in page and "SIM hard, time" in page
    assert "1 users" not in capsys.readouterr().err
    kept = sorted((tmp_path / "models").iterdir())
    before = [path.stat().st_mtime_ns for path in kept]
    again = sim_lifelong.run(SimLifelong(quick=True, only=only, out=tmp_path))
    assert again.figures == made.figures and [path.stat().st_mtime_ns for path in kept] == before and len(kept) == 2
    monkeypatch.setattr(runs, "_commit", lambda: "another")
    with pytest.raises(ValueError, match="models holds nothing of these settings and this commit"):
        sim_lifelong.run(SimLifelong(quick=True, only=only, train=False, out=tmp_path))


def test_unknown_models_are_refused():
    with pytest.raises(ValueError, match=r"only=\['FM'\]: there is no such model; there are 'DIN'"):
        SimLifelong(only=("FM",))
    assert set(sim_lifelong.FIGURES.values()) == set(MODELS)
    assert {name for pair in sim_lifelong.ORDER for name in pair} <= set(MODELS)
