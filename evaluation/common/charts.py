"""Logs of runs, and curves as pictures."""
import json
import math

from PIL import Image, ImageDraw, ImageFont

import engine

SIDE, LINE, SCALE = (720, 400), 3, 2  # pixels of a picture and of a line, drawn SCALE times as large for smooth edges
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf")


def numbers(values):
    """The finite numbers of a dictionary."""
    return {name: value for name, value in values.items() if type(value) in (int, float) and abs(value) < 1e300}


def read_log(path):
    """({epoch: numbers of its line}, count of damaged lines) of a log.txt; of an epoch that was repeated the last line."""
    epochs, broken = {}, 0
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as error:
        raise engine.InputError(f"{path}: cannot be read ({error.strerror})") from error
    for line in filter(str.strip, lines):
        try:
            values = numbers(json.loads(line))
            epochs[int(values["epoch"])] = values
        except (ValueError, KeyError, AttributeError, RecursionError):
            broken += 1
    return dict(sorted(epochs.items())), broken


def loss_curves(epochs):
    """{name: [(epoch, value)]} of the losses in a log of pre-training, as `read_log` gives it."""
    return {name: [(epoch, values[f"train_{key}"]) for epoch, values in epochs.items() if f"train_{key}" in values]
            for key, name in (("loss", "total"), ("cls", "[CLS]"), ("patch", "patch"))}


def quality_curves(epochs):
    """{name of a picture: (title, curves)} of what `--eval_every` wrote into a log of pre-training; see `loss_curves`."""
    def curves(**names):
        return {name: [(epoch, values[key]) for epoch, values in epochs.items() if key in values]
                for key, name in names.items()}
    return {"knn": ("Accuracy of the teacher in percent, as it trained", curves(knn="20-NN")),
            "ranks": ("Effective ranks of the teacher's features", curves(rankme="RankMe", lidar="LiDAR"))}


def ticks(low, high, count=6):
    """Round numbers, about `count`, within [low, high]."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= count)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def draw_curves(series, title, path, x_label="epoch", log_x=False):
    """Write `series`, {name: [(x, value)]}, as a picture with axes and a legend.

    x is marked at whole numbers; `log_x`: on a logarithmic axis, where there are points (x > 0).
    """
    def spread(values):
        low, high = min(values), max(values)
        margin = max(0.05 * (high - low), 1e-3 * abs(high), 1e-3 * abs(low), 1e-6)
        return low - margin, high + margin

    marks = sorted({x for points in series.values() for x, _ in points})
    series = {name: [(math.log(x) if log_x else x, y) for x, y in points] for name, points in series.items()}
    everything = [point for points in series.values() for point in points]
    (left, right), (low, high) = (spread([point[i] for point in everything]) for i in (0, 1))
    width, height = (side * SCALE for side in SIDE)
    image = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=12 * SCALE)
    x0, x1, y0 = 64 * SCALE, width - 16 * SCALE, height - 44 * SCALE
    names, legend, x, y = [engine.printable(name) for name in series], [], x0, 42 * SCALE
    for name in names:
        length = 44 * SCALE + draw.textlength(name, font)
        if x > x0 and x + length > x1:
            x, y = x0, y + 16 * SCALE
        legend.append((x, y))
        x += length
    y1 = y + 16 * SCALE

    def place(x, y):
        return x0 + (x - left) / (right - left) * (x1 - x0), y0 + (y - low) / (high - low) * (y1 - y0)

    for value in ticks(low, high):
        y = place(left, value)[1]
        draw.line((x0, y, x1, y), "#e0e0e0", SCALE)
        draw.text((x0 - 6 * SCALE, y), f"{value:.6g}", "black", font, "rm")
    if not log_x:
        marks = sorted({round(value) for value in ticks(left, right, 10) if value >= 0})
    for mark in marks:
        x = place(math.log(mark) if log_x else mark, low)[0]
        draw.line((x, y0, x, y0 + 4 * SCALE), "black", SCALE)
        draw.text((x, y0 + 7 * SCALE), str(mark), "black", font, "ma")
    draw.rectangle((x0, y1, x1, y0), outline="black", width=SCALE)
    draw.text(((x0 + x1) / 2, height - 6 * SCALE), x_label, "black", font, "md")
    draw.text((x0, 8 * SCALE), title, "black", font, "la")
    for i, (name, points, (x, y)) in enumerate(zip(names, series.values(), legend, strict=True)):
        colour, radius = COLOURS[i % len(COLOURS)], LINE * SCALE
        draw.line((x, y, x + 20 * SCALE, y), colour, LINE * SCALE)
        draw.text((x + 26 * SCALE, y), name, "black", font, "lm")
        places = [place(*point) for point in points]
        draw.line(places, colour, LINE * SCALE // 2, "curve")
        for x, y in places if len(places) < 40 else places[-1:]:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), colour)
    image.reduce(SCALE).save(path)
