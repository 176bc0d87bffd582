"""Pictures of text in the making: in the terminal, and as an animated SVG without scripts.

A picture is a list of (text, style), one for each token; styles are noise, new and settled.
"""
import sys
import time
import unicodedata
from html import escape

SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height}" width="{width:g}">
<style>
rect {{ fill: #fff }} .noise {{ fill: #a0a7ae }} .new {{ fill: #1a7f37 }}
text {{ font: 14px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace }}
text {{ white-space: pre; fill: #1f2328 }}
.f {{ visibility: hidden; animation: f {loop:.2f}s step-end infinite }}
.l {{ animation: l {loop:.2f}s step-end infinite }}
@keyframes f {{ 0% {{ visibility: visible }} {shown:.3f}% {{ visibility: hidden }} }}
@keyframes l {{ 0% {{ visibility: hidden }} {last:.3f}% {{ visibility: visible }} }}
@media (prefers-color-scheme: dark) {{
rect {{ fill: #0d1117 }} text {{ fill: #e6edf3 }} .noise {{ fill: #656c76 }} .new {{ fill: #3fb950 }} }}
@media (prefers-reduced-motion: reduce) {{ .f, .l {{ animation: none }} }}
</style>
<rect width="100%" height="100%" rx="6"/>
<g xml:space="preserve">
{frames}
</g></svg>
"""


def wide(c):
    return unicodedata.east_asian_width(c) in "WF"      # takes two columns


def layer(cells, style):
    """The <text> of one style: lines of single characters, blank where another style writes."""
    lines = ["".join(line).rstrip() for line in cells]
    spans = [f'<tspan x="9" y="{20 * y + 24}">{escape(line)}</tspan>' for y, line in enumerate(lines) if line]
    return f'<text class="{style}">{"".join(spans)}</text>' if spans else ""


def animation(pictures, wrap=64, seconds=0.12, hold=3):
    """An SVG of the pictures, in a loop, the last one held for some seconds.

    Each token has the room that its text takes in the last picture, and shows in it what it is in the others:
    nothing moves. Where SVG isn't animated, the last one is seen.
    """
    room, y, x = [], 0, 0                               # (line, column) of each character of each token
    for piece, _ in pictures[-1]:
        room.append([])
        for c in piece:
            if x == wrap and c != "\n":
                y, x = y + 1, 0
            room[-1].append((y, x))
            y, x = (y + 1, 0) if c == "\n" else (y, x + 1 + wide(c))
    n_lines, n_columns = y + 1, 2 + max(x for cells in room for _, x in cells)
    frames = []
    for i, pairs in enumerate(pictures):
        cells = {style: [[" "] * n_columns for _ in range(n_lines)] for style in ("noise", "new", "settled")}
        for spot, (piece, style) in zip(room, pairs):
            for (y, x), c in zip(spot, piece):
                cells[style][y][x] = c if c.isprintable() else " "
                if wide(c):
                    cells[style][y][x + 1] = ""
        delay = f'f" style="animation-delay:{i * seconds:.2f}s' if i + 1 < len(pictures) else "l"
        layers = "".join(layer(lines, style) for style, lines in cells.items())
        frames.append(f'<g class="{delay}">{layers}</g>')
    loop = (len(pictures) - 1) * seconds + hold
    return SVG.format(width=8.5 * n_columns + 18, height=20 * n_lines + 20, frames="\n".join(frames),
                      loop=loop, shown=100 * seconds / loop, last=100 * (1 - hold / loop))


def show(picture):
    """Draws a picture in the terminal: noise dim, new tokens green."""
    colour = {"noise": "2", "new": "32", "settled": "0"}
    text = "".join(f"\033[{colour[style]}m{piece}\033[0m" for piece, style in picture)
    print("\033[H\033[2J" + text, file=sys.stderr, flush=True)
    time.sleep(0.05)


class Film:
    """Collects the states of one text while it is sampled, and shows them in the terminal if it is to."""

    def __init__(self, tokenizer, live):
        self.tokenizer, self.live = tokenizer, live
        self.last, self.states, self.n, self.every = None, [], 0, 1

    def picture(self, before, state):
        pieces = self.tokenizer.pieces(state[0])
        return [(piece, "noise" if sure < 0.5 else "new" if token != old else "settled")
                for piece, token, old, sure in zip(pieces, state[0], before[0], state[1])]

    def add(self, tokens, certainty):
        """A state, lists of ids and certainties; of those before, 48 to 96 are kept."""
        state = tokens, certainty
        if self.live:
            show(self.picture(self.last or state, state))
        if self.n % self.every == 0:
            self.states.append(state)
        if len(self.states) == 96:
            del self.states[1::2]
            self.every *= 2
        self.last, self.n = state, self.n + 1

    def svg(self):
        """The animation of up to 48 states, the last one, and that again as settled text."""
        n = min(48, len(self.states))
        states = [self.states[round(i * (len(self.states) - 1) / max(1, n - 1))] for i in range(n)]
        tokens = self.last[0]
        states += [self.last, (tokens, [float(token < self.tokenizer.V) for token in tokens])]
        return animation([self.picture(old, now) for old, now in zip([states[0], *states], states)])
