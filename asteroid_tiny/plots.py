"""Small pictures for a page, without a plotting library: SVG axes with dots, bars and lines, and
spectrograms as PNG."""

import html
import math
import struct
import zlib

import numpy as np

COLOURS = ("#2563a8", "#d1603d", "#4a8c5c", "#8a6bb1", "#b08a1e", "#3aa0a8", "#c2578f", "#666666")
WIDTH, HEIGHT = 420, 260
LEFT, RIGHT, TOP, BOTTOM = 48, 20, 14, 40  # margins around the axes
RANGE_DB = 70.0  # of a spectrogram
FAINT_DB = -30.0  # in a spectrogram: of a tone at -66 dB re full scale
COLUMNS = 500  # of a spectrogram, about
HEAT = ((0, 0, 4), (59, 15, 112), (140, 41, 129), (222, 73, 104), (254, 159, 109), (252, 253, 191))


class Axes:
    """Axes to draw on.

    Args:
        xs, ys (array-like): All values that are to be seen.
        x_label, y_label (str): Names of the axes.
        y_names (list of str, optional): Names at 0, 1, .. of the y axis in place of numbers.
        log (str): The axes that are logarithmic: ``""``, ``"x"``, ``"y"`` or ``"xy"``.
        right (float): Margin on the right; `words` are written into it.

    Examples:
        >>> axes = Axes([0, 10], [0, 1], "time", "level")
        >>> axes.line([0, 10], [0, 1], name="rising")
        >>> axes.svg()[:4]
        '<svg'
    """

    def __init__(self, xs, ys, x_label, y_label, y_names=None, log="", right=RIGHT):
        self.log, self.right = log, right
        self.x_ticks = (log_ticks if "x" in log else nice_ticks)(xs)
        self.y_ticks = (log_ticks if "y" in log else nice_ticks)(ys)
        self.y_names = y_names
        if y_names:
            self.y_ticks = [-0.6, *range(len(y_names)), len(y_names) - 0.4]
        self.labels = x_label, y_label
        self.marks, self.names = [], []

    def _place(self, x, y):
        across = LEFT + _share(x, self.x_ticks, "x" in self.log) * (WIDTH - LEFT - self.right)
        down = HEIGHT - BOTTOM - _share(y, self.y_ticks, "y" in self.log) * (HEIGHT - TOP - BOTTOM)
        return np.round(across, 1), np.round(down, 1)

    def dots(self, xs, ys, titles, name=None, colour=0):
        """Draws a dot at each place, which tells its title under the pointer."""
        for x, y, title in zip(*self._place(xs, ys), titles):
            self.marks.append(
                f'<circle cx="{x}" cy="{y}" r="2.6" fill="{COLOURS[colour]}" fill-opacity=".6">'
                f"<title>{html.escape(title)}</title></circle>"
            )
        self._name(name, colour)

    def bars(self, edges, heights):
        """Draws a histogram: a bar from each edge to the next."""
        left, top = self._place(edges[:-1], heights)
        right, bottom = self._place(edges[1:], 0 * heights)
        for x, y, width, height in zip(left, top, right - left - 1, bottom - top):
            self.marks.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{height:.1f}" '
                f'fill="{COLOURS[0]}"/>'
            )

    def line(self, xs, ys, name=None, colour=0, faint=False):
        """Draws a line through the places."""
        points = " ".join(f"{x},{y}" for x, y in zip(*self._place(xs, ys)))
        self.marks.append(
            f'<polyline points="{points}" fill="none" stroke="{COLOURS[colour]}" '
            f'stroke-width="1.6" stroke-opacity="{0.45 if faint else 1}"/>'
        )
        self._name(name, colour)

    def words(self, xs, ys, texts, colours):
        """Writes a text to the right of each place, moved down where it would cover another."""
        places = sorted(zip(*self._place(xs, ys)[::-1], texts, colours))
        written = []
        for y, x, text, colour in places:
            near = [low for left, low in written if abs(left - x) < 90]
            y = max([y, *(low + 11 for low in near)])
            written.append((x, y))
            self.marks.append(
                f'<text x="{x + 5}" y="{y + 4}" font-size="10" fill="{COLOURS[colour]}">'
                f"{html.escape(text)}</text>"
            )

    def upright(self, x, y0, y1, title="", colour=None):
        """Draws a thick upright stroke, or a fine one in a colour."""
        stroke, width = ("#222", 2) if colour is None else (COLOURS[colour], 0.8)
        (x, _), (top, bottom) = self._place([x, x], [y1, y0])
        self.marks.append(
            f'<line x1="{x}" x2="{x}" y1="{top}" y2="{bottom}" stroke="{stroke}" '
            f'stroke-width="{width}">'
            f"<title>{html.escape(title)}</title></line>"
        )

    def _name(self, name, colour):
        if name:
            self.names.append((name, COLOURS[colour]))

    def svg(self):
        """The picture as text."""
        right, low = WIDTH - self.right, HEIGHT - BOTTOM
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
            'font-family="system-ui, sans-serif" font-size="12" fill="#333">'
        ]
        for tick, x in zip(self.x_ticks, self._place(self.x_ticks, self.y_ticks[0])[0]):
            parts.append(f'<line x1="{x}" x2="{x}" y1="{TOP}" y2="{low}" stroke="#e4e4e4"/>')
            parts.append(f'<text x="{x}" y="{low + 15}" text-anchor="middle">{tick:g}</text>')
        names = dict(enumerate(self.y_names)) if self.y_names else None
        for tick, y in zip(self.y_ticks, self._place(self.x_ticks[0], self.y_ticks)[1]):
            name = f"{tick:g}" if names is None else names.get(tick)
            if name is not None:
                parts.append(f'<line x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}" stroke="#e4e4e4"/>')
                parts.append(
                    f'<text x="{LEFT - 5}" y="{y + 4}" text-anchor="end">{html.escape(name)}</text>'
                )
        parts += self.marks
        x_label, y_label = map(html.escape, self.labels)
        middle = (LEFT + right) / 2
        parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{x_label}</text>')
        parts.append(
            f'<text transform="translate(11 {(TOP + low) / 2}) rotate(-90)" '
            f'text-anchor="middle">{y_label}</text>'
        )
        x, y = LEFT + 8, TOP + 8
        for name, colour in self.names:
            width = 24 + 6.2 * len(name)
            if x + width > WIDTH and x > LEFT + 8:
                x, y = LEFT + 8, y + 15
            parts.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}"/>')
            parts.append(f'<text x="{x + 8}" y="{y + 4}">{html.escape(name)}</text>')
            x += width
        return "\n".join([*parts, "</svg>"])


def side_by_side(pictures):
    """One picture of several (SVG as text)."""
    inner = "".join(
        picture.replace("<svg ", f'<svg x="{k * WIDTH}" width="{WIDTH}" height="{HEIGHT}" ', 1)
        for k, picture in enumerate(pictures)
    )
    size = f'viewBox="0 0 {len(pictures) * WIDTH} {HEIGHT}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{inner}</svg>'


def nice_ticks(values, n=6):
    """Round numbers around values, about `n` of them.

    Examples:
        >>> nice_ticks([0.3, 9.4])
        [0, 2, 4, 6, 8, 10]
    """
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    low, high = (values.min(), values.max()) if len(values) else (0.0, 1.0)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / (n - 1)
    step = 10 ** math.floor(math.log10(raw))
    step *= next(factor for factor in (1, 2, 5, 10) if factor * step >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [k * step for k in range(first, last + 1)]


def log_ticks(values):
    """1, 2 and 5 times powers of ten around positive values.

    Examples:
        >>> log_ticks([0.3, 9.4])
        [0.2, 0.5, 1.0, 2.0, 5.0, 10.0]
    """
    low, high = min(values), max(values)
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    ticks = [float(f"{factor}e{power}") for power in powers for factor in (1, 2, 5)]
    first = max(tick for tick in ticks if tick <= low)
    last = min(tick for tick in ticks if tick >= high and tick > first)
    return [tick for tick in ticks if first <= tick <= last]


def _share(values, ticks, log):
    """How far values are on the way from the first tick to the last."""
    values, first, last = np.asarray(values, float), ticks[0], ticks[-1]
    if log:
        values, first, last = np.log10(values), math.log10(first), math.log10(last)
    return (values - first) / (last - first)


def spectrogram(samples, top):
    """A spectrogram as a PNG file.

    Args:
        samples (numpy.ndarray): (time,)
        top (float): Level of the brightest colour in dB, see `loudest`.

    Returns:
        bytes: The file; low frequencies are below.
    """
    return _png(_shades(samples, top))


def stacked_spectrograms(signals):
    """Spectrograms of signals one above the other, with the same colours.

    Args:
        signals (list of numpy.ndarray): (time,)

    Returns:
        bytes: A PNG file.
    """
    panels = [_shades(samples, loudest(signals)) for samples in signals]
    panels = [panel // 16 * 16 for panel in panels]  # fewer colours, a smaller file
    gaps = [np.full((6, panel.shape[1]), 255, np.uint8) for panel in panels]
    return _png(np.concatenate([part for both in zip(panels, gaps) for part in both][:-1]))


def loudest(signals):
    """The highest level in the spectrograms of signals, in dB; at least that of a faint tone.

    Examples:
        >>> loudest([np.zeros(8000)])  # silence stays dark
        -30.0
    """
    return max([FAINT_DB, *(float(_levels(samples).max()) for samples in signals)])


def _shades(samples, top):
    shades = np.clip((_levels(samples) - top) / RANGE_DB + 1, 0, 1) * 255
    return np.round(shades).astype(np.uint8).T[::-1]


def _levels(samples, size=256):
    samples = np.pad(samples, (size // 2, size))
    hop = max(32, len(samples) // COLUMNS)
    frames = np.lib.stride_tricks.sliding_window_view(samples, size)[::hop]
    powers = np.abs(np.fft.rfft(frames * np.hanning(size))) ** 2
    return 10 * np.log10(powers + 1e-10)


def _png(pixels):
    """An image of palette indices, (rows, columns) uint8."""
    height, width = pixels.shape
    anchors, shades = np.linspace(0, 255, len(HEAT)), np.arange(256)
    palette = np.stack([np.interp(shades, anchors, channel) for channel in zip(*HEAT)], axis=1)
    rows = np.pad(pixels, ((0, 0), (1, 0)))  # each begins with its filter, none
    chunks = {
        b"IHDR": struct.pack(">2I5B", width, height, 8, 3, 0, 0, 0),
        b"PLTE": np.round(palette).astype(np.uint8).tobytes(),
        b"IDAT": zlib.compress(rows.tobytes(), 9),
        b"IEND": b"",
    }
    parts = [b"\x89PNG\r\n\x1a\n"]
    for name, data in chunks.items():
        parts += [struct.pack(">I", len(data)), name, data]
        parts.append(struct.pack(">I", zlib.crc32(name + data)))
    return b"".join(parts)
