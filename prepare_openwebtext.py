"""Many documents to GPT-2 tokens: data/<dataset>/ with train.bin, val.bin and meta.json.

    python prepare_openwebtext.py                                      # OpenWebText: 13 GB to download
    python prepare_openwebtext.py --input folder more.jsonl.gz --val held_out.txt --dataset my

Reads .txt (documents between lines of <|endoftext|>), .jsonl, .ndjson, plain, .xz or .gz, and tars of these.
Without --val, the first document is for validation, and one in 2,000 by a hash of its text. Stopped anywhere,
the same command goes on behind the last whole file, and ends with the same bytes.
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
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from urllib.request import Request, urlopen

import numpy as np
from tqdm import tqdm

from config import fail
from data import Tokenizer, replace_file
from prepare_shakespeare import UNREADABLE, opened, owned

URL = "https://huggingface.co/datasets/Skylion007/openwebtext/resolve/main/subsets/urlsf_subset{:02d}.tar"
KINDS = {"text": r"\.txt(\.xz|\.gz)?", "lines": r"\.(jsonl|ndjson)(\.xz|\.gz)?|\.json\.(xz|gz)",
         "tar": r"\.(tar|tar\.xz|tar\.gz|tgz)|^[^.]*\.xz"}              # the last: inside OpenWebText's tars
META = {"tokenizer": "gpt2", "vocab_size": 50257}
EOT = 50256                                 # <|endoftext|>, after each document
LONGEST = 2 ** 20                           # characters of a document; a longer one becomes several
KEEP_SECONDS = 2                            # between updates of progress.json: what a crash costs at least


class Download(io.RawIOBase):
    """The bytes at url; takes up a broken connection where it was, gives up after five breaks in a row."""

    def __init__(self, url):
        self.url, self.at, self.response = url, 0, None

    def read(self, n):
        for attempt in range(6):
            try:
                if self.response is None:
                    request = Request(self.url, headers={"Range": f"bytes={self.at}-"})
                    self.response = urlopen(request, timeout=60)
                    if self.response.status != 206:
                        raise OSError("the server sends no part of a file")
                data = self.response.read(n)
                if not data and self.response.length:
                    raise OSError("the connection ended early")
                self.at += len(data)
                return data
            except UNREADABLE as e:
                self.response = None
                if not self.at or attempt == 5:         # it never began, or it doesn't go on
                    raise OSError(f"download failed: {e}") from e
                time.sleep(2 ** attempt)


def kind(path):
    """text, lines or tar, by the end of a file's name; None for others and for hidden ones (macOS's ._*)."""
    name = os.path.basename(path)
    return next((kind for kind, end in KINDS.items() if re.search(rf"(?i)^(?!\.).*({end})$", name)), None)


def find(paths):
    """{real path: path} of the files named and those in the folders named, each file once."""
    found, left_out = {}, {}
    for path in paths:
        names = glob.glob(f"{glob.escape(path)}/**", recursive=True) if os.path.isdir(path) else [path]
        names = [name for name in sorted(names) if os.path.isfile(name)]        # no dead links
        if not any(map(kind, names)):
            fail(f"{path} is neither a file nor a folder of files of a kind that is read: see --help")
        for name in names:
            (found if kind(name) else left_out).setdefault(os.path.realpath(name), name)
    if left_out:
        ends = Counter(os.path.splitext(name)[1].lower() or "no ending" for name in left_out.values())
        print("LEFT OUT, of no kind that is read:", ", ".join(f"{n:,} of {end}" for end, n in ends.items()))
    return found


def documents(name, stream, field):
    """Yields the texts in a stream of that name; what is in an archive is read as if it lay beside it."""
    if kind(name) == "tar":
        with tarfile.open(fileobj=stream, mode="r|*") as tar:
            for member in tar:
                tar.members.clear()                     # else a million of them fill the memory
                if member.isfile() and kind(member.name):
                    inside = io.BytesIO(tar.extractfile(member).read())
                    for text in documents(f"{name}/{member.name}", inside, field):
                        # in an inner tar as the usual loader of OpenWebText, for its tokens
                        yield re.sub("\n\n\n+", "\n\n", text) if kind(member.name) == "tar" else text
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
        lines, text = opened(name, stream), ""
        for line in iter(lambda: lines.readline(LONGEST), ""):
            separator = line.strip() == "<|endoftext|>"
            text += "" if separator else line
            if separator or len(text) >= LONGEST:
                yield text
                text = ""
        yield text


def encoded(sources, first, field, pool, encode):
    """Yields (number of the source, future encode(text)) of the documents from source first on, in order."""
    pending = deque()
    for n, (_, path, _) in enumerate(sources[first:], first):
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
    """Appends the tokens of the sources that are left to the bins, and keeps the journal."""
    bpe, files, kept = Tokenizer(META).bpe, {}, time.time()

    def encode(text):
        raw = text.encode("utf-8", "replace")           # JSON may hold half a character
        ids = bpe.encode_to_numpy(raw.decode(), disallowed_special=())
        share = int(hashlib.blake2b(raw, digest_size=8).hexdigest(), 16) / 2 ** 64
        return "val" if share < val_share else "train", np.append(ids, EOT).astype(np.uint16)

    with (open(folder / "train.bin", "ab") as files["train"], open(folder / "val.bin", "ab") as files["val"],
          ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(unit=" tokens", unit_scale=True) as bar):
        for split, file in files.items():
            if file.tell() < 2 * done[f"{split}_tokens"]:
                fail(f"{file.name} is shorter than {folder}/progress.json says: delete that to start over")
            file.truncate(2 * done[f"{split}_tokens"])
        for n, result in encoded(sources, done["read"], field, pool, encode):
            if n > done["read"] and time.time() > kept + KEEP_SECONDS:      # all sources before n are whole
                for file in files.values():             # the journal never promises what isn't on the disk
                    file.flush()
                    os.fsync(file.fileno())
                done.update(read=n, fingerprint=sources[n - 1][-1])
                replace_file(folder / "progress.json", lambda file: file.write(json.dumps(done).encode()))
                kept = time.time()
            by_hash, ids = result.result()
            split = sources[n][0] or by_hash
            if len(ids) > 1:                            # else the text is empty
                files[split].write(ids)
                done[f"{split}_tokens"] += len(ids)
                done[f"{split}_documents"] += 1
                bar.update(len(ids))
                last = ids
        if done["train_documents"] > 1 and not done["val_documents"] and not sources[-1][0]:
            files["val"].write(last)                    # none fell to validation: the last one goes there
            files["train"].truncate(2 * (done["train_tokens"] - len(last)))
            for split, sign in ("train", -1), ("val", 1):
                done[f"{split}_tokens"] += sign * len(last)
                done[f"{split}_documents"] += sign


def prepare(dataset="openwebtext", inputs=(), val=(), field="text", val_share=0.0005):
    """Writes data/<dataset>/ train.bin, val.bin and meta.json from files and folders, or from OpenWebText."""
    held_out, found = find(val), find(inputs)
    paths = [path for real, path in found.items() if real not in held_out]
    paths = paths if inputs else [URL.format(i) for i in range(21)]
    sources, running = [], hashlib.blake2b(f"{field} {val_share}".encode(), digest_size=16)
    for path in [*paths, *held_out.values()]:           # split None: a hash of the text decides
        split = "val" if len(sources) >= len(paths) else "train" if val else None
        state = "" if "://" in path else (os.path.getsize(path), os.path.getmtime(path))
        running.update(json.dumps([split, path, state]).encode())
        sources.append((split, path, running.hexdigest()))      # a fingerprint of all sources so far
    counts = dict.fromkeys(("train_tokens", "val_tokens", "train_documents", "val_documents"), 0)
    with owned(dataset, foreign="chars") as folder:
        journal, done = folder / "progress.json", META | counts | {"read": 0}
        try:
            done |= json.loads(journal.read_bytes()) if journal.exists() else {}
        except ValueError:
            fail(f"{journal} is damaged: delete it to start over")
        if done["read"] and sources[:done["read"]][-1][-1] != done["fingerprint"]:
            fail(f"what {journal} says is done isn't as it was (files, --field, --val_share): repeat "
                 f"{done['command']} with the same files, or delete that journal to start over")
        done["command"] = shlex.join(["python", *sys.argv])
        replace_file(journal, lambda file: file.write(json.dumps(done).encode()))        # from now on it is known to be unfinished
        for name in ("meta.json", "train.bin", "val.bin") if not done["read"] else ():
            (folder / name).unlink(missing_ok=True)     # an older data set; a run that reads it still can
        print(f"{folder}: {len(sources) - done['read']:,} of {len(sources):,} files are left to read")
        write(folder, sources, done, val_share, field)
        counts = {name: done[name] for name in counts}
        if not all(counts.values()):
            journal.unlink()                            # other documents are to come, from the beginning
            fail("there is text for one of train.bin and val.bin alone: pass more documents, or --val")
        meta = META | {"source": ", ".join(inputs)[:200] or "OpenWebText"} | counts
        replace_file(folder / "meta.json", lambda file: file.write(json.dumps(meta, indent=1).encode()))
        journal.unlink()
    print(", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in counts.items()))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")            # a name may hold what the terminal lacks
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--input", dest="inputs", nargs="+", default=(), help="files and folders")
    parser.add_argument("--val", nargs="+", default=(), help="files and folders for validation alone")
    parser.add_argument("--dataset", default="openwebtext", help="name of the folder under data/")
    parser.add_argument("--field", default="text", help="of JSON lines: the name of the text")
    parser.add_argument("--val_share", type=float, default=0.0005, help="of the documents, without --val")
    prepare(**vars(parser.parse_args()))
