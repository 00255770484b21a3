"""Block sizes of the GPU kernels: candidates for the tuner, and the reviewed table by device, pass, head width, length.

`python -m experiments attention-tune` prints entries of ``TABLE``.
"""

from typing import Any, NamedTuple

BLOCK_Q = 64  # rows of a warpgroup: what one wgmma takes
KEYS = 64  # keys of a warpgroup, in the kernel that walks by keys
CHUNK = 64  # columns of the output that are staged at a time
ENTRIES = 32  # int32 that describe a tile of the forward pass: a cache line, as TMA wants it
SHARED_MEMORY = 232_448  # bytes that a program may have
NAMED_BARRIERS = 16


class Forward(NamedTuple):
    """Forward pass: a tile is ``groups`` warpgroups of 64 rows each.

    Attributes:
      block_k: keys of a block, a multiple of 64.
      stages: blocks of keys, and of values, in shared memory.
      groups: warpgroups that compute, 1 to 3; one more moves data.
      q_stages: tiles of queries in shared memory; 2 load the next tile during this one.
      split_loop: blocks before, in and after the run that needs no mask in three loops; False is one loop in which
        every block asks whether it needs the mask.
      turns: warpgroups take turns at issuing products; False lets each go as far ahead as the stages reach.
      lazy: a row's output and sum are scaled anew only where its maximum rises by 8 in base 2 (FlashAttention-4's);
        the factor that they have in common is then not the maximum's, and their ratio is the same.
    """

    block_k: int = 128
    stages: int = 2
    groups: int = 2
    q_stages: int = 2
    split_loop: bool = False
    turns: bool = True
    lazy: bool = False


class Backward(NamedTuple):
    """Backward pass: tiles of ``rows_groups`` and ``keys_groups`` warpgroups of 64 rows or keys each.

    Attributes:
      keys_groups, keys_stages: warpgroups of the kernel that walks by keys, and its blocks of 64 rows in shared memory.
      keys_tiles: its tiles of keys in shared memory; 2 load the next tile during this one.
      rows_block_k, rows_groups, rows_stages: keys of a block, warpgroups and blocks of the kernel that makes dq alone.
      rows_tiles: its tiles of rows in shared memory; 2 load the next tile during this one.
    """

    keys_groups: int = 2
    keys_stages: int = 2
    keys_tiles: int = 1
    rows_block_k: int = 64
    rows_groups: int = 2
    rows_stages: int = 2
    rows_tiles: int = 1


FORWARD_CANDIDATES: dict[int, tuple[Forward, ...]] = {
    64: (
        Forward(stages=3, split_loop=True, turns=False),
        Forward(groups=3, stages=3, split_loop=True, lazy=True),
        Forward(groups=3, split_loop=True),
        Forward(groups=3, split_loop=True, turns=False),
        Forward(groups=3, split_loop=True, turns=False, stages=4),
        Forward(groups=3, split_loop=True, stages=3),
        Forward(groups=3),
        Forward(groups=3, q_stages=1, split_loop=True),
        Forward(groups=3, block_k=64, stages=3, split_loop=True),
        Forward(),
        Forward(split_loop=True),
        Forward(stages=3),
        Forward(groups=1),
    ),
    128: (
        Forward(),
        Forward(lazy=True),
        Forward(split_loop=True, lazy=True),
        Forward(split_loop=True),
        Forward(split_loop=True, turns=False),
        Forward(q_stages=1),
        Forward(block_k=64, stages=4),
        Forward(groups=1),
        Forward(groups=1, stages=3, q_stages=1),
    ),
    256: (
        Forward(block_k=64, q_stages=1),
        Forward(block_k=64, q_stages=1, split_loop=True),
        Forward(block_k=64, groups=1),
    ),
}
BACKWARD_CANDIDATES: dict[int, tuple[Backward, ...]] = {
    64: (
        Backward(keys_groups=3, keys_stages=3, keys_tiles=2, rows_groups=3, rows_stages=3, rows_tiles=2),
        Backward(keys_stages=3, keys_tiles=2, rows_stages=3, rows_tiles=2),
        Backward(keys_groups=3, keys_stages=3, keys_tiles=2, rows_stages=3, rows_tiles=2),
        Backward(keys_tiles=2, rows_tiles=2),
        Backward(rows_groups=3, keys_groups=3),
        Backward(rows_block_k=128, keys_tiles=2, rows_tiles=2),
    ),
    128: (
        Backward(rows_tiles=2),
        Backward(keys_tiles=2, rows_tiles=2),
        Backward(keys_stages=3, rows_stages=3),
    ),
    256: (Backward(keys_stages=1, rows_stages=1),),
}

# (device, pass, head width) -> (longest length, blocks) by rising length; what is longer takes the last entry.
# A device is found by the start of its name. Rows that do not fill the tile of three warpgroups get one of two.
TABLE: dict[tuple[str, str, int], tuple[tuple[int, Any], ...]] = {
    ("NVIDIA H100", "forward", 64): (
        (512, Forward(stages=3, split_loop=True, turns=False)),
        (32768, Forward(groups=3, stages=3, split_loop=True, lazy=True)),
    ),
    ("NVIDIA H100", "forward", 128): ((512, Forward(split_loop=True)), (32768, Forward(split_loop=True, lazy=True))),
    ("NVIDIA H100", "forward", 256): ((32768, Forward(block_k=64, q_stages=1)),),
    ("NVIDIA H100", "backward", 64): (
        (32768, Backward(keys_groups=3, keys_stages=3, keys_tiles=2, rows_groups=3, rows_stages=3, rows_tiles=2)),
    ),
    ("NVIDIA H100", "backward", 128): ((32768, Backward(rows_tiles=2)),),
    ("NVIDIA H100", "backward", 256): ((32768, Backward(keys_stages=1, rows_stages=1)),),
}
DEFAULT_DEVICE = "NVIDIA H100"  # whose entries serve other devices of its architecture


def forward_blocks(device: str, head_width: int, rows: int) -> Forward:
    """Blocks of the forward pass for ``rows`` queries an example; ``device`` is JAX's ``device_kind``."""
    return _look_up(device, "forward", head_width, rows)


def backward_blocks(device: str, head_width: int, rows: int) -> Backward:
    """Blocks of the backward pass for ``rows`` queries an example; ``device`` is JAX's ``device_kind``."""
    return _look_up(device, "backward", head_width, rows)


def _look_up(device: str, which: str, head_width: int, length: int) -> Any:
    names = sorted({name for name, *_ in TABLE if device.startswith(name)}, key=len, reverse=True)
    for name in (*names, DEFAULT_DEVICE):
        entries = TABLE.get((name, which, head_width))
        if entries:
            return next((blocks for longest, blocks in entries if length <= longest), entries[-1][1])
    raise ValueError(
        f"no {which} blocks for head width {head_width} on {device!r}; there are blocks for head widths "
        f"{sorted({width for _, one, width in TABLE if one == which})}: add an entry to TABLE in "
        "rec_core/attention/blocks.py"
    )


def barrier_ids(blocks: Forward) -> dict[str, int]:
    """The first named barrier of each kind; 0 is the program's and 1 .. groups + 1 are the warpgroups' own."""
    ids, place = {}, blocks.groups + 2
    turns = blocks.groups if blocks.turns else 0
    for kind, number in (("q", blocks.q_stages), ("turn", turns), ("k", blocks.stages), ("v", blocks.stages)):
        ids[kind] = place
        place += number
    return ids | {"end": place}


def shared_memory(blocks: Forward, head_width: int) -> int:
    """Bytes of shared memory that the forward kernel takes, for operands of two bytes."""
    tile = BLOCK_Q * blocks.groups
    keys = blocks.stages * blocks.block_k * head_width * 2
    ranges = blocks.q_stages * tile * 4
    buffers = [blocks.q_stages * tile * head_width * 2, tile * CHUNK * 2, keys, keys]
    return _together([*buffers, tile * 4, blocks.q_stages * ENTRIES * 4, ranges, ranges])


def backward_shared_memory(blocks: Backward, head_width: int) -> dict[str, int]:
    """Bytes of shared memory that the kernels of the backward pass take, by what they walk by ("keys", "rows")."""
    tile, block = blocks.keys_groups * KEYS, blocks.keys_stages * BLOCK_Q
    vectors = block * 2 * 4
    keys = [blocks.keys_tiles * tile * head_width * 2] * 2 + [block * head_width * 2] * 2 + [tile * CHUNK * 2]
    keys += [vectors, vectors, blocks.keys_tiles * ENTRIES * 4]
    tile, block = blocks.rows_tiles * blocks.rows_groups * BLOCK_Q, blocks.rows_stages * blocks.rows_block_k
    rows = [tile * head_width * 2] * 2 + [block * head_width * 2] * 2 + [blocks.rows_groups * BLOCK_Q * CHUNK * 2]
    return {"keys": _together(keys), "rows": _together([*rows, *[tile * 4] * 4, blocks.rows_tiles * ENTRIES * 4])}


def _together(buffers: list[int]) -> int:
    """A buffer begins at a multiple of 1,024; barriers take two of these."""
    return sum(-(-size // 1024) * 1024 for size in buffers) + 2048


def check_forward(blocks: Forward, head_width: int) -> None:
    """Raises ValueError for blocks that the forward kernel cannot have, with the reason."""
    if not 1 <= blocks.groups <= 3 or blocks.block_k not in (64, 128, 192, 256):
        raise ValueError(f"{blocks}: groups is 1 to 3, block_k one of 64, 128, 192, 256")
    if min(blocks.stages, blocks.q_stages) < 1 or barrier_ids(blocks)["end"] > NAMED_BARRIERS:
        raise ValueError(
            f"{blocks}: stages and q_stages are 1 or more, and (groups, with turns) + q_stages + 2 stages at most "
            f"{NAMED_BARRIERS - 2 - blocks.groups}, as there are {NAMED_BARRIERS} named barriers"
        )
    _check_memory(blocks, head_width, shared_memory(blocks, head_width), "stages or a smaller block_k")


def check_backward(blocks: Backward, head_width: int) -> None:
    """Raises ValueError for blocks that the kernels of the backward pass cannot have, with the reason."""
    if min(blocks) < 1 or max(blocks.keys_groups, blocks.rows_groups) > 3 or blocks.rows_block_k % 64:
        raise ValueError(f"{blocks}: counts are 1 or more, groups at most 3, rows_block_k a multiple of 64")
    keys = blocks.keys_groups + 2 + blocks.keys_tiles + 2 * blocks.keys_stages
    if max(keys, blocks.rows_groups + 2 + blocks.rows_tiles + blocks.rows_stages) > NAMED_BARRIERS:
        raise ValueError(
            f"{blocks}: keys_groups + keys_tiles + 2 keys_stages is at most {NAMED_BARRIERS - 2} and rows_groups + "
            f"rows_tiles + rows_stages at most {NAMED_BARRIERS - 2}, as there are {NAMED_BARRIERS} named barriers"
        )
    for walk, needed in backward_shared_memory(blocks, head_width).items():
        _check_memory(blocks, head_width, needed, f"{walk}_tiles or {walk}_stages")


def _check_memory(blocks: Any, head_width: int, needed: int, remedy: str) -> None:
    if needed > SHARED_MEMORY:
        raise ValueError(
            f"{blocks} at head width {head_width} needs {needed} bytes of shared memory, of which there are "
            f"{SHARED_MEMORY}: give fewer {remedy}"
        )
