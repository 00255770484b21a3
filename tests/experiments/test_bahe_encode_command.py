"""The command that fills a table: what it finds, what it leaves out the second time, and what is no text."""

from pathlib import Path

import numpy as np
import pytest

from bahe_jax.table import open_table
from experiments import bahe_encode, results
from experiments.bahe_encode import BaheEncode
from rec_core.data.schema import DataError

MODEL = Path(__file__).parents[1] / "bahe_jax" / "golden" / "gguf" / "llama.gguf"


def settings(folder: Path, **changes) -> BaheEncode:
    small = {"rows": 8, "row_length": 16, "limit": 8, "group": 3, "precision": "float32", "out": folder}
    return BaheEncode(MODEL, table=f"array:{folder}/table", **small | changes)


def test_only_new_lines_are_encoded(tmp_path, capsys):
    file = tmp_path / "texts.txt"
    file.write_bytes(b"a film\nanother\n\nbroken \xff byte\na film\n")
    first = bahe_encode.run(settings(tmp_path, texts=file))
    assert results.read(tmp_path / "result.json") == first and "4 of 4 texts" in capsys.readouterr().out
    assert first.figures["encoded_texts"] == first.rows[0]["in_table"] == 4 and first.figures["tokens_per_s"] > 0
    file.write_bytes(file.read_bytes() + b"one more\n")
    again = bahe_encode.run(settings(tmp_path, texts=file))
    assert again.figures["encoded_texts"] == 1 and again.rows[0]["in_table"] == 5
    assert again.rows[0]["version"] == first.rows[0]["version"]
    with open_table(
        f"array:{tmp_path}/table", version=str(first.rows[0]["version"]), width=64, dtype="float16", readonly=True
    ) as table:
        states, lengths = table.rows(["a film", "", "broken \ufffd byte"])
    assert np.isfinite(states).all() and lengths[1] == 1


def test_no_texts_is_an_error(tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match=r"empty\.txt: has no texts: give a file with one a line"):
        bahe_encode.read_texts(settings(tmp_path, texts=tmp_path / "empty.txt"))
    with pytest.raises(DataError, match=r"none\.txt: cannot be read"):
        bahe_encode.read_texts(settings(tmp_path, texts=tmp_path / "none.txt"))
