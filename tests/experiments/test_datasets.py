"""Data by name: a folder that was prepared before serves in the source's place."""

import numpy as np
import pytest

from experiments.datasets import Data, load, make_world
from rec_core.data.schema import DataError
from rec_core.data.world import World

SMALL = World(users=12, items=40, categories=4, departments=2, mean_length=5.0, max_length=20, min_impressions=8)


def test_a_prepared_folder_serves_where_its_source_is_asked_for(tmp_path):
    made = make_world(SMALL, tmp_path, log=lambda _: None)
    for name in ("table", "prepared"):
        found = load(Data(data=name, data_dir=made.path), log=lambda _: None)
        assert found.path == made.path
        np.testing.assert_array_equal(found.offsets, made.offsets)
    with pytest.raises(DataError, match="was prepared from 'world', asked for was 'ml-1m'"):
        load(Data(data="ml-1m", data_dir=made.path), log=lambda _: None)
    with pytest.raises(DataError, match="needs data_dir"):
        load(Data(data="prepared"), log=lambda _: None)
