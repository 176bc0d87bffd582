"""Any text to character tokens: data/<dataset>/ with train.bin, val.bin and meta.json.

    python prepare_shakespeare.py                             # downloads Tiny Shakespeare (1.1 MB)
    python prepare_shakespeare.py --input my.txt --dataset my # any UTF-8 text
    python prepare_shakespeare.py --offline                   # English text that ships inside Python
"""
import argparse
import hashlib
import http.client
import urllib.request

import numpy as np

from config import fail
from data import write_dataset

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def download():
    """Tiny Shakespeare as bytes, or None (and one line that says why) where there is no network."""
    try:
        with urllib.request.urlopen(URL, timeout=20) as response:
            raw = response.read()
    except (OSError, http.client.HTTPException) as e:
        print(f"Tiny Shakespeare can't be downloaded ({e}): using the reference text inside Python instead; "
              "pass --input FILE for a text of your own.")
        return None
    if hashlib.sha256(raw).hexdigest() != SHA256:
        fail(f"what came from {URL} is not Tiny Shakespeare (its sha256 differs): "
             "try again, or pass --input FILE")
    return raw


def prepare(dataset="shakespeare", path=None, offline=False):
    """Writes data/<dataset>: the first 90 % of the characters for training, the rest for validation."""
    raw, source = None, path
    if path:
        try:
            with open(path, "rb") as f:
                raw = f.read()
        except OSError as e:
            fail(f"{path} can't be read: {e.strerror}")
    elif not offline:
        raw, source = download(), "Tiny Shakespeare"
    if raw is None:
        from pydoc_data.topics import topics
        raw = "\n\n".join(topics[name] for name in sorted(topics)).encode()
        source = "the Python reference (pydoc_data.topics), in place of Shakespeare"
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as e:
        fail(f"{source} is not UTF-8 text: byte {e.start} can't be decoded; convert it first")
    chars = sorted(set(text))
    if len(text) < 10 or len(chars) < 2:
        fail(f"{source} has {len(text)} characters, {len(chars)} distinct: there is nothing to learn")
    if len(chars) > 65_535:
        fail(f"{source} has {len(chars):,} distinct characters: uint16 tokens and [MASK] allow 65,535")
    ids = {c: i for i, c in enumerate(chars)}
    tokens = np.fromiter((ids[c] for c in text), dtype=np.uint16, count=len(text))
    cut = int(0.9 * len(tokens))
    meta = {"tokenizer": "chars", "chars": "".join(chars), "vocab_size": len(chars), "source": source}
    write_dataset(dataset, tokens[:cut], tokens[cut:], meta)
    print(f"data/{dataset}: {len(text):,} characters of {source}; {cut:,} tokens to train on, "
          f"{len(tokens) - cut:,} to validate; alphabet of {len(chars)}: {''.join(chars)!r}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", help="a UTF-8 text file (default: download Tiny Shakespeare)")
    parser.add_argument("--dataset", default="shakespeare", help="name of the folder under data/")
    parser.add_argument("--offline", action="store_true", help="don't download: use the text inside Python")
    args = parser.parse_args()
    prepare(args.dataset, args.input, args.offline)
