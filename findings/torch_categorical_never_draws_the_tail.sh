#!/usr/bin/env bash
# torch 2.13.0 (CPU), torch.distributions.Categorical.sample() and torch.multinomial(p, n, replacement=True), float32.
# One would expect a token of probability p to be drawn with probability p, as multinomial without replacement does.
# Both add the probabilities up in float32, in the order of the vocabulary. Behind a token that is nearly certain, less
# than 3e-8 is rounded away: with Gemma's vocabulary of 262,144, a first token of .995 and the rest shared by all others,
# not one of the others is ever drawn. If the certain token comes last, all is right: samples depend on the numbering of
# the tokens. Samplers of text diffusion draw by these functions (flow-matching's categorical, bionemo-moco's
# step_confidence: read in their code, not measured here). float64 cures it.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
if [ -n "${TORCH_PYTHON:-}" ]; then py=$TORCH_PYTHON             # a Python that has torch 2.13.0 already
else python3 -m venv "$work/venv"; py=$work/venv/bin/python; "$py" -m pip install -q torch==2.13.0 numpy==2.4.6; fi
TMPDIR="$work" OMP_NUM_THREADS=1 "$py" - <<'PY'
import torch

print("torch", torch.__version__)
torch.manual_seed(0)
V, N, REST = 262_144, 50_000, .005
WAYS = "Categorical", "with replacement", "without replacement"
seen = {}


def draws(p, how):
    """N tokens."""
    if how == "Categorical":
        return torch.distributions.Categorical(p).sample((N,))
    if how == "with replacement":
        return torch.multinomial(p, N, replacement=True)
    return torch.cat([torch.multinomial(p.expand(50, V), 1)[:, 0] for _ in range(8)])


print(f"share of draws that aren't the certain token; it should be {REST}")
for dtype in torch.float32, torch.float64:
    for certain in 0, V - 1:
        p = torch.full((V,), REST / (V - 1), dtype=torch.float64)
        p[certain] = 1 - REST
        for how in WAYS:
            x = draws(p.to(dtype), how)
            share = seen[dtype, certain, how] = (x != certain).double().mean().item()
            print(f"{dtype}, certain token is number {certain:6d}, {how:20s}: {share:.5f} of {len(x):,}")
wrong = [key for key in seen if key[2] != WAYS[2] and seen[key] == 0]
right = [seen[key] for key in seen if key[2] != WAYS[2] and key not in wrong]
assert wrong == [(torch.float32, 0, how) for how in WAYS[:2]], "no longer as stated"
assert all(abs(share - REST) < .0015 for share in right), "no longer as stated"
assert all(seen[dtype, 0, WAYS[2]] < .04 for dtype in (torch.float32, torch.float64)), "no longer as stated"
PY
