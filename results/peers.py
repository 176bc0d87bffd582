"""What published packages of the field say and write when an exact model takes the place of their network.

    python -m venv env && . env/bin/activate
    pip install torch==2.13.0 numpy==2.4.6
    pip install flow-matching==1.0.10                       # what PACKAGES says beside the package's name
    python results/peers.py flow-matching                   # prints its rows of the table in peers.md

The data are 10 tokens of a Markov chain over 7, whose exact posterior is known. Two questions:

- What does the loss say of a model that knows nothing? Uniform logits must cost log 7 = 1.946 nats a token. And
  of the exact model? The entropy, 1.158: less is no bound, more is a loose one.
- What does the sampler write with the exact model? Its pairs of neighbours are compared with the chain's by total
  variation, after 2, 4, 10 and 32 steps, and [MASK]s that are left at the end are counted.

A model here is a function of tokens (B, T) in which 7 is [MASK]; it returns logits (B, T, 8), in which [MASK] is never
the answer. Models of uniform noise, which has no [MASK], return (B, T, 7) and need to know what share of the tokens the
noise has left alone; for the others a second argument changes nothing.
"""
import importlib.metadata
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).resolve().parents[1]))   # this repository, for `ours`

V = MASK = 7
T = 10
STEPS = 2, 4, 10, 32
N_LOSS, N_SAMPLES, BATCHES = 1000, 4000, 40
RNG = np.random.default_rng(0)

# ---- the chain, and what models know of it


def seeded(seed, *shape):
    """A tensor of normal random numbers that is the same everywhere."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


MOVES = (2 * seeded(3, V, V)).softmax(1)                    # p(next token | this one)
FIRST = seeded(4, V).softmax(0)


def marginals():
    """(T, V): how likely each token is at each place."""
    rows = [FIRST]
    for _ in range(T - 1):
        rows.append(rows[-1] @ MOVES)
    return torch.stack(rows)


PAIRS = marginals()[:-1].mean(0)[:, None] * MOVES           # of neighbours, over all places
ENTROPY = float(torch.special.entr(FIRST).sum() - (T - 1) * (PAIRS * MOVES.log()).sum()) / T


def text(n):
    """(n, T) tokens of the chain."""
    x = [torch.multinomial(FIRST, n, replacement=True)]
    for _ in range(T - 1):
        x.append(torch.multinomial(MOVES[x[-1]], 1)[:, 0])
    return torch.stack(x, 1)


def posterior(evidence):
    """log p(token | all evidence) at each place, by forward-backward; evidence (B, T, V) are likelihoods."""
    forward = torch.ones_like(evidence)
    backward = torch.ones_like(evidence)
    before = FIRST.expand(len(evidence), V)
    for i in range(T):
        forward[:, i] = F.normalize(before * evidence[:, i], p=1, dim=1, eps=0)
        before = forward[:, i] @ MOVES
    for i in range(T - 1, 0, -1):
        ahead = (backward[:, i] * evidence[:, i]) @ MOVES.T
        backward[:, i - 1] = F.normalize(ahead, p=1, dim=1, eps=0)
    both = F.normalize(forward * backward, p=1, dim=2, eps=0)
    return both.log().clamp(min=-60).float()


def with_mask(logits):
    """Logits with a column for [MASK], which is never the answer."""
    return torch.cat((logits, torch.full_like(logits[..., :1], -1e9)), -1)


def exact(x, kept=None):
    """The model that knows the chain."""
    seen = torch.cat((torch.eye(V), torch.ones(1, V))).double()
    return with_mask(posterior(seen[x]))


def uniform(x, kept=None):
    """The model that knows nothing."""
    return with_mask(torch.full((*x.shape, V), -math.log(V)))


def patched(model, revealed):
    """The model at [MASK]s, another one where tokens are revealed."""
    return lambda x, kept=None: model(x).where((x == MASK)[..., None], revealed(x))


def copy(x, kept=None):
    """The model that is sure of what it sees."""
    return 60.0 * F.one_hot(x, V + 1)


def likelihoods(x, kept):
    """Evidence for posterior: where noise leaves a token alone with probability kept, else draws any."""
    share = torch.as_tensor(kept).double().reshape(-1, 1, 1)
    return share * F.one_hot(x, V) + (1 - share) / V


def exact_of_noise(x, kept):
    """The model that knows the chain, under uniform noise."""
    return posterior(likelihoods(x, kept))


def uniform_of_noise(x, kept):
    """The model that knows nothing but how the noise works."""
    return likelihoods(x, kept).log().float()


# ---- what packages need around a model


def masks(n):
    """(n, T) where all is [MASK]."""
    return torch.full((n, T), MASK)


def noise(n):
    """(n, T) random tokens."""
    return torch.randint(V, (n, T))


def draw(logits):
    """A token at each place."""
    p = logits.softmax(-1)
    return torch.multinomial(p.flatten(0, -2), 1).view(p.shape[:-1])


def stepwise(step, start=masks):
    """The sampler that goes on with step(x, i, steps) from what start(n) gives."""
    def sample(n, steps):
        x = start(n)
        for i in range(steps):
            x = step(x, i, steps)
        return x
    return sample


def network(forward):
    """A torch module that answers by forward; its weights only tell where it lives."""
    net = torch.nn.Linear(1, 1)
    net.forward = forward
    return net


def probabilities(model):
    """The model, with probabilities in the place of logits."""
    return lambda x, t: model(x, t).softmax(-1)


# ---- the measurements


def mean_loss(loss, model):
    """The mean of loss(model, x0), which may be a scalar or have values for each row, and its standard error."""
    torch.manual_seed(0)
    means = torch.stack([loss(model, text(N_LOSS)).detach().mean() for _ in range(BATCHES)])
    return f"{means.mean():.3f} ± {means.std() / BATCHES ** .5:.3f}"


def distance(x):
    """Total variation between the pairs of neighbours in x (n, T) and the chain's."""
    pairs = x[:, :-1] * V + x[:, 1:]
    share = torch.bincount(pairs.flatten(), minlength=V * V) / pairs.numel()
    return 0.5 * float((share - PAIRS.flatten()).abs().sum())


def row(what, loss=None, sample=None, models=(uniform, exact), steps=STEPS, n=N_SAMPLES):
    """Prints a row: loss(model, x0) of the two models, samples of sample(n, steps) with the exact one."""
    losses = [mean_loss(loss, model) if loss else "" for model in models]
    distances, left = [], 0
    for k in steps if sample else ():
        torch.manual_seed(1)
        x = sample(n, k)
        left = max(left, float((x == MASK).float().mean()))
        whole = x[(x < V).all(1)]
        distances.append(f"{distance(whole):.3f}".lstrip("0") if len(whole) else "-")
    print("|", " | ".join([what, *losses, " / ".join(distances), f"{left:.0%}" if sample else ""]), "|", flush=True)


# ---- ours, and the scale


def scale():
    """True draws, and tokens that follow each place's distribution without looking at each other."""
    row("true draws", sample=lambda n, steps: text(n))
    alone = marginals()
    row("independent tokens", sample=lambda n, steps: torch.multinomial(alone, n, True).T)


def measure_ours(what, process, denoise, **settings):
    """A row of a process of this repository, whose network's place denoise(process, model, ...) takes."""
    from config import Config
    from diffusion import times

    cfg = Config(block_size=T, n_layer=1, n_head=1, n_embd=16, device="cpu")

    def build(model):
        built = process(cfg, V)
        built.denoise = partial(denoise, built, model)
        return built

    def loss(model, x0):
        return build(model).nelbo(x0, times(RNG, 1, len(x0))[0])

    def sample(n, steps):
        *_, (x, _) = build(exact).sample(masks(n), masks(n) != MASK, steps, **settings)
        return x

    row(what, loss, sample)


def ours():
    """This repository's two processes."""
    from diffusion import Embed, Masked

    def masked(process, model, xt, where):
        return model(xt)[where, :V]

    def embed(process, model, xt, t, *_):
        alone = process.alone(xt, t)            # what each noisy vector tells of its own token
        return posterior(alone.double().softmax(-1)) if model is exact else alone

    for order in "random", "confidence", "margin", "entropy":
        measure_ours(f"masked, order {order}", Masked, masked, order=order)
    measure_ours("embed", Embed, embed)


# ---- the packages


def flow_matching():
    """Meta's discrete flows: a path that mixes source and data, generalised KL, Euler solver."""
    from flow_matching.loss import MixturePathGeneralizedKL
    from flow_matching.path import MixtureDiscreteProbPath, scheduler
    from flow_matching.solver import MixtureDiscreteEulerSolver

    path = MixtureDiscreteProbPath(scheduler.CondOTScheduler())

    def measure(what, source, *models):
        def loss(model, x0):
            t = torch.rand(len(x0))
            xt = path.sample(source(len(x0)), x0, t).x_t
            return MixturePathGeneralizedKL(path)(model(xt, t), x0, xt, t)

        def sample(n, steps):
            solver = MixtureDiscreteEulerSolver(probabilities(models[1]), path, V + (source is masks))
            return solver.sample(source(n), 1 / steps)

        row(what, loss, sample, models)

    # at revealed places, which no loss trains, the first row's models know nothing
    measure("mask source", masks, uniform, patched(exact, uniform))
    measure("mask source, revealed places copied", masks, patched(uniform, copy), exact)
    measure("uniform source", noise, uniform_of_noise, exact_of_noise)


def bionemo_moco():
    """NVIDIA's MDLM, and its sampler that goes by confidence."""
    from bionemo.moco.distributions import prior, time
    from bionemo.moco.interpolants import MDLM
    from bionemo.moco.schedules.noise import continuous_noise_transforms as schedules

    def loss(model, x0):
        t = mdlm.sample_time(len(x0))
        xt = mdlm.interpolate(x0, t)
        return mdlm.loss(model(xt), x0, xt, t)

    def step(x, i, steps):
        return mdlm.step(exact(x), torch.tensor([1 - i / steps]), x, 1 / steps)

    for schedule in schedules.CosineExpNoiseTransform, schedules.LogLinearExpNoiseTransform:
        mdlm = MDLM(time.UniformTimeDistribution(), prior.DiscreteMaskedPrior(V + 1), schedule())
        row(f"MDLM, {schedule.__name__}", loss, stepwise(step))
    row("MDLM.step_confidence", steps=[T], sample=stepwise(
        lambda x, *i: mdlm.step_confidence(exact(x), x, *i)))


def diffusers():
    """The schedulers for tokens; they have no losses."""
    import diffusers as lib

    amused = lib.AmusedScheduler(MASK, "linear")

    def measure(what, scheduler, start=masks, model=exact, **settings):
        def step(x, i, steps):
            scheduler.set_timesteps(steps)
            t = steps - 1 - i if scheduler is amused else i             # the others count up
            return scheduler.step(model(x, i / steps), t, x, **settings).prev_sample

        row(what, sample=stepwise(step, start))

    measure("AmusedScheduler, default temperature (2, 0)", amused)
    blocks = lib.BlockRefinementScheduler(T)
    measure("BlockRefinementScheduler, temperature 1", blocks, mask_token_id=MASK, temperature=1.0)
    measure("BlockRefinementScheduler, default temperature 0", blocks, mask_token_id=MASK)
    ddim = lib.DiscreteDDIMScheduler()
    measure("DiscreteDDIMScheduler, temperature 1", ddim, noise, exact_of_noise, temperature=1.0)
    measure("DiscreteDDIMScheduler, default temperature 0", ddim, noise, exact_of_noise)
    more_of_diffusers()


def more_of_diffusers():
    """Two more of its samplers: DiscreteDDIMScheduler with its corrector, and VQDiffusionScheduler."""
    import diffusers as lib

    def step(x, i, steps):
        ddim.set_timesteps(steps)
        x = ddim.step(exact_of_noise(x, i / steps), i, x, temperature=1.0).prev_sample
        for _ in range(4 * (i + 1 < steps)):
            x = ddim.step_correct(exact_of_noise(x, (i + 1) / steps), i, x).prev_sample
        return x

    for settings in {}, {"corrector_selection": "random"}:
        ddim = lib.DiscreteDDIMScheduler(**settings)
        row(f"DiscreteDDIMScheduler, 4 sweeps of its corrector a step, {settings}", sample=stepwise(step, noise))

    def vq(x, i, steps):
        scheduler = lib.VQDiffusionScheduler(V + 1, num_train_timesteps=steps)
        logits = exact(x)[..., :V].transpose(1, 2)
        return scheduler.step(logits, steps - 1 - i, x).prev_sample

    row("VQDiffusionScheduler, as many steps as trained", sample=stepwise(vq))


def transformers():
    """The entropy-bound sampler of DiffusionGemma; the model is told which tokens of the canvas were accepted."""
    from transformers.models.diffusion_gemma import generation_diffusion_gemma as gemma

    bound = gemma.EntropyBoundSamplerConfig(0.1)              # generate's default, as .8 and .4 are

    def measure(what, argmax, t_max, t_min):
        def sample(n, steps):
            sampler = gemma.EntropyBoundSampler(bound, T, V, steps)
            x = noise(n)
            known = x == MASK                                               # none
            for left in range(steps, 0, -1):
                logits = exact(x.where(known, MASK))[..., :V] / (t_min + (t_max - t_min) * left / steps)
                x = sampler.accept_canvas(x, draw(logits), logits, left)
                x, known = sampler.renoise_canvas(x, left), sampler.accepted_token_mask
            return logits.argmax(-1) if argmax else x

        row(what, sample=sample)

    measure("EntropyBoundSampler, its canvas, temperature 1", False, 1, 1)
    measure("EntropyBoundSampler, the argmax that generate returns, temperature 1", True, 1, 1)
    measure("EntropyBoundSampler, as generate does it, temperature .8 to .4", True, 0.8, 0.4)


def x_transformers():
    """Its wrapper for masked models; the network itself is replaced."""
    from x_transformers import Encoder, NonAutoregressiveWrapper, TransformerWrapper

    def wrapper(model, **settings):
        net = TransformerWrapper(num_tokens=V + 1, max_seq_len=T, attn_layers=Encoder(dim=8, depth=1, heads=1))

        def forward(x, return_logits_and_embeddings=False, **_):
            logits = model(x)
            return (logits, None) if return_logits_and_embeddings else logits

        net.forward = forward
        exactly = {"no_replace_prob": 0.0, "random_token_prob": 0.0}
        return NonAutoregressiveWrapper(net, mask_id=MASK, **exactly, **settings)

    def loss(**settings):
        return lambda model, x0: wrapper(model, **settings)(x0).loss

    def sample(**settings):
        return lambda n, steps: wrapper(exact, steps=steps).generate(n, **settings)

    row("NonAutoregressiveWrapper", loss(), sample())
    row("the same without its loss weight, and without its filter",
        loss(use_simple_mdlm_loss_weight=False), sample(filter_thres=None))


def d3_dna():
    """SEDD with its absorbing graph, by the score of the exact model: log p - log(e^sigma - 1) at a [MASK]."""
    from d3_dna.models.diffusion import Absorbing, GeometricNoise, get_pc_sampler

    graph = Absorbing(V)

    @network
    def score(x, labels, train, sigma, model=exact):
        log_p = model(x) - sigma.expm1().log().reshape(-1, 1, 1)
        log_p[..., MASK] = 0
        return log_p

    def measure(schedule):
        def loss(model, x0):
            sigma, rate = schedule(torch.rand(len(x0), 1))
            xt = graph.sample_transition(x0, sigma)
            return rate * graph.score_entropy(score(xt, None, True, sigma, model), sigma, xt, x0)

        def sample(n, steps):
            return get_pc_sampler(graph, schedule, (n, T), "analytic", steps)(score, None)

        row(f"SEDD, sigma {schedule.sigmas[0]:g} to {schedule.sigmas[1]:g}, analytic", loss, sample)

    measure(GeometricNoise())
    measure(GeometricNoise(1e-4, 20))


def dllm_reason():
    """MDLM and its random order."""
    from dllm_reason.models.base import DiffusionOutput
    from dllm_reason.models.mdlm import MDLM
    from dllm_reason.scheduler.random_scheduler import RandomScheduler

    def build(model):
        mdlm = MDLM(V, T, dim=8, num_layers=1, num_heads=1, noise_schedule="linear")
        mdlm.forward = lambda x, t, attention_mask=None: DiffusionOutput(model(x), None, None)
        return mdlm

    row("MDLM, linear", lambda model, x0: build(model).compute_loss(x0),
        lambda n, steps: build(exact).sample(RandomScheduler(), n, T, num_steps=steps))


def telos_ml():
    """MDLM's loss and its sampler, which goes by a margin with noise and takes one text at a time."""
    from telos.diffusion.mdlm import apply_masking_pytorch, mdlm_loss_pytorch
    from telos.diffusion.sampler import MDLMSampler

    ordinary = torch.zeros(V + 1, dtype=torch.bool)         # no token is special
    net = network(exact)

    def loss(model, x0):
        t = torch.rand(len(x0), 1).clamp(min=1e-5)
        xt, hidden, t = apply_masking_pytorch(x0, t, MASK, ordinary)
        return mdlm_loss_pytorch(model(xt), x0, hidden, t)[0]

    def sample(n, steps):
        sampler = MDLMSampler(net, MASK, steps, repetition_penalty=1.0, schedule="linear")
        return torch.cat([sampler.sample(T) for _ in range(n)])

    row("MDLM, linear, no repetition penalty", loss, sample, n=1500)


def omgformers():
    """MaskScheduler for training, ParallelDecoder for sampling."""
    from types import SimpleNamespace

    from omgformers.diffusion import MaskScheduler, ParallelDecoder

    def measure(schedule):
        def scheduler(steps):
            return MaskScheduler(steps, schedule, MASK, -1, V + 1, random_token_prob=0.0)

        def loss(model, x0):
            t = torch.randint(1, T + 1, (len(x0),))
            xt, hidden = scheduler(T).corrupt_batch(x0, t, T)
            return scheduler(T).compute_loss(model(xt), x0, hidden)

        def sample(n, steps):
            net = network(lambda x, timesteps: SimpleNamespace(logits=exact(x)))
            prompt = torch.empty(n, 0, dtype=torch.long)
            return ParallelDecoder(net, scheduler(steps)).generate(prompt, T, steps)

        row(f"masked, plain mean, {schedule}", loss, sample)

    measure("cosine")
    measure("linear")


def evodiff():
    """OADM: masks, reweighted loss, and its sampler, which reveals one place a step. 31 symbols, of which we use 7."""
    from evodiff.collaters import OAMaskCollater
    from evodiff.generate import generate_oaardm
    from evodiff.losses import OAMaskedCrossEntropyLoss
    from evodiff.utils import Tokenizer

    tokenizer = Tokenizer()

    def widened(model, x):
        return F.pad(model(x.where(x < V, MASK)), (0, 23), value=-60.0)

    def loss(model, x0):
        xt, k, x, hidden = OAMaskCollater()([(tokenizer.untokenize(line),) for line in x0])
        nats, _ = OAMaskedCrossEntropyLoss()(widened(model, xt), x, hidden, k, torch.ones_like(x))
        return nats / x.numel()

    def sample(n, steps):
        return generate_oaardm(lambda x, t: widened(exact, x), tokenizer, T, batch_size=n, device="cpu")[0]

    row("OADM", loss, sample, steps=(T,))


def dantinox():
    """LLaDA's loss on JAX, with times from 0 and from the trainer's lowest, .05."""
    import jax
    from dantinox.core.diffusion import corrupt, masked_cross_entropy

    def array(x):
        return jax.numpy.asarray(x.numpy())

    def measure(schedule, lowest):
        def loss(model, x0):
            key = jax.random.key(int(torch.randint(2 ** 31, ())))
            t = array(lowest + (1 - lowest) * torch.rand(len(x0)))
            xt = corrupt(array(x0), t, key, schedule, MASK)
            logits = array(model(torch.tensor(xt.tolist())))
            return torch.tensor(float(masked_cross_entropy(logits, array(x0), xt, MASK, t)))

        row(f"{schedule}, times from {lowest:g}", loss)

    measure("linear", 1e-6)
    measure("linear", 0.05)
    measure("cosine", 0.05)
    measure("sqrt", 0.05)


def llada():
    """Not a package: the sampler of LLaDA's paper (arXiv:2502.09992) in our own words."""
    def measure(what, temperature):
        def step(x, i, steps):
            logits = exact(x)[..., :V]
            drawn = draw(logits / temperature) if temperature else logits.argmax(-1)
            sure = logits.softmax(-1).gather(2, drawn[..., None])[..., 0]
            sure = sure.where(x == MASK, 2.0)
            x = drawn.where(x == MASK, x)
            again = sure.argsort(1)[:, :T * (steps - 1 - i) // steps]       # the least sure are masked again
            return x.scatter(1, again, MASK)

        row(what, sample=stepwise(step))

    measure("low-confidence remasking, temperature 1", 1.0)
    measure("low-confidence remasking, temperature 0, as in the paper", 0.0)


PACKAGES = {        # function, and what pip installs
    "scale": (scale, ""),
    "ours": (ours, ""),
    "llada": (llada, ""),
    "flow-matching": (flow_matching, "flow-matching==1.0.10"),
    "bionemo-moco": (bionemo_moco, "bionemo-moco==0.0.2.2"),
    "diffusers": (diffusers, "diffusers==0.42.1 huggingface-hub==2.4.0"),
    "transformers": (transformers, "transformers==5.24.0"),
    "x-transformers": (x_transformers, "x-transformers==2.31.10"),
    "d3-dna": (d3_dna, "d3-dna==0.1.3"),
    "dllm-reason": (dllm_reason, "--no-deps dllm-reason==1.6.1 einops==0.8.2 tqdm==4.70.1"),
    "telos-ml": (telos_ml, "telos-ml==1.2.0"),
    "omgformers": (omgformers, "--no-deps omgformers==2.0.6 tqdm==4.70.1"),
    "evodiff": (evodiff, "evodiff==1.1.2 'setuptools<81'"),
    "dantinox": (dantinox, "dantinox==0.4.14 flax==0.12.4"),
}


if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) == 2 else ""
    if name not in PACKAGES:
        sys.exit("one of: " + "".join(f"\n  {name:16} pip install {pins}" for name, (_, pins) in PACKAGES.items()))
    torch.set_num_threads(1)
    np.random.seed(0)                   # which some draw from; torch is seeded for each measurement
    measure_package, pins = PACKAGES[name]
    version = importlib.metadata.version(name) if pins else ""
    print(f"{name} {version} torch {torch.__version__}; entropy {ENTROPY:.4f}, log V {math.log(V):.4f}")
    measure_package()
