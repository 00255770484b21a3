"""Dense networks: from the vectors of an impression to its logits. What stands where the MLP of `ctr` stands.

All are Flax linen modules with one face:

    network(hidden, tasks, dropout, dtype, ...)(inputs, deterministic) -> [B, tasks], float32

- `inputs`: see `Inputs`. `network.needs` names the parts beside x that a network reads.
- `deterministic=False`, with a "dropout" key, is training.
- `network.flops(D, F, k, d_D)`: operations of one example; `rec_core.ranking.cost` reads it.

Where a paper has a plain MLP it is the one of `DNN` in all of them: linear layers, each with Dice and dropout, so that
a difference between networks is what their papers add. None has a state: running statistics and schedules are replaced
by what needs none, and the class says how. An example's logits never depend on the other examples.

`NETWORKS` maps names, as they stand in configs, to modules.
"""

from collections.abc import Mapping

from rec_core.ranking.networks.adasparse import AdaSparse
from rec_core.ranking.networks.apg import APG
from rec_core.ranking.networks.base import Inputs, Network
from rec_core.ranking.networks.dcnv2 import DCNv2
from rec_core.ranking.networks.dffm import DFFM
from rec_core.ranking.networks.dnn import DNN
from rec_core.ranking.networks.fm import DeepFM, XDeepFM
from rec_core.ranking.networks.masknet import MaskNet
from rec_core.ranking.networks.mlr import MLR
from rec_core.ranking.networks.ple import PLE
from rec_core.ranking.networks.star import STAR

NETWORKS: Mapping[str, type[Network]] = {
    "mlr": MLR,
    "dnn": DNN,
    "deepfm": DeepFM,
    "xdeepfm": XDeepFM,
    "dcnv2": DCNv2,
    "masknet": MaskNet,
    "dffm": DFFM,
    "apg": APG,
    "adasparse": AdaSparse,
    "star": STAR,
    "ple": PLE,
}

__all__ = [
    "APG",
    "DFFM",
    "DNN",
    "MLR",
    "NETWORKS",
    "PLE",
    "STAR",
    "AdaSparse",
    "DCNv2",
    "DeepFM",
    "Inputs",
    "MaskNet",
    "Network",
    "XDeepFM",
]
