"""Pictures of text in the making, which are lists of (text, style): in the terminal, and as animated SVG."""
import re
import sys
import time
from html import escape
from unicodedata import east_asian_width

STYLES = {"noise": 2, "new": 32, "settled": 0}          # in the terminal: dim, green, plain

def picture(before, state):
    """(text, style) of each token of a state (texts, certainties). The text has one character for a column:
    NUL goes before a wide one, a blank stands for what can't be drawn."""
    drawn = ["".join("\0" * (east_asian_width(c) in "WF") + (c if c.isprintable() or c == "\n" else " ")
                     for c in text) for text in state[0]]
    return [(text, "noise" if sure < 0.5 else "settled" if new == old else "new")
            for text, new, old, sure in zip(drawn, state[0], before[0], state[1])]

def show(before, state):
    """Draws a state in the terminal; what is new since the state before is green."""
    text = "".join(f"\033[{STYLES[style]}m{text}\033[0m" for text, style in picture(before, state))
    print("\033[H\033[2J" + text.replace("\0", ""), file=sys.stderr, flush=True)
    time.sleep(0.05)

def animation(states, wrap=64, seconds=0.12, hold=3):
    """An SVG of the states and the settled text: a film strip that goes up by one picture at a time. Tokens
    keep the columns that they take in the last one, on which it rests, or always if motion isn't wanted."""
    states = [*states, (states[-1][0], [text != "·" for text in states[-1][0]])]    # · is no text
    pictures = [picture(old, new) for old, new in zip([states[0], *states], states)]
    room = [text for text, _ in pictures[-1]]
    lines = [line.span() for line in re.finditer(f".{{1,{wrap}}}\n?|\n", "".join(room))]
    width, height, frames = 8.5 * max(b - a for a, b in lines) + 35, 20 * len(lines) + 20, ""
    for i, pairs in enumerate(pictures):
        frames += f'<g transform="translate(0 {i * height})">'
        for layer in STYLES:                            # each blank where another one writes
            text = "".join((text if style == layer else "")[:len(old)].rstrip("\0").ljust(len(old))
                           for (text, style), old in zip(pairs, room)).replace("\n", " ")
            spans = [f'<tspan x="9" y="{20 * y + 24}">{escape(text[a:b].rstrip())}</tspan>'
                     for y, (a, b) in enumerate(lines) if text[a:b].strip()]
            frames += f'<text class="{layer}">{"".join(spans)}</text>' if spans else ""
        frames += "</g>\n"
    up, run, loop = i * height, i * seconds, i * seconds + hold
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}"
height="{height}"><style>text {{ font: 14px Menlo, Consolas, DejaVu Sans Mono, monospace; white-space: pre }}
rect {{ fill: #fff }} .noise {{ fill: #8c959f }} .new {{ fill: #1a7f37 }} .settled {{ fill: #1f2328 }}
@media (prefers-color-scheme: dark) {{ rect {{ fill: #111}} .new {{ fill: #3b5 }} .settled {{ fill: #eee }} }}
@media not (prefers-reduced-motion) {{ .film {{ animation: f {loop:.2f}s steps({i}) infinite }} }}
@keyframes f {{ 0% {{ transform: none }} {100 * run / loop:.3f}%, to {{ transform: translateY(-{up}px) }} }}
</style><rect width="100%" height="100%" rx="6"/><g class="film" xml:space="preserve"
transform="translate(0 -{up})">{frames}</g></svg>\n""".replace("\0", "")
