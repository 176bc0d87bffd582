"""What the two processes promise, against exact answers. test_tools.py tests what a user does with the scripts.

    python -m pytest test_diffusion.py

The first part is the one to read: it puts an exact answer in the place of the network. All that is left then is
the diffusion itself, so the bound must equal the entropy of the text, and samples must follow its distribution.
"""
import itertools
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import model
from config import Config
from data import crops
from diffusion import ORDERS, PROCESSES, SCHEDULES, Embed, Masked, draw, probabilities, times
from model import look_aside, rotate
from optim import orthogonalise
from results import peers

TINY = {"block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 32, "batch_size": 8, "dtype": "float32",
        "device": "cpu"}
torch._dynamo.config.capture_dynamic_output_shape_ops = True                    # as train.py does
torch.set_num_threads(1)                    # models this small: more threads only wait for each other,
os.environ["OMP_NUM_THREADS"] = "1"         # for minutes if another program needs a core


def build(kind, V, **settings):
    """A tiny process with V tokens; kind is its name or its class."""
    torch.manual_seed(0)
    cfg = Config(**TINY | settings)
    return PROCESSES.get(kind, kind)(cfg, V).eval()


def unknown(B, T):
    """x and known of B texts of T unknown tokens."""
    return torch.zeros(B, T, dtype=torch.long), torch.zeros(B, T, dtype=torch.bool)


def last(states):
    """The tokens with which a sampler ends."""
    *_, (tokens, _) = states
    return tokens


def is_distributed(tokens, weights):
    """Whether tokens (n,) are drawn in proportion to weights (V,), within five standard errors each."""
    truth = weights / weights.sum()
    n = tokens.numel()
    share = torch.bincount(tokens.flatten(), minlength=len(weights)) / n
    se = (truth * (1 - truth) / n).sqrt()
    return bool(((share - truth).abs() < 5 * se + 1e-9).all())


# ---- a Markov chain in the network's place: each token depends on the one before it, and on nothing else

V, T = 8, 12
NEXT = torch.softmax(1.5 * torch.randn(V, V, generator=torch.Generator().manual_seed(1)), 1).double()
START = torch.linalg.matrix_power(NEXT, 200)[0]     # (V,): how often each token comes in the long run
PAIRS = START[:, None] * NEXT                       # (V, V): how often each pair of neighbours does
ENTROPY = float(torch.special.entr(START).sum() - (T - 1) * (PAIRS * NEXT.log()).sum()) / T     # nats/token


def chain_text(n):
    """n texts (n, T) that the chain wrote."""
    x = [draw(START.expand(n, -1))]
    for _ in range(T - 1):
        x.append(draw(NEXT[x[-1]]))
    return torch.stack(x, 1)


def posterior(evidence):
    """log p(token | all evidence) for each place of a chain: the forward-backward algorithm.

    evidence (B, T, V): how well each token explains what is seen at its own place, up to a factor.
    """
    evidence = evidence.double()
    before = [START.expand_as(evidence[:, 0])]      # (B, V): what all places to the left tell
    after = [torch.ones_like(evidence[:, 0])]       # and all to the right
    for i in range(evidence.size(1) - 1):
        left = (before[-1] * evidence[:, i]) @ NEXT
        right = (after[-1] * evidence[:, -1 - i]) @ NEXT.T
        before.append(left / left.sum(1, keepdim=True))
        after.append(right / right.sum(1, keepdim=True))
    p = torch.stack(before, 1) * evidence * torch.stack(after[::-1], 1)
    return (p / p.sum(-1, keepdim=True)).log().clamp(min=-60).float()


CERTAIN = torch.cat((torch.eye(V), torch.ones(1, V)))       # evidence of a token; [MASK] tells nothing


class ExactMasked(Masked):
    """Knows the chain: what each [MASK] may be, given all tokens that are left."""

    def denoise(self, xt, where):
        return posterior(CERTAIN[xt])[where]


class ExactEmbed(Embed):
    """Knows the chain: what each token may be, given all noisy vectors."""

    def denoise(self, xt, t, sc=None, known=None):
        alpha, sigma = self.scales(t[:, None, None])
        alike = xt @ self.table().T                                             # (B, T, V)
        evidence = (alpha / sigma ** 2 * alike).softmax(-1)     # of a normal distribution around alpha E
        if known is not None:
            evidence = CERTAIN[alike.argmax(-1)].where(known[..., None], evidence)
        return posterior(evidence)


EXACT = {"masked": ExactMasked, "embed": ExactEmbed}


def exact(process, **constants):
    """A process that knows the chain, with constants of its class changed."""
    model = build(EXACT[process], V, block_size=T)
    vars(model).update(constants)
    return model


@torch.no_grad()
def excess(model, n):
    """How far the mean bound of n batches of the chain's text is above the entropy, and its standard error."""
    torch.manual_seed(0)
    t = [times(np.random.default_rng(i), 1, 64)[0] for i in range(n)]
    bounds = torch.stack([model.nelbo(chain_text(64), t[i]).mean() for i in range(n)])
    return float(bounds.mean()) - ENTROPY, float(bounds.std() / n ** 0.5)


@pytest.mark.parametrize("process, constants, above", [
    ("masked", {}, 0),
    ("embed", {}, 0),
    ("embed", {"CURVE": (2, 2)}, 0),
    # little noise at one end and much at the other: what both ends cost is worth .18 and .07 here, and the
    # noisiest vectors are not quite N(0, I), which costs .02
    ("embed", {"ENDS": (2, -2)}, 0.02)])
def test_bound_of_the_exact_posterior_is_the_entropy(process, constants, above):
    difference, se = excess(exact(process, **constants), 300)
    assert se < 0.02
    assert -4 * se < difference < 4 * se + above


@pytest.mark.parametrize("process", EXACT)
def test_bound_of_another_posterior_is_above_the_entropy(process):
    model = exact(process)
    denoise = model.denoise
    model.denoise = lambda *args: 0.4 * denoise(*args)
    difference, se = excess(model, 50)
    assert difference > 4 * se


@pytest.mark.parametrize("process, steps, settings", [
    ("masked", 12, {}),
    ("masked", 150, {"remask": 0.1}),
    ("masked", 150, {"noise": 0.6}),
    ("masked", 12, {"order": "confidence"}),
    ("masked", 12, {"order": "margin"}),
    ("masked", 12, {"order": "entropy", "threshold": 0.999}),
    ("embed", 100, {}),
    ("embed", 100, {"eta": 0.0}),
    ("embed", 150, {"noise": 0.4})])
def test_samples_of_the_exact_posterior_have_the_chains_pairs(process, steps, settings):
    torch.manual_seed(0)
    x = chain_text(3000)
    y = last(exact(process).sample(x, unknown(3000, T)[1], steps, **settings))
    assert is_distributed(V * y[:, :-1] + y[:, 1:], PAIRS.flatten())
    # they keep something of x where the noise leaves something of it, and else as much as chance does
    kept = (y == x).float().mean() - (START ** 2).sum()
    assert 0.1 < kept < 0.7 if "noise" in settings else abs(kept) < 0.02


@pytest.mark.parametrize("process, w", [("masked", 0.0), ("masked", 0.5), ("masked", 2.0), ("embed", 0.0)])
def test_infill_follows_the_true_conditional_over_the_marginal_to_the_power_of_guidance(process, w):
    torch.manual_seed(0)
    x = torch.tensor([2, 0, 5]).expand(4000, -1)
    known = torch.tensor([True, False, True]).expand(4000, -1)
    y = last(exact(process).sample(x, known, {"masked": 3, "embed": 100}[process], guidance=w))
    assert (y[:, ::2] == x[:, ::2]).all()
    assert is_distributed(y[:, 1], (NEXT[2] * NEXT[:, 5]) ** (1 + w) / START ** w)


def test_guidance_of_embed_makes_what_fits_the_known_tokens_likelier():
    torch.manual_seed(0)
    x = torch.full((2000, 3), 2)
    known = torch.tensor([True, False, True]).expand(2000, -1)
    fits = (NEXT[2] * NEXT[:, 2] / START).log()                                 # what the neighbours tell
    none, some, more = (fits[last(exact("embed").sample(x, known, 50, guidance=w))[:, 1]].mean() for w in (0, 1, 3))
    assert none + 0.1 < some < more - 0.02


@pytest.mark.parametrize("settings", [{"order": order} for order in ORDERS] + [
    {"temperature": 1.0, "remask": 0.1}, {"order": "confidence", "threshold": 0.65}])
def test_independent_tokens_keep_their_shares_under_every_order(settings):
    """An order by the probability of the token that was just drawn makes .974, .019, .007 of them."""
    shares = torch.tensor([0.7, 0.2, 0.1])
    model = build("masked", 3, block_size=16)
    model.denoise = lambda xt, where: shares.log().expand(int(where.sum()), 3)
    torch.manual_seed(0)
    y = last(model.sample(*unknown(2000, 16), 16, **settings))
    assert is_distributed(y, shares)


def test_few_steps_of_an_exact_model_stay_as_near_to_the_chain_as_published():
    """results/peers.md: samplers that reveal a random number of tokens in a step are at .22, .12 and .05."""
    model = build("masked", peers.V, block_size=peers.T)
    model.denoise = lambda xt, where: peers.exact(xt)[where][:, :peers.V]
    for steps, most in (2, 0.23), (4, 0.09), (10, 0.02):
        torch.manual_seed(0)
        y = last(model.sample(*unknown(peers.N_SAMPLES, peers.T), steps))
        assert peers.distance(y) < most


# ---- masked: counts and identities


def test_uniform_logits_cost_exactly_log_V():
    model = build("masked", 65)
    model.denoise = lambda xt, where: torch.zeros(int(where.sum()), 65)
    bound = model.nelbo(torch.randint(65, (8, 32)), torch.rand(8))
    assert torch.allclose(bound, torch.full((8,), math.log(65)), atol=1e-5)


def test_mean_over_all_masks_is_mean_chain_rule_over_all_orders():
    """A text's likelihood can be told one token after the other, in any order. The bound is the mean of all."""
    n = 4
    model = build("masked", 3, block_size=n)
    stir(model, 0.3)
    x0 = torch.tensor([[2, 0, 1, 1]])

    def mask(places):
        """Makes the noise mask these places; returns the times of so many masks."""
        masked = torch.tensor([[i in places for i in range(n)]])
        model.corrupt = lambda x0, t: x0.masked_fill(masked, 3)
        return torch.tensor([(len(places) - 0.5) / n])

    chain_rule, bounds = [], []
    for order in itertools.permutations(range(n)):
        for i in range(n):
            t = mask(order[i:])
            bounds.append(model.nelbo(x0, t))               # all numbers of masks, all masks, alike
            _, logits, truth = model.predict(x0, t)
            which = sorted(order[i:]).index(order[i])       # of the masked places, that which comes next
            chain_rule.append(F.cross_entropy(logits[which], truth[which]))
    assert abs(torch.stack(bounds).mean() - torch.stack(chain_rule).mean()) < 1e-5


@pytest.mark.parametrize("n", [1, 2, 7, 32])
def test_masks_are_exactly_as_many_as_t_says_and_all_numbers_come_alike(n):
    model = build("masked", 5, block_size=n)
    x0 = torch.zeros(2 * n, n, dtype=torch.long)
    for seed in range(20):
        t = times(np.random.default_rng(seed), 1, 2 * n)[0]
        xt = model.corrupt(x0, t)
        k = (xt == 5).sum(1)
        assert torch.equal(k, (t * n).floor().long() + 1)
        assert torch.bincount(k, minlength=n + 1).tolist() == [0] + n * [2]     # on a grid of 2 n times
    ends = model.corrupt(x0[:2], torch.tensor([0.0, 1.0]))
    assert (ends == 5).sum(1).tolist() == [1, n]


def stir(module, size=0.2):
    """Moves the weights from where they start, at which much is zero."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(size * torch.randn_like(p))


def data_and_times():
    """x0 (8, 32) of 11 tokens, and times for it."""
    return torch.randint(11, (8, 32)), times(np.random.default_rng(0), 1, 8)[0]


def test_head_at_masked_places_gives_the_loss_and_the_gradients_of_the_full_head():
    model = build("masked", 11)
    x0, t = data_and_times()
    xt = model.corrupt(x0, t)
    model.corrupt = lambda x0, t: xt
    logits = model.denoise(xt, torch.ones_like(xt, dtype=torch.bool)).view(8, 32, 11)
    truth = x0.masked_fill(xt != 11, -100)                                      # left out
    losses = model(x0, t), F.cross_entropy(logits.transpose(1, 2), truth)
    assert abs((losses[0] - losses[1]).item()) < 1e-5
    gradients = [torch.autograd.grad(loss, model.parameters()) for loss in losses]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients))


def test_times_are_stratified_over_the_whole_step():
    t = times(np.random.default_rng(0), 4, 8)
    assert (t.flatten().sort().values.diff() < 2 / 32).all()                    # 32 strata
    assert (t.sort(1).values.diff(dim=1) < 2 / 8 + 1e-3).all()                  # 8 in each micro-batch


@pytest.mark.parametrize("bell", [False, True])
def test_each_time_is_uniform_or_normal_and_cut_off_at_0_and_1(bell):
    t = torch.stack([times(np.random.default_rng(i), 2, 4, bell) for i in range(4000)])
    assert 0 <= t.min() and t.max() <= 1
    for x in 0.1, 0.3, 0.5, 0.8:
        low, share = torch.special.ndtr(torch.tensor([-2.5, (x - 0.5) / 0.2]))
        share = (share - low) / (1 - 2 * low) if bell else x
        assert abs((t < x).float().mean() - share) < 0.005                      # five standard deviations


def test_crops_cover_the_split():
    x = crops(np.arange(40, dtype=np.uint16), np.random.default_rng(0), 500, 8)
    assert x.dtype == torch.int64 and (x.diff() == 1).all()
    assert x.min() == 0 and x.max() == 39


# ---- embed: its schedule, and what training gives the network


def test_the_schedules_slope_is_its_derivative():
    model = build("embed", 11)
    t = torch.linspace(0.02, 0.98, 50, dtype=torch.float64, requires_grad=True)
    logsnr, slope = model.schedule(t)
    assert torch.allclose(-torch.autograd.grad(logsnr.sum(), t)[0], slope)
    ends = model.schedule(torch.tensor([0.0, 1.0]))[0] + math.log(model.D)
    assert torch.allclose(ends, torch.tensor(model.ENDS), atol=1e-3)


def test_a_known_token_counts_as_a_clean_one():
    model = build("embed", 11)
    x0 = torch.arange(11)[None]
    known = x0 < 5
    p = model.alone(model.embed(x0), torch.ones(1), known).softmax(-1).amax(-1)
    assert p[known].min() > 0.999 and p[~known].max() < 0.9


def test_in_training_known_tokens_are_clean_and_cost_nothing():
    model = build("embed", 11)
    x0, t = data_and_times()
    model.KNOWN_SHARE, model.HIDDEN_SHARE = 1.0, 0.0
    seen = []

    def denoise(xt, t, sc, known):
        """Is right about unknown tokens only."""
        seen.append((known, (xt - model.embed(x0[-len(xt):])).norm(dim=-1)))
        return 50 * F.one_hot(x0[-len(xt):] + known, 12)[..., :11].float()

    model.denoise = denoise
    assert model(x0, t) < 1e-3
    known, distance = seen[-1]
    assert 0.1 < known.float().mean() < 0.9
    assert distance[known].max() < 1e-5 < distance[~known].min()


def test_hidden_tokens_cost_what_the_frequencies_leave():
    model = build("embed", 11)
    x0, t = data_and_times()
    torch.nn.init.zeros_(model.head.weight)                                     # the context tells nothing
    torch.nn.init.normal_(model.bias)
    frequencies = F.cross_entropy(model.bias.expand(x0.numel(), -1), x0.flatten())
    model.KNOWN_SHARE, model.HIDDEN_SHARE = 0.0, 1.0
    assert torch.allclose(model(x0, t), frequencies)
    model.HIDDEN_SHARE = 0.0
    assert model(x0, t) < frequencies - 0.1


# ---- samplers


def test_embeds_sampler_tells_the_network_what_the_context_told_and_the_present_noise():
    model = build("embed", 11)
    told = [0, 0]                                       # of the step before: with and without the known tokens

    def denoise(xt, t, sc, known=None):
        alone = model.alone(xt, t, known)
        assert torch.allclose(sc, alone + told.pop(0), atol=1e-3)
        told.append(torch.randn_like(alone))
        return alone + told[-1]

    model.denoise = denoise
    last(model.sample(*unknown(2, 8), 5, guidance=1))


CHOICES = {
    "schedule": list(SCHEDULES), "noise": [1, 1, 0.6, 1e-6], "guidance": [0, 0, 1.5],
    "temperature": [0, 0.5, 1, 2], "top_k": [0, 1, 3, 14], "top_p": [0.1, 0.9, 1]}
OWN = {
    "embed": {"eta": [0, 0.5, 1]},
    "masked": {"order": list(ORDERS), "threshold": [1, 1, 0.3], "remask": [0, 0, 0.3, 0.9]}}


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("seed", range(60))
def test_every_sampler_setting_keeps_known_tokens_and_its_promises(process, seed):
    rng = np.random.default_rng(seed)
    B, n, steps = rng.integers(1, [5, 33, 50]).tolist()
    known = torch.from_numpy(rng.random((B, n)) < rng.choice([0, 0.5, 0.9, 1]))
    x = torch.from_numpy(rng.integers(0, 11, (B, n)))
    settings = {name: rng.choice(values).item() for name, values in (CHOICES | OWN[process]).items()}
    model = build(process, 11)
    calls = []
    model.net.register_forward_hook(lambda *_: calls.append(1))
    states = list(model.sample(x, known, steps, **settings))
    for tokens, certainty in states:
        assert tokens.shape == certainty.shape == (B, n)
        assert (tokens[known] == x[known]).all() and (certainty[known] == 1).all()
        assert 0 <= certainty.min() and certainty.max() <= 1
    assert 0 <= tokens.min() and tokens.max() < 11
    assert (not known.all()) <= len(states) - 1 <= steps
    assert len(calls) == (len(states) - 1) * (1 + (settings["guidance"] > 0))


def test_schedules_leave_this_share_after_a_tenth_a_half_and_nine_tenths_of_the_steps():
    assert {name: [round(f(u), 2) for u in (1, 0.9, 0.5, 0.1, 0)] for name, f in SCHEDULES.items()} == {
        "linear": [1, 0.9, 0.5, 0.1, 0], "cosine": [1, 0.99, 0.71, 0.16, 0],
        "squared_cosine": [1, 0.98, 0.5, 0.02, 0], "exponential": [1, 0.73, 0.18, 0.02, 0]}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_masked_step_reveals_what_the_schedule_says(schedule):
    model = build("masked", 11)
    for n in 1, 2, 7, 29, 30, 100:
        left = [int((x == 11).sum()) for x, _ in model.sample(*unknown(1, 30), n, schedule=schedule)]
        grid = torch.tensor(30) * torch.tensor([SCHEDULES[schedule](1 - i / n) for i in range(n + 1)])
        assert left == sorted(set(grid.round().tolist()), reverse=True)     # nothing to reveal: no call


def test_orders_differ_in_what_they_call_certain():
    p = torch.tensor([[0.5, 0.5, 0.0], [0.45, 0.05, 0.5], [0.4, 0.3, 0.3]])
    ranks = {order: ORDERS[order](p).argsort().tolist() for order in ("margin", "entropy")}
    assert ranks == {"margin": [0, 1, 2], "entropy": [2, 1, 0]}


def test_what_is_certain_goes_first_and_above_the_threshold_at_once():
    model = build("masked", 3)
    certain = torch.tensor([[0, 0, 0, 1, 1, 1]])
    logits = 9.0 * F.one_hot(certain, 3) * certain[..., None]
    model.denoise = lambda xt, where: logits[where]

    def filled(order, threshold):
        """Which places are filled after the first step."""
        _, (x, _), *_ = model.sample(*unknown(1, 6), 6, order=order, threshold=threshold)
        return (x < 3).int()

    for order in "confidence", "margin", "entropy":
        first = filled(order, 1.0)
        assert first.sum() == 1 and (first <= certain).all()
    for order in ORDERS:
        assert (filled(order, 0.9) >= certain).all()


def test_draws_follow_the_probabilities_and_never_take_a_zero():
    torch.manual_seed(0)
    p = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    assert is_distributed(draw(p.expand(100_000, -1)), p)
    # a tail of 2^16 tokens that hold one half together, and one that holds next to nothing
    tail = torch.full((128, 2 ** 16), 2.0 ** -16)
    tail[:, 0] = 1
    assert 35 < (draw(tail) > 0).sum() < 93                                     # of 128 draws
    tail[:, 1:] = 2.0 ** -40
    assert (draw(tail) > 0).sum() <= 1


@pytest.mark.parametrize("settings, kept", [
    ((1.0, 2, 1.0), [2, 2]), ((1.0, 0, 0.7), [2, 2]), ((0.0, 0, 1.0), [1, 2]), ((1.0, 9, 0.9), [3, 2])])
def test_truncation_keeps_the_likeliest(settings, kept):
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 3.0, 3.0, 0.0]])        # .644, .237, .087, .032; ties
    p = probabilities(logits, *settings)
    assert (p > 0).sum(-1).tolist() == kept
    truth = (logits / max(settings[0], 0.1)).softmax(-1) * (p > 0)
    assert torch.allclose(p, truth / truth.sum(-1, keepdim=True))


# ---- the network


@pytest.mark.parametrize("n", [1, 2, 7])
def test_an_mlp_reads_half_of_its_channels_from_the_neighbours(n):
    x = torch.randn(3, n, 32)
    y = look_aside(x, (2, 1, -1, -2))
    padded = F.pad(x, (0, 0, 2, 2))                         # padded[:, i] is what stands two places before i
    for part, first in enumerate([0, 1, 3, 4, 2, 2, 2, 2]):
        channels = slice(4 * part, 4 * part + 4)
        assert torch.equal(y[..., channels], padded[:, first:first + n, channels])


def test_a_causal_network_sees_no_later_place():
    net = build("masked", 11).net
    stir(net)
    for block in net.blocks:
        block.causal = True
    x = torch.randn(1, 16, 32)
    y = net(x, torch.zeros(1))
    x[:, 9] += 1
    moved = (net(x, torch.zeros(1)) - y).abs().amax(-1)[0]
    assert (moved[:9] == 0).all() and (moved[9:] > 1e-4).all()


def test_network_sees_all_places_their_order_and_the_time():
    net = build("masked", 11).net
    stir(net)
    x = torch.randn(1, 16, 32)
    t = torch.tensor([0.3])
    y = net(x, t)
    for i in 0, 15:
        moved = x.clone()
        moved[0, i] += torch.randn(32)
        assert ((net(moved, t) - y).abs().sum(-1) > 1e-4).all()
    assert not torch.allclose(net(x, t + 0.3), y, atol=1e-3)
    assert not torch.allclose(net(x.flip(1), t), y.flip(1), atol=1e-3)


def test_rotary_positions_tell_distances_and_nothing_else(monkeypatch):
    seen = []
    monkeypatch.setattr(model, "rotate", lambda *args: seen.append(args) or rotate(*args))
    build("masked", 11, qk_norm=True).net(torch.randn(1, 16, 32), torch.tensor([0.3]))
    assert len(seen) == 4                                   # queries and keys of two layers
    x, *angle = seen[0]
    assert x.norm(dim=-1).std() < 1e-4                      # normalised
    y = rotate(x[:, :, :1].expand_as(x), *angle)            # the same vector at each position
    scores = y @ y.mT
    assert torch.allclose(scores[..., 1:, 1:], scores[..., :-1, :-1], atol=1e-4)
    assert not torch.allclose(scores[..., 1:], scores[..., :-1], atol=1e-2)


def test_bfloat16_computes_the_same_but_for_rounding():
    nets = [build("masked", 11, dtype=dtype).net for dtype in ("float32", "bfloat16")]
    stir(nets[0])
    nets[1].load_state_dict(nets[0].state_dict())
    x = torch.randn(1, 16, 32)
    exact, short = (net(x, torch.tensor([0.3])).float() for net in nets)
    assert 0 < (short - exact).std() < 0.05


def test_updates_are_orthogonal_enough_in_bfloat16_too():
    """The polynomials explode beyond 1, where a matrix of nearly one direction has its largest singular value."""
    for noise in 1e-4, 1e-2, 100:
        X = torch.randn(96, 1) @ torch.randn(1, 32) + noise * torch.randn(96, 32)
        for Y in X, X.T:
            values = torch.linalg.svdvals(orthogonalise(Y.bfloat16()).float())
            assert values[0] < 1.35 and (noise < 100 or values[-1] > 0.6)


# ---- GPUs, without one: tensors that say they are elsewhere, and what torch.compile makes of a step


class Elsewhere(torch.Tensor):
    """Says that it is on another device ("meta"), and keeps its numbers on the CPU."""

    @staticmethod
    def __new__(cls, inner):
        new = torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype,
                                                  device="meta")
        new.inner = inner
        return new

    @classmethod
    def __torch_dispatch__(cls, function, *_):
        raise AssertionError(f"{function} outside of Watch")


class Watch(TorchDispatchMode):
    """Computes with what is Elsewhere; raises where both devices meet; counts what makes the host wait."""

    waits = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        target = str(kwargs.get("device"))
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there = any(isinstance(x, Elsewhere) for x in tensors)
        here = any(not isinstance(x, Elsewhere) and x.dim() > 0 for x in tensors)
        assert not (there and here) or name == "copy_", f"{function} mixes devices"
        # the device must say how many places a mask holds, but for x[mask] = number
        by_mask = name.startswith("index") and all(x.dim() for x in args[2:3]) and any(
            x.dtype == torch.bool for x in tree_leaves(args[1]) if isinstance(x, torch.Tensor))
        reads = name in ("_local_scalar_dense", "nonzero", "equal", "masked_select")
        self.waits += reads or by_mask or there and (here or target == "cpu")
        args, kwargs = tree_map(lambda x: x.inner if isinstance(x, Elsewhere) else x, (args, kwargs))
        out = function(*args, **kwargs | ({"device": "cpu"} if "device" in kwargs else {}))
        stays = target == "meta" or there and target != "cpu"
        return tree_map(lambda x: Elsewhere(x) if stays and isinstance(x, torch.Tensor) else x, out)


@pytest.mark.parametrize("process, waits, samples", [
    ("masked", 2, [({}, 8), ({"guidance": 1.0}, 12), ({"top_p": 0.5, "noise": 0.5}, 8),
                   ({"order": "margin"}, 28), ({"threshold": 0.9}, 28), ({"remask": 0.1, "top_k": 3}, 8)]),
    ("embed", 0, [({}, 1), ({"guidance": 1.0}, 1), ({"eta": 0.5, "top_k": 3}, 1), ({"noise": 0.5}, 1)])])
def test_nothing_mixes_devices_and_the_host_waits_as_seldom_as_it_can(process, waits, samples, monkeypatch):
    tensor = torch.tensor                                   # it makes a meta tensor without asking
    monkeypatch.setattr(torch, "tensor", lambda data, device=None: tensor(data).to(device or "cpu"))
    model = build(process, 11)
    batch = *data_and_times(), torch.rand(8, 32) < 0.5
    with Watch() as watch:
        model._apply(Elsewhere)
        x0, t, known = map(Elsewhere, batch)
        model(x0, t).backward()
        assert watch.waits == waits + (waits > 0)           # the gradient of an index by a mask waits, too
        assert all(p.grad is not None for p in model.parameters())
        for method in model.nelbo, model.measures:
            watch.waits = 0
            method(x0, t)
            assert watch.waits == waits
        found = []
        for settings, _ in samples:
            watch.waits = 0
            *_, (tokens, certainty) = model.sample(x0, known, 4, **settings)
            assert isinstance(tokens, Elsewhere) and isinstance(certainty, Elsewhere)
            found.append((settings, watch.waits))
        assert found == samples


@pytest.mark.parametrize("process", PROCESSES)
def test_a_compiled_step_is_one_graph_for_any_number_of_masks_and_gives_the_same_loss(process):
    model = build(process, 11)
    counter = CompileCounterWithBackend("aot_eager")
    model.compile(backend=counter, fullgraph=True)          # raises where the graph would break
    for step in range(3):
        x0 = torch.randint(11, (8, 32))
        t = times(np.random.default_rng(step), 1, 8)[0]
        losses = []
        for function in model, model.forward:               # compiled and eager
            torch.manual_seed(step)
            losses.append(function(x0, t))
        losses[0].backward()
        assert abs((losses[0] - losses[1]).item()) < 1e-5
    assert counter.frame_count == 1


