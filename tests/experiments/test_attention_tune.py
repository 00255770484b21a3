"""The tuner chooses the fastest candidate that is right, and says of every other why not."""

import json
from dataclasses import replace
from typing import NamedTuple

import pytest

from experiments import attention_cases, attention_tune
from experiments.__main__ import main
from experiments.attention_cases import Case
from experiments.attention_timing import Times
from experiments.attention_tune import Blocks, Tunable, table, tunable, tune

CASE = Case("causal_16", 2, 2, 2, 8, (16,), backward=True)


class Size(NamedTuple):
    block: int
    fault: str = ""


def call(inputs, which, sizes):
    if sizes.fault == "fails":
        raise RuntimeError(f"{sizes.block} does not fit")
    out = attention_cases.attend(inputs, "reference")
    return -out if sizes.fault == "wrong" else out


@pytest.mark.parametrize("which", ["forward", "backward", "both"])
def test_the_fastest_right_candidate_is_chosen(which, monkeypatch):
    sizes = [Size(8, "wrong"), *map(Size, (1, 2, 3)), Size(7, "fails")]
    speeds = iter([3.0, 1.0, 2.0, 9.0, 3.5])  # three at first, then the best two again
    monkeypatch.setattr(attention_tune, "FINALISTS", 2)
    monkeypatch.setattr(
        attention_tune, "measure", lambda program, sets, repeats: Times(next(speeds), 0.0, 9.0, repeats)
    )
    subject = Tunable("fake", (which,), lambda *_: sizes, call)
    rows = tune(subject, which, CASE, "float32", 5)
    times = [(row["blocks"], row["ms"], row["repeats"]) for row in rows if "ms" in row]
    assert [blocks for blocks, _, _ in times] == [repr(Size(n)) for n in (3, 2, 1)]
    assert [repeats for _, _, repeats in times] == [5, 5, 3]
    assert [row["chosen"] for row in rows] == [True] + 4 * [False]
    reasons = {row["blocks"]: row["reason"] for row in rows if "reason" in row}
    assert reasons[repr(Size(7, "fails"))] == "RuntimeError: 7 does not fit"
    assert reasons[repr(Size(8, "wrong"))].startswith("wrong: error")


def test_nothing_is_chosen_where_all_fail_or_none_is_given():
    rows = tune(Tunable("fake", ("forward",), lambda *_: [Size(1, "fails")], call), "forward", CASE, "float32", 3)
    assert [row["chosen"] for row in rows] == [False]
    with pytest.raises(ValueError, match="fake has no forward candidates for head width 8"):
        tune(Tunable("fake", ("forward",), lambda *_: [], call), "forward", CASE, "float32", 3)


def test_the_candidates_of_xla():
    candidates = tunable("xla").candidates("both", 64, 1024)
    assert len(candidates) == 36 and Blocks(32, 1024) in candidates
    assert max(map(max, tunable("xla").candidates("both", 64, 200))) == 128


def test_sizes_reach_the_implementation(monkeypatch):
    seen = []
    entry = attention_tune.IMPLEMENTATIONS["xla"]

    def function(*arguments, **options):
        seen.append(options)
        return entry.function(*arguments, **options)

    monkeypatch.setitem(attention_tune.IMPLEMENTATIONS, "xla", replace(entry, function=function))
    inputs, _ = attention_cases.make(CASE, 0, "float32")
    tunable("xla").call(inputs, "both", Blocks(16, 8))
    assert seen == [{"scale": 8**-0.5, "block_q": 16, "block_k": 8}]


def test_an_implementation_without_sizes_is_refused():
    with pytest.raises(ValueError, match="'reference' has no block sizes to tune"):
        tunable("reference")


def test_the_table_is_python_and_joins_equal_neighbours():
    a, b = Blocks(64, 32), Blocks(128, 64)
    names: dict = {"Blocks": Blocks}
    exec(table("Some Device", 64, {"forward": {512: a, 1024: a, 4096: b, 8192: a}, "backward": {512: b}}), names)
    assert names["TABLE"] == {
        ("Some Device", "forward", 64): ((1024, a), (4096, b), (8192, a)),
        ("Some Device", "backward", 64): ((512, b),),
    }


def test_the_command_tunes_xla_here(tmp_path, capsys):
    out = tmp_path / "tuned.json"
    sizes = ["--lengths", "64", "--head-width", "8", "--heads", "2", "--tokens", "64", "--repeats", "3"]
    assert main(["attention-tune", *sizes, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert len(result["rows"]) == 4 and sum(row["chosen"] for row in result["rows"]) == 1
    assert not [row for row in result["rows"] if "reason" in row]
    assert result["figures"]["both_64_ms"] == result["rows"][0]["ms"]
    chosen = result["rows"][0]["blocks"]
    names: dict = {"Blocks": Blocks}
    printed = capsys.readouterr().out
    exec(printed[printed.index("TABLE =") : printed.index("\nresult:")], names)
    assert [repr(blocks) for entries in names["TABLE"].values() for _, blocks in entries] == [chosen]


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="repeats is 2"):
        attention_tune.AttentionTune(repeats=2)
    with pytest.raises(ValueError, match="1 or more"):
        attention_tune.AttentionTune(lengths=(0,))
