"""Pictures of text in the making: in the terminal, and as an animated SVG. Optional reading: no diffusion here.

A state of a text is (texts, certainties), with an entry for each token. A picture of it is a list of (text, style)
with an entry for each token, too.
"""
import re
import sys
import time
from html import escape
from itertools import groupby
from operator import itemgetter

STYLES = {"noise": 2, "new": 32, "settled": 0}          # in the terminal: dim, green, plain


def picture(before, state):
    """The picture of a state; what differs from the state before it is new."""
    styled = []
    for text, old, certainty in zip(state[0], before[0], state[1]):
        style = "settled" if text == old else "new"
        drawn = "".join(c if c.isprintable() or c == "\n" else " " for c in text)
        styled.append((drawn, style if certainty >= 0.5 else "noise"))
    return styled


def show(before, state):
    """Draws a state in the terminal; what is new since the state before it is green."""
    text = "".join(f"\033[{STYLES[style]}m{text}\033[0m" for text, style in picture(before, state))
    print("\033[H\033[2J" + text, file=sys.stderr, flush=True)
    time.sleep(0.05)


def animation(states):
    """An SVG of the states and of the settled text: a film strip that goes up by one picture at a time.

    Tokens keep the columns that they take in the last picture. The film rests on that one, and stays there
    where the reader wants no motion.
    """
    texts = states[-1][0]
    states = [*states, (texts, [text != "·" for text in texts])]                # · is no text
    pictures = [picture(old, new) for old, new in zip([states[0], *states], states)]
    room = [text for text, _ in pictures[-1]]
    lines = [line.span() for line in re.finditer(r".{1,64}\n?|\n", "".join(room))]
    width = 8.5 * max(end - start for start, end in lines) + 35
    height = 20 * len(lines) + 20
    frames = ""
    for i, styled in enumerate(pictures):
        columns = []                        # of each: its character and style. A token takes as many as in the end
        for (text, style), last in zip(styled, room):
            n = len(last)
            columns += [(c, style) for c in text[:n].ljust(n)]
        frames += f'<g transform="translate(0 {i * height})">'
        for y, (start, end) in enumerate(lines):
            frames += f'<text x="9" y="{20 * y + 24}">'
            for style, run in groupby(columns[start:end], key=itemgetter(1)):
                text = "".join(c for c, _ in run).replace("\n", " ")
                frames += f'<tspan class="{style}">{escape(text)}</tspan>'
            frames += "</text>"
        frames += "</g>\n"
    loop = 0.12 * i + 3                     # seconds: .12 (12 % of one, below) for a picture, 3 of rest on the last
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}"
height="{height}"><style>text {{ font: 14px Menlo, Consolas, DejaVu Sans Mono, monospace; white-space: pre }}
rect {{ fill: #fff }} .noise {{ fill: #8c959f }} .new {{ fill: #1a7f37 }} .settled {{ fill: #1f2328 }}
@media (prefers-color-scheme: dark) {{ rect {{ fill: #111}} .new {{ fill: #3b5 }} .settled {{ fill: #eee }} }}
@media not (prefers-reduced-motion) {{ .film {{ animation: f {loop:.2f}s steps({i}) infinite }} }}
@keyframes f {{ 0% {{ transform: none }} {12 * i / loop:.3f}%, to {{ transform: translateY(-{i * height}px) }} }}
</style><rect width="100%" height="100%" rx="6"/><g class="film" xml:space="preserve"
transform="translate(0 -{i * height})">{frames}</g></svg>\n"""
