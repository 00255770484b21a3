"""README quotes what was measured, and says nothing of places that are not the reader's."""

import re
from pathlib import Path

import pytest

from experiments import readme, results

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "experiments" / "results").glob("*.json"))


def test_the_measured_part_is_made_from_the_results():
    assert readme.section() in (ROOT / "README.md").read_text(), "run `python -m experiments readme`"


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_result_has_the_form_and_came_from_a_commit(path):
    result = results.read(path)
    assert result.figures and result.rows
    assert re.fullmatch(r"[0-9a-f]{40}", result.commit), "measure with a clean tree"
    assert not re.search(r"(^|\s)(/|\.\./)", result.command), f"{result.command}: a path of one machine only"


def test_the_examples_of_the_readme_run():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert names["answers"].shape[1:] == (2, names["config"].width)
    assert names["interest"].shape == names["item"].shape
