"""Many documents to GPT-2 tokens: data/<dataset>/ with train.bin, val.bin and meta.json.

    python prepare_openwebtext.py                                      # OpenWebText: 13 GB to download
    python prepare_openwebtext.py --input folder more.jsonl.gz --val held_out.txt --dataset my

Reads .txt (documents between lines of <|endoftext|>), .jsonl, .ndjson, plain, .xz or .gz, and tars of these.
Without --val, a hash of its text sends one document in 2,000 to validation. Stopped anywhere, the same
command goes on behind the last whole file, and ends with the same bytes.
"""
import glob
import hashlib
import io
import json
import os
import re
import shlex
import sys
import tarfile
import time
import urllib.request
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from config import fail
from data import UNREADABLE, Tokenizer, opened, replace_file
from prepare_shakespeare import owned

URL = "https://huggingface.co/datasets/Skylion007/openwebtext/resolve/main/subsets/urlsf_subset{:02d}.tar"
KINDS = {"text": r"[^/]*\.txt(\.xz|\.gz)?", "lines": r"[^/]*(\.(jsonl|ndjson)(\.xz|\.gz)?|\.json\.(xz|gz))",
         "tar": r"[^/]*\.(tar|tar\.xz|tar\.gz|tgz)|[^/.]*\.xz"}         # the last: inside OpenWebText's tars
SEPARATOR = re.compile(r"[\r\n]<\|endoftext\|>[ \t]*(?=[\r\n])")        # on a line of its own
META = {"tokenizer": "gpt2", "vocab_size": 50257}
EOT = 50256                                 # <|endoftext|>, after each document
LONGEST = 2 ** 20                           # characters of a document; a longer one becomes several
KEEP_SECONDS = 2                            # between updates of progress.json: what a crash costs at least


class Download(io.RawIOBase):
    """The bytes at url; takes up a broken connection where it was, gives up after five breaks in a row."""

    def __init__(self, url):
        self.url, self.at, self.size, self.response = url, 0, None, None

    def read(self, n):
        for attempt in range(6):
            try:
                if self.response is None:
                    request = urllib.request.Request(self.url, headers={"Range": f"bytes={self.at}-"})
                    self.response = urllib.request.urlopen(request, timeout=60)
                    if self.response.status != 206:
                        raise OSError("the server sends no part of a file")
                    self.size = self.at + int(self.response.headers["Content-Length"])
                data = self.response.read(n)
                if not data and self.at < self.size:
                    raise OSError("the connection ended early")
                self.at += len(data)
                return data
            except UNREADABLE as e:
                self.response = None
                if self.size is None or attempt == 5:
                    raise OSError(f"download failed: {e}") from e
                time.sleep(2 ** attempt)


def kind(name):
    """text, lines or tar, by the end of a file's name; None for others and for hidden ones (macOS's ._*)."""
    return next((kind for kind, end in KINDS.items() if re.search(rf"(?i)(^|/)(?!\.)({end})$", name)), None)


def find(paths):
    """{real path: path} of the files named and those in the folders named, each file once."""
    found, left_out = {}, {}
    for path in paths:
        names = glob.glob(f"{glob.escape(path)}/**", recursive=True) if os.path.isdir(path) else [path]
        files = [name for name in sorted(names) if kind(name) and os.path.isfile(name)]     # no dead links
        if not files:
            fail(f"{path} is neither a file nor a folder of files of a kind that is read: see --help")
        for name in files:
            found.setdefault(os.path.realpath(name), name)
        left_out |= {os.path.realpath(name): os.path.splitext(name)[1].lower() or "no ending"
                     for name in names if os.path.isfile(name) and not kind(name)}
    if left_out:
        counts = Counter(left_out.values()).most_common()
        print("LEFT OUT, not of a kind that is read:", ", ".join(f"{n:,} of {end}" for end, n in counts))
    return found


def documents(name, stream, field):
    """Yields the texts in a stream of that name; what is in an archive is read as if it lay beside it."""
    if kind(name) == "tar":
        with tarfile.open(fileobj=stream, mode="r|*") as tar:
            for member in tar:
                tar.members.clear()                     # else a million of them fill the memory
                if member.isfile() and kind(member.name):
                    inside = io.BytesIO(tar.extractfile(member).read())
                    texts = documents(f"{name}/{member.name}", inside, field)
                    if kind(member.name) == "tar":      # as the usual loader of OpenWebText, for its tokens
                        texts = (re.sub("\n\n\n+", "\n\n", text) for text in texts)
                    yield from texts
            # an archive ends in two blocks of zeros; tarfile itself takes any bad header for the end
            if tar.fileobj.tell() != tar.offset + 512 or tar.fileobj.read(512).strip(b"\0"):
                raise tarfile.ReadError("the archive is cut short or damaged")
    elif kind(name) == "lines":
        for n, line in enumerate(opened(name, stream), 1):
            try:
                text = json.loads(line)[field] + "" if line.strip() else ""
            except (ValueError, LookupError, TypeError):
                fail(f'{name}, line {n}: not a JSON object with a string "{field}" (--field names another)')
            yield text
    else:
        text, rest = opened(name, stream), "\n"
        while some := text.read(LONGEST):
            *whole, rest = SEPARATOR.split(rest + some)
            yield from whole
            if len(rest) > LONGEST:                     # cut behind a line, so that memory is bounded
                end = max(rest.rfind("\n"), 0) or len(rest)
                yield rest[:end]
                rest = rest[end:]
        yield from SEPARATOR.split(rest + "\n")


def encoded(sources, first, field, pool, encode):
    """Yields (number of the source, future encode(text)) of the documents from source first on, in order."""
    pending = deque()
    for n, (_, path, *_) in enumerate(sources[first:], first):
        try:
            with Download(path) if "://" in path else open(path, "rb") as stream:
                for text in documents(path, stream, field):
                    pending.append((n, pool.submit(encode, text.strip())))
                    if len(pending) > 8 * os.cpu_count():       # no more than this in memory
                        yield pending.popleft()
        except (*UNREADABLE, tarfile.TarError) as e:
            fail(f"{path} can't be read ({e}); once it can, the same command goes on")
    yield from pending


def write(folder, sources, done, val_share, field):
    """Appends the tokens of the sources that are left to the .tmp files, and keeps the journal."""
    bpe, kept = Tokenizer(META).bpe, time.time()

    def encode(text):
        raw = text.encode("utf-8", "replace")           # JSON may hold half a character
        ids = bpe.encode_to_numpy(raw.decode(), disallowed_special=())
        share = int(hashlib.blake2b(raw, digest_size=8).hexdigest(), 16) / 2 ** 64
        return "val" if share < val_share else "train", np.append(ids, EOT).astype(np.uint16)

    def keep(n):
        for file in files.values():                     # the journal never promises what isn't on the disk
            file.flush()
            os.fsync(file.fileno())
        done.update(read=n, fingerprint=sources[n - 1][-1])
        replace_file(f"{folder}/progress.json", json.dumps(done).encode())

    with (open(f"{folder}/train.bin.tmp", "a+b") as train, open(f"{folder}/val.bin.tmp", "a+b") as val,
          ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(unit=" tokens", unit_scale=True) as bar):
        files = {"train": train, "val": val}
        for split, file in files.items():
            if file.tell() < 2 * done[f"{split}_tokens"]:
                fail(f"{file.name} is shorter than {folder}/progress.json says: delete that to start over")
            file.truncate(2 * done[f"{split}_tokens"])
        for n, result in encoded(sources, done["read"], field, pool, encode):
            if n > done["read"] and time.time() > kept + KEEP_SECONDS:      # all sources before n are whole
                keep(n)
                kept = time.time()
            by_hash, ids = result.result()
            split = sources[n][0] or by_hash
            if len(ids) > 1:                            # else the text is empty
                files[split].write(ids)
                done[f"{split}_tokens"] += len(ids)
                done[f"{split}_documents"] += 1
                done["last"] = len(ids)
                bar.update(len(ids))
        if not sources[-1][0] and not done["val_tokens"] and done["train_documents"] > 1:
            train.seek(-2 * done["last"], os.SEEK_END)  # nothing fell to validation: the last one goes there
            val.write(train.read())
            for split, sign in ("train", -1), ("val", 1):
                done[f"{split}_tokens"] += sign * done["last"]
                done[f"{split}_documents"] += sign
        keep(len(sources))


def finish(folder, done, source):
    """Turns the .tmp files into a data set; stopped on the way, it can be repeated."""
    for split in "train", "val":
        if not done[f"{split}_tokens"]:
            for name in "progress.json", "train.bin.tmp", "val.bin.tmp":
                os.remove(folder / name)
            fail(f"there is no text for {split}.bin: pass more documents, or some with --val")
    (folder / "meta.json").unlink(missing_ok=True)      # without it, nobody takes the files for whole
    for split in "train", "val":
        if (path := folder / f"{split}.bin.tmp").exists():
            os.truncate(path, 2 * done[f"{split}_tokens"])
            os.replace(path, folder / f"{split}.bin")
    counts = {key: n for key, n in done.items() if key.startswith(("train", "val"))}
    replace_file(folder / "meta.json", json.dumps(META | {"source": source} | counts, indent=1).encode())
    os.remove(folder / "progress.json")
    print(", ".join(f"{n:,} {key.replace('_', ' ')}" for key, n in counts.items()))


def prepare(dataset="openwebtext", inputs=(), val=(), field="text", val_share=0.0005):
    """Writes data/<dataset>/ train.bin, val.bin and meta.json from files and folders, or from OpenWebText."""
    held_out = find(val)
    paths = [path for real, path in find(inputs).items() if real not in held_out]
    if not inputs:
        paths = [URL.format(i) for i in range(21)]
    split = "train" if val else None                    # None: the hash of a text decides
    sources, running = [], hashlib.blake2b(f"{field} {val_share}".encode(), digest_size=16)
    for split, path in [(split, path) for path in paths] + [("val", path) for path in held_out.values()]:
        state = "" if "://" in path else (os.path.getsize(path), os.path.getmtime(path))
        running.update(json.dumps([split, path, state]).encode())
        sources.append((split, path, running.hexdigest()))      # a fingerprint of all sources so far
    done = META | {"read": 0, "train_tokens": 0, "val_tokens": 0, "train_documents": 0, "val_documents": 0}
    with owned(dataset, "gpt2") as folder:
        journal = folder / "progress.json"
        if journal.exists():
            done |= json.loads(journal.read_bytes())
            if done["read"] and sources[:done["read"]][-1][-1] != done["fingerprint"]:
                fail(f"what {journal} says is done isn't as it was (files, --field, --val_share): repeat "
                     f"{done['command']} with the same files, or delete that journal to start over")
        done["command"] = shlex.join(["python", *sys.argv])
        replace_file(journal, json.dumps(done).encode())        # from now on it is known to be unfinished
        print(f"{folder}: {len(sources) - done['read']:,} of {len(sources):,} files are left to read")
        if done["read"] < len(sources):                 # else it was stopped in finish()
            write(folder, sources, done, val_share, field)
        names = ", ".join(map(os.path.basename, paths[:4])) + ", ..." * (len(paths) > 4)
        finish(folder, done, names if inputs else "OpenWebText")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")            # a name may hold what the terminal lacks
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--input", dest="inputs", nargs="+", default=(), help="files and folders")
    parser.add_argument("--val", nargs="+", default=(), help="files and folders for validation alone")
    parser.add_argument("--dataset", default="openwebtext", help="name of the folder under data/")
    parser.add_argument("--field", default="text", help="of JSON lines: the name of the text")
    parser.add_argument("--val_share", type=float, default=0.0005, help="of the documents, without --val")
    prepare(**vars(parser.parse_args()))
