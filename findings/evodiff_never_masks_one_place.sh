#!/usr/bin/env bash
# evodiff 1.1.2 (Microsoft), OAMaskCollater: order-agnostic masking of protein sequences, for training and for its loss.
# The any-order bound takes the step t uniformly from 1 ... D, so that D - t + 1 (the collater's own formula) of D places
# are masked: 1 ... D of them, all alike. One expects a bound from the mean, and each step of the sampler to be trained.
# t comes from numpy's randint(1, D), which excludes D: never is exactly one place masked. The sampler's last step, one
# place missing, is never trained, and the loss is a mean of D - 1 of the bound's D terms: the cheapest one is missing.
# An exact model of two places that are always equal costs log 20 / 2 a token; its loss here is log 20, twice that.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
if [ -n "${EVODIFF_PYTHON:-}" ]; then py=$EVODIFF_PYTHON         # a Python that has these already
else
    python3 -m venv "$work/venv"; py=$work/venv/bin/python
    "$py" -m pip install -q torch==2.13.0 numpy==1.26.4
    "$py" -m pip install -q evodiff==1.1.2 'setuptools<81'
fi
TMPDIR="$work" MPLCONFIGDIR="$work" OMP_NUM_THREADS=1 "$py" -W ignore - <<'PY'
import importlib.metadata as md
import math

import numpy as np
import torch
from evodiff.collaters import OAMaskCollater
from evodiff.losses import OAMaskedCrossEntropyLoss

print("evodiff", md.version("evodiff"), "torch", torch.__version__)
np.random.seed(0)
torch.manual_seed(0)
collate = OAMaskCollater()
counts = {}
for D in 2, 5, 10:
    _, k, _, _ = collate([("ACDEFGHIKL"[:D],)] * 3_000)
    counts[D] = torch.bincount(k, minlength=D + 1)[1:].tolist()
    print(f"length {D:2d}: rows with 1 ... {D} masked places: {counts[D]}")

# pairs of one amino acid, twice: the exact model is uniform if both are masked, certain if one is seen
tokenizer, letters = collate.tokenizer, "ACDEFGHIKLMNPQRSTVWY"
ids = torch.tensor([tokenizer.a_to_i[a] for a in letters])
xt, k, x, mask = collate([(a + a,) for a in letters * 100])
logits = torch.full((*x.shape, len(tokenizer.alphabet)), -60.)
logits[..., ids] = 0
seen = xt.where(xt != tokenizer.mask_id, -1).amax(1)
for row in (seen >= 0).nonzero()[:, 0]:
    logits[row, :, seen[row]] = 60
loss = OAMaskedCrossEntropyLoss(reweight=True)(logits, x, mask, k, torch.ones_like(x))[0].item() / x.numel()
print(f"exact model of equal pairs: loss {loss:.3f} nats a token; entropy {math.log(20) / 2:.3f}, log 20 = {math.log(20):.3f}")
assert all(c[0] == 0 and min(c[1:]) > 0 for c in counts.values()), "no longer as stated"
assert abs(loss - math.log(20)) < 1e-3, "no longer as stated"
PY
