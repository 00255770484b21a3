"""Our modules with other people's weights give other people's outputs; golden/make_interest.py made the files."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rec_core.interest import DIEN, DIN, ETA, MIMN, SDIM, TWIN, MultiHead
from rec_core.interest.mimn import Memory

GOLDEN = Path(__file__).parent / "golden"
HELP = "differs from the library's output: look for the last change of this module before making the file anew"


def load(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def heads(weight, count):
    """torch's `[heads * width, d]` as a DenseGeneral kernel `[d, heads, width]`."""
    return weight.T.reshape(weight.shape[1], count, -1)


def gru(w_input, w_state, b_input, b_state):
    """torch's three gates (reset, update, new), stacked, as a Flax GRU cell."""
    cell = {}
    for gate, wi, wh, bi, bh in zip("rzn", *(np.split(x, 3) for x in (w_input, w_state, b_input, b_state))):
        last = gate == "n"
        cell[f"i{gate}"] = {"kernel": wi.T, "bias": bi if last else bi + bh}
        cell[f"h{gate}"] = {"kernel": wh.T} | ({"bias": bh} if last else {})
    return cell


def check(name, module, params, g):
    out = jax.jit(module.apply)({"params": params}, g["target"], g["sequence"], g["mask"])
    np.testing.assert_allclose(out, g["out"], rtol=2e-5, atol=2e-6, err_msg=f"{name} {HELP}")


@pytest.mark.parametrize("softmax", [False, True])
def test_din_is_fuxictrs(softmax):
    g = load("din_softmax" if softmax else "din")
    layers = sorted({key.split(".")[3] for key in g if key.startswith("w.")}, key=int)
    first, dice_0, second, dice_1, score = ({k.split(".", 4)[4]: g[k] for k in g if f".mlp.{i}." in k} for i in layers)
    params = {
        "kernel_0": first["weight"].T,
        "bias_0": first["bias"],
        "dice_0": dice_0,
        "dense_1": {"kernel": second["weight"].T, "bias": second["bias"]},
        "dice_1": dice_1,
        "score": {"kernel": score["weight"].T, "bias": score["bias"]},
    }
    check("DIN", DIN((8, 5), softmax), params, g)


def test_multi_head_is_fuxictrs():
    g = load("multi_head")
    params = {n: {"kernel": heads(g[f"w.W_{n[0]}.weight"], 2)} for n in ("query", "key", "value")}
    check("MultiHead", MultiHead(2, 3), params, g)


@pytest.mark.portable
def test_dien_is_fuxictrs():
    g = load("dien")
    extractor = gru(*(g[f"w.extractor.{n}_l0"] for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")))
    parts = [g[f"w.evolution.gru_cell.{n}"] for n in ("x2h.weight", "h2h.weight", "x2h.bias", "h2h.bias")]
    # Theirs are (update, reset, new), the update being how much is new; Flax's z is how much stays: sigmoid(-x).
    parts = [np.concatenate([r, -u, n]) for u, r, n in (np.split(x, 3) for x in parts)]
    params = {
        "extractor": {"cell": extractor},
        "evolution": {"cell": gru(*parts)},
        "attention": {"kernel": g["w.W_kernel"].T},
    }
    states = DIEN().apply({"params": params}, g["sequence"], g["mask"], method="encode").states
    states = np.where(g["mask"][..., None], states, 0)
    np.testing.assert_allclose(states, g["out_states"], rtol=2e-5, atol=2e-6, err_msg=f"DIEN's extractor {HELP}")
    check("DIEN", DIEN(), params, g)


def test_twin_is_fuxictrs():
    g = load("twin")
    value = np.moveaxis(heads(g["w.W_v.weight"], 2), 1, 0)
    params = {
        "query": {"kernel": heads(g["w.W_q.weight"], 2)},
        "key": {"kernel": heads(g["w.W_h.weight"], 2)},
        "value": {"kernel": value},
        "out": {"kernel": g["w.W_o.weight"].T},
    }
    check("TWIN", TWIN(top=3, heads=2, width=4), params, g)


def test_eta_is_fuxictrs():
    g = load("eta")
    attention = {n: {"kernel": heads(g[f"w.W_{n[0]}.weight"], 2)} for n in ("query", "key", "value")}
    rotations = g["w.rotations"][0]
    params = {"hash": {"directions": rotations[:, None]}, "attention": attention}
    module = ETA(top=3, bits=rotations.shape[1], heads=2, width=3)
    code = module.apply({"params": params}, g["sequence"], g["mask"], method="encode").code
    signs = np.unpackbits(np.asarray(code).view(np.uint8), axis=-1, count=rotations.shape[1], bitorder="little")
    np.testing.assert_array_equal(signs[g["mask"]], g["out_code"][g["mask"]], err_msg=f"ETA's hash {HELP}")
    check("ETA", module, params, g)


def test_sdim_is_fuxictrs():
    g = load("sdim")
    params = {"hash": {"directions": g["w.rotations"][0]}}
    module = SDIM(rounds=5, bits=2)
    bucket = module.apply({"params": params}, g["sequence"], g["mask"], method="encode").bucket
    np.testing.assert_array_equal(bucket[g["mask"]], g["out_bucket"][g["mask"]], err_msg=f"SDIM's hash {HELP}")
    check("SDIM", module, params, g)


def test_mimn_is_its_authors():
    g = load("mimn")
    d, units = g["target"].shape[1], g["out_controller"].shape[1]

    def keras_gru(name):
        # Keras stacks (update, reset, new) and holds one bias for the input and one for the state.
        parts = [g[f"w.{name}.{n}"] for n in ("kernel", "recurrent_kernel")]
        parts = [x.T for x in parts] + list(g[f"w.{name}.bias"])
        return gru(*(np.concatenate([r, z, n]) for z, r, n in (np.split(x, 3) for x in parts)))

    def controls(part):
        """Theirs: a head is key, beta, one that is not read, shift and gamma; then the erase and the add vector."""
        read, write = np.split(g[f"w.o2p.{part}"][..., : 2 * (d + 6)], 2, axis=-1)
        erase_add = g[f"w.o2p.{part}"][..., 2 * (d + 6) :]
        return np.concatenate([read[..., : d + 1], write[..., : d + 1], erase_add, write[..., d + 2 :]], axis=-1)

    cell = {
        "controller": keras_gru("controller"),
        "induction": keras_gru("induction"),
        "controls": {"kernel": controls("weights"), "bias": controls("biases")},
        "slot_keys": np.arctanh(g["w.slot_keys"]),
        "out": {"kernel": g["w.o2o.weights"], "bias": g["w.o2o.biases"]},
    }
    module = MIMN(slots=4, units=units)
    params = {"cell": cell}
    state = jax.jit(lambda *a: module.apply({"params": params}, *a, method="encode"))(g["sequence"], g["mask"])
    theirs = {"controller": "controller", "last_read": "read", "memory": "memory", "channels": "channels"}
    for ours, name in (theirs | {"usage": "usage"}).items():
        got = getattr(state, ours)
        np.testing.assert_allclose(got, g[f"out_{name}"], rtol=2e-5, atol=5e-6, err_msg=f"MIMN's {name} {HELP}")
    counted = state._replace(written=jnp.ones_like(state.written))  # theirs counts writes, ours takes their shares
    spread, users = module.apply({"params": params}, counted, method="auxiliary")["utilisation"]
    # Theirs is its mean over slots, once more by slots and users, by a factor.
    size, slots = g["out_usage"].shape
    np.testing.assert_allclose(0.001 * spread / (size * slots) / (slots * users), g["out_loss"], rtol=1e-4)
    alone = MIMN(slots=4, units=units, induction=0)
    state = Memory(**state._asdict() | {"channels": jnp.zeros((size, 0, d))})
    del cell["induction"]
    read = jax.jit(lambda *a: alone.apply({"params": params}, *a, method="read"))(state, g["target"])
    np.testing.assert_allclose(read, g["out"], rtol=2e-5, atol=5e-6, err_msg=f"MIMN's read {HELP}")
