"""Judges samples of a character model against the text it was trained on.

    python sample.py --num_samples 64 | python results/judge.py data/shakespeare

Prints, for the samples and for as many characters of the validation split: nats/char under a 5-gram model of
the training split (interpolated, Witten-Bell), the share of words that occur in that split, the entropy of
single characters (nats), and the most frequent character's share over its share in that split. Lower nats are
likelier text, but only at equal entropy: repeating "the the the" is likely, too.
"""
import json
import math
import re
import sys
from collections import Counter

import numpy as np


class Judge:
    """The 5-gram model, and the words, of the training split in a folder of data/."""

    def __init__(self, folder):
        with open(f"{folder}/meta.json", encoding="utf-8") as f:
            strings = json.load(f)["chars"]

        def read(split):
            ids = np.fromfile(f"{folder}/{split}.bin", np.uint16)
            return "".join(strings[i] for i in ids)

        text = read("train")
        self.val = read("val")
        self.V = len(set("".join(strings)))
        self.words = set(re.findall(r"[A-Za-z']+", text))
        self.frequency = {char: count / len(text) for char, count in Counter(text).items()}
        self.counts = Counter()                         # of all grams of 1 to 5 characters
        for n in range(1, 6):
            self.counts.update(text[i:i + n] for i in range(len(text) - n + 1))
        self.totals = Counter()                         # of the characters that follow each context
        self.kinds = Counter()                          # of the different ones among them
        for gram, count in self.counts.items():
            context = gram[:-1]
            self.totals[context] += count
            self.kinds[context] += 1

    def probability(self, char, context):
        """Of a character after a context of up to four, mixed from those of all the context's ends."""
        p = 1 / self.V
        for n in range(len(context) + 1):
            end = context[len(context) - n:]
            if end not in self.totals:
                break
            p = (self.counts[end + char] + self.kinds[end] * p) / (self.totals[end] + self.kinds[end])
        return p

    def __call__(self, samples):
        """Dict of measures of a list of strings."""
        nats = 0
        for s in samples:
            for i, char in enumerate(s):
                nats -= math.log(self.probability(char, s[max(0, i - 4):i]))
        # words that are cut off by the ends of a sample don't count
        whole = r"(?<=[^A-Za-z'])[A-Za-z']+(?=[^A-Za-z'])"
        words = [word for s in samples for word in re.findall(whole, s)]
        real = [word for word in words if word in self.words]
        chars = Counter("".join(samples))
        n = chars.total()
        share = {char: count / n for char, count in chars.items()}
        top = max(share, key=share.get)
        return {
            "5-gram nats": nats / n,
            "real words": len(real) / max(1, len(words)),
            "entropy": -sum(p * math.log(p) for p in share.values()),
            "top share": share[top] / self.frequency[top],
        }


if __name__ == "__main__":
    judge = Judge(sys.argv[1])
    samples = sys.stdin.read()[:-1].split("\n" + "-" * 80 + "\n")
    length = len(samples[0])
    stride = len(judge.val) // len(samples)
    starts = range(0, len(judge.val) - length, stride)
    real = [judge.val[i:i + length] for i in starts][:len(samples)]
    for name, texts in ("samples", samples), ("validation", real):
        measures = [f"{key} {value:.3f}" for key, value in judge(texts).items()]
        print(f"{name:>12}: {', '.join(measures)}")
