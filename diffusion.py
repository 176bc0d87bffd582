"""The two diffusion processes: how noise destroys text, what the network learns from that, how text is made.

    training:   text x0  --corrupt-->  noisy xt  --denoise-->  logits  -->  loss
    sampling:   pure noise  --denoise, keep a little-->  less noise  --...-->  text

Read Masked first, since it is the simpler one. Embed does the same with Gaussian noise on vectors. Names:

    B, T, V     sequences in a batch, tokens in a sequence, tokens in the vocabulary
    C, D        channels of the network, width of Embed's vectors
    x0, xt      the clean tokens (B, T), and what noise makes of them: tokens, or vectors (B, T, D)
    t           the share of the information that noise has destroyed, (B,): 0 is text, 1 is pure noise
    known       (B, T) bool, True where the user has given the token: samplers never touch those
"""
import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from config import Config
from data import Tokenizer, load_checkpoint, load_weights
from model import Linear, Transformer
from roberta import Roberta

# ---- what both processes use

NETWORKS = {"own": Transformer, "roberta": Roberta}

# How a sampler walks from t = 1 to t = 0: u falls from 1 to 0 in even steps, and the function gives t.
SCHEDULES = {
    "linear": lambda u: u,
    "cosine": lambda u: math.sin(u * math.pi / 2),                              # few tokens first, many last
    "squared_cosine": lambda u: math.sin(u * math.pi / 2) ** 2,                 # few first and few last
    "exponential": lambda u: math.expm1(3 * u) / math.expm1(3),                 # many first; MaskGIT's exp: few
}


def times(rng, n_micro, B, bell=False):
    """Noise levels (n_micro, B) for the micro-batches of one optimizer step.

    They are not independent: one random offset moves an even grid over [0, 1], so that each step sees all
    levels, which makes losses and bounds less noisy. With bell, which is for training, they gather around
    1/2: nearly clean and nearly destroyed text teach less (arXiv:2605.13026).
    """
    n = n_micro * B
    u = (rng.random() + torch.arange(n, dtype=torch.float64) / n) % 1
    if bell:        # a normal distribution around .5 with an s.d. of .2, cut off at 0 and 1: 2.5 s.d. away
        tail = 0.00621                                  # of it is more than 2.5 s.d. to one side
        u = 0.5 + 0.2 * torch.special.ndtri(tail + (1 - 2 * tail) * u)
    # deal the grid out like cards, so that each micro-batch sees all levels; then shuffle each hand
    hands = u.view(B, n_micro).T
    return torch.from_numpy(rng.permuted(hands.numpy(), axis=1)).float()


def highest(score, k):
    """(B, T) bool: True at the k (B,) highest scores in each row of score (B, T)."""
    rank = score.argsort(dim=1, descending=True).argsort(dim=1)
    return rank < k[:, None]


def random_ones(mask, k):
    """(B, T) bool: True at k (B,) random places of each row, out of those where mask (B, T) is True."""
    score = torch.rand(mask.shape, device=mask.device)
    return highest(score.masked_fill(~mask, -1), k)


def probabilities(logits, temperature, top_k, top_p):
    """softmax(logits / temperature), cut down to the likeliest tokens.

    It keeps the top_k likeliest (0: all), and of those the fewest that together hold the share top_p.
    Temperature 0 gives everything to the likeliest token.
    """
    logits = logits - logits.amax(-1, keepdim=True)
    p = (logits / max(temperature, 1e-30)).softmax(-1)
    if top_k == 0 and top_p == 1:
        return p
    p, ids = p.sort(-1, descending=True)
    if top_k:
        p[..., top_k:] = 0
    before = p.cumsum(-1) - p                           # what the likelier tokens hold already
    p[before >= top_p * p.sum(-1, keepdim=True)] = 0
    p = torch.zeros_like(p).scatter(-1, ids, p)         # back in the order of the vocabulary
    return p / p.sum(-1, keepdim=True)


def draw(p):
    """One token id (K,) from each row of the probabilities p (K, V), which need not sum to 1.

    By inverting the distribution function in float64: Gumbel noise in float32 makes samples from large
    vocabularies less varied (arXiv:2409.02908), and torch.multinomial takes 3 to 4 times as long on a CPU.
    """
    precise = torch.float32 if p.device.type == "mps" else torch.float64
    cdf = p.to(precise).cumsum(-1)
    u = torch.rand_like(cdf[:, :1]) * cdf[:, -1:]
    ids = torch.searchsorted(cdf, u, right=True).squeeze(1)
    return ids.clamp(max=p.size(1) - 1)                 # where rounding made u the whole sum


# ---- masked: noise replaces tokens by [MASK]


# Which [MASK]s a sampler fills first: those with the highest score (K,), from their probabilities p (K, V).
ORDERS = {
    "random": lambda p: torch.rand_like(p[:, 0]),
    "confidence": lambda p: p.amax(1),                  # the likeliest token has the most
    "margin": lambda p: -p.topk(2).values.diff()[:, 0],     # it is furthest ahead of the second likeliest
    "entropy": lambda p: -torch.special.entr(p).sum(1),
}


def choose(masked, p, quota, order, threshold):
    """(B, T) bool: of the masked places those that a step fills, quota (B,) in each row.

    p (K, V) are the probabilities at all masked places. Those with a token surer than threshold come on top.
    """
    score = torch.full(masked.shape, -torch.inf, device=p.device)
    score[masked] = ORDERS[order](p)
    keep = highest(score, quota)
    keep[masked] |= p.amax(1) > threshold
    return keep


class Masked(nn.Module):
    """Tokens turn into [MASK] one after the other, in random order (MDLM, arXiv:2406.07524).

    Going back, the network tells for each [MASK] how likely each token is there, given all that is left.
    """

    def __init__(self, cfg, V):
        super().__init__()
        self.V = V                                      # also the id of [MASK]
        self.stem = nn.Embedding(V + 1, cfg.n_embd)     # its first V rows are the head's weights, too
        nn.init.normal_(self.stem.weight, std=cfg.n_embd ** -0.5)
        self.net = NETWORKS[cfg.net](cfg)
        self.register_buffer("bias", torch.zeros(V))    # the head's: train.py puts log-frequencies there

    def corrupt(self, x0, t):
        """x0 (B, T) with k = floor(t T) + 1 random tokens of each row replaced by [MASK].

        For uniform t, k is uniform on 1 ... T.
        """
        T = x0.size(1)
        k = (t * T).long().clamp(max=T - 1) + 1
        return x0.masked_fill(random_ones(x0 != self.V, k), self.V)

    def denoise(self, xt, where):
        """Logits (K, V) of the tokens at the K places where `where` (B, T) is True, given all of xt (B, T).

        The network is told the time, which is the share of [MASK]s. The head sees no other places: with
        many tokens it is what costs most.
        """
        t = (xt == self.V).float().mean(1)
        h = self.net(self.stem(xt), t)                                          # (B, T, C)
        h = h[where]                                                            # (K, C)
        head = self.stem.weight[:self.V].to(h.dtype)
        return F.linear(h, head).float() + self.bias

    def predict(self, x0, t):
        """Masks x0 at t: masked (B, T), and of its K [MASK]s the logits (K, V) and the true tokens (K,)."""
        xt = self.corrupt(x0, t)
        masked = xt == self.V
        return masked, self.denoise(xt, masked), x0[masked]

    def forward(self, x0, t):
        """The training loss: the mean cross-entropy of all masked tokens.

        Each of them counts the same here, while the bound below weighs it by 1/k. The gradient is less
        noisy this way, and even the bound ends lower (results/README.md).
        """
        _, logits, truth = self.predict(x0, t)
        return F.cross_entropy(logits, truth)

    def nelbo(self, x0, t):
        """(B,) nats per token. Its mean over uniform t is an upper bound on -log p(x0) / T.

        It is the mean cross-entropy of the k masked tokens. Averaged over k = 1 ... T that is the bound of
        an any-order autoregressive model, and MDLM's continuous-time bound too (RADD, arXiv:2406.03736).
        """
        masked, logits, truth = self.predict(x0, t)
        nll = F.cross_entropy(logits, truth, reduction="none")                  # (K,)
        nll = torch.zeros_like(masked, dtype=nll.dtype).masked_scatter(masked, nll)
        return nll.sum(1) / masked.sum(1)

    def measures(self, x0, t):
        """Scalars by name, for train.py's table by noise level."""
        _, logits, truth = self.predict(x0, t)
        right = logits.argmax(1) == truth
        return {"cross-entropy": F.cross_entropy(logits, truth), "accuracy": right.float().mean()}

    @torch.no_grad()
    def sample(
            self, x, known, steps,
            noise=1.0,              # the share of the unknown tokens that starts as [MASK]; the rest is x
            schedule="linear",      # how many [MASK]s are left after each step
            order="random",         # which ones are filled first (MaskGIT, arXiv:2202.04200)
            threshold=1.0,          # guesses surer than this stay, whatever the schedule says
            remask=0.0,             # the share of the new tokens that a step takes back (ReMDM, arXiv:2503.00307)
            guidance=0.0,           # above 0: away from the logits without known tokens (arXiv:2207.12598)
            temperature=1.0, top_k=0, top_p=1.0):
        """Fills in the unknown tokens of x (B, T); yields (tokens, certainty), at first and after each step.

        The idea: let the network guess all [MASK]s, keep some of the guesses, and ask again. Each place is
        chosen by its probabilities, never by the token drawn there, which would favour likely tokens.
        Certainty (B, T) is 0 for [MASK] and 1 for tokens.
        """
        V = self.V
        n_unknown = (~known).sum(1)                                             # (B,), as all counts below
        n_masks = (noise * n_unknown).round().clamp(min=1).minimum(n_unknown)
        x = x.masked_fill(random_ones(~known, n_masks), V)
        yield x, (x != V).float()
        for i in range(1, steps + 1):
            after = (n_masks * SCHEDULES[schedule](1 - i / steps)).round()      # [MASK]s after this step
            new = ~known & (x != V)
            chance = torch.rand_like(after)             # rounds up or down, so that the mean is right
            back = (remask * new.sum(1) + chance).floor().minimum(after)
            x = x.masked_fill(random_ones(new, back), V)
            masked = x == V
            quota = masked.sum(1) - after                                       # how many to fill in now
            if not (quota > 0).any():
                continue
            # random places don't depend on the guesses: choose first, and ask for those alone
            blind = order == "random" and threshold == 1
            where = random_ones(masked, quota) if blind else masked
            logits = self.denoise(x, where)                                     # (K, V)
            if guidance:
                without = self.denoise(x.masked_fill(known, V), where)
                logits = without + (1 + guidance) * (logits - without)
            if not blind:
                keep = choose(where, logits.softmax(1), quota, order, threshold)
                logits = logits[keep[where]]
                where = keep
            tokens = draw(probabilities(logits, temperature, top_k, top_p))
            x = x.masked_scatter(where, tokens)
            yield x, (x != V).float()


# ---- embed: Gaussian noise on the tokens' vectors


class Embed(nn.Module):
    """Gaussian noise on embeddings: xt = alpha E[x0] + sigma eps, with alpha^2 + sigma^2 = 1.

    The network answers with a distribution over tokens and learns by cross-entropy (CDCD, arXiv:2211.15089).
    The noise level is measured by logsnr = log(alpha^2 / sigma^2), which falls as t grows.
    """
    ENDS = 5.5, -6.0        # log D + logsnr at t = 0, where text can be read off, and at t = 1, where it can't
    CURVE = 4, 3.5          # the shape of the schedule in between, see schedule()
    KNOWN_SHARE = 1 / 8     # this share of the rows in training has a part that is known
    HIDDEN_SHARE = 0.1      # this share of the tokens in training is hidden altogether
    AHEAD = 1               # how far the sampler's estimate goes on as it moved: 0 is of first order, 1 of second

    def __init__(self, cfg, V):
        super().__init__()
        C, D = cfg.n_embd, cfg.embed_dim
        self.V = V
        self.D = D
        self.weight = nn.Parameter(torch.randn(V, D))   # the embeddings, before table() sets their length
        # the vectors that the network reads for tokens, and one beside them; AdamW turns short ones faster
        self.stem = nn.Parameter(0.02 * torch.randn(V, C))
        self.stem_bias = nn.Parameter(0.02 * torch.randn(C))
        self.net = NETWORKS[cfg.net](cfg)
        self.head = Linear(C, V)
        self.bias = nn.Parameter(torch.zeros(V))        # the head's; train.py puts the log-frequencies there

    def table(self):
        """E (V, D): every embedding has the length sqrt(D), so they can neither shrink nor run away."""
        return self.D ** 0.5 * F.normalize(self.weight, dim=1)

    def embed(self, x0):
        """E[x0] (B, T, D). Not by plain indexing, whose gradient isn't repeatable on several threads."""
        return F.embedding(x0, self.table())

    def schedule(self, t):
        """logsnr at t, and how steeply it falls there; each has the shape of t.

        With x = D e^logsnr, t is (1 + x / c)^-a, stretched so that it goes from 0 to 1 between the ENDS.
        c and a come from CURVE, which was fitted to what characters and byte pairs cost: equal pieces of t
        carry about equal parts of the bound. h nats are decided around x = 2 h, so c grows with log V.
        """
        c, a = self.CURVE
        c *= math.log(self.V)
        at_0, at_1 = ((1 + math.exp(end) / c) ** -a for end in self.ENDS)
        u = at_0 + (at_1 - at_0) * t
        x = c * (u ** (-1 / a) - 1)
        slope = (at_1 - at_0) * (c + x) / (a * u * x)
        return (x / self.D).log(), slope

    def scales(self, t):
        """alpha and sigma at t."""
        logsnr, _ = self.schedule(t)
        return logsnr.sigmoid().sqrt(), (-logsnr).sigmoid().sqrt()

    def corrupt(self, x0, t):
        """(B, T, D): the embeddings of x0 (B, T) with the noise of t (B,)."""
        alpha, sigma = self.scales(t[:, None, None])
        e = self.embed(x0)
        return alpha * e + sigma * torch.randn_like(e)

    def alone(self, xt, t, known=None):
        """Logits (B, T, V) of each token from its own xt and the frequencies alone: Bayes' rule, no network.

        A known token counts as one at t = 0. A hidden one has xt = 0, which tells nothing.
        """
        t = t[:, None, None]
        if known is not None:
            t = t * ~known[..., None]                   # 0 where known
        alpha, sigma = self.scales(t)
        return F.linear(alpha / sigma ** 2 * xt, self.table(), self.bias)

    def denoise(self, xt, t, sc=None, known=None):
        """Logits (B, T, V): what each token tells alone, plus what the network reads from the context.

        sc (B, T, V) are the logits of its previous answer (self-conditioning, arXiv:2208.04202), at first
        those of each token alone. The network doesn't see xt itself: it reads the mean of the tokens' vectors
        under the probabilities in sc. Where known (B, T) is True, xt holds the embedding without noise.
        """
        alone = self.alone(xt, t, known)
        if sc is None:
            sc = alone.detach()
        p = sc.softmax(-1).to(self.net.dtype)
        # The length of the mean says how sure it is. The network normalises its input, which would lose that
        # length, but next to a vector that is always there, it shows.
        h = p @ self.stem.to(p.dtype) + self.stem_bias
        return alone + self.head(self.net(h, t)).float()

    def forward(self, x0, t):
        """The training loss: the mean cross-entropy of the unknown tokens."""
        B, T = x0.shape
        device = x0.device
        xt = self.corrupt(x0, t)

        # some rows have known tokens, a random share of each: never the last one, so that some token is unknown
        known = torch.rand(B, T, device=device) < torch.rand(B, 1, device=device)
        known &= torch.rand(B, 1, device=device) < self.KNOWN_SHARE
        known[:, -1] = False
        xt = torch.where(known[..., None], self.embed(x0), xt)

        # some tokens are hidden (set to zero): there the network must say what the context alone tells
        hidden = ~known & (torch.rand(B, T, device=device) < self.HIDDEN_SHARE)
        xt = xt.masked_fill(hidden[..., None], 0)

        # Self-conditioning: a quarter of the rows gets what each token tells alone, the others what a first
        # look at this xt gave. Which ones is no matter, since rows come in random order.
        first = (B + 2) // 4
        with torch.no_grad():
            sc = self.alone(xt, t, known)
            sc[first:] = self.denoise(xt.detach()[first:], t[first:], sc[first:], known[first:])

        logits = self.denoise(xt, t, sc, known)
        truth = x0.masked_fill(known, -100)             # F.cross_entropy leaves these out
        return F.cross_entropy(logits.transpose(1, 2), truth)

    def predict(self, x0, t):
        """Noises x0 to t; probabilities (B, T, V) of its tokens: the mean of a second and a third look.

        Each look at the same xt is told the answer of the one before. The errors of the two differ, so
        their mean gives a lower bound than either.
        """
        xt = self.corrupt(x0, t)
        first = self.denoise(xt, t)
        second = self.denoise(xt, t, first)
        third = self.denoise(xt, t, second)
        return (second.softmax(-1) + third.softmax(-1)) / 2

    def nelbo(self, x0, t):
        """(B,) nats per token. The mean over uniform t is an upper bound on -log p(x0) / T.

        It has three parts (VDM, arXiv:2107.00630, eq. 11 and 17): what can still be read at the noisy end,
        the integral over logsnr of 1/2 e^logsnr |E[x0] - e0|^2, of which t is a sample, and the
        cross-entropy at the clean end.
        """
        logsnr, _ = self.schedule(torch.ones_like(t))
        noisy_end = 0.5 * self.D * F.softplus(logsnr)                           # KL(q(x1 | x0) || N(0, I))

        logsnr, slope = self.schedule(t)
        e0 = self.predict(x0, t) @ self.table()
        error = (self.embed(x0) - e0).square().sum(-1).mean(1)
        between = 0.5 * logsnr.exp() * slope * error

        clean = torch.zeros_like(t)
        logits = self.denoise(self.corrupt(x0, clean), clean)
        clean_end = F.cross_entropy(logits.transpose(1, 2), x0, reduction="none").mean(1)
        return noisy_end + between + clean_end

    def measures(self, x0, t):
        """Scalars by name, for train.py's table by noise level. A collapsed model shows in the last two."""
        p = self.predict(x0, t)
        e, e0 = self.embed(x0), p @ self.table()
        log_p = p.clamp(min=1e-30).log()
        return {
            "noise share": self.scales(t)[1].square().mean(),
            "cross-entropy": F.nll_loss(log_p.transpose(1, 2), x0),
            "accuracy": (p.argmax(-1) == x0).float().mean(),
            "cosine": F.cosine_similarity(e, e0, dim=-1).mean(),
            "magnitude": (e0.norm(dim=-1) / e.norm(dim=-1)).mean(),
        }

    @torch.no_grad()
    def sample(
            self, x, known, steps,
            noise=1.0,              # where to start: at 1 from pure noise, below from x with that much noise
            schedule="linear",      # the noise levels of the steps
            eta=1.0,                # noise that is drawn anew: 1 ancestral, 0 none (DDIM, arXiv:2010.02502)
            guidance=0.0,           # above 0: away from the logits without known tokens (arXiv:2207.12598)
            temperature=1.0, top_k=0, top_p=1.0):
        """Fills in the unknown tokens of x (B, T); yields (tokens, certainty), at first and after each step.

        The idea: estimate the clean embeddings from the noisy z, take away a little noise, and ask again.
        Tokens are the likeliest ones, and certainty (B, T) is their probability.
        """
        E = self.table()
        fixed = known[..., None]                                                # (B, T, 1)
        given = E[x.where(known, 0)]
        z = torch.randn_like(given)
        if noise < 1:
            z = self.corrupt(x, torch.full(x.shape[:1], noise, device=x.device))
        z = given.where(fixed, z)
        tokens = F.linear(z, E, self.bias).argmax(-1)
        yield x.where(known, tokens), known.float()

        if known.all():
            return
        levels = torch.tensor([noise * SCHEDULES[schedule](1 - i / steps) for i in range(steps + 1)], device=x.device)
        context = aside = 0     # logits that the network added to those of each token alone; aside is for guidance
        e0 = None
        for t, s in pairwise(levels):                   # from level t to a lower one, s
            now = t.expand(len(z))                                              # (B,)
            alone = self.alone(z, now, known)
            logits = self.denoise(z, now, alone + context, known)
            context = logits - alone
            if guidance:
                alone = self.bias.where(fixed, alone)                           # as if nothing was known
                without = self.denoise(z.masked_fill(fixed, 0), now, alone + aside)
                aside = without - alone
                logits = without + (1 + guidance) * (logits - without)
            p = probabilities(logits, temperature, top_k, top_p)
            before = e0
            e0 = p @ E                                                          # the estimate, (B, T, D)
            ahead = e0 if before is None else e0 + self.AHEAD * (e0 - before)   # extrapolated

            # to level s: keep the noise that z implies, but draw a part of it anew (DDIM, eq. 12 and 16)
            alpha, sigma = self.scales(t)
            alpha_s, sigma_s = self.scales(s)
            eps = (z - alpha * ahead) / sigma
            fresh = (eta * sigma_s / sigma) ** 2 * (1 - (alpha / alpha_s) ** 2)     # its variance
            z = alpha_s * ahead + (sigma_s ** 2 - fresh).sqrt() * eps
            z = z + fresh.sqrt() * torch.randn_like(z)
            z = given.where(fixed, z)
            certainty, tokens = p.max(-1)
            yield x.where(known, tokens), certainty.where(~known, 1.0)


# ---- by name, and from disk

PROCESSES = {"masked": Masked, "embed": Embed}


def load_model(path, **changes):
    """(model, tokenizer, its settings with changes, the checkpoint itself) of a model.pt; exits if it isn't one."""
    ckpt = load_checkpoint(path)
    cfg = Config(**ckpt["config"] | {"device": "cpu"} | changes)
    tokenizer = Tokenizer(ckpt["meta"])
    model = PROCESSES[cfg.process](cfg, tokenizer.V)
    load_weights(model, ckpt["model"], path)
    return model.to(cfg.device).eval(), tokenizer, cfg, ckpt
