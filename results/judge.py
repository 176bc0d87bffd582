"""Judges samples of a character model against the text it was trained on.

Lower nats are likelier text, but only at equal entropy: repeating "the the the" is likely too.

    python sample.py --num_samples 64 | python results/judge.py data/shakespeare

Prints, for the samples and for as many characters of the validation split: nats/char under a 5-gram model of
the training split (interpolated, Witten-Bell), the share of words that occur in the training split, the
entropy of single characters (nats), and the most frequent character with its share over that in the training
split.
"""
import collections
import json
import math
import re
import sys

import numpy as np


class Judge:
    def __init__(self, folder, order=5):
        with open(f"{folder}/meta.json", encoding="utf-8") as f:
            chars = json.load(f)["chars"]
        self.text, self.val = ("".join(chars[i] for i in np.fromfile(f"{folder}/{split}.bin", np.uint16))
                               for split in ("train", "val"))
        self.order, self.V = order, len(chars)
        self.words = set(re.findall(r"[A-Za-z']+", self.text))
        self.frequency = collections.Counter(self.text)
        self.counts = [collections.Counter(self.text[i:i + n] for i in range(len(self.text) - n + 1))
                       for n in range(1, order + 1)]
        self.totals, self.kinds = collections.Counter(), collections.Counter()
        for counts in self.counts:
            for gram, count in counts.items():
                self.totals[gram[:-1]] += count
                self.kinds[gram[:-1]] += 1

    def probability(self, char, context):
        p = 1 / self.V
        for n in range(min(self.order, len(context) + 1)):                      # from zero to four characters
            past = context[len(context) - n:]
            if past not in self.totals:
                break
            p = (self.counts[n][past + char] + self.kinds[past] * p) / (self.totals[past] + self.kinds[past])
        return p

    def __call__(self, samples):
        """Dict of measures of a list of strings."""
        nats = [-math.log(self.probability(c, s[max(0, i - 4):i])) for s in samples for i, c in enumerate(s)]
        # words cut off by the end of a sample don't count
        words = [w for s in samples for w in re.findall(r"(?<=[^A-Za-z'])[A-Za-z']+(?=[^A-Za-z'])", s)]
        share = {c: n / len(nats) for c, n in collections.Counter("".join(samples)).items()}
        top = max(share, key=share.get)
        return {"5-gram nats": sum(nats) / len(nats),
                "real words": sum(w in self.words for w in words) / max(1, len(words)),
                "entropy": -sum(p * math.log(p) for p in share.values()),
                "top share": share[top] / (self.frequency[top] / len(self.text))}


if __name__ == "__main__":
    judge = Judge(sys.argv[1])
    samples = sys.stdin.read()[:-1].split("\n" + "-" * 80 + "\n")
    n = len(samples[0])
    real = [judge.val[i:i + n]
            for i in range(0, len(judge.val) - n, len(judge.val) // len(samples))][:len(samples)]
    for name, texts in ("samples", samples), ("validation", real):
        print(f"{name:>12}: " + ", ".join(f"{key} {value:.3f}" for key, value in judge(texts).items()))
