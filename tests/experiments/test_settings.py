"""What settings share: a quick run keeps what was given, and what cannot be written is named first."""

from pathlib import Path

import pytest

from experiments import (
    ads_chunks,
    ads_cost,
    ads_multidomain,
    bahe_cost,
    bahe_text,
    interest_bench,
    results,
    sim_serving,
)
from experiments.ads_chunks import AdsChunks
from experiments.ads_cost import AdsCost
from experiments.ads_multidomain_models import AdsMultidomain
from experiments.bahe_cost import BaheCost
from experiments.bahe_text_models import BaheText
from experiments.interest_bench import InterestBench
from experiments.settings import in_small
from experiments.sim_serving import SimServing


class Begun(Exception):
    """Holds the settings that a run began with."""


# The experiment, and its first function that gets the settings.
FIRST = {
    AdsMultidomain: (ads_multidomain, "_all_data"),
    AdsChunks: (ads_chunks, "measure_cost"),
    AdsCost: (ads_cost, "_measure_attention"),
    BaheCost: (bahe_cost, "_distinct"),
    BaheText: (bahe_text, "read_language"),
    InterestBench: (interest_bench, "measure"),
    SimServing: (sim_serving, "tree_part"),
}
FOLDER = Path("tests")


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (AdsMultidomain(quick=True), {"dials": (0.0, 0.4), "users": 60}),
        (AdsMultidomain(quick=True, dials=(1.0,), main=1.0, only=("MLR",)), {"users": 60}),
        (AdsMultidomain(quick=True, main=1.0), {"dials": (0.0, 0.4, 1.0), "users": 60}),
        (AdsMultidomain(quick=True, dials=(), ml_1m=FOLDER), {"seeds": 2}),
        (AdsChunks(quick=True, items=(5,)), {"seeds": 2}),
        (AdsCost(quick=True, repeats=3), {"steps": 2}),
        (BaheCost(quick=True, steps=3), {"batch": 2}),
        (BaheText(quick=True), {"only": ("dnn", "bahe_48", "bahe_48_random", "llm_ctr_48"), "lengths": (48,)}),
        (BaheText(quick=True, lengths=(64, 1024), seeds=1), {"base": 1024, "batch_size": 16}),
        (InterestBench(quick=True, items=20), {"lengths": (200, 1000), "batch": 3}),
        (SimServing(quick=True, days=1), {"users": 400}),
    ],
    ids=lambda x: type(x).__name__ if not isinstance(x, dict) else "",
)
def test_a_quick_run_changes_only_what_was_not_given(config, sizes, tmp_path, monkeypatch):
    def begin(*arguments):
        raise Begun(next(x for x in arguments if isinstance(x, type(config))))

    module, name = FIRST[type(config)]
    monkeypatch.setattr(module, name, begin)
    monkeypatch.setattr(results, "make_folder", lambda path: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / FOLDER).mkdir()
    with pytest.raises(Begun) as begun:
        module.run(config)
    found, default = begun.value.args[0], type(config)()
    for field, value in vars(config).items():
        if value != getattr(default, field):
            assert getattr(found, field) == value, field
    assert {field: getattr(found, field) for field in sizes} == sizes


def test_no_experiment_overrides_what_was_given():
    for file in Path(bahe_text.__file__).parent.glob("*.py"):
        assert "vars(config) |" not in file.read_text(), f"{file.name}: take settings.in_small"
    assert in_small(SimServing(), {"days": 1}) == SimServing(days=1)


@pytest.mark.parametrize("settings", [AdsMultidomain, AdsChunks, AdsCost, BaheCost, InterestBench])
def test_a_folder_that_cannot_be_written_is_named_before_anything_is_measured(settings, tmp_path, monkeypatch):
    module, name = FIRST[settings]
    monkeypatch.setattr(module, name, lambda *_: pytest.fail("something was measured"))
    (file := tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="file"):
        module.run(settings(quick=True, out=file))


def test_a_folder_on_a_system_without_files_is_refused():
    with pytest.raises(OSError, match="/proc"):
        results.make_folder(Path("/proc"))


@pytest.mark.parametrize("command", ["ads-cost", "ads-multidomain", "bahe-cost"])
def test_joining_nothing_is_refused(command, capsys):
    from experiments.__main__ import main

    with pytest.raises(SystemExit):
        main([command, "--joined"])
    said = capsys.readouterr()
    assert "joined names no file" in " ".join((said.out + said.err).split())
