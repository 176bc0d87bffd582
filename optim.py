"""What follows the gradients: Muon for the matrices of the blocks, AdamW for the rest, and the average."""
import torch

# Three polynomials a s + b s^3 + c s^5 that, one after the other, move singular values s from .01 to 1 as near
# to 1 as three can (Polar Express, arXiv:2505.16932). Beyond 1 they explode: 1.01 becomes 3,110.
STEPS = [
    (8.0934, -23.6204, 17.4462),
    (3.6366, -2.7219, 0.5365),
    (2.6613, -1.9772, 0.4526),
]


def orthogonalise(X):
    """X (rows, columns) with all its singular values moved to about 1, by three Newton-Schulz steps."""
    rows, columns = X.shape
    if rows > columns:
        return orthogonalise(X.T).T             # the smaller of X X' and X' X is the cheaper one
    X = X / (1.02 * X.norm()).clamp(min=1e-7)   # all singular values are below 1 now, whatever is rounded
    for a, b, c in STEPS:
        gram = X @ X.T
        poly = torch.addmm(gram, gram, gram, beta=b, alpha=c)                   # b gram + c gram^2
        X = torch.addmm(X, poly, X, beta=a)                                     # a X + poly X
    return X


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates, for matrices (Keller Jordan, kellerjordan.github.io/posts/muon).

    It computes in float32. torch.optim.Muon always rounds to bfloat16: a CPU without it takes 20 times as long
    for that, and runs on one and on four processes, whose sums differ in the last bit, drift apart.
    """

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        for p in group["params"]:
            average = self.state[p].setdefault("average", torch.zeros_like(p))
            average.lerp_(p.grad, 1 - group["momentum"])
            update = p.grad.lerp(average, group["momentum"])                    # it looks ahead: Nesterov
            update = orthogonalise(update)
            rows, columns = p.shape
            scale = max(1, rows / columns) ** 0.5                               # equal steps for each output
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(update, alpha=-group["lr"] * scale)


def configure_optimizers(model, cfg):
    """Muon for the matrices of the blocks, AdamW for everything else.

    RoBERTa is for AdamW alone: to go on by Muon where Adam began harms what was learned (arXiv:2605.10468).
    """
    matrices = [p for p in model.net.blocks.parameters() if p.ndim == 2 and cfg.net == "own"]
    others = [p for p in model.parameters() if p not in set(matrices)]
    muon = Muon(
        [{"params": matrices}],         # a group may be empty, a list may not
        {"lr": cfg.learning_rate, "weight_decay": cfg.weight_decay, "momentum": 0.95})
    adamw = torch.optim.AdamW(
        others, lr=cfg.adam_lr, betas=(0.9, 0.95),
        weight_decay=0, fused=True)
    return muon, adamw


@torch.no_grad()
def update(model, ema, optimizers, grad_clip, keep):
    """One step of the optimizers; then ema keeps the share `keep` of itself and takes the rest from model."""
    if grad_clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    torch._foreach_lerp_(
        list(ema.parameters()), list(model.parameters()), 1 - keep)
