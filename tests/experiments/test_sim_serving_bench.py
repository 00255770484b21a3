"""The serving benchmark files what it says, asks what it says, and says what could not be measured."""

import numpy as np
import pytest

from experiments import results, sim_serving, sim_serving_device
from experiments.sim_serving import SimServing
from rec_core.store import StoreError, open_store
from sim_jax.tree import BehaviorTree

TINY = SimServing(events=2_000, users=40, days=2, long_users=3, history=300, requests=100, k=20)


def test_a_quick_run_writes_rows_figures_and_a_report(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sim_serving.shutil, "which", lambda name: None)
    outcome = sim_serving.run(SimServing(quick=True, out=tmp_path))
    assert results.read(tmp_path / "result.json") == outcome
    names = [row["what"] for row in outcome.rows]
    assert names[:3] == ["build", "a day", "a day"] and names[-2:] == ["look-up, LMDB", "look-up, LMDB, at past times"]
    assert set(outcome.figures) == {"small_build_10m_s", "small_append_events_per_s", "small_lookup_p99_ms_lmdb"}
    assert 0 < outcome.rows[0]["peak_memory_gib"] < 4
    missing = next(row for row in outcome.rows if row["what"] == "look-up, Redis")
    assert "redis-server is not installed" in missing["reason"]
    text = (tmp_path / "report.html").read_text()
    assert "<svg" in text and "look-up, LMDB" in text and "Build and append" in text
    assert not list(tmp_path.glob("stores-*")), "the stores are gone"
    assert "20,000 events" in capsys.readouterr().out


def test_the_device_part_of_another_run_is_joined(tmp_path):
    started = results.begin()
    rows = [{"what": "rank, SIM", "p99_ms": 2.0, "device": "TPU v9"}, {"what": "build", "seconds": 1.0}]
    other = results.record("sim_serving", started=started, seeds=[0], rows=rows, figures={"rank_p99_ms_10k": 2.0})
    results.write(tmp_path / "other.json", other)
    small = vars(TINY) | {"redis": False, "out": tmp_path, "device_result": tmp_path / "other.json"}
    outcome = sim_serving.run(SimServing(**small))
    assert outcome.rows[-1] == rows[0] | {"commit": other.commit}
    assert outcome.figures["rank_p99_ms_10k"] == 2.0 and "small_build_10m_s" in outcome.figures
    assert "TPU v9" in (tmp_path / "report.html").read_text()
    with pytest.raises(ValueError, match="nothing is left to measure"):
        SimServing(tree=False)
    with pytest.raises(ValueError, match="give one of them"):
        SimServing(device=True, device_result=tmp_path)


def test_days_and_batches_have_the_pairs_that_their_rows_name():
    with open_store("memory:") as store:
        rows = sim_serving.appends(TINY, store)
        held = len(BehaviorTree(store, key=sim_serving.KEY).snapshot())
    assert held == sum(row["events"] for row in rows)
    assert [row["events"] for row in rows[:2]] == [200, 200] and all(1 < row["events_per_pair"] < 5 for row in rows[:2])
    for row in rows[2:]:
        assert row["events_per_pair"] == int(row["what"].split()[0])


def test_histories_are_whole_and_every_request_finds_its_categories():
    with open_store("memory:") as store:
        sim_serving.file_histories(TINY, store)
        table = BehaviorTree(store, key=sim_serving.KEY).snapshot()
        assert table.user.tolist() == [40, 41, 42] and len(table) == 900 and np.diff(table.pairs).max() <= 20
        for past in (False, True):
            taken = sim_serving.lookups(TINY, store, past=past)
            assert taken.shape == (100,) and (taken > 0).all()
    with open_store("memory:") as empty, pytest.raises(RuntimeError, match="no behaviours where 300 were filed"):
        sim_serving.lookups(TINY, empty)


def test_a_redis_server_is_started_with_a_password_and_ends(tmp_path):
    if not sim_serving.shutil.which("redis-server"):
        with pytest.raises(StoreError, match="not installed"), sim_serving.redis_server(tmp_path):
            pass
        return
    with sim_serving.redis_server(tmp_path) as address:
        with open_store(address) as store:
            sim_serving.file_histories(TINY, store)
            assert sim_serving.lookups(TINY, store).shape == (100,)
        with pytest.raises(StoreError, match="authenticate"):
            open_store("redis://" + address.split("@")[1])
    with pytest.raises(StoreError, match="connection"):
        open_store(address)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"users": 0}, "users is 0"), ({"candidates": 19}, "20 or more"), ({"requests": 99}, "99th percentile")],
)
def test_settings_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        SimServing(**change)


def test_figures_of_the_device_are_those_of_its_rows(monkeypatch):
    tiny = sim_serving_device.Sizes((1000,), 4, 2, 3, (4, 2), 4, 24, 32, 1, 2, 4, 4, "din")
    monkeypatch.setattr(sim_serving_device, "QUICK", tiny)
    rows, figures = sim_serving_device.device_part(quick=True)
    ranked, steps = rows[:2], rows[2:]
    assert [row["behaviors"] for row in ranked] == [1000, 1000] and len(steps) == 3 * 2 + 2
    assert all(row["lookup_p99_ms"] > 0 and 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"] for row in ranked)
    for name, row in {"rank_p99_ms_1k": ranked[0], "rank_p99_ms_dien_1k": ranked[1]}.items():
        assert figures[name] == row["p99_ms"]
    full, tree, soft = (
        f"training step, {name}"
        for name in ("DIN over the full length", "SIM, search by the tree on the device", "SIM, soft search over all")
    )
    ms = {(row["what"], row["behaviors"], row["batch"]): row["ms"] for row in steps}
    assert figures["train_speedup_10k"] == ms[full, 24, 4] / ms[tree, 24, 4]
    assert figures["train_speedup_10k_soft"] == ms[full, 24, 4] / ms[soft, 24, 4]
    assert figures["train_speedup_10k_batch_2"] == ms[full, 24, 2] / ms[tree, 24, 2]
    assert figures["train_step_ms_54k"] == ms[tree, 32, 4] and figures["train_step_ms_54k_soft"] == ms[soft, 32, 4]
