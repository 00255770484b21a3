"""The comparison over domains: what models read, equal tuning, and the command in small."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import ads_multidomain, ads_multidomain_models, ads_multidomain_rows, results, statistics
from experiments.ads_multidomain_models import ATTENTIONS, MODELS, QUICK, AdsMultidomain, Outcome, model_config, rivals
from experiments.datasets import make_world
from experiments.steps import multidomain, runs
from experiments.steps.problem import make_problem
from rec_core import metrics, training
from rec_core.ranking import ctr

SETTINGS = AdsMultidomain(**QUICK | {"quick": True, "users": 30, "train_samples": 256, "test_samples": 100})


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    return make_problem(make_world(SETTINGS.world(0.4), tmp_path_factory.mktemp("world"), log=lambda _: None))


@pytest.fixture(scope="module")
def data(problem):
    return multidomain.make_impressions(problem, name="w", train=256, test=100, length=8, width=4)


def test_impressions_are_the_samples_with_what_is_strictly_older(problem, data):
    samples, behaviors = problem.samples, problem.behaviors
    known = {(u, i, t): row for row, (u, i, t) in enumerate(zip(samples.user, samples.item, samples.time))}
    assert len(data.train) == 256 and len(data.test) > 50
    columns = jax.tree.map(np.asarray, data.batch)
    times = []
    for n in range(0, len(data.label), 11):
        own = [row for (u, i, _), row in known.items() if (u, i) == (data.user[n], columns.target["item"][n])]
        own = [row for row in own if samples.end[row] - samples.start[row] == columns.context["activity"][n]]
        row = own[0]  # the same item twice between two clicks: the same behaviours
        older = np.arange(samples.start[row], samples.end[row])[-8:]
        assert (behaviors.columns["time"][older] < samples.time[row]).all()
        np.testing.assert_array_equal(columns.sequence["item"][n][columns.mask[n]], behaviors.columns["item"][older])
        assert columns.context["domain"][n] in samples.domain[own]
        there = columns.sequence["position"][n][columns.mask[n]]
        np.testing.assert_array_equal(there, np.arange(len(older), 0, -1))
        assert columns.target["position"][n] == 0 and not columns.sequence["position"][n][~columns.mask[n]].any()
        times.append((n, samples.time[row]))
    assert max(t for n, t in times if n < 256) < min(t for n, t in times if n in data.test)
    assert data.settings["domains"] == problem.behaviors.sizes["domain"]


def test_every_model_is_built_on_the_same_features(data):
    for name in MODELS:
        model, config = model_config(data, name, SETTINGS)
        shapes = jax.eval_shape(lambda model=model, config=config: model.init(jax.random.key(0), config))
        assert {"item", "category", "user", "domain", "activity", "position"} <= shapes["tables"].keys()
    for attention in ATTENTIONS:
        assert set(rivals(attention)) <= MODELS.keys()
        control, personal = (
            model_config(data, f"{attention} + ADS{end}", SETTINGS)[1] for end in (", E_D constant", "")
        )
        assert control == replace(personal, constant=True)


def test_runs_side_by_side_are_runs_alone_at_their_own_rate(data):
    """A run's numbers are those of the plain step with its learning rate and seed, whoever runs beside it."""
    _, config = model_config(data, "DNN", SETTINGS)
    config = replace(config, hidden=(4,))
    settings = training.TrainConfig(steps=3, decay="linear", warmup=1)
    rates = np.array([[1e-3, 1e-3], [1e-2, 3e-2]])
    share = {"model": ctr, "config": config, "settings": settings, "batch_size": 32}
    params, losses, diverged = multidomain.train(data, np.array([0, 5]), rates, **share)
    assert losses.shape == (3, 2) and (diverged == -1).all()
    alone = replace(settings, learning_rate=1e-2, seed=5)
    state, order = training.init_state(ctr, config, alone), np.random.default_rng([5, 7]).permutation(data.train)
    step = jax.jit(lambda state, batch: training.advance(ctr, config, alone, state, batch))
    for i in range(3):
        rows = order[32 * i : 32 * i + 32]
        old, (state, found) = state, step(state, jax.tree.map(lambda x, rows=rows: x[rows], data.batch))
        np.testing.assert_allclose(losses[i, 1], found["loss"], rtol=1e-5)
        tables = jax.tree.map(lambda a, b: a + 3 * (b - a), old.params["tables"], state.params["tables"])
        state = replace(state, params={**state.params, "tables": tables})
    for got, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(state.params)):
        np.testing.assert_allclose(got[1], wanted, atol=2e-4)
    logits = multidomain.scores(data, params, data.test, model=ctr, config=config)
    part = jax.tree.map(lambda x: x[data.test[:7]], data.batch)
    one = jax.tree.map(lambda x: x[1], params)
    np.testing.assert_allclose(logits[1, :7], ctr.apply(one, part, config), rtol=1e-4, atol=1e-5)
    spoilt = replace(data, batch=replace(data.batch, label=jnp.full_like(data.batch.label, jnp.nan)))
    with pytest.raises(training.DivergedError, match="diverged at step 0"):
        multidomain.tune_and_train(
            spoilt, ctr, config, epochs=(1.0,), rates=((1e-3, 1e-3), (1e-2, 1e-2)), seeds=2, batch_size=32
        )


def test_rates_and_epochs_are_chosen_on_the_validation_period(data, monkeypatch):
    """Trials and final runs replaced: what is best in the test period, or in one seed, is not what is taken."""
    trained, scored = [], []

    def train(data, seeds, rates, *, settings, **_):
        trained.append((settings.steps, tuple(seeds), rates.tolist()))
        final = seeds[0] != multidomain.TUNING_SEED
        diverged = np.where(final & (settings.steps == 6) & (seeds == 1), 3, -1)
        return (settings.steps, final), np.full((settings.steps, len(seeds)), float(settings.steps)), diverged

    def scores(data, params, index, **_):
        steps, final = params
        scored.append((steps, final, index is data.test))
        noise = {2: [0.5, 0.5], 4: [0.0, 0.6], 6: [0.0, 0.0]}[steps] if final else [0.9, 0.1, 0.5]
        label = data.label[index]
        draw = np.random.default_rng(0).normal(size=len(label))
        return np.stack([(1 - x) * label + x * 3 * draw for x in noise])

    monkeypatch.setattr(multidomain, "train", train)
    monkeypatch.setattr(multidomain, "scores", scores)
    rates = ((1e-3, 1e-3), (1e-2, 4e-2), (1e-1, 1e-1))
    found = multidomain.tune_and_train(data, ctr, None, epochs=(1, 2, 3), rates=rates, seeds=2, batch_size=128)
    assert trained[0] == (2, (multidomain.TUNING_SEED,) * 3, [list(pair) for pair in rates])
    assert [steps for steps, *_ in trained[1:]] == [2, 4, 6]
    assert all(given == [[1e-2, 4e-2]] * 2 and seeds == (0, 1) for _, seeds, given in trained[1:])
    assert found.best == {"learning_rate": 1e-2, "table_rate": 4e-2, "epochs": 2.0}
    assert found.lengths[2] == -1 and found.lengths[1] > found.lengths[0] > 0.5
    assert found.losses.shape == (4, 2) and found.test.shape == (2, len(data.test))
    assert [where for *where, test in scored if test] == [[4, True]], "the test period is scored once"


def test_imp_keeps_its_sign_and_zero():
    difference = statistics.across_seeds(np.array([0.01, 0.03]))
    imp = ads_multidomain_rows.imp_of(difference, 0.7)
    assert imp.mean == pytest.approx(100 * 0.02 / 0.2) and imp.low < 0 < imp.high and imp.contains_zero
    assert imp.per_seed == pytest.approx((5.0, 15.0))
    assert imp.mean == pytest.approx(metrics.imp(0.72, 0.7))
    wide = ads_multidomain_rows.imp_of(statistics.across_seeds(np.array([-0.02, 0.06])), 0.6)
    assert wide.high > 100 * (1 - 0.6) / 0.1, "two seeds' interval reaches beyond an AUC of 1"


def test_the_best_rival_is_the_best_in_validation_of_all():
    done = Outcome(data=None, tuned=dict.fromkeys([*rivals("MHA"), "DIN"]))
    for best in rivals("MHA"):
        done.valid_auc.update({name: 0.6 + 0.1 * (name == best) for name in rivals("MHA")} | {"DIN": 0.9})
        assert ads_multidomain_rows.best_rival(done, "MHA") == best
    del done.tuned[rivals("MHA")[-1]]
    assert ads_multidomain_rows.best_rival(done, "MHA") is None, "one was not trained"


NOISE = {"MHA": 0.4, "MHA + FRNet": 0.3, "DIN + ADS without PCRG": 0.3}  # others .5, those with ADS .1


def test_models_are_compared_by_seed_with_what_they_stand_on():
    auc = {"DNN": (0.6, 0.62), "MLR": (0.61, 0.63), "DIN": (0.7, 0.7), "DIN + ADS": (0.71, 0.73)}
    rows = [{"data": "x", "model": n, "seed": i, "test_auc": v} for n, own in auc.items() for i, v in enumerate(own)]
    found = {row["model"]: row for row in ads_multidomain_rows.over_seeds(rows)}
    assert {name: row["base"] for name, row in found.items()} == {"MLR": "DNN", "DIN": "DNN", "DIN + ADS": "DIN"}
    assert found["MLR"]["auc_difference"] == pytest.approx(0.01)
    assert found["MLR"]["auc_difference_high"] == pytest.approx(0.01)  # the same in both seeds
    assert found["DIN + ADS"]["imp"] == pytest.approx(100 * 0.02 / 0.2)
    assert found["DIN + ADS"]["imp_low"] < 0 < found["DIN + ADS"]["imp"] < found["DIN + ADS"]["imp_high"]
    assert ads_multidomain_rows.over_seeds([row for row in rows if row["seed"] == 0]) == []


def test_all_models_are_compared_and_published(tmp_path, capsys, monkeypatch):
    """The command with the training replaced: logits of the true probability with each model's noise."""
    calls = []

    def trained(data, model, config, *, epochs, rates, seeds, batch_size):
        name = next(n for n in MODELS if model_config(data, n, quick)[1] == config)
        calls.append((data.name, name))
        draw, level = np.random.default_rng(len(name) + len(data.name)), NOISE.get(name, 0.1 if "ADS" in name else 0.5)
        truth = np.log(data.probability / (1 - data.probability))
        valid, test = (truth[i] + level * draw.normal(size=(seeds, len(i))) for i in (data.valid, data.test))
        trials, lengths = (np.linspace(0.5, 0.6, len(given)) for given in (rates, epochs))
        return multidomain.Tuned(
            np.asarray(rates), trials, np.asarray(epochs), lengths, np.ones((3, seeds)), valid, test
        )

    monkeypatch.setattr(multidomain, "tune_and_train", trained)
    quick = AdsMultidomain(**QUICK | {"quick": True, "out": tmp_path})
    made = ads_multidomain.run(replace(quick, only=tuple(MODELS)))
    assert results.read(tmp_path / "result.json") == made
    figures = made.figures
    for key in ("din", "mha", "can"):
        assert figures[f"{key}_imp_low"] <= figures[f"{key}_imp"] <= figures[f"{key}_imp_high"]
        assert np.sign(figures[f"{key}_imp"]) == np.sign(figures[f"{key}_auc_difference"])
        assert f"{key}_over_constant_domain_imp" in figures and f"{key}_over_dnn_imp" in figures
    for key in ("gain_at_zero_domain_dial", "gain_at_zero_over_constant_domain"):
        assert figures[f"{key}_low"] <= figures[key] <= figures[f"{key}_high"]
    assert figures["gain_at_zero_domain_dial"] > abs(figures["gain_at_zero_over_constant_domain"])
    assert 0.5 < figures["oracle_auc"] < 1
    base = {
        row["base"]
        for row in made.rows
        if row.get("comparison") == "mha" and row["data"] == "world of 60 users, domain 0.4"
    }
    assert base <= set(rivals("MHA")) and len(base) == 1
    rows = [
        row for row in made.rows if row.get("model") == "MHA + ADS" and row["data"] == "world of 60 users, domain 0.4"
    ]
    chosen = {(row["learning_rate"], row["table_rate"], row["epochs"]) for row in rows if "seed" in row}
    assert chosen == {(*quick.trials[-1], quick.epochs[-1])}
    assert len({row["test_auc"] for row in rows if "seed" in row}) == 2, "two seeds gave one number"
    tried = [row["valid_auc"] for row in rows if "valid_auc" in row and "seed" not in row]
    assert tried == [*np.linspace(0.5, 0.6, len(quick.trials)), *np.linspace(0.5, 0.6, len(quick.epochs))]
    domains = [row for row in rows if "domain" in row]
    assert domains[-1]["domain"] == "all" and len(domains) > 2
    assert "Gain along the domain dial" in (tmp_path / "report.html").read_text()
    assert "MHA + ADS - MHA" in capsys.readouterr().out
    assert sorted(calls) == sorted(
        (f"world of 60 users, domain {dial}", name) for dial in ("0", "0.4") for name in MODELS
    )
    assert (
        ads_multidomain.run(replace(quick, only=("DNN", "MHA", "MHA + ADS"))).figures["mha_over_dnn_imp"]
        == (figures["mha_over_dnn_imp"])
    )
    assert len(calls) == 2 * len(MODELS), "what was done is not done again"
    for dial in quick.dials:  # as if each had been measured on a machine of its own
        own = tuple(row for row in made.rows if row["data"] == ads_multidomain.world_name(dial, quick.users))
        results.write(tmp_path / f"{dial}.json", replace(made, rows=own, figures={}))
    parts = tuple(tmp_path / f"{dial}.json" for dial in reversed(quick.dials))
    joined = ads_multidomain.run(AdsMultidomain(joined=parts, out=tmp_path / "joined"))
    assert joined.figures == pytest.approx(figures) and len(joined.rows) == len(made.rows)
    assert {row.get("command") for row in joined.rows if row["data"] == "world of 60 users, domain 0"} != {None}
    assert "Gain along the domain dial" in (tmp_path / "joined" / "report.html").read_text()
    larger = [
        {**row, "data": "world of 9 users, domain 0"}
        for row in made.rows
        if row["data"] == "world of 60 users, domain 0"
    ]
    larger = [{**row, "samples": 10**6} if row.get("comparison") == "all_over_alone" else row for row in larger]
    larger = [{**row, "auc_difference": 0.5} if row.get("samples") == 10**6 else row for row in larger]
    results.write(tmp_path / "all.json", made)
    results.write(tmp_path / "larger.json", replace(made, rows=tuple(larger), figures={}))
    both = AdsMultidomain(joined=(tmp_path / "all.json", tmp_path / "larger.json"), out=tmp_path / "joined")
    assert ads_multidomain.run(both).figures == pytest.approx(figures | {"gain_at_zero_domain_dial": 0.5})
    with pytest.raises(ValueError, match=r"'world of 60 users, domain 0' is in .*result\.json and in .*0\.0\.json"):
        ads_multidomain.run(AdsMultidomain(joined=(tmp_path / "result.json", parts[-1]), out=tmp_path / "joined"))
    calls.clear()
    monkeypatch.setattr(runs, "_commit", lambda: "another")
    for _ in range(2):
        ads_multidomain.run(replace(quick, only=("DNN",), dials=(0.4,)))
        assert len(calls) == 1, "another commit's models are not reported, its own are"
    alone = ads_multidomain.run(replace(quick, only=("DNN",), dials=(0.4,), seeds=1))
    assert len([row for row in alone.rows if "test_auc" in row]) == 1
    page = (tmp_path / "report.html").read_text()
    assert "No interval is shown." in page and "t over seeds" not in page
    calls.clear()
    elsewhere = replace(quick, only=("STAR",), out=tmp_path / "kept", report=False)
    assert ads_multidomain.run(elsewhere) is None and len(calls) == 2
    assert not (tmp_path / "kept" / "report.html").exists() and any((tmp_path / "kept" / "models").iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"only": ("FM",)}, r"only=\['FM'\]: there is no such model; there are 'MLR'"),
        ({"rates": ()}, r"rates=\(\): must be at least one number"),
        ({"table_factors": (1.0, 0.0)}, r"table_factors=\(1\.0, 0\.0\): must be at least one number above 0"),
        ({"main": 0.5}, r"main=0\.5 must be one of dials"),
        ({"dials": ()}, r"dials=\(\): there are no data"),
        *(({name: 0}, f"{name}=0 must be at least") for name in ads_multidomain_models._LEAST),
        ({"resamples": 19}, "resamples=19 must be at least 20"),
        *(({name: (1.0, np.inf)}, f"{name}=.*and finite") for name in ("rates", "table_factors", "epochs")),
        *(({"mean_length": value}, "mean_length=") for value in (0.0, np.inf, np.nan)),
        *(({"dials": (0.4, value)}, "domain = .* must be") for value in (1.5, np.nan)),
        ({"dials": (0.4, 0.4)}, r"dials=\(0\.4, 0\.4\): must differ"),
        ({"items": 5}, "items = 5: must be at least categories x styles"),
        ({"ml_1m": Path("/nowhere/ml-1m")}, "ml_1m=/nowhere/ml-1m: there is no such file"),
        ({"taobao": Path("/nowhere/taobao")}, "taobao=/nowhere/taobao: there is no such file"),
        ({"joined": ()}, "joined names no file"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AdsMultidomain(**settings)


@pytest.mark.parametrize("sizes", [(0, 100), (256, 0)])
def test_no_samples_are_refused(problem, sizes):
    with pytest.raises(ValueError, match=f"train is {sizes[0]} and test {sizes[1]}"):
        multidomain.make_impressions(problem, name="w", train=sizes[0], test=sizes[1], length=8)


def test_rare_domains_share_layers():
    few = np.array([1, 2, 2], np.int32)
    group, groups = multidomain.group_domains(few, 3, 2)
    assert groups == 3 and (group == few).all()
    draw, domains = np.random.default_rng(0), 200
    domain = np.minimum(draw.geometric(0.05, 5000), domains - 1).astype(np.int32)
    group, groups = multidomain.group_domains(domain, domains, 4000)
    counts = np.bincount(domain[:4000], minlength=domains)
    assert groups == multidomain.GROUPS and group.min() == 0 and group.max() == groups - 1
    for own in range(1, groups):
        assert len(set(domain[group == own])) == 1
    assert counts[np.unique(domain[group == 0])].max() <= min(
        counts[domain[group == own][0]] for own in range(1, groups)
    )
