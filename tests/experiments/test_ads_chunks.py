"""Items per chunk: a small run says all that a full one does. Training and compiling are tested where they are."""

from dataclasses import fields, replace
from functools import partial

import numpy as np
import pytest

from experiments import ads_chunks, results
from experiments.ads_chunks import AdsChunks
from experiments.ads_multidomain_models import model_config
from experiments.steps import multidomain, timing
from experiments.steps.timing import Program
from rec_core.ranking import ctr


def test_every_variant_is_trained_measured_and_compared(tmp_path, monkeypatch, capsys):
    """Logits are the true ones with noise that grows with the chunk; steps are stand-ins of as many milliseconds."""
    configs = {}

    def trained(data, model, config, *, epochs, rates, seeds, batch_size):
        items = getattr(config, "items", None)
        configs[items] = config
        draw = np.random.default_rng(0)
        truth = np.log(data.probability / (1 - data.probability))
        noise = 0.05 * items if items else 1.0
        valid, test = (truth[i] + noise * draw.normal(size=(seeds, len(i))) for i in (data.valid, data.test))
        trials, lengths = (np.linspace(0.5, 0.6, len(given)) for given in (rates, epochs))
        return multidomain.Tuned(
            np.asarray(rates), trials, np.asarray(epochs), lengths, np.ones((3, seeds)), valid, test
        )

    def measured(what, sizes, programs, *, steps, repeats):
        rows = []
        for ms, variant in enumerate(programs, start=1):
            rows.append(variant.row(what) | {"ms": ms, "temporaries_gib": 0.1 * ms})
            rows[-1] |= {"gflop": 10.0 * ms} if what == "dense part" else {}
        return rows, {}

    monkeypatch.setattr(multidomain, "tune_and_train", trained)
    monkeypatch.setattr(ads_chunks.ads_step, "measure_whole", partial(measured, "whole step"))
    monkeypatch.setattr(ads_chunks.ads_step, "measure_dense", partial(measured, "dense part"))
    monkeypatch.setattr(timing, "compile_all", lambda lower, *, log: dict.fromkeys(lower, Program()))
    config = AdsChunks(quick=True, out=tmp_path)
    made = ads_chunks.run(config)
    assert results.read(tmp_path / "result.json") == made
    found = made.figures
    assert found["small_auc_1"] > found["small_auc_3"] > found["small_auc_alone"]
    assert found["small_gain_low_1"] <= found["small_gain_1"] <= found["small_gain_high_1"]
    assert found["small_gain_1"] == pytest.approx(found["small_auc_1"] - found["small_auc_alone"], abs=1e-9)
    assert found["small_parameters_1"] > found["small_parameters_3"] > found["small_parameters_alone"]
    assert (found["small_ms_alone"], found["small_ms_3"], found["small_gflop_1"]) == (1, 2, 30)
    assert set(configs) == {None, 3, 1} and configs[3].pcrg and replace(configs[3], items=1) == configs[1]
    assert configs[None] == ctr.Config(**{field.name: getattr(configs[1], field.name) for field in fields(ctr.Config)})
    assert {row["what"]: row["length"] for row in made.rows} == {"whole step": 12, "dense part": 12, "AUC": 8}
    seeds = [row["seed"] for row in made.rows if row["what"] == "AUC" and row["items"] == 3]
    assert seeds == [0, 1] and "ADS, chunks of 3" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 2 and "What chunks cost" in page


def test_the_world_and_the_models_are_those_of_ads_multidomain(tmp_path):
    data, world = ads_chunks.make_data(AdsChunks(**ads_chunks.QUICK, quick=True, out=tmp_path))
    assert len(data.train) == 2048 and data.name == "world, domain 0.4"
    _, config = model_config(data, "MHA + ADS", world)
    assert config.items == world.items_per_chunk == 3 and config.interest == "multi_head"


@pytest.mark.parametrize("change", [{"items": (2, 2)}, {"items": (0,)}, {"attention": "SIM"}, {"repeats": 0}])
def test_settings_say_what_is_wrong(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        AdsChunks(**change)
