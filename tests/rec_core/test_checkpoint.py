"""A checkpoint comes back exactly, on any mesh, or says why not; a failed save leaves the last good one."""

import dataclasses
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_model
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rec_core.checkpoint import (
    CheckpointError,
    Checkpoints,
    Log,
    config_record,
    differences,
    fingerprint,
    read_records,
    restore_params,
)
from rec_core.embedding import Categorical
from rec_core.sharding import make_mesh
from rec_core.training import TrainConfig

RECORD = {"config.heads": 4}
# Where one read or write fails, Orbax lets the errors of the others go; Python tells of them when they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def state(fill: float = 0.5) -> dict[str, Any]:
    table = jnp.asarray(np.random.default_rng(0).normal(size=(64, 50)), jnp.float32)
    return {"params": {"table": table, "half": jnp.full(3, fill, jnp.bfloat16)}, "step": jnp.int32(7)}


def save(directory: Path, *steps: int, record: dict[str, Any] = RECORD) -> None:
    with Checkpoints(directory, record, keep=5) as saves:
        for step in steps:
            saves.save(step, state(step), {"next_index": step})


def largest_file(directory: Path) -> Path:
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def assert_same(a: Any, b: Any) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


def test_comes_back_exactly_on_another_mesh(tmp_path: Path) -> None:
    def placed(mesh: Any) -> Any:
        spread = NamedSharding(mesh, P(("data", "model")))
        whole = NamedSharding(mesh, P())
        return {"params": {"table": spread, "half": whole}, "step": whole}

    kept = jax.device_put(state(), placed(make_mesh(4, 2)))
    with Checkpoints(tmp_path, RECORD, keep=2) as saves:
        for step in (1, 2, 3):
            saves.save(step, kept, {"next_index": step})
        assert saves.latest == 3
    where = placed(make_mesh(1, 2))
    like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state(), where)
    with Checkpoints(tmp_path, RECORD, keep=2) as saves:
        assert saves.steps() == [2, 3]
        found = saves.restore(like)
        saves.clear(after=2)
        assert saves.steps() == [2]
    assert (found.step, found.data) == (3, {"next_index": 3})
    assert_same(found.state, state())
    assert found.state["params"]["table"].sharding == where["params"]["table"]


def test_another_configuration_is_refused_by_field(tmp_path: Path) -> None:
    config, _ = toy_model.example()
    train = TrainConfig(steps=5)
    save(tmp_path, 1, record=config_record(toy_model, config, train))
    other = dataclasses.replace(train, learning_rate=0.5, log_every=3, keep=9)  # the last two change no number
    record = config_record(toy_model, dataclasses.replace(config, width=4), other)
    with Checkpoints(tmp_path, record) as saves, pytest.raises(CheckpointError) as info:
        saves.restore(state())
    assert "config.width: 8 in the checkpoint, 4 now; train.learning_rate: 0.001 in the checkpoint, 0.5 now." in str(
        info.value
    )
    free = config_record(toy_model, config, dataclasses.replace(train, log_every=3, keep=9, micro_batches=2))
    assert not differences(config_record(toy_model, config, train), free)
    assert differences({"a": 1}, {"b": 1}) == [
        "a: 1 in the checkpoint, '(absent)' now",
        "b: '(absent)' in the checkpoint, 1 now",
    ]


def test_a_longer_run_is_the_same_run_only_at_a_constant_rate() -> None:
    config, _ = toy_model.example()
    for decay, same in (("constant", True), ("cosine", False)):
        short, long = (config_record(toy_model, config, TrainConfig(steps=n, decay=decay)) for n in (5, 9))
        assert (not differences(short, long)) == same


def test_the_record_of_a_configuration_names_nested_fields() -> None:
    @dataclasses.dataclass(frozen=True)
    class Nested:
        features: tuple[Any, ...] = (Categorical("item", 5, 2),)
        hidden: tuple[int, ...] = (4, 2)

    record = config_record(toy_model, Nested())
    assert record["config.features[0].size"] == 5 and record["config.hidden"] == [4, 2]
    assert json.loads(json.dumps(record)) == record


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (
            jnp.zeros((64, 50), jnp.bfloat16),
            r"params/table: 'float32\[64, 50\]' in the checkpoint, 'bfloat16\[64, 50\]' now",
        ),
        (jnp.zeros((65, 50)), r"params/table: 'float32\[64, 50\]' in the checkpoint, 'float32\[65, 50\]' now"),
    ],
)
def test_another_dtype_or_shape_is_refused(tmp_path: Path, leaf: Any, message: str) -> None:
    save(tmp_path, 1)
    like = state()
    like["params"]["table"] = leaf
    with Checkpoints(tmp_path, RECORD) as saves, pytest.raises(CheckpointError, match=message):
        saves.restore(like)


@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "missing", "record"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(tmp_path: Path, damage: str, capsys: Any) -> None:
    save(tmp_path, 1, 2)
    file = largest_file(tmp_path / "2" / "state")
    raw = bytearray(file.read_bytes())
    if damage == "flipped bit":
        raw[len(raw) // 2] ^= 0x10
        file.write_bytes(raw)
    elif damage == "truncated":
        file.write_bytes(raw[: len(raw) // 2])
    elif damage == "missing":
        file.unlink()
    else:
        path = tmp_path / "2" / "record" / "metadata"
        path.write_text(path.read_text().replace('"next_index": 2', '"next_index": 3'))
    with Checkpoints(tmp_path, RECORD) as saves:
        found = saves.restore(state())
        assert found.step == 1 and found.data == {"next_index": 1}
        assert_same(found.state, state(1))
        assert f"{tmp_path / '2'} is damaged" in capsys.readouterr().out
        saves.save(2, state(2), {"next_index": 2})  # the run comes to that step again
    with Checkpoints(tmp_path, RECORD) as saves:
        assert saves.restore(state()).step == 2


def test_when_all_are_damaged_it_says_so(tmp_path: Path) -> None:
    save(tmp_path, 1)
    largest_file(tmp_path / "1" / "state").unlink()
    with Checkpoints(tmp_path, RECORD) as saves, pytest.raises(CheckpointError, match="no checkpoint can be read"):
        saves.restore(state())


@contextmanager
def no_room(limit: int) -> Iterator[None]:
    """Writes beyond ``limit`` bytes of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_an_error_and_the_last_good_checkpoint_stays(tmp_path: Path) -> None:
    saves = Checkpoints(tmp_path, RECORD)
    saves.save(1, state(1), {"next_index": 1})
    saves.wait()
    with (
        no_room(4096),
        pytest.raises(CheckpointError, match=r"step 2 could not be written to .*the last good one is step 1"),
    ):
        saves.save(2, state(2), {"next_index": 2})
        saves.wait()
    assert not list(tmp_path.glob("2*")), "remains of the failed save take the disk's room"
    assert_same(saves.restore(state()).state, state(1))
    saves.save(2, state(2), {"next_index": 2})  # room was made
    saves.wait()
    assert saves.restore(state()).step == 2
    saves.close()


def test_an_unusable_directory_and_state_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file.* cannot be used for checkpoints"):
        Checkpoints(tmp_path / "file" / "run", RECORD)
    with Checkpoints(tmp_path / "run", RECORD) as saves, pytest.raises(CheckpointError, match="state is not JSON"):
        saves.save(1, state(), {"next": object()})
    with pytest.raises(CheckpointError, match="is not a directory"):
        restore_params(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        restore_params(tmp_path / "run")


def test_parameters_alone(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    assert_same(restore_params(tmp_path), state(2)["params"])
    assert_same(restore_params(tmp_path, 1), state(1)["params"])
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 5; steps there: \[1, 2\]"):
        restore_params(tmp_path, 5)


def test_without_a_directory_nothing_happens() -> None:
    with Checkpoints(None, RECORD) as saves:
        saves.save(1, state())
        assert saves.restore(state()) is None and saves.steps() == []


@pytest.mark.portable
def test_fingerprint_sees_one_bit_and_no_mesh() -> None:
    tree = state()
    known = fingerprint(tree)
    spread = jax.device_put(tree["params"]["table"], NamedSharding(make_mesh(4, 2), P("data", "model")))
    assert fingerprint({"params": {**tree["params"], "table": spread}, "step": tree["step"]}) == known
    swapped = tree["params"]["table"].at[jnp.array([3, 9])].set(tree["params"]["table"][jnp.array([9, 3])])
    bit = jax.lax.bitcast_convert_type(tree["params"]["table"], jnp.uint32).at[63, 49].add(1)
    for table in (swapped, jax.lax.bitcast_convert_type(bit, jnp.float32)):
        other = fingerprint({"params": {**tree["params"], "table": table}, "step": tree["step"]})
        assert {name for name in known if known[name] != other[name]} == {"params/table"}


def test_log_cuts_back_to_the_checkpoint(tmp_path: Path) -> None:
    with Log(tmp_path, 0) as log:
        for step in (1, 2, 3):
            log.write({"step": step, "loss": 1 / step})
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [record["step"] for record in read_records(path)] == [1, 2, 3]
    with Log(tmp_path, 2) as log:
        assert [record["step"] for record in log.records] == [1, 2]
        log.write({"step": 3, "loss": 0.0})
    assert [record["loss"] for record in read_records(path)] == [1, 0.5, 0.0]
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: not a JSON record .*'nonsense'"):
        read_records(path)


def test_records_on_a_full_disk_are_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with (
        no_room(300),
        pytest.raises(CheckpointError, match=rf"{path} cannot be written: .*bytes are free.*last checkpoint"),
        Log(tmp_path, 0) as log,
    ):
        for step in range(100):
            log.write({"step": step, "loss": 0.5})
    whole = read_records(path)
    assert 5 < len(whole) < 20 and whole == log.records[: len(whole)]
    with Log(tmp_path, 5) as log:  # room was made
        log.write({"step": 6, "loss": 0.5})
    assert [record["step"] for record in read_records(path)] == list(range(7))
