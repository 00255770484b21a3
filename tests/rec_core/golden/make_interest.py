"""Writes the golden outputs of the interest modules, from other people's implementations and their own weights.

    python tests/rec_core/golden/make_interest.py fuxictr CHECKOUT
        DIN, DIEN, multi-head, TWIN, ETA and SDIM from FuxiCTR (reczoo/FuxiCTR, version 2.3.10, commit 0245987),
        with torch 2.13 and what that package imports
    python tests/rec_core/golden/make_interest.py mimn CHECKOUT
        MIMN's memory cell from the authors' code (UIC-Paper/MIMN, commit 5cd5ccf), with tensorflow 2.21 and tf_keras

CHECKOUT is a copy of that repository at that commit. Neither this package nor JAX is imported, so that any Python with
the library will do. A file holds inputs, weights ("w." and their names there) and outputs ("out" ...), and no code.
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

B, T, D = 4, 7, 6
HERE = Path(__file__).parent


def examples() -> dict[str, np.ndarray]:
    """Rows of different length, padded behind (DIEN there needs it), each with at least one behaviour."""
    draw = np.random.default_rng(0)
    return {
        "target": draw.normal(size=(B, D)).astype(np.float32),
        "sequence": draw.normal(size=(B, T, D)).astype(np.float32),
        "mask": np.arange(T) < np.array([7, 4, 1, 5])[:, None],
    }


def write(name: str, arrays: dict[str, Any]) -> None:
    np.savez_compressed(HERE / f"{name}.npz", **{key: np.asarray(value) for key, value in arrays.items()})
    print(name, "written")


def fuxictr(checkout: str) -> None:
    sys.path.insert(0, checkout)
    import torch
    from fuxictr.pytorch.layers import Dice, DIN_Attention, MultiHeadTargetAttention
    from model_zoo.LongCTR.DIEN.DIEN import AttentionLayer, DynamicGRU
    from model_zoo.LongCTR.ETA.ETA import ETA
    from model_zoo.LongCTR.SDIM.SDIM import SDIM
    from model_zoo.LongCTR.TWIN.TWIN import MultiHeadTopKAttention
    from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

    torch.manual_seed(0)
    given = examples()
    target, sequence, mask = (torch.from_numpy(given[name]) for name in ("target", "sequence", "mask"))

    def weights(module: Any, prefix: str = "w.") -> dict[str, Any]:
        return {f"{prefix}{name}": x.detach().numpy() for name, x in module.named_parameters()}

    def dice(units: int) -> Any:
        # Over units instead of over the batch, the form without running statistics.
        activation = Dice(units)
        activation.bn = torch.nn.LayerNorm(units, eps=1e-6, elementwise_affine=False)
        torch.nn.init.normal_(activation.alpha)
        return activation

    with torch.no_grad():
        for softmax in (False, True):
            din = DIN_Attention(D, [8, 5], [dice(8), dice(5)], use_softmax=softmax)
            out = din(target, sequence, mask)
            write("din_softmax" if softmax else "din", given | weights(din) | {"out": out})

        heads = MultiHeadTargetAttention(D, D, num_heads=2)
        heads.W_o.weight.copy_(torch.eye(D))  # ours has no matrix there
        write("multi_head", given | weights(heads) | {"out": heads(target, sequence, mask)})

        lengths = mask.sum(dim=1)

        def pack(x: Any) -> Any:
            return pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)

        extractor, evolution = torch.nn.GRU(D, D, batch_first=True), DynamicGRU(D, D, gru_type="AUGRU")
        attention = AttentionLayer(D)
        torch.nn.init.normal_(attention.W_kernel)
        interests, _ = extractor(pack(sequence))
        states, _ = pad_packed_sequence(interests, batch_first=True, total_length=T)
        scores = attention(states, target, mask)
        _, out = evolution(interests, pack(scores))
        parts = weights(extractor, "w.extractor.") | weights(attention, "w.") | weights(evolution, "w.evolution.")
        write("dien", given | parts | {"out_states": states, "out_scores": scores, "out": out})

        # Without cross features: FuxiCTR's bias of them is shaped for one behaviour a sequence only.
        twin = MultiHeadTopKAttention(D, attention_dim=8, topk=3, num_heads=2)
        write("twin", given | weights(twin) | {"out": twin(target, sequence, mask)})

        # The search methods of ETA and SDIM read these fields of their model, and nothing else of it.
        bits = 40
        eta = SimpleNamespace(reuse_hash=True, hash_bits=bits, lsh_hash=lambda *a: ETA.lsh_hash(eta, *a))
        rotations = torch.randn(1, D, bits, generator=torch.Generator().manual_seed(1))
        code = ETA.lsh_hash(eta, sequence, rotations.repeat(B, 1, 1))
        top = 3
        distance = (code - ETA.lsh_hash(eta, target[:, None], rotations.repeat(B, 1, 1))).abs().sum(dim=-1)
        distance = distance.masked_fill(~mask, bits + 1).sort(dim=1).values
        tied = (distance[:, top - 1] == distance[:, top]) & (distance[:, top] <= bits)
        if tied.any():  # which of the equally distant it takes is not defined there
            raise ValueError(f"eta: rows {tied.nonzero().tolist()} have a tie at place {top}; draw other rotations")
        nearest, found = ETA.topk_retrieval(eta, rotations, target, sequence, mask, top)
        attention = MultiHeadTargetAttention(D, D, num_heads=2)
        attention.W_o.weight.copy_(torch.eye(D))
        out = attention(target, nearest, found)
        write("eta", given | weights(attention) | {"w.rotations": rotations, "out_code": code, "out": out})

        rounds, width = 5, 2
        sdim = SimpleNamespace(
            reuse_hash=True,
            l2_norm=True,
            num_hashes=rounds,
            hash_bits=width,
            powers_of_two=torch.tensor([2.0**i for i in range(width)]),
            lsh_hash=lambda *a: SDIM.lsh_hash(sdim, *a),
        )
        rotations = torch.randn(1, D, rounds, width)
        bucket = SDIM.lsh_hash(sdim, sequence, rotations.repeat(B, 1, 1, 1))
        out = SDIM.lsh_attentioin(sdim, rotations, target, sequence, mask)
        write("sdim", given | {"w.rotations": rotations, "out_bucket": bucket, "out": out})


def mimn(checkout: str) -> None:
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
    import tensorflow.compat.v1 as tf
    import tf_keras

    tf.disable_eager_execution()

    class GRUCell:
        """In place of TensorFlow 1's: the GRU that resets after its matrix, as torch, Flax and DIEN's paper have it."""

        def __init__(self, units: int) -> None:
            self.cell = tf_keras.layers.GRUCell(
                units, recurrent_activation="sigmoid", reset_after=True, bias_initializer="random_normal"
            )
            self.units = units

        def __call__(self, x: Any, state: Any) -> tuple[Any, Any]:
            output, [state] = self.cell(x, [state])
            return output, state

        def zero_state(self, batch: int, dtype: Any) -> Any:
            return tf.zeros([batch, self.units], dtype)

    def fully_connected(x: Any, units: int, weights_initializer: Any = None, **unused: Any) -> Any:
        with tf.variable_scope(None, "fully_connected"):
            kernel = tf.get_variable("weights", [x.shape[-1], units], initializer=weights_initializer)
            bias = tf.get_variable("biases", [units], initializer=tf.random_normal_initializer(stddev=0.3))
        return x @ kernel + bias

    # The parts of TensorFlow 1 that TensorFlow 2 left out.
    tf.contrib = SimpleNamespace(
        layers=SimpleNamespace(fully_connected=fully_connected), rnn=SimpleNamespace(RNNCell=object)
    )
    tf.nn.rnn_cell = SimpleNamespace(GRUCell=GRUCell)
    sys.modules["tensorflow"] = tf
    sys.path.insert(0, str(Path(checkout) / "script"))
    from mimn import MIMNCell

    class Once(MIMNCell):
        """Their g_t adds up write weights that went through the re-balancing twice; in the paper they go once."""

        balanced = None

        def capacity_overflow(self, w_g: Any, s: Any, gamma: Any) -> Any:
            if self.balanced is None:
                self.balanced = super().capacity_overflow(w_g, s, gamma)
                return self.balanced
            balanced, self.balanced = self.balanced, None
            return balanced

    tf.set_random_seed(0)
    given = examples()
    given["mask"] = np.ones((B, T), bool)  # their masking starts the memory anew; ours is tested on its own
    cell = Once(8, 4, D, 1, 1, output_dim=D, batch_size=B, mem_induction=1, util_reg=1)
    state = cell.zero_state(B, tf.float32)
    # Ours starts from an empty memory and an empty first read.
    empty = {"M": tf.zeros_like(state["M"]), "read_vector_list": [tf.zeros([B, D])]}
    slot_keys = state["key_M"][0]
    state = state | empty
    for t in range(T):
        _, state, _ = cell(tf.constant(given["sequence"][:, t]), state)
    channels = tf.stack(cell.channel_rnn_state, axis=1)
    read, _, _ = cell(tf.constant(given["target"]), state)
    out = {
        "out_controller": state["controller_state"],
        "out_read": state["read_vector_list"][0],
        "out_memory": state["M"],
        "out_usage": state["w_aggre"],
        "out_channels": channels,
        "out_loss": cell.capacity_loss(state["w_aggre"]),
        "out": read,
        "w.slot_keys": slot_keys,
    }
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        out = session.run(out)
        for name, gru in (("controller", cell.controller), ("induction", cell.channel_rnn)):
            for part in ("kernel", "recurrent_kernel", "bias"):
                out[f"w.{name}.{part}"] = session.run(getattr(gru.cell, part))
        for name in ("o2p", "o2o"):
            [scope] = {v.name.rsplit("/", 1)[0] for v in tf.global_variables() if f"{name}/" in v.name}
            for part in ("weights", "biases"):
                [variable] = [v for v in tf.global_variables() if v.name.startswith(f"{scope}/{part}")]
                out[f"w.{name}.{part}"] = session.run(variable)
    write("mimn", given | out)


if __name__ == "__main__":
    {"fuxictr": fuxictr, "mimn": mimn}[sys.argv[1]](sys.argv[2])
