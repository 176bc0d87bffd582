"""The diffusion process: how text is destroyed, what the network learns from that, and how text is made.

B sequences of T tokens; vocabulary V, channels C. x0 are the data's tokens, xt noisy ones, or noisy vectors
of width D. t in [0, 1] is the share of the information that the noise has destroyed: 0 is text, 1 is noise; a
sampler's step goes from t to s < t. `known` (B, T) is True where a token is given and must stay.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from config import Config
from data import Tokenizer, load_checkpoint, load_weights
from model import Linear, Transformer

SCHEDULES = {       # how the sampler walks from t = 1 to 0: u is the share of its steps to go, the value is t
    "linear": lambda u: u,
    "cosine": lambda u: math.sin(u * math.pi / 2),                              # few tokens first, many last
    "squared_cosine": lambda u: math.sin(u * math.pi / 2) ** 2,                 # few first and few last
    "exponential": lambda u: math.expm1(-3 * u) / math.expm1(-3),               # like cosine, steeper
}
ORDERS = {          # which [MASK]s go first: those with the highest value (K,) of their probabilities (K, V)
    "random": lambda p: torch.rand_like(p[:, 0]),
    "confidence": lambda p: p.amax(1),                                          # in the likeliest token
    "margin": lambda p: -p.topk(2).values.diff().squeeze(1),                    # to the second likeliest
    "entropy": lambda p: -torch.special.entr(p).sum(1),
}

def times(rng, n_micro, B, bell=False):
    """(n_micro, B) times for one optimizer step, spread evenly over [0, 1] by one random offset. Rows i and
    i + B/2 of a micro-batch are a pair t, 1 - t; pairs are dealt to the micro-batches in turn. With bell, for
    training, most are near 1/2: nearly clean and nearly destroyed text teach less (arXiv:2605.13026)."""
    n_pairs = n_micro * B // 2
    t = (rng.random() + torch.arange(n_pairs, dtype=torch.float64) / n_pairs) % 1
    if bell:        # .5 + .2 z within [0, 1], by the inverse distribution function; P(z < -2.5) = .00621
        t = 0.5 + 0.2 * torch.special.ndtri(0.00621 + 0.98758 * t)
    t = (2 * (t * 2 ** 22).floor() + 1) / 2 ** 23           # exact in float32, and t T is never whole
    t = t.view(B // 2, n_micro).T
    return torch.cat((t, 1 - t), dim=1).float()

def choose(score, k):
    """(B, T) bool: in each row of score (B, T) the k (B,) highest; exactly k of them, ties or not."""
    first = torch.arange(score.size(1), device=score.device) < k[:, None]
    return torch.zeros_like(first).scatter(1, score.argsort(1, descending=True), first)

def lot(mask, k):
    """(B, T) bool: in each row k (B,) random ones of the places where mask (B, T) is True."""
    return choose(torch.rand(mask.shape, device=mask.device).where(mask, -1), k)

def probabilities(logits, temperature, top_k, top_p):
    """softmax(logits / temperature) of the top_k likeliest tokens (0: all), then of the fewest with the share
    top_p of the rest; 0 for the others. temperature 0: all to the likeliest."""
    p = ((logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)).softmax(-1, dtype=torch.float32)
    if top_k or top_p < 1:
        p, ids = p.sort(-1, descending=True)
        p[..., top_k or p.size(-1):] = 0
        p = p.masked_fill(p.cumsum(-1) - p >= max(top_p, 1e-9) * p.sum(-1, keepdim=True), 0)
        p = torch.zeros_like(p).scatter(-1, ids, p / p.sum(-1, keepdim=True))
    return p

def draw(p):
    """One index (K,) per row of the probabilities p (K, V), which need not sum to 1. By inversion in float64:
    Gumbel noise in float32 lowers the entropy of samples from large vocabularies (arXiv:2409.02908)."""
    cdf = p.to(torch.float32 if p.device.type == "mps" else torch.float64).cumsum(-1)
    u = torch.rand_like(cdf[:, :1]) * cdf[:, -1:]
    return torch.searchsorted(cdf, u, right=True).squeeze(1).clamp(max=p.size(1) - 1)

class Masked(nn.Module):
    """Tokens turn into [MASK], one after the other in random order (MDLM, arXiv:2406.07524)."""

    def __init__(self, cfg, V):
        super().__init__()
        self.V = V                                      # also the id of [MASK], which the head doesn't have
        self.stem = nn.Embedding(V + 1, cfg.n_embd)     # its first V rows are the head, too
        nn.init.normal_(self.stem.weight, std=cfg.n_embd ** -0.5)
        self.net = Transformer(cfg)
        self.register_buffer("bias", torch.zeros(V))    # of the head; train.py puts the log-frequencies there

    def corrupt(self, x0, t):
        """x0 (B, T) with exactly k = floor(t T) + 1 random tokens of each row replaced by V: for uniform t, k
        is uniform on 1..T; at 1 - t it is T + 1 - k."""
        T = x0.size(1)
        k = ((t * 2 ** 40).long() * T // 2 ** 40 + 1).clamp(max=T)              # whole numbers: no rounding
        return x0.masked_fill(choose(torch.rand(x0.shape, device=x0.device), k), self.V)

    def denoise(self, xt, t, at=None):
        """Logits (B, T, V) of each position's token given xt; t (B,) is the share of xt that is masked. With
        at (K,), indices into the flattened (B T) positions, the head computes those rows only: (K, V)."""
        h = self.net(self.stem(xt), t)                                          # (B, T, C)
        if at is not None:
            h = h.flatten(0, 1).index_select(0, at)
        return F.linear(h, self.stem.weight[:self.V].to(h.dtype)).float() + self.bias

    def denoise_at(self, xt, at):
        """Rows at (K,) of the logits, (K, V), also from a denoise that knows no `at` (an exact posterior)."""
        logits = self.denoise(xt, (xt == self.V).sum(1) / xt.size(1), at=at)
        return (logits if logits.dim() == 2 else logits.flatten(0, 1)[at]).float()

    def predict(self, x0, t):
        """Noises x0 to t: k (B,), and of all K masked tokens row (K,), id (K,) and logits (K, V)."""
        B, T = x0.shape
        xt = self.corrupt(x0, t)
        masked = xt == self.V
        k = masked.sum(1)
        # compiled code wants a constant: pairs t, 1 - t mask so many tokens
        size = B * (T + 1) // 2 if torch.compiler.is_compiling() else int(k.sum())
        at = masked.flatten().nonzero_static(size=size).squeeze(1)
        return k, at // T, x0.flatten()[at], self.denoise_at(xt, at)

    def forward(self, x0, t):
        """What training minimises: the mean cross-entropy of all masked tokens. Each counts the same, where
        the bound weighs it by 1 / k: the gradient is less noisy, and the bound itself ends lower
        (results/README.md). Compiled, times that are no pairs give nan."""
        k, _, target, logits = self.predict(x0, t)
        nll = F.cross_entropy(logits, target, reduction="none")                 # (K,)
        return torch.where(k.sum() == len(nll), nll, torch.nan).mean()

    def nelbo(self, x0, t):
        """(B,) nats per token; for t ~ U(0, 1) its mean is an upper bound on -log p(x0) / T: the mean
        cross-entropy of k masked tokens, k uniform on 1..T, which is the any-order autoregressive bound and
        equal to the continuous-time one (RADD, arXiv:2406.03736)."""
        k, row, target, logits = self.predict(x0, t)
        nll = F.cross_entropy(logits, target, reduction="none")
        return torch.zeros_like(t).index_add(0, row, nll) / k

    def measures(self, x0, t):
        """Scalars by name, at the masked positions, for the table by noise level."""
        _, _, target, logits = self.predict(x0, t)
        return {"cross-entropy": F.cross_entropy(logits, target),
                "accuracy": (logits.argmax(-1) == target).float().mean()}

    @torch.no_grad()
    def sample(self, x, known, steps, noise=1.0, schedule="linear", order="random", threshold=1.0, remask=0.0,
               guidance=0.0, temperature=1.0, top_k=0, top_p=1.0):
        """Yields (tokens, certainty), (B, T) each: the start with [MASK]s, then after each step; certainty is
        0 for [MASK], else 1. x (B, T) counts where known (B, T) and, with noise below 1, elsewhere: that
        share of it is masked. A step chooses which tokens to reveal, at random or the surest first (MaskGIT,
        arXiv:2202.04200), and draws them; there are at most as many as unknown tokens, but with remask, which
        takes back that share of what was revealed, on average (ReMDM, arXiv:2503.00307)."""
        n = (~known).sum(1)
        first = (n * noise).round().long().clamp(min=1).minimum(n)              # (B,) masked at the start
        x = x.masked_fill(lot(~known, first), self.V)
        steps = steps if remask else min(steps, int(first.max()))
        yield x, (x != self.V).float()
        for i in range(1, steps + 1):
            masked = x == self.V
            left, shown = masked.sum(1), ~(masked | known)
            after = (first * SCHEDULES[schedule](1 - i / steps)).round().long().minimum(left)
            if not remask:          # each step reveals at least one, and leaves one for each to come
                after = after.clamp(min=steps - i).minimum(left - 1).clamp(min=0)
            back = (remask * (n - left) + torch.rand(n.shape, device=n.device)).long().minimum(after)
            quota = left - after + back                                         # (B,) to reveal in this step
            blind = order == "random" and threshold == 1        # then no logits choose: head at these alone
            reveal = lot(masked, quota) if blind else masked
            if not (quota.any() if threshold == 1 else left.any()):
                continue
            at = reveal.flatten().nonzero().squeeze(1)
            logits = self.denoise_at(x, at)                                     # (K, V)
            if guidance:            # away from what they are without the known tokens (arXiv:2207.12598)
                without = self.denoise_at(x.masked_fill(known, self.V), at)
                logits = without + (1 + guidance) * (logits - without)
            if not blind:
                p, nowhere = logits.softmax(1), torch.full(x.shape, -torch.inf, device=x.device)
                reveal = choose(nowhere.masked_scatter(masked, ORDERS[order](p)), quota)
                reveal |= nowhere.masked_scatter(masked, p.amax(1)) > threshold
                logits = logits[reveal[masked]]
            x = x.masked_scatter(reveal, draw(probabilities(logits, temperature, top_k, top_p)))
            x = x.masked_fill(lot(shown, back), self.V) if remask else x
            yield x, (x != self.V).float()

class Embed(nn.Module):
    """Gaussian noise on embeddings: xt = alpha E[x0] + sigma eps, alpha^2 = sigmoid(logsnr) = 1 - sigma^2.
    The network answers with a distribution over tokens (CDCD, arXiv:2211.15089) and learns by cross-entropy.
    E's rows, of width D, have length sqrt(D): they can neither shrink together nor run away. Equal pieces of
    t carry about equal parts of the bound: the schedule was fitted to what characters and byte pairs cost."""
    ENDS = 5.5, -6.0        # log D + logsnr at t = 0 and t = 1
    CURVE = 4, 3.5          # of the schedule in between: c / log V and a; h nats are decided around x = 2 h
    KNOWN_SHARE = 1 / 8     # of training rows, of which a part is known
    HIDDEN_SHARE = 0.1      # of their other tokens, of which xt tells nothing

    def __init__(self, cfg, V):
        super().__init__()
        self.V, self.D, C = V, cfg.embed_dim, cfg.n_embd
        self.weight = nn.Parameter(torch.randn(V, self.D))
        self.stem, self.stem_sc = Linear(self.D, C, zero=True), Linear(self.D, C)
        self.stem_bias = nn.Parameter(torch.randn(C))
        self.net = Transformer(cfg)
        self.head = Linear(C, V)
        self.bias = nn.Parameter(torch.zeros(V))        # of the head; train.py puts the log-frequencies there

    def table(self):
        """E (V, D), the embeddings: float32 rows of length sqrt(D)."""
        return self.D ** 0.5 * F.normalize(self.weight, dim=1)

    def schedule(self, t):
        """logsnr at t, and how steeply it falls there, which is one over its density; each of t's shape.
        t = (1 + x / c)^-a where x = D e^logsnr, but that both ends are cut off: for D = c, t = sigma^(2a)."""
        c, a = self.CURVE[0] * math.log(self.V), self.CURVE[1]
        clean, noisy = ((1 + math.exp(end) / c) ** -a for end in self.ENDS)
        u = clean + (noisy - clean) * t
        x = c * (u ** (-1 / a) - 1)
        return (x / self.D).log(), (noisy - clean) * (c + x) / (a * u * x)

    def logsnr(self, t):
        """log(alpha^2 / sigma^2) at t: falls from 5.5 - log D at t = 0 to -6 - log D at t = 1."""
        return self.schedule(t)[0]

    def scales(self, t):
        """alpha and sigma at t."""
        logsnr = self.logsnr(t)
        return logsnr.sigmoid().sqrt(), (-logsnr).sigmoid().sqrt()

    def corrupt(self, x0, t):
        """(B, T, D): the embeddings of x0 (B, T), noised to t (B,)."""
        e, (alpha, sigma) = self.table()[x0], self.scales(t[:, None, None])
        return alpha * e + sigma * torch.randn_like(e)

    def alone(self, xt, t, known=None):
        """Logits (B, T, V) of the exact posterior of each token when nothing but its own xt and the tokens'
        frequencies is known. A known token is one at the clean end of the noise."""
        t = t[:, None, None]
        alpha, sigma = self.scales(t if known is None else t * ~known[..., None])
        return F.linear(alpha / sigma ** 2 * xt, self.table(), self.bias)

    def estimate(self, logits):
        """e0 (B, T, D): the mean embedding under the logits (B, T, V), in the precision of the network."""
        p = logits.softmax(-1).to(self.net.dtype)           # half the traffic, where it is bfloat16
        return (p @ self.table().to(p.dtype)).float()

    def denoise(self, xt, t, sc=None, known=None):
        """Logits (B, T, V) of each position's token given xt (B, T, D) at t (B,): what the context tells,
        from the network, is added to the exact posterior of the token alone. sc (B, T, D) is an earlier
        estimate of the embeddings (self-conditioning, arXiv:2208.04202), by default that of each token alone.
        Where known (B, T) is True, xt holds the embedding itself, without noise."""
        alone = self.alone(xt, t, known)
        sc = self.estimate(alone).detach() if sc is None else sc
        # the network normalises its input: beside a vector that is always there, it sees how sure sc is
        h = self.stem(xt) + self.stem_sc(sc) + self.stem_bias
        return alone + self.head(self.net(h, t)).float()

    def forward(self, x0, t):
        """What training minimises: the mean cross-entropy of the unknown tokens."""
        (B, T), device = x0.shape, x0.device
        # in a few rows a part is known: a beginning, or in every other row scattered tokens
        place, share = torch.rand(B, T, device=device), torch.rand(B, 1, device=device)
        place[::2] = torch.arange(T, device=device) / T
        known = (place < share) & (torch.rand(B, 1, device=device) < self.KNOWN_SHARE)
        xt = torch.where(known[..., None], self.table()[x0], self.corrupt(x0, t))
        # some are hidden: of them the network must say what the context tells, its part of all logits
        hidden = ~known & (torch.rand(B, T, device=device) < self.HIDDEN_SHARE)
        xt = xt.masked_fill(hidden[..., None], 0)
        # each fourth row gets the estimate of each token alone, the others a better one: their own
        with torch.no_grad():
            sc = self.estimate(self.alone(xt, t, known))
            row = torch.arange(B - -(-B // 4), device=device)
            row = row + row // 3 + 1                                            # 1, 2, 3, 5, 6, 7, 9, ...
            own = self.denoise(xt[row], t[row], sc=sc[row], known=known[row])
            sc = sc.index_copy(0, row, self.estimate(own))
        logits = self.denoise(xt, t, sc=sc, known=known)
        nll = F.cross_entropy(logits.flatten(0, 1), x0.flatten(), reduction="none").view(B, T)
        return (nll * ~known).sum() / (~known).sum().clamp(min=1)

    def refined(self, x0, t):
        """Probabilities (B, T, V) of each token of x0, noised to t: the mean of a second and a third look,
        each with the estimate of the one before. Their errors differ: the bound is lower than either's."""
        xt = self.corrupt(x0, t)
        second = self.denoise(xt, t, sc=self.estimate(self.denoise(xt, t)))
        third = self.denoise(xt, t, sc=self.estimate(second))
        return (second.softmax(-1, dtype=torch.float32) + third.softmax(-1, dtype=torch.float32)) / 2

    def nelbo(self, x0, t):
        """(B,) nats per token; for t ~ U(0, 1) its mean is an upper bound on -log p(x0) / T (VDM,
        arXiv:2107.00630, eq. 11): what the noisy end tells, the integral of 1/2 e^logsnr |E[x0] - e0|^2 over
        logsnr (eq. 17), of which t is a sample, and the cross-entropy at the clean end."""
        zero, one = torch.zeros_like(t), torch.ones_like(t)
        prior = 0.5 * self.D * F.softplus(self.logsnr(one))                     # KL(q(x1|x0) || N(0, I))
        (logsnr, slope), e0 = self.schedule(t), self.refined(x0, t) @ self.table()
        between = 0.5 * logsnr.exp() * slope * (self.table()[x0] - e0).square().sum(-1).mean(1)
        clean = self.denoise(self.corrupt(x0, zero), zero).transpose(1, 2)
        return prior + between + F.cross_entropy(clean, x0, reduction="none").mean(1)

    def measures(self, x0, t):
        """Scalars by name, for the table by noise level, where a collapsed model shows at once."""
        p = self.refined(x0, t)
        e, e0 = self.table()[x0], p @ self.table()
        return {"noise share": (-self.logsnr(t)).sigmoid().mean(),
                "cross-entropy": F.nll_loss(p.clamp(min=1e-30).log().flatten(0, 1), x0.flatten()),
                "accuracy": (p.argmax(-1) == x0).float().mean(),
                "cosine": F.cosine_similarity(e, e0, dim=-1).mean(),
                "magnitude": (e0.norm(dim=-1) / e.norm(dim=-1)).mean()}

    @torch.no_grad()
    def sample(self, x, known, steps, noise=1.0, schedule="linear", eta=1.0, guidance=0.0, temperature=1.0,
               top_k=0, top_p=1.0):
        """Yields (tokens, certainty), (B, T) each: of noise, then after each of the steps; tokens are the
        likeliest, certainty is their probability. x (B, T) counts where known (B, T) and, with noise below 1,
        elsewhere: it is noised to t = noise. eta 1 is ancestral sampling (VDM, arXiv:2107.00630, eq. 32-33),
        eta 0 deterministic (DDIM, arXiv:2010.02502, eq. 12). guidance, as in Masked, noises what it hides."""
        E, place = self.table(), known[..., None]
        given, eps = E[x.where(known, 0)], torch.randn(*x.shape, self.D, device=x.device)
        start = eps if noise == 1 else self.corrupt(x, torch.full(x.shape[:1], noise, device=x.device))
        z, sc, hidden_sc = given.where(place, start), None, None
        yield x.where(known, F.linear(z, E, self.bias).argmax(-1)), known.float()
        grid = [noise * SCHEDULES[schedule](1 - i / steps) for i in range(steps + 1)]
        grid = torch.tensor(grid, device=x.device)
        (alpha, sigma), logsnr = self.scales(grid), self.logsnr(grid)
        for i in range(steps if not known.all() else 0):
            t = grid[i].expand(len(z))
            logits = self.denoise(z, t, sc=sc, known=known)
            if guidance:
                hidden = torch.where(place, alpha[i] * given + sigma[i] * eps, z)
                without = self.denoise(hidden, t, sc=hidden_sc)
                hidden_sc = self.estimate(without)
                logits = without + (1 + guidance) * (logits - without)
            p = probabilities(logits, temperature, top_k, top_p)
            certainty, tokens = p.max(-1)
            before, sc = sc, p @ E
            e0 = sc if before is None else 2 * sc - before                      # it goes on as it moved
            # from t to s: e0 and the noise that z implies stay, a share of the latter is drawn anew
            fresh = -torch.expm1(logsnr[i] - logsnr[i + 1]) * (eta * sigma[i + 1]) ** 2
            z = (alpha[i + 1] * e0 + (sigma[i + 1] ** 2 - fresh).sqrt() * (z - alpha[i] * e0) / sigma[i]
                 + fresh.sqrt() * torch.randn_like(z))
            z = given.where(place, z)
            yield x.where(known, tokens), certainty.where(~known, 1.0)

PROCESSES = {"masked": Masked, "embed": Embed}

def load_model(path, **changes):
    """(model, tokenizer, its Config with changes, a line about it) of a model.pt; exits if it isn't one."""
    ckpt = load_checkpoint(path)
    cfg, tokenizer = Config(**ckpt["config"] | {"device": "cpu"} | changes), Tokenizer(ckpt["meta"])
    model = PROCESSES[cfg.process](cfg, tokenizer.V)
    load_weights(model, ckpt["model"], path)
    bound, source = ckpt.get("nelbo", math.nan), ckpt["meta"]["source"]         # nan: not measured
    about = f"step {ckpt['step']}, bound {bound:.4f} nats/token, trained on {source}"
    return model.to(cfg.device).eval(), tokenizer, cfg, about
