#!/usr/bin/env bash
# transformers 5.24.0, DiffusionGemmaForBlockDiffusion.generate, default sampler; its logits are replaced by known ones.
# One expects a text from a sampler: each step draws tokens at a temperature (t_max .8 to t_min .4) and accepts some.
# What generate returns is the argmax of the last step's logits at every place, not the canvas of accepted draws. At a
# place whose token is open, it is the mode, at any temperature: two tokens at .6 and .4 everywhere come out as 1 and 0
# (and not as .73 and .27, which .4 would give), and no seed changes a token. The docstring calls it "the new denoised
# canvas". Diversity can only come through what the network makes of the random canvas.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
if [ -n "${TORCH_PYTHON:-}" ]; then py=$TORCH_PYTHON             # a Python that has torch 2.13.0 already
else python3 -m venv "$work/venv"; py=$work/venv/bin/python; "$py" -m pip install -q torch==2.13.0 numpy==2.4.6; fi
"$py" -m pip install -q --target "$work/pkg" transformers==5.24.0 numpy==2.4.6
TMPDIR="$work" PYTHONPATH="$work/pkg" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$py" - <<'PY'
import math

import torch
import transformers
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion
from transformers.models.diffusion_gemma import generation_diffusion_gemma as gemma

print("transformers", transformers.__version__, "torch", torch.__version__)
torch.manual_seed(0)
V, T = 32, 16
text = dict(vocab_size=V, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, global_head_dim=8, num_experts=2, top_k_experts=1,
            moe_intermediate_size=16, layer_types=["sliding_attention", "full_attention"])
config = DiffusionGemmaConfig(text_config=text, vision_config=None, canvas_length=T, image_token_id=V - 1,
                              boi_token_id=V - 2, eoi_token_id=V - 3)
model = DiffusionGemmaForBlockDiffusion(config).eval()
forward, drawn = model.forward, []


def two_tokens(*args, **kwargs):
    """The network runs, then its logits say: token 5 with .6, token 7 with .4, wherever."""
    out = forward(*args, **kwargs)
    out.logits = torch.full_like(out.logits, -30.)
    out.logits[..., 5], out.logits[..., 7] = math.log(.6), math.log(.4)
    return out


class Sampler(gemma.EntropyBoundSampler):
    """Counts what the sampler draws and accepts, as it is."""

    def accept_canvas(self, current, draws, logits, step):
        accepted = super().accept_canvas(current, draws, logits, step)
        drawn.append(accepted[self.accepted_token_mask])
        return accepted


gemma.EntropyBoundSampler = Sampler
model.forward = two_tokens
prompt = torch.tensor([[2, 9, 11]]).repeat(50, 1)
texts = []
for seed in range(3):
    torch.manual_seed(seed)
    out = model.generate(prompt, max_new_tokens=T, max_denoising_steps=24)
    texts.append(out.sequences[:, 3:])
returned, accepted = torch.cat(texts).flatten(), torch.cat(drawn)
share = {name: [(x == token).float().mean().item() for token in (5, 7)]
         for name, x in (("drawn and accepted", accepted), ("returned", returned))}
for name, (five, seven) in share.items():
    print(f"{name:18s}: token 5 {five:.3f}, token 7 {seven:.3f}")
print("texts of three seeds are the same:", all(torch.equal(texts[0], x) for x in texts))
assert share["returned"] == [1, 0] and .2 < share["drawn and accepted"][1] < .45, "no longer as stated"
PY
