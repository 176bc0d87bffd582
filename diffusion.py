"""The diffusion process: how text is destroyed, what the network learns from that, and how text is made.

B sequences of T tokens; vocabulary V, channels C. x0 are the data's tokens, xt noisy ones. t in [0, 1] is the
share of the information that the noise has destroyed: 0 is text, 1 is pure noise. `known` (B, T) is True
where a token is given and must stay.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from model import Linear, Transformer

# How the sampler walks from t = 1 to 0: u is the share of its steps still to go, the value is t.
SCHEDULES = {
    "linear": lambda u: u,
    "cosine": lambda u: math.sin(u * math.pi / 2),                              # few tokens first, many last
    "squared_cosine": lambda u: math.sin(u * math.pi / 2) ** 2,                 # few first and few last
    "exponential": lambda u: math.expm1(-3 * u) / math.expm1(-3),               # like cosine, steeper
}


def times(rng, n_micro, B):
    """(n_micro, B) times for one optimizer step, spread evenly over [0, 1] by one random offset.

    Rows i and i + B/2 of a micro-batch are a pair t, 1 - t; pairs are dealt to the micro-batches in turn, so
    each is spread by itself. All are odd multiples of 2^-23: exact in float32, and t T is never whole.
    """
    n_pairs = n_micro * B // 2
    t = (rng.random() + torch.arange(n_pairs, dtype=torch.float64) / n_pairs) % 1
    t = (2 * (t * 2 ** 22).floor() + 1) / 2 ** 23
    t = t.view(B // 2, n_micro).T
    return torch.cat((t, 1 - t), dim=1).float()


def choose(score, k):
    """(B, T) bool: in each row of score (B, T) the k (B,) highest; exactly k of them, ties or not."""
    k = k.to(score.device, non_blocking=score.is_cuda)                          # so the host need not wait
    first = torch.arange(score.size(1), device=score.device) < k[:, None]
    return torch.zeros_like(first).scatter(1, score.argsort(1, descending=True), first)


def lot(mask, k):
    """(B, T) bool: in each row k (B,) random ones of the places where mask (B, T) is True."""
    return choose(torch.rand(mask.shape, device=mask.device).where(mask, -1), k)


def places(mask, n):
    """(n,) indices into the flattened mask where it is True; n is their number: so nobody waits for it."""
    return mask.flatten().nonzero_static(size=n).squeeze(1)


def long(x):
    """Whether rows of x (..., V) are so long that looking at blocks of 64 first saves time on a CPU."""
    return x.size(-1) > 4096 and x.size(-1) % 64 == 0


def top(x, k):
    """The k largest of each row of x (..., V) and their ids, (..., k) each."""
    if not long(x):
        return x.topk(k)
    blocks = x.unflatten(-1, (-1, 64))                  # the k of them with the largest maxima hold all
    i = blocks.amax(-1).topk(k).indices
    values, j = blocks.take_along_dim(i[..., None], -2).flatten(-2).topk(k)
    return values, i.gather(-1, j // 64) * 64 + j % 64


def probabilities(logits, temperature, top_k, top_p):
    """softmax(logits / temperature) of the top_k likeliest tokens (0: all), then of the fewest with the share
    top_p of the rest; 0 for the others. temperature 0: all to the likeliest token."""
    if temperature < 1e-30:                             # float32 ends there
        return F.one_hot(logits.argmax(-1), logits.size(-1)).float()
    p = (logits if temperature == 1 else (logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if top_k or top_p < 1:
        p, ids = p.sort(-1, descending=True)
        p[..., top_k or p.size(-1):] = 0
        before = p.cumsum(-1) - p
        p.masked_fill_(before >= max(top_p, 1e-9) * p.sum(-1, keepdim=True), 0)
        p = torch.zeros_like(p).scatter(-1, ids, p / p.sum(-1, keepdim=True))
    return p


def surety(logits, order):
    """(K,): how sure the logits (K, V) are: confidence (in the best), margin (to the second), entropy."""
    p = logits.softmax(-1)
    if order == "entropy":
        return torch.special.entr(p).sum(-1).neg()
    if order == "confidence":
        return p.amax(-1)
    best, second = top(p, 2)[0].unbind(1)
    return best - second


def draw(p):
    """One index (K,) per row of the probabilities p (K, V), which need not sum to 1.

    By inversion in float64: float32 Gumbel noise can't reach the tail of a large vocabulary, and silently
    lowers the entropy of samples (arXiv:2409.02908).
    """
    exact = torch.float32 if p.device.type == "mps" else torch.float64
    if long(p):
        blocks = p.unflatten(1, (-1, 64))
        i = draw(blocks.sum(-1, dtype=exact))
        return 64 * i + draw(blocks[torch.arange(len(p), device=p.device), i])
    cdf = p.to(exact).cumsum(-1)
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
        self.bias = nn.Parameter(torch.zeros(V))        # of the head; train.py puts the log-frequencies there

    MEASURES = "cross-entropy", "accuracy"

    def adapt(self, total):
        """Nothing: this schedule is not learned."""

    def flops(self, T):
        """Of a training step, per token: forward and twice that backward, the head at the masked half."""
        return 3 * (self.net.flops(T) + 2 * self.V * self.stem.embedding_dim * (T + 1) / (2 * T))

    def count(self, t, T):
        """k (B,), the number of masked tokens at t: uniform on 1..T if t is, and T + 1 - k at 1 - t."""
        return ((t * 2 ** 40).long() * T // 2 ** 40 + 1).clamp(max=T)           # whole numbers: no rounding

    def corrupt(self, x0, t):
        """x0 (B, T) with exactly floor(t T) + 1 random tokens of each row replaced by V."""
        masked = choose(torch.rand(x0.shape, device=x0.device), self.count(t, x0.size(1)))
        return x0.masked_fill(masked, self.V)

    def denoise(self, xt, t, at=None):
        """Logits (B, T, V) of each position's token given xt; t (B,) is the share of xt that is masked.

        With at (K,), indices into the flattened (B T) positions, the head computes those rows only: (K, V).
        """
        h = self.net(self.stem(xt), t)
        if at is not None:
            h = h.flatten(0, 1).index_select(0, at)
        return F.linear(h, self.stem.weight[:self.V].to(h.dtype)).float() + self.bias

    def denoise_at(self, xt, t, at):
        """Rows at (K,) of the logits, (K, V), also from a denoise that knows no `at` (an exact posterior)."""
        logits = self.denoise(xt, t, at=at)
        return (logits if logits.dim() == 2 else logits.flatten(0, 1)[at]).float()

    def predict(self, x0, t):
        """Noises x0 to t: k (B,), the masked positions (K,) of the flat batch, and their logits (K, V)."""
        B, T = x0.shape
        xt, k = self.corrupt(x0, t), self.count(t, T)
        # pairs t, 1 - t mask B (T + 1) / 2 tokens whatever t is: the compiler gets a constant
        K = B * (T + 1) // 2 if torch.compiler.is_compiling() else int(k.sum())
        at = places(xt == self.V, K)
        return k, at, self.denoise_at(xt, k / T, at)

    def losses(self, x0, t):
        """Noises x0 to t: k (B,), and the row and the cross-entropy (K,) of each masked token."""
        k, at, logits = self.predict(x0, t)
        nll = F.cross_entropy(logits, x0.flatten()[at], reduction="none")
        return k, at // x0.size(1), torch.where(k.sum() == len(at), nll, torch.nan)     # compiled, unpaired t

    def nelbo(self, x0, t):
        """(B,) nats per token; for t ~ U(0, 1) its mean is an upper bound on -log p(x0) / T.

        The mean cross-entropy of k masked tokens, k uniform on 1..T: the any-order autoregressive bound,
        equal to the continuous-time one (RADD, arXiv:2406.03736). When compiled, t must come in pairs.
        """
        k, row, nll = self.losses(x0, t)
        return torch.zeros_like(t, dtype=torch.float32).index_add(0, row, nll) / k

    def forward(self, x0, t):
        """What training minimises: the mean cross-entropy of all masked tokens.

        Each counts the same, where the bound weighs it by 1 / k. That makes the gradient less noisy, and the
        bound itself ends lower (README.md).
        """
        return self.losses(x0, t)[2].mean()

    def measures(self, x0, t):
        """Cross-entropy (nats) and accuracy at the masked positions: scalars by name, for the evaluation."""
        _, at, logits = self.predict(x0, t)
        target = x0.flatten()[at]
        return {"cross-entropy": F.cross_entropy(logits, target),
                "accuracy": (logits.argmax(-1) == target).float().mean()}

    def guided(self, x, known, at, guidance):
        """Rows at (K,) of the logits given x, moved away from what they would be without the known tokens
        (classifier-free guidance, arXiv:2207.12598), for which the network is called once more."""
        logits = self.denoise_at(x, (x == self.V).float().mean(1), at)
        if guidance:
            x = x.masked_fill(known, self.V)
            without = self.denoise_at(x, (x == self.V).float().mean(1), at)
            logits = without + (1 + guidance) * (logits - without)
        return logits

    def pick(self, x, known, left, quota, order, threshold, guidance):
        """The places (K,) that a step reveals, their logits (K, V), and their number in each row (B,).

        In each row the first quota (B,) by order of the left (B,) masked ones, and all surer than threshold.
        """
        masked = x == self.V
        if order == "random" and threshold == 1:        # places don't depend on logits: head at those alone
            at = places(lot(masked, quota), int(quota.sum()))
            return at, self.guided(x, known, at, guidance), quota
        at = places(masked, int(left.sum()))
        logits = self.guided(x, known, at, guidance)

        def spread(values):
            nowhere = torch.full(x.shape, -torch.inf, device=x.device)
            return nowhere.flatten().index_copy(0, at, values).view(x.shape)

        reveal = lot(masked, quota) if order == "random" else choose(spread(surety(logits, order)), quota)
        if threshold < 1:
            reveal |= spread(surety(logits, "confidence")) > threshold
            quota = reveal.sum(1).cpu()
        row = places(reveal.flatten()[at], int(quota.sum()))
        return at[row], logits[row], quota

    @torch.no_grad()
    def sample(self, x, known, steps, noise=1.0, schedule="linear", order="random", threshold=1.0, remask=0.0,
               guidance=0.0, temperature=1.0, top_k=0, top_p=1.0):
        """Yields (tokens, certainty), (B, T) each: the start with [MASK]s, then after each step.

        x (B, T) counts where known (B, T) and, with noise below 1, elsewhere: that share of it is masked. A
        step chooses which tokens to reveal, at random or the surest first (MaskGIT, arXiv:2202.04200), and
        draws them; the last leaves none. There are min(steps, unknown tokens) at most, each revealing one or
        more; with remask up to steps, which also take back that share of what was revealed, on average
        (ReMDM, arXiv:2503.00307). certainty is 1 for what is revealed and 0 for [MASK].
        """
        n = (~known).sum(1).cpu()                       # from here on only a threshold waits for the device
        first = left = (n * noise).round().long().clamp(min=1).minimum(n)
        x = x.masked_fill(lot(~known, left), self.V)
        steps = steps if remask else min(steps, int(left.max()))
        yield x, (x != self.V).float()
        for i in range(1, steps + 1):
            if not left.any():
                return
            # as many stay masked as the grid says; but this step reveals one and leaves one for each to come
            after = (first * SCHEDULES[schedule](1 - i / steps)).round().long()
            if not remask:
                after = after.clamp(min=steps - i).minimum(left - 1).clamp(min=0)
            after = after.minimum(left)
            back = (remask * (n - left) + torch.rand(len(n))).long().minimum(after)     # rounded at random
            quota, old = left - after + back, (x != self.V) & ~known
            if threshold == 1 and not quota.any():      # with remask and many steps
                continue
            at, logits, shown = self.pick(x, known, left, quota, order, threshold, guidance)
            token = draw(probabilities(logits, temperature, top_k, top_p))
            x = x.flatten().index_copy(0, at, token).view(x.shape)
            if remask:
                x = x.masked_fill(lot(old, back), self.V)
            left = left - shown + back
            yield x, (x != self.V).float()


class Embed(nn.Module):
    """Gaussian noise on embeddings: zt = alpha E[x0] + sigma eps, alpha^2 = sigmoid(logsnr) = 1 - sigma^2.

    The network answers with a distribution over tokens (CDCD, arXiv:2211.15089) and learns by cross-entropy.
    E's rows, of width D, have length sqrt(D): they can neither shrink together nor run away. logsnr(t) is
    learned: equal pieces of t carry equal parts of the bound.
    """
    BINS = 64           # of logsnr, for the learned schedule
    FIRST_EVERY = 4     # of so many training rows one learns a first look; the rest a second
    KNOWN_SHARE = 1 / 8 # of training rows, of which a part is known
    HIDDEN_SHARE = 0.1  # of their other tokens, of which xt tells nothing
    RAMP = 0.1          # share of the schedule that only rises towards the clean end, which would starve
    AHEAD = 2.0         # how far sampling steps lead the estimate's motion; 0: first order, 1: second
    MEASURES = "noise share", "cross-entropy", "accuracy", "cosine", "magnitude"

    def __init__(self, cfg, V):
        super().__init__()
        C, D = cfg.n_embd, cfg.embed_dim
        self.V, self.D = V, D
        self.weight = nn.Parameter(torch.randn(V, D))
        self.stem, self.stem_sc = Linear(D, C, zero=True), Linear(D, C)
        self.stem_known = nn.Embedding(2, C)            # a vector for unknown places, one for known ones
        self.net = Transformer(cfg)
        self.head = Linear(C, V)
        self.bias = nn.Parameter(torch.zeros(V))        # of the head; train.py puts the log-frequencies there
        # the schedule: running sums of the bound's integrand by bin of logsnr, and the knots of t that follow
        self.register_buffer("edges", torch.linspace(-6, 5.5, self.BINS + 1) - math.log(D))
        self.register_buffer("sums", torch.ones(2, self.BINS))                  # integrand, rows; decayed
        self.register_buffer("fresh", torch.zeros(2, self.BINS))                # the same, of this step
        self.register_buffer("knots", torch.linspace(0, 1, self.BINS + 1))      # 1 - t at each edge

    def table(self):
        """E (V, D), the embeddings: float32 rows of length sqrt(D)."""
        return self.D ** 0.5 * F.normalize(self.weight, dim=1)

    def flops(self, T):
        """Of a training step, per token: forward and twice that backward, a second look at some rows, and
        the estimates: the first of all, of the second look, and of every 4th token for the schedule."""
        forward = self.net.flops(T) + 2 * self.head.weight.numel() + 2 * self.weight.numel()
        second = 1 - 1 / self.FIRST_EVERY
        return (3 + second) * forward + (2 + second + 1 / 4) * 2 * self.weight.numel()

    # ---- the schedule

    def bin(self, t):
        """Index (B,) of the bin of logsnr in which t lies, and how far up the bin, in [0, 1]."""
        i = (torch.searchsorted(self.knots, 1 - t, right=True) - 1).clamp(0, self.BINS - 1)
        return i, (1 - t - self.knots[i]) / (self.knots[i + 1] - self.knots[i])

    def logsnr(self, t):
        """log(alpha^2 / sigma^2) at t (B,): falls from 5.5 - log D at t = 0 to -6 - log D at t = 1."""
        i, up = self.bin(t)
        return self.edges[i] + up * (self.edges[i + 1] - self.edges[i])

    def observe(self, x0, e0, t, counts):
        """Adds to the sums of this step what estimates e0 of x0 (B, T) cost, where counts (B, T)."""
        cost = self.integrand(x0, e0, self.logsnr(t))
        self.fresh.index_add_(1, self.bin(t)[0], torch.stack((cost * counts, counts)).mean(2))

    def adapt(self, total):
        """Once a step, moves the schedule towards the integrand; total sums a tensor over all processes."""
        self.sums.mul_(0.99).add_(total(self.fresh))
        self.fresh.zero_()
        mean = self.sums[0] / self.sums[1]
        ramp = torch.arange(1, self.BINS + 1, device=mean.device) ** 2
        q = (1 - self.RAMP) * mean / mean.sum() + self.RAMP * ramp / ramp.sum()
        self.knots[1:] = q.cumsum(0) / q.sum()

    def integrand(self, x0, e0, logsnr):
        """(B, T) nats per unit of logsnr: 1/2 e^logsnr |E[x0] - e0|^2 (VDM, arXiv:2107.00630, eq. 17)."""
        return 0.5 * logsnr.exp()[:, None] * (self.table()[x0] - e0).square().sum(-1)

    # ---- noise in, tokens out

    def corrupt(self, x0, t):
        """(B, T, D): the embeddings of x0 (B, T), noised to t (B,)."""
        e, logsnr = self.table()[x0], self.logsnr(t)[:, None, None]
        return logsnr.sigmoid().sqrt() * e + (-logsnr).sigmoid().sqrt() * torch.randn_like(e)

    # A token seen alone, when only its frequency is known, has an exact posterior: of logits q E' + bias.

    def query(self, xt, t):
        """(B, T, D): alpha / sigma^2 xt."""
        logsnr = self.logsnr(t)[:, None, None]
        return logsnr.sigmoid().sqrt() / (-logsnr).sigmoid() * xt

    @torch.no_grad()
    def first(self, xt, t, known=None):
        """e0 (B, T, D): the mean embedding under that posterior, which is attention over the table."""
        q, E = self.query(xt, t).reshape(1, 1, -1, self.D), self.table()[None, None]
        bias = self.bias.detach()[None, None, None]     # one that wants gradients would make this slow
        return self.given(F.scaled_dot_product_attention(q, E, E, bias, scale=1.0).view_as(xt), xt, known)

    def given(self, e0, xt, known):
        """e0, but what xt holds where it is known."""
        return e0 if known is None else torch.where(known[..., None], xt, e0)

    def estimate(self, logits, xt, known=None):
        """e0 (B, T, D): the mean embedding under the logits (B, T, V); where known, what xt holds."""
        return self.given(logits.softmax(-1, dtype=torch.float32) @ self.table(), xt, known)

    def denoise(self, xt, t, sc=None, known=None):
        """Logits (B, T, V) of each position's token given xt (B, T, D) at t (B,).

        sc (B, T, D) is an earlier estimate of the embeddings (self-conditioning, arXiv:2208.04202), by
        default that of each token alone. Where known (B, T) is True, xt holds the embedding itself, without
        noise. The network adds what the context tells to the exact posterior of the token alone.
        """
        # the network normalises its input: without a vector that is always there, it couldn't see how long,
        # that is how sure, an estimate is
        place = torch.zeros_like(xt[..., 0], dtype=torch.long) if known is None else known.long()
        x = self.stem(xt) + self.stem_known(place)
        x = x + self.stem_sc(self.first(xt, t, known) if sc is None else sc)
        high, low = self.edges[-1], self.edges[0]
        h = self.net(x, (high - self.logsnr(t)) / (high - low))
        alone = torch.addmm(self.bias, self.query(xt, t).flatten(0, 1), self.table().T)
        return alone.view(*xt.shape[:2], self.V) + self.head(h).float()

    def forward(self, x0, t):
        """What training minimises: the mean cross-entropy of the unknown tokens."""
        B, T = x0.shape
        device = x0.device
        # in some rows a part is known: a beginning, or scattered tokens
        place = torch.where(torch.rand(B, 1, device=device) < 0.5,
                            torch.arange(T, device=device) / T, torch.rand(B, T, device=device))
        known = ((place < torch.rand(B, 1, device=device))
                 & (torch.rand(B, 1, device=device) < self.KNOWN_SHARE))
        xt = torch.where(known[..., None], self.table()[x0], self.corrupt(x0, t))
        # some tokens are hidden: of them the network must say what the context tells, which is its part
        # of the logits everywhere
        hidden = ~known & (torch.rand(B, T, device=device) < self.HIDDEN_SHARE)
        xt = xt.masked_fill(hidden[..., None], 0)
        # some rows learn to use a better estimate than that of each token alone: their own
        with torch.no_grad():
            sc = self.first(xt, t, known)
            row = places(torch.arange(B, device=device) % self.FIRST_EVERY > 0, B - -(-B // self.FIRST_EVERY))
            own = self.denoise(xt[row], t[row], sc=sc[row], known=known[row])
            own = self.estimate(own, xt[row], known[row])
            sc = sc.index_copy(0, row, own)
        logits = self.denoise(xt, t, sc=sc, known=known)
        nll = F.cross_entropy(logits.flatten(0, 1), x0.flatten(), reduction="none").view(B, T)
        with torch.no_grad():
            counts = ~(hidden | known.any(1, keepdim=True))
            e0 = self.estimate(logits[:, ::4], xt[:, ::4])                      # every 4th token will do
            self.observe(x0[:, ::4], e0, t, counts[:, ::4])
        return (nll * ~known).sum() / (~known).sum().clamp(min=1)

    def nelbo(self, x0, t):
        """(B,) nats per token; for t ~ U(0, 1) its mean is an upper bound on -log p(x0) / T.

        What the noisiest state still tells, plus the cross-entropy at the cleanest, plus the integral between
        them over logsnr, of which t is a sample with density q (VDM, arXiv:2107.00630, eq. 11 and 17).
        """
        prior = 0.5 * self.D * F.softplus(self.edges[0])                        # KL(q(z1|x0) || N(0, I))
        zero = torch.zeros_like(t)
        clean = self.denoise(self.corrupt(x0, zero), zero).flatten(0, 1)
        nll = F.cross_entropy(clean, x0.flatten(), reduction="none").view(x0.shape)
        i, p = self.bin(t)[0], self.refined(x0, t)
        q = (self.knots[i + 1] - self.knots[i]) / (self.edges[i + 1] - self.edges[i])
        between = self.integrand(x0, p @ self.table(), self.logsnr(t)) / q[:, None]
        return prior + (nll + between).mean(1)

    def refined(self, x0, t):
        """Probabilities (B, T, V) of each token of x0, noised to t: the mean of a second and a third look,
        each with the estimate of the one before. Their errors differ: the bound is lower than either's."""
        xt = self.corrupt(x0, t)
        second = self.denoise(xt, t, sc=self.estimate(self.denoise(xt, t), xt)).softmax(-1).float()
        return (second + self.denoise(xt, t, sc=second @ self.table()).softmax(-1).float()) / 2

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
        """Yields (tokens, certainty), (B, T) each: of noise, then after each of the steps.

        x (B, T) counts where known (B, T) and, with noise below 1, elsewhere: it is noised to t = noise. eta
        1 is ancestral sampling (VDM, arXiv:2107.00630, eq. 32-33), eta 0 deterministic (DDIM,
        arXiv:2010.02502, eq. 12). guidance is as in Masked; where it hides known tokens, it noises them like
        the others. tokens are the likeliest, certainty is their probability.
        """
        E, place = self.table(), known[..., None]
        rounded = E.to(self.net.dtype)
        given, eps = E[x.where(known, 0)], torch.randn(*x.shape, self.D, device=x.device)
        start = eps if noise == 1 else self.corrupt(x, torch.full(x.shape[:1], noise, device=x.device))
        z = given.where(place, start)
        sc = hidden_sc = before = None
        yield x.where(known, top(z @ E.T + self.bias, 1)[1].squeeze(-1)), known.float()
        grid = noise * torch.tensor([SCHEDULES[schedule](1 - i / steps) for i in range(steps + 1)])
        grid = grid.to(x.device)
        logsnr = self.logsnr(grid)
        alpha, sigma = logsnr.sigmoid().sqrt(), (-logsnr).sigmoid().sqrt()
        for i in range(steps if not known.all() else 0):
            t = grid[i].expand(len(z))
            logits = self.denoise(z, t, sc=sc, known=known)
            if guidance:
                hidden = torch.where(place, alpha[i] * given + sigma[i] * eps, z)
                without = self.denoise(hidden, t, sc=hidden_sc)
                hidden_sc = self.estimate(without, hidden)
                logits = without + (1 + guidance) * (logits - without)
            p = probabilities(logits, temperature, top_k, top_p)
            certainty, tokens = (best.squeeze(-1) for best in top(p, 1))
            before, sc = sc, self.given((p.to(rounded.dtype) @ rounded).float(), z, known)
            # the estimate goes on as it moved in the last step
            e0 = sc if before is None else sc + self.AHEAD / 2 * (sc - before) * (
                (logsnr[i + 1] - logsnr[i]) / (logsnr[i] - logsnr[i - 1]).clamp(min=1e-5))
            # from t to s: e0 and the noise that z implies stay, a share of the latter is drawn anew
            fresh = -torch.expm1(logsnr[i] - logsnr[i + 1]) * (eta * sigma[i + 1]) ** 2
            z = (alpha[i + 1] * e0 + (sigma[i + 1] ** 2 - fresh).sqrt() * (z - alpha[i] * e0) / sigma[i]
                 + fresh.sqrt() * torch.randn_like(z))
            z = given.where(place, z)
            yield x.where(known, tokens), certainty.where(~known, 1.0)


PROCESSES = {"masked": Masked, "embed": Embed}
