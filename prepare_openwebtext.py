"""Many documents to GPT-2 tokens: data/<dataset>/ with train.bin, val.bin and meta.json.

    python prepare_openwebtext.py                                      # OpenWebText: 13 GB to download
    python prepare_openwebtext.py --input folder more.jsonl.gz --dataset my
    python prepare_openwebtext.py --input train.txt.xz --val val.txt.xz --dataset my

Reads .txt (documents between lines of <|endoftext|>), .jsonl (field "text"), both also as .xz or .gz, and
.tar archives of .txt documents or of .xz tars of them. A document goes to validation by a hash of its text,
one in 2,000, unless --val names ready validation texts. Stopped anywhere, the same command goes on, to the
same bytes as a run that was never stopped.
"""
import argparse
import contextlib
import gzip
import hashlib
import http.client
import io
import itertools
import json
import lzma
import os
import re
import shutil
import tarfile
import time
import urllib.request
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from config import fail
from data import Tokenizer, replace_file

URL = "https://huggingface.co/datasets/Skylion007/openwebtext/resolve/main/subsets/urlsf_subset{:02d}.tar"
DOCUMENTS = 8_013_769                       # in its 21 archives
KINDS = (".txt", ".txt.xz", ".txt.gz", ".jsonl", ".jsonl.xz", ".jsonl.gz", ".tar", ".tar.xz", ".tar.gz")
META = {"tokenizer": "gpt2", "vocab_size": 50257}
EOT = 50256                                 # <|endoftext|>, after each document
UNIT = 2 ** 20                              # characters in a piece of work; a longer document becomes several
VAL_SHARE = 0.0005
KEEP_SECONDS = 2                            # between updates of progress.json: what a crash may cost


# ------------------------------------------------------------------------------------------------------------
# sources: files, archives, downloads

class Download(io.RawIOBase):
    """The bytes at url; takes up a broken connection where it was, gives up after five breaks in a row."""

    def __init__(self, url):
        self.url, self.at, self.size, self.response = url, 0, None, None

    def connect(self):
        request = urllib.request.Request(self.url, headers={"Range": f"bytes={self.at}-"})
        self.response = urllib.request.urlopen(request, timeout=60)
        if self.at and self.response.status != 206:
            raise OSError("the server can't continue a download")
        self.size = self.at + int(self.response.headers["Content-Length"])

    def read(self, n=-1):
        for attempt in range(6):
            try:
                if self.response is None:
                    self.connect()
                data = self.response.read(n)
                if not data and self.at < self.size:
                    raise OSError("the connection ended early")
                self.at += len(data)
                return data
            except (OSError, http.client.HTTPException) as e:
                self.response = None
                if self.size is None or attempt == 5:
                    raise OSError(f"download failed: {e}") from e
                time.sleep(2 ** attempt)


@contextlib.contextmanager
def reading(source):
    """Ends the program with one sentence if source can't be read."""
    try:
        yield
    except (OSError, EOFError, lzma.LZMAError, zlib.error, tarfile.TarError, UnicodeDecodeError) as e:
        fail(f"{source} can't be read ({e}); once it can, the same command goes on from what is done")


def members(tar, kinds):
    """Yields name and bytes of the files of these kinds in an archive; an archive cut short is an error."""
    for member in tar:
        if member.isfile() and member.name.endswith(kinds):
            yield member.name, tar.extractfile(member).read()
    # an archive ends in two blocks of zeros; tarfile itself takes any bad header for the end
    if tar.fileobj.tell() != tar.offset + 512 or tar.fileobj.read(512).strip(b"\0"):
        raise tarfile.ReadError("the archive is cut short or damaged")


def texts(source):
    """Yields the documents of a .txt or .jsonl file."""
    opener = lzma.open if source.endswith(".xz") else gzip.open if source.endswith(".gz") else open
    document, size = [], 0
    with opener(source, "rt", encoding="utf-8") as f:
        if ".jsonl" in os.path.basename(source):
            for n, line in enumerate(f, 1):
                try:
                    yield json.loads(line)["text"] + ""
                except (ValueError, LookupError, TypeError):
                    fail(f'{source}, line {n}: not a JSON object with a string "text"')
            return
        while line := f.readline(UNIT):
            ends = line.rstrip("\r\n") == "<|endoftext|>"
            if ends or size + len(line) > UNIT:
                yield "".join(document)
                document, size = [], 0
            if not ends:
                document.append(line)
                size += len(line)
    yield "".join(document)


def units(source):
    """Yields pieces of work in a fixed order: lists of documents, or the bytes of an .xz tar of documents."""
    with reading(source):
        if re.search(r"\.tar(\.xz|\.gz)?$", source):
            with (Download(source) if source.startswith("http") else open(source, "rb")) as stream, \
                    tarfile.open(fileobj=stream, mode="r|*") as tar:
                for name, content in members(tar, (".txt", ".xz")):
                    yield content if name.endswith(".xz") else [content.decode()]
            return
        unit, size = [], 0
        for text in texts(source):
            unit.append(text)
            size += len(text)
            if size >= UNIT:
                yield unit
                unit, size = [], 0
        yield unit


# ------------------------------------------------------------------------------------------------------------
# tokens

def tokenise(tokenizer, unit, source, split):
    """{split: (number of documents, tokens as bytes)} of a unit; if split is None, a text's hash decides."""
    if isinstance(unit, bytes):
        with reading(source), tarfile.open(fileobj=io.BytesIO(unit), mode="r|xz") as tar:
            # as the usual loader of OpenWebText does, for the same tokens
            unit = [re.sub("\n\n\n+", "\n\n", content.decode()) for _, content in members(tar, ".txt")]
    tokens = {"train": [], "val": []}
    for text in unit:
        raw = text.strip().encode("utf-8", "replace")       # JSON may hold half a character
        share = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big") / 2 ** 64
        if raw:
            ids = tokenizer.bpe.encode_to_numpy(raw.decode(), disallowed_special=())
            tokens[split or ("val" if share < VAL_SHARE else "train")].append(np.append(ids, EOT))
    return {split: (len(some), np.concatenate(some).astype(np.uint16).tobytes() if some else b"")
            for split, some in tokens.items()}


def in_order(function, items):
    """Yields function(item) for each item, computed by one thread per core (tiktoken frees Python's lock)."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pending = deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > 2 * os.cpu_count():                           # no more than this in memory
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def find(paths):
    """The files to read: those named, and all of a known kind in the folders named, in alphabetical order."""
    found = []
    for path in paths:
        inside = sorted(os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
        files = [name for name in inside if name.endswith(KINDS)] if os.path.isdir(path) else [path]
        if not files or not os.path.isfile(files[0]) or not files[0].endswith(KINDS):
            fail(f"{path} is neither a file {', '.join(KINDS)} nor a folder with such files")
        found += files
    return found


# ------------------------------------------------------------------------------------------------------------
# to disk: progress.json says how much of train.bin.tmp and val.bin.tmp is final, and where to go on

def write(folder, sources, done):
    """Appends the tokens of what is left of sources to the folder's .tmp files, keeping the journal."""
    tokenizer, journal = Tokenizer(META), os.path.join(folder, "progress.json")
    with contextlib.ExitStack() as stack:
        files = {}
        for split, size in done["bytes"].items():
            path = os.path.join(folder, f"{split}.bin.tmp")
            files[split] = stack.enter_context(open(path, "ab"))
            if files[split].tell() < size:
                fail(f"{path} is shorter than {journal} says: delete {journal} to start over")
            files[split].truncate(size)

        def keep(source, unit):
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
            done.update(source=source, unit=unit)
            replace_file(journal, json.dumps(done).encode())

        total = DOCUMENTS if sources[0][0].startswith("http") else None
        bar = stack.enter_context(
            tqdm(initial=sum(done["documents"].values()), total=total, unit=" documents"))
        start, kept, before = time.time(), time.time(), sum(done["bytes"].values())
        for source in range(done["source"], len(sources)):
            name, split, _ = sources[source]
            first = done["unit"]
            results = in_order(lambda unit, name=name, split=split: tokenise(tokenizer, unit, name, split),
                               itertools.islice(units(name), first, None))
            for unit, result in enumerate(results, first + 1):
                for split, (n, tokens) in result.items():
                    files[split].write(tokens)
                    done["bytes"][split] += len(tokens)
                    done["documents"][split] += n
                    bar.update(n)
                new = sum(done["bytes"].values()) - before
                bar.set_postfix_str(f"{new / 2 / (time.time() - start):,.0f} tokens/s", refresh=False)
                if time.time() - kept > KEEP_SECONDS:
                    keep(source, unit)
                    kept = time.time()
            keep(source + 1, 0)


def prepare(dataset="openwebtext", inputs=(), val=()):
    """Writes data/<dataset>/ train.bin, val.bin and meta.json from files and folders, or from OpenWebText."""
    split = "train" if val else None
    sources = [[path, split, os.path.getsize(path)] for path in find(inputs)]
    if not inputs:
        sources = [[URL.format(i), split, 0] for i in range(21)]
    sources += [[path, "val", os.path.getsize(path)] for path in find(val)]
    folder = os.path.join("data", dataset)
    journal = os.path.join(folder, "progress.json")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as e:
        fail(f"{folder} can't be made: {e.strerror}")
    done = {"sources": sources, "source": 0, "unit": 0,
            "bytes": {"train": 0, "val": 0}, "documents": {"train": 0, "val": 0}}
    if os.path.exists(journal):
        with open(journal, encoding="utf-8") as f:
            done = json.load(f)
        if done["sources"] != sources:
            fail(f"{journal} belongs to an unfinished run with other inputs: repeat that command, or delete "
                 "the file to start over")
        print(f"going on after {sum(done['documents'].values()):,} documents")
    # a byte of English becomes 0.46 bytes of tokens, one of compressed English 1.6
    need = sum(size * (0.46 if name.endswith((".txt", ".jsonl")) else 1.6) for name, _, size in sources) / 1e9
    need, free = need + (0 if inputs else 18.1), shutil.disk_usage(folder).free / 1e9
    print(f"{folder}: {len(sources)} files to read; the tokens take about {need:.2f} GB of {free:.1f} free")
    try:
        if done["source"] < len(sources):       # else it was stopped in finish(), the .tmp files may be gone
            write(folder, sources, done)
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on from here")
    except OSError as e:
        fail(f"{folder} can't be written ({e.strerror}): make room, then run the same command, which goes on")
    names = ", ".join(os.path.basename(path) for path, *_ in sources[:4]) + ", ..." * (len(sources) > 4)
    finish(folder, done, names if inputs else "OpenWebText")


def finish(folder, done, source):
    """Turns the .tmp files into a dataset; stopped on the way, it can be repeated."""
    journal, meta_path = os.path.join(folder, "progress.json"), os.path.join(folder, "meta.json")
    for split, size in done["bytes"].items():
        if size == 0:
            for path in journal, *(os.path.join(folder, f"{split}.bin.tmp") for split in done["bytes"]):
                os.remove(path)
            fail(f"there is no text for {split}.bin in {sum(done['documents'].values())} documents; one in "
                 "2,000 goes to validation: pass more text, or a ready one with --val")
    if os.path.exists(meta_path):
        os.remove(meta_path)                # without it, nobody takes the files for whole
    for split in done["bytes"]:
        path = os.path.join(folder, f"{split}.bin")
        if os.path.exists(path + ".tmp"):
            os.replace(path + ".tmp", path)
    counts = {f"{split}_{what}": done[key][split] // size for split in done["bytes"]
              for what, key, size in (("tokens", "bytes", 2), ("documents", "documents", 1))}
    replace_file(meta_path, json.dumps(META | {"source": source} | counts, indent=1).encode())
    os.remove(journal)
    print(", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", default=(), help="files and folders (default: download)")
    parser.add_argument("--val", nargs="+", default=(), help="files and folders for validation alone")
    parser.add_argument("--dataset", default="openwebtext", help="name of the folder under data/")
    args = parser.parse_args()
    prepare(args.dataset, args.input, args.val)
