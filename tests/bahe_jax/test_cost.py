"""Multiply-adds: by hand, by the compiler's own count, and in the paper's proportions."""

import dataclasses

import jax
import numpy as np
import pytest

from bahe_jax import Config, Lora, catalogue, language_model, model
from bahe_jax.cost import count
from rec_core.transformer import TransformerConfig

DECODER = TransformerConfig(
    width=64, layers=2, heads=2, kv_heads=1, head_width=32, hidden=96, attention="reference"
)  # fmt: skip
LM = language_model.Config("llama", vocabulary=50, transformer=DECODER, tied=True)
BASE = Config(LM, sequences=2, split=1, lower="frozen", reduced=8, hidden=(16,), row=8)
TOKEN = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96  # query, key and value, output, SwiGLU
PAIR = 2 * 64


def test_by_hand():
    """N = 2, M = 3, K = 4, 5 distinct texts for 10 samples."""
    sizes = {"behaviors": 3, "tokens": 4, "distinct": 5, "samples": 10}
    llm = count(dataclasses.replace(BASE, setting="llm_ctr"), **sizes)
    assert llm.lower_linear == llm.upper_linear == 10 * 28 * TOKEN
    assert llm.lower_attention == llm.upper_attention == 10 * (28 * 29 // 2) * PAIR
    assert llm.paper == 10 * 2 * 24**2 and llm.head == 10 * (2 * 64 * 8 + 16 * 16 + 16)
    fp = count(dataclasses.replace(BASE, setting="fp"), **sizes)
    assert fp.lower_linear == llm.lower_linear and fp.paper == 10 * 2 * 2 * 12**2
    assert fp.lower_attention == 10 * (2 * 12 * 13 // 2 + 10) * PAIR
    abe = count(dataclasses.replace(BASE, setting="abe"), **sizes)
    assert (abe.lower_linear, abe.lower_attention) == (5 * 4 * TOKEN, 5 * 10 * PAIR)
    assert (abe.upper_linear, abe.upper_attention) == (fp.upper_linear, fp.upper_attention)
    assert abe.paper == 10 * 2 * 12**2 + 5 * 4**2
    ba = count(dataclasses.replace(BASE, setting="ba", dense=3, dense_width=2), **sizes)
    assert ba.upper_linear == 10 * 7 * TOKEN and ba.upper_attention == 10 * (2 * 6 + 1) * PAIR
    assert ba.paper == 10 * 2 * 3**2 + 5 * 4**2
    assert ba.head == 10 * (3 * 64 * 8 + (24 + 2) * 16 + 16 + 3 * 2)
    table = count(dataclasses.replace(BASE, setting="ba", lower="table"), behaviors=3, tokens=4, samples=10)
    assert table.lower_linear == table.lower_attention == 0 and table.total == ba.upper_linear + ba.upper_attention + (
        table.head
    )
    lora = count(dataclasses.replace(BASE, upper="lora", lora=Lora(3, projections=("key", "down"))), **sizes)
    assert lora.upper_linear == 10 * 7 * (TOKEN + 3 * (64 + 32 + 96 + 64))


@pytest.mark.parametrize(("setting", "texts"), [("llm_ctr", 1), ("ba", 3)])
def test_as_the_compiler_counts(setting, texts):
    """Its count has all pairs of a row, masked or not, rows of whole eights, and elementwise work: some percent."""
    config = dataclasses.replace(BASE, setting=setting)
    size, behaviors, tokens = 2, 31, 8
    batch = catalogue([np.arange(tokens)] * 20).batch(
        np.arange(2 * 2 * behaviors).reshape(2, 2, behaviors) % 20, np.arange(2), np.zeros(2)
    )
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), config))
    run = jax.jit(lambda params, batch: model.apply(params, batch, config))
    found = run.lower(params, batch).compile().cost_analysis()["flops"]
    distinct = size * (2 * behaviors + 1)
    ours = count(config, behaviors=behaviors, tokens=tokens, distinct=distinct, samples=size)
    slots = (2 * behaviors + 1) * (tokens if texts == 1 else 1)
    full = size * slots**2 * PAIR  # all pairs of the upper layer's row
    lower_rows = distinct * tokens * 8 * PAIR if setting == "ba" else full
    exact = 2 * (ours.total - ours.lower_attention - ours.upper_attention + full + lower_rows)
    assert exact <= found <= 1.12 * exact


def test_the_order_of_the_settings_is_the_papers():
    """At the paper's sizes each step of the ablation costs less, and the lower layers' share fades with samples."""
    full = dataclasses.replace(
        BASE, sequences=6, language_model=dataclasses.replace(LM, transformer=dataclasses.replace(DECODER, layers=8))
    )
    full = dataclasses.replace(full, split=4)
    sizes = {"behaviors": 50, "tokens": 5, "distinct": 10_000, "samples": 10_000}
    totals = [count(dataclasses.replace(full, setting=name), **sizes).total for name in ("llm_ctr", "fp", "abe", "ba")]
    assert totals == sorted(totals, reverse=True) and totals[0] > 6 * totals[3]
