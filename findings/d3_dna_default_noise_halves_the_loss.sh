#!/usr/bin/env bash
# d3-dna 0.1.3 (SEDD for DNA), GeometricNoise with its default sigma_max = 1, absorbing graph.
# One expects the score-entropy loss of an exact model to be the entropy of the data, of a uniform guess log V, as SEDD's
# bound says, and sampling, which starts from all [MASK], to start where training ended.
# sigma = 1 masks 1 - 1/e = 63 % of the places. What the rest tells (the KL between the noised text and the prior) is
# no part of the loss, so uniform DNA costs .88 nats in place of log 4 = 1.39, and sampling begins with texts of a kind
# that training never shows. sigma_max = 20 gives log 4. Perplexities from the two don't compare.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
if [ -n "${TORCH_PYTHON:-}" ]; then py=$TORCH_PYTHON             # a Python that has torch 2.13.0 already
else python3 -m venv "$work/venv"; py=$work/venv/bin/python; "$py" -m pip install -q torch==2.13.0 numpy==2.4.6; fi
"$py" -m pip install -q --target "$work/pkg" tqdm==4.70.1
"$py" -m pip install -q --no-deps --target "$work/pkg" d3-dna==0.1.3
# only the file of the mathematics: the package's own __init__ imports a training framework
file=$work/pkg/d3_dna/models/diffusion.py
TMPDIR="$work" PYTHONPATH="$work/pkg" OMP_NUM_THREADS=1 "$py" - "$file" <<'PY'
import importlib.metadata as md
import importlib.util
import math
import sys

import torch

spec = importlib.util.spec_from_file_location("diffusion", sys.argv[1])
d3 = importlib.util.module_from_spec(spec)
spec.loader.exec_module(d3)
print("d3-dna", md.version("d3-dna"), "torch", torch.__version__)
torch.manual_seed(0)
V, T, n = 4, 10, 200_000
graph = d3.Absorbing(V)                                     # [MASK] is number 4
seen = {}
for name, noise in ("defaults", d3.GeometricNoise()), ("sigma_max 20", d3.GeometricNoise(1e-4, 20)):
    t = (torch.arange(n) + .5).reshape(-1, 1) / n
    sigma, rate = noise(t)
    x0 = torch.randint(V, (n, T))                           # DNA without any structure: log 4 nats a base
    xt = graph.sample_transition(x0, sigma)
    # the exact score of a base at a [MASK]: its probability, 1/4, over e^sigma - 1
    score = (-math.log(V) - sigma.expm1().log())[..., None].expand(n, T, V)
    score = torch.cat((score, torch.zeros(n, T, 1)), -1)
    loss = (rate * graph.score_entropy(score, sigma, xt, x0)).mean().item()
    share = (graph.sample_transition(x0, noise(torch.ones(n, 1))[0]) == V).float().mean().item()
    start = (graph.sample_limit(2, T) == V).float().mean().item()
    seen[name] = loss, share
    print(f"{name:12s}: sigma from {noise.sigmas[0]:.4f} to {noise.sigmas[1]:.0f}; loss of the exact model {loss:.3f} "
          f"(log 4 = {math.log(4):.3f}); at t = 1 masked in training {share:.3f}, at the start of sampling {start:.3f}")
assert abs(seen["defaults"][0] - .875) < .01 and abs(seen["defaults"][1] - .632) < .01, "no longer as stated"
assert abs(seen["sigma_max 20"][0] - math.log(4)) < .02 and seen["sigma_max 20"][1] == 1, "no longer as stated"
PY
