"""What follows the gradients: Muon for the matrices of the blocks, AdamW for the rest, and the average."""
import torch


def orthogonalise(G):
    """G (n, rows, columns) with its singular values moved to about 1, by five Newton-Schulz steps."""
    X = G if G.size(1) <= G.size(2) else G.mT                                   # the smaller Gram matrix
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = X @ X.mT
        poly = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        X = torch.baddbmm(X, poly, X, beta=3.4445)
    return X if G.size(1) <= G.size(2) else X.mT

class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates, for matrices (Keller Jordan, kellerjordan.github.io/posts/muon).
    Not torch.optim.Muon, which always rounds to bfloat16: in float32, gradients that differ in the last bit,
    as sums over 1 and 4 processes do, give weights that differ in the last bits. A shape's go at once."""

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        for shape in dict.fromkeys(p.shape for p in group["params"]):
            params = [p for p in group["params"] if p.shape == shape]
            grads, state = torch.stack([p.grad for p in params]), self.state[params[0]]
            if not state:
                state["average"] = torch.zeros_like(grads)                      # (n, rows, columns)
            average = state["average"].lerp_(grads, 1 - group["momentum"])
            update = orthogonalise(grads.lerp(average, group["momentum"]).to(group["dtype"])).float()
            lr = group["lr"] * max(1, shape[0] / shape[1]) ** 0.5               # equal steps for each output
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, list(update), alpha=-lr)

def configure_optimizers(model, cfg):
    """Muon for the matrices of the blocks, AdamW for everything else."""
    matrices = [p for p in model.net.blocks.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not q for q in matrices)]
    muon = {"lr": cfg.learning_rate, "weight_decay": cfg.weight_decay, "momentum": 0.95}
    return [Muon(matrices, muon | {"dtype": model.net.dtype}),
            torch.optim.AdamW(others, lr=cfg.adam_lr, betas=(0.9, 0.95), weight_decay=0, fused=True)]

@torch.no_grad()
def update(model, ema, optimizers, grad_clip, keep):
    """Clips the gradients (0: not), steps, clears them; then ema moves to model, but for the share keep."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or float("inf"))
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - keep)
