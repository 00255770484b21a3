"""The three steps on a small world: what each reads, and that nothing of the future reaches a sample."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import lum_jax
from experiments import results
from experiments.datasets import make_world
from experiments.steps import rank, runs
from experiments.steps.ask import ask, lay_out, looked_up, moments, version
from experiments.steps.pretrain import columns, lum_config, lum_rows, pretrain
from experiments.steps.problem import ANY, make_problem
from experiments.steps.recall import target_ranks, targets
from rec_core.checkpoint import restore_params
from rec_core.data.schema import EventLog, Items
from rec_core.data.world import World
from rec_core.data.writer import write
from rec_core.ranking import ctr
from rec_core.store import StoreError
from rec_core.training import DivergedError

WORLD = World(users=60, items=220, categories=8, departments=2, domains=2, mean_length=20, max_length=60, seed=1)


def test_a_kept_run_is_of_one_commit_and_one_version_of_jax(tmp_path, monkeypatch):
    def file(identity=(1, "model")):
        return runs.run_file(tmp_path, "w", identity)

    own = file()
    assert file() == own != file((2, "model"))
    with monkeypatch.context() as patch:
        patch.setattr(jax, "__version__", "0.0")
        assert file() != own
    runs._commit.cache_clear()
    monkeypatch.setattr(results, "commit", lambda: "another")
    assert file() != own
    runs._commit.cache_clear()


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    return make_problem(make_world(WORLD, tmp_path_factory.mktemp("world"), log=str), log=str)


@pytest.fixture(scope="module")
def model(problem):
    config = lum_config(problem, "6k")
    return config, jax.jit(lum_jax.init, static_argnums=1)(jax.random.key(0), config)


def test_conditions_are_hidden_at_the_asked_rate_and_items_never(problem):
    shown, plain = columns(problem, hide=0.5, seed=3), columns(problem)
    np.testing.assert_array_equal(shown["item"], plain["item"])
    for name in ("condition_category", "condition_gap", "condition_domain"):
        hidden = shown[name] == ANY
        assert abs(hidden.mean() - 0.5) < 0.06
        np.testing.assert_array_equal(shown[name][~hidden], plain[name][~hidden])


def test_pretraining_rows_end_before_the_split(problem):
    rows = lum_rows(problem, until=problem.train_end, max_length=16, row_length=32)
    end = rows.windows.start + rows.windows.length
    assert (problem.behaviors.columns["time"][end - 1] < problem.train_end).all()
    trained = (problem.behaviors.columns["time"] < problem.train_end).sum()
    assert rows.windows.length.sum() >= trained - problem.behaviors.users  # windows of one event teach nothing


def test_moments_rest_on_older_behaviours_only(problem):
    known = moments(problem.behaviors, every=5)
    time = problem.behaviors.columns["time"]
    assert (known.end > problem.behaviors.offsets[known.user]).all()
    assert (time[known.end - 1] < known.as_of).all()
    inside = known.end < problem.behaviors.offsets[known.user + 1]
    assert (time[known.end[inside]] >= known.as_of[inside]).all()


def test_users_without_a_behaviour_are_served_with_empty_histories(tmp_path):
    """User 1 of 3 was shown items and took none; user 2 took one, which is nobody's history yet."""
    taken = [[1] * 6, [0] * 6, [0] * 5 + [1]]
    user, label = np.repeat(np.arange(3), 6), np.concatenate(taken).astype(np.uint8)
    log = EventLog(user, 2 + np.arange(18) % 5, 1000 + 10 * np.tile(np.arange(6), 3) + user, label=label)
    items = Items(np.arange(2, 7), np.array([1, 2, 1, 2, 1], np.int32))
    dataset = write([log], items, tmp_path / "set", meta={"source": {}, "options": {}})
    problem = make_problem(dataset, log=str)
    np.testing.assert_array_equal(np.diff(problem.behaviors.offsets), [6, 0, 1])
    rows = lum_rows(problem, until=2000, max_length=4, row_length=8)
    assert set(rows.windows.user) == {0} and rows.windows.users_dropped == 2
    known = moments(problem.behaviors, every=2)
    assert set(known.user) == {0, 2}
    ones = np.ones(len(problem.samples), np.float32)
    batch = rank.rank_batch(problem, np.arange(len(problem.samples)), ones, None, 4)
    np.testing.assert_array_equal(batch.mask.sum(1), np.r_[np.minimum(np.arange(6), 4), [0] * 12])
    ctr.check(batch, rank.rank_config(problem))
    assert (known.newest(np.full(4, 1), np.full(4, 10**6)) == -1).all()
    with pytest.raises(ValueError, match="none of 3 users has min_length = 2 events"):
        lum_rows(problem, until=1005, max_length=4, row_length=8)


def test_tasks_hold_every_question_once_within_their_row():
    row = np.random.default_rng(0).integers(0, 7, 200)
    calls = lay_out(row, 16)
    assert sorted(calls.question) == list(range(200))
    np.testing.assert_array_equal(calls.row[calls.task], row[calls.question])
    assert len(set(zip(calls.task.tolist(), calls.slot.tolist(), strict=True))) == 200 and calls.slot.max() < 16


def test_answers_equal_separate_passes_and_cover_what_samples_look_up(problem, model, tmp_path):
    config, params = model
    knowledge = ask(
        problem, params, config, store=str(tmp_path / "k"), max_length=16, every=4, rows_a_call=4, questions_a_row=24
    )
    known = moments(problem.behaviors, 4)
    moment, category = looked_up(problem, known)
    assert len(knowledge.answers) == len(moment)
    given = columns(problem)
    apply = jax.jit(lum_jax.query, static_argnums=3)
    sequences = problem.behaviors
    for number in np.random.default_rng(1).choice(len(moment), 12, replace=False):
        m, c = moment[number], int(category[number])
        user, end = known.user[m], known.end[m]
        before = end - sequences.offsets[user]
        begin = sequences.offsets[user] + max(0, -(-(before - 16) // 8)) * 8
        assert 8 < end - begin <= 16 or begin == sequences.offsets[user]
        place = np.minimum(begin + np.arange(16), end - 1)
        mask = begin + np.arange(16) < end
        batch = lum_jax.Batch(
            item={n: (given[n][place] * mask)[None] for n in ("item", "category")},
            condition={n: (given[f"condition_{n}"][place] * mask)[None] for n in problem.conditions},
            segment_ids=mask.astype(np.int32)[None],
            positions=(np.arange(16) * mask).astype(np.int32)[None],
        )
        condition = {n: np.array([[c if n == "category" else ANY]], np.int32) for n in problem.conditions}
        expected = apply(params, batch, lum_jax.Queries(condition, np.ones((1, 1), np.int32)), config)[0, 0]
        found, _, _ = knowledge.answers.read(np.array([user]), np.array([[c]]), np.array([known.as_of[m]]))
        np.testing.assert_allclose(found[0, 0], expected, atol=3e-3)  # the store keeps float16


def test_changing_events_at_or_after_t_changes_no_feature_of_a_sample_at_t(problem, model, tmp_path):
    config, params = model
    t = int(np.quantile(problem.samples.time, 0.6))
    later = problem.behaviors.columns["time"] >= t
    assert 0.2 < later.mean() < 0.8
    changed = dict(problem.behaviors.columns)
    changed["item"] = np.where(later, 2 + (changed["item"] + 17) % 200, changed["item"]).astype(np.int32)
    changed["category"] = problem.category[changed["item"]]
    other = dataclasses.replace(problem, behaviors=dataclasses.replace(problem.behaviors, columns=changed))
    options = {"max_length": 16, "every": 4, "rows_a_call": 4, "questions_a_row": 24}
    features, batches = [], []
    for number, view in enumerate((problem, other)):
        knowledge = ask(view, params, config, store=str(tmp_path / str(number)), **options)
        features.append(rank.answer_features(view, knowledge))
        index = np.arange(len(view.samples))
        batches.append(rank.rank_batch(view, index, np.ones(len(index), np.float32), features[-1], 8))
    at_t = problem.samples.time <= t
    np.testing.assert_array_equal(features[0][at_t], features[1][at_t])
    for a, b in zip(jax.tree.leaves(batches[0]), jax.tree.leaves(batches[1]), strict=True):
        np.testing.assert_array_equal(a[at_t], b[at_t])
    assert not np.array_equal(features[0][~at_t], features[1][~at_t])  # later samples do see the change


def test_targets_are_after_training_and_ranks_are_of_the_whole_catalogue(problem, model):
    config, params = model
    index = targets(problem, 40)
    assert (problem.behaviors.columns["time"][index] >= problem.train_end).all()
    ranks = target_ranks(problem, params, config, index, length=8, batch_size=16)
    assert ranks.shape == index.shape and ranks.min() >= 1 and ranks.max() <= WORLD.items
    # An untrained model knows nothing: ranks are spread over the catalogue.
    assert 0.25 * WORLD.items < np.median(ranks) < 0.75 * WORLD.items


def test_pretraining_learns_and_so_does_the_ranker_beside_features_of_noise(problem):
    config = lum_config(problem, "6k", negative_count=64)
    trained = pretrain(
        problem, config, until=problem.train_end, events=20_000, max_length=16, row_length=32, learning_rate=1e-2
    )
    losses = [record["loss"] for record in trained.history if "loss" in record]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.3
    index = targets(problem, 200)
    hit = (target_ranks(problem, trained.params, config, index, length=16) <= 10).mean()
    assert hit > 2 * 10 / WORLD.items  # twice what chance gives
    train, test = problem.splits["train"], problem.splits["test"]
    dense = np.random.default_rng(0).standard_normal((len(problem.samples), 3)).astype(np.float16)
    model = rank.rank_config(problem, dense=3)
    result = rank.train_ranker(
        problem, model, train, dense=dense, length=8, batch_size=256, epochs=3, learning_rate=1e-2
    )
    logits = rank.scores(problem, result.params, model, test, dense=dense, length=8, batch_size=128)
    assert logits.shape == test.shape and np.isfinite(logits).all()
    fitted = rank.scores(problem, result.params, model, train, dense=dense, length=8, batch_size=128)
    assert rank.auc(problem, train, fitted) > 0.6


def test_a_diverging_pretraining_names_the_step_and_keeps_the_state_before_it(problem, tmp_path):
    config = lum_config(problem, "6k", negative_count=64)
    with pytest.raises(DivergedError, match=r"diverged at step (\d+): loss .*the state before it is saved in") as error:
        pretrain(
            problem, config, until=problem.train_end, events=1_000, max_length=16, row_length=32, learning_rate=1e30,
            directory=tmp_path,
        )  # fmt: skip
    assert 0 < error.value.step < 3  # the first steps' loss is that of the parameters before any update
    assert f"diverged at step {error.value.step}:" in str(error.value)
    kept = restore_params(tmp_path, error.value.step)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(kept))


def test_the_store_of_another_model_is_refused(problem, model, tmp_path: Path):
    config, params = model
    folder = str(tmp_path / "k")
    options: dict = {"max_length": 16, "every": 20, "rows_a_call": 4, "questions_a_row": 24}
    ask(problem, params, config, store=folder, **options)
    other = jax.tree.map(lambda leaf: leaf * 1.01, params)
    with pytest.raises(StoreError, match=f"'{version(params)}' and opened for '{version(other)}'"):
        ask(problem, other, config, store=folder, **options)
