"""Judges samples of a character model against the text it was trained on.

    python sample.py --num_samples 64 | python results/judge.py data/shakespeare

Prints, for the samples and for as many characters of the validation split: nats/char under a 5-gram model of
the training split (interpolated, Witten-Bell), the share of words that occur in that split, the entropy of
single characters (nats), and the most frequent character's share over its share in that split. Lower nats are
likelier text, but only at equal entropy: repeating "the the the" is likely too.
"""
import json
import math
import re
import sys
from collections import Counter

import numpy as np


class Judge:
    def __init__(self, folder):
        with open(f"{folder}/meta.json", encoding="utf-8") as f:
            chars = json.load(f)["chars"]
        text, self.val = ("".join(chars[i] for i in np.fromfile(f"{folder}/{split}.bin", np.uint16))
                          for split in ("train", "val"))
        self.V, self.words = len({*"".join(chars)}), set(re.findall(r"[A-Za-z']+", text))
        self.frequency = {char: count / len(text) for char, count in Counter(text).items()}
        self.counts = Counter(text[i:i + n] for n in range(1, 6) for i in range(len(text) - n + 1))
        self.totals, self.kinds = Counter(), Counter()  # of what follows each context
        for gram, count in self.counts.items():
            self.totals[gram[:-1]] += count
            self.kinds[gram[:-1]] += 1

    def probability(self, char, context):
        p = 1 / self.V
        for past in (context[len(context) - n:] for n in range(len(context) + 1)):
            if past not in self.totals:
                break
            p = (self.counts[past + char] + self.kinds[past] * p) / (self.totals[past] + self.kinds[past])
        return p

    def __call__(self, samples):
        """Dict of measures of a list of strings."""
        nats = [-math.log(self.probability(c, s[max(0, i - 4):i])) for s in samples for i, c in enumerate(s)]
        # words cut off by the ends of a sample don't count
        words = [w for s in samples for w in re.findall(r"(?<=[^A-Za-z'])[A-Za-z']+(?=[^A-Za-z'])", s)]
        share = {c: n / len(nats) for c, n in Counter("".join(samples)).items()}
        top = max(share, key=share.get)
        return {"5-gram nats": sum(nats) / len(nats),
                "real words": sum(w in self.words for w in words) / max(1, len(words)),
                "entropy": -sum(p * math.log(p) for p in share.values()),
                "top share": share[top] / self.frequency[top]}

if __name__ == "__main__":
    judge = Judge(sys.argv[1])
    samples = sys.stdin.read()[:-1].split("\n" + "-" * 80 + "\n")
    n, stride = len(samples[0]), len(judge.val) // len(samples)
    real = [judge.val[i:i + n] for i in range(0, len(judge.val) - n, stride)][:len(samples)]
    for name, texts in ("samples", samples), ("validation", real):
        print(f"{name:>12}: " + ", ".join(f"{key} {value:.3f}" for key, value in judge(texts).items()))
