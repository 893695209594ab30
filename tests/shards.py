"""A mesh of eight devices, the specs of weights on it, and what moves between its devices."""

import re

import jax
from contract_case import auto_mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

DP, TP = 2, 4


def specs_of(weight, split):
    """Specs of a weight split along "K" or "N" over axis tp; "K" with scales kept whole too."""
    along_k, along_n = (P("tp"), P(None, "tp"))
    qweight = {"K": along_k, "K, scales whole": along_k, "N": along_n, None: P()}[split]
    groups = {"K": along_k, "K, scales whole": P(), "N": along_n, None: P()}[split]
    if weight.layout != "gemm":
        qweight = P(*reversed((*qweight, *[None] * (2 - len(qweight)))))
    if weight.layout == "gemv":
        groups = P("tp") if split == "N" else P()
    return jax.tree.unflatten(jax.tree.structure(weight), [qweight, groups, groups])


def collectives(compiled):
    names = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter")
    text = compiled.as_text()
    return {n: len(c) for n in names if (c := re.findall(rf" {n}(?:-start)?\(", text))}


def put_auto(tree, specs):
    mesh = auto_mesh(dp=DP, tp=TP)
    return jax.tree.map(lambda a, s: jax.device_put(a, NamedSharding(mesh, s)), tree, specs)
