"""The networks' formulas in NumPy, for one example at a time, without the code under test."""

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def relu(x):
    return np.maximum(x, 0)


def dense(p, x):
    return x @ p["kernel"] + p.get("bias", 0)


def norm(x, p=None):
    z = (x - x.mean()) / np.sqrt(x.var() + 1e-6)
    return z if p is None else z * p["scale"] + p["bias"]


def dice(s, p):
    gate = sigmoid(norm(s))
    return gate * s + (1 - gate) * p["alpha"] * s


def deep(p, x, layers=2):
    for i in range(layers):
        x = dice(dense(p[f"mlp_{i}"], x), p[f"dice_{i}"])
    return x


def dnn(p, x):
    return dense(p["logit"], deep(p, x))


def mlr(p, o, x, e, d, i):
    regions = o["regions"]
    divide, fit = (dense(p[name], x).reshape(2, regions) for name in ("divide", "fit"))
    probability = (softmax(divide) * sigmoid(fit)).sum(-1)
    return np.log(probability / (1 - probability))


def deepfm(p, o, x, e, d, i):
    pairs = sum(e[a] @ e[b] for a in range(len(e)) for b in range(a))
    return dense(p["first_order"], e.reshape(-1)) + pairs + dnn(p, x)


def xdeepfm(p, o, x, e, d, i):
    sums, layer = [], e
    for n in range(2):
        w = p[f"cin_{n}"]
        new = [
            sum(w[a, b, h] * layer[a] * e[b] for a in range(len(layer)) for b in range(len(e)))
            for h in range(w.shape[2])
        ]
        layer = np.array(new)
        sums += [vector.sum() for vector in layer]
    return dense(p["first_order"], e.reshape(-1)) + dense(p["cin_logit"], np.array(sums)) + dnn(p, x)


def dcnv2(p, o, x, e, d, i):
    cross = x
    for n in range(2):
        if o.get("experts"):
            v, c, u = (p[f"cross_{name}_{n}"] for name in "vcu")
            gate = softmax(dense(p[f"cross_gate_{n}"], cross))
            low = [np.tanh(np.tanh(cross @ v[j]) @ c[j]) @ u[j] + p[f"cross_bias_{n}"] for j in range(3)]
            cross = sum(g * x * one for g, one in zip(gate, low)) + cross
        else:
            low = dense(p[f"cross_v_{n}"], cross) if o.get("rank") else cross
            cross = x * dense(p[f"cross_{n}"], low) + cross
    if o.get("structure") == "stacked":
        return dnn(p, cross)
    return dense(p["logit"], np.concatenate([cross, deep(p, x)]))


def masknet(p, o, x, e, d, i):
    def block(v, name):
        mask = dense(p[f"{name}_project"], relu(dense(p[f"{name}_aggregate"], x)))
        return relu(norm(dense(p[name], mask * v), p[f"{name}_norm"]))

    v = norm(x, p["norm"])
    if o.get("structure") == "serial":
        return dense(p["logit"], block(block(v, "block_0"), "block_1"))
    return dense(p["logit"], deep(p, np.concatenate([block(v, "block_0"), block(v, "block_1")]), 1))


def dffm(p, o, x, e, d, i):
    w = dense(p["generate"], d).reshape(e.shape[1], -1)
    products = [e[a] @ w @ e[b] for a in range(len(e)) for b in range(a + 1, len(e))]
    return dnn(p, np.concatenate([x, products, d]))


def apg(p, o, x, e, d, i):
    def matrix(name):
        return p[f"{name}_left"] @ p[f"{name}_right"] if "over" in o else p[name]

    for n in range(2):
        s = dense(p[f"generate_{n}"], d).reshape(o["rank"], o["rank"])
        x = dice(x @ (matrix(f"u_{n}") @ s @ matrix(f"v_{n}")) + p[f"bias_{n}"], p[f"dice_{n}"])
    return dense(p["logit"], x)


def adasparse(p, o, x, e, d, i):
    form, epsilon = o.get("form", "fusion"), o.get("epsilon")
    for n in range(2):
        v = dense(p[f"pruner_{n}"], np.concatenate([d, x]))
        if form == "scaling":
            factor = 2 * sigmoid(v)
        elif form == "fusion":
            factor = np.array([s if s > epsilon else 0 for s in 2 * sigmoid(v)])
        else:
            factor = np.array([1.0 if s > epsilon else 0 for s in sigmoid(2 * v)])
        x = dice(dense(p[f"mlp_{n}"], factor * x), p[f"dice_{n}"])
    return dense(p["logit"], x)


def star(p, o, x, e, d, i):
    def layer(h, name):
        kernel = p[f"{name}_kernel"] * p[f"{name}_kernel_domain"][i]
        return h @ kernel + p[f"{name}_bias"] + p[f"{name}_bias_domain"][i]

    h = p["gamma"] * p["gamma_domain"][i] * norm(x) + p["beta"] + p["beta_domain"][i]
    for n in range(2):
        h = dice(layer(h, f"mlp_{n}"), p[f"dice_{n}"])
    beside = p["auxiliary"]
    return layer(h, "logit") + dense(beside["logit"], deep(beside, np.concatenate([d, x]), 1))


def ple(p, o, x, e, d, i):
    domains, own, shared = o.get("domains", 1), o.get("own", 1), o.get("shared", 1)
    groups = range(2 * domains)

    def linear(name, h, *at):
        return h @ p[f"{name}_kernel"][at] + p[f"{name}_bias"][at]

    states, common = [x] * len(groups), x
    for n in range(2):
        mine = [[relu(linear(f"own_{n}", states[g], g, m)) for m in range(own)] for g in groups]
        ours = [relu(linear(f"shared_{n}", common, m)) for m in range(shared)]
        mixed = []
        for g in groups:
            gate = softmax(states[g] @ p[f"gate_{n}"][g])
            mixed.append(sum(w * expert for w, expert in zip(gate, mine[g] + ours)))
        if n == 0:
            gate = softmax(common @ p["shared_gate_0"])
            common = sum(w * expert for w, expert in zip(gate, [expert for some in mine for expert in some] + ours))
        states = mixed
    logits = [linear("logit", relu(linear("tower_0", states[g], g)), g)[0] for g in groups]
    return np.array(logits).reshape(domains, 2)[i if domains > 1 else 0]


FORMULAS = {
    "mlr": mlr,
    "dnn": lambda p, o, x, e, d, i: dnn(p, x),
    "deepfm": deepfm,
    "xdeepfm": xdeepfm,
    "dcnv2": dcnv2,
    "masknet": masknet,
    "dffm": dffm,
    "apg": apg,
    "adasparse": adasparse,
    "star": star,
    "ple": ple,
}
