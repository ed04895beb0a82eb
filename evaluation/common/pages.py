"""Pages for the browser, each one file that needs no network: their frame, and queries with their nearest images."""
import base64
import html
import io
import re
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont, ImageOps

from evaluation.common.nearest import crop, load_tolerantly

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem 1.5rem 4rem }
body { color: #1b1b1b; background: #fff }
h1 { margin-bottom: 0 } h2 { margin-top: 2.5rem; border-top: 1px solid #ccc; padding-top: 1rem }
nav a { margin-right: 1rem } table { border-collapse: collapse } td { padding: .1rem 1rem .1rem 0; vertical-align: top }
figure { display: inline-block; margin: 0 1rem 1rem 0; max-width: 100%; vertical-align: top }
img { max-width: 100%; height: auto; border: 1px solid #ddd } figcaption { font-size: .85rem; color: #555 }
pre { background: #f5f5f5; padding: .6rem .8rem; overflow-x: auto; font-size: .85rem } .error { background: #fde8e8 }
summary { color: #555; font-size: .85rem; cursor: pointer }
"""


# ---------------------------------------------------------------- the frame

def anchor(title):
    return re.sub(r"\W+", "-", title.lower())


def section(title, content):
    return f'<section id="{anchor(title)}"><h2>{html.escape(title)}</h2>\n{content}\n</section>'


def page(title, facts, sections):
    """The whole page."""
    titles = re.findall(r"<h2>(.*?)</h2>", "".join(sections))
    links = "\n".join(f'<a href="#{anchor(html.unescape(name))}">{name}</a>' for name in titles)
    rows = "\n".join(f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>" for name, value in facts)
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
            f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>\n'
            f"<h1>{html.escape(title)}</h1>\n<table>{rows}</table>\n<nav>{links}</nav>\n" + "\n".join(sections)
            + "\n</body></html>\n")


# ---------------------------------------------------------------- queries with their nearest images

TILE = 160  # pixels
MARKS = {"right": "#2ca02c", "wrong": "#d62728", "junk": "#999999", "": "#dddddd"}
ROWS_STYLE = """<style>
body { max-width: 96rem } .row, .row div { display: flex; flex-wrap: wrap; gap: .5rem } .row { margin-bottom: 1rem }
.row > div { flex: 1 } .row figure { width: 7rem; margin: 0 } .row .query { margin-right: 1.5rem }
.row img { width: 100%; box-sizing: border-box; border-width: 4px }
figcaption { overflow-wrap: anywhere; line-height: 1.25 }
""" + "".join(f".{mark} img {{ border-color: {colour} }} " for mark, colour in MARKS.items() if mark) + "</style>\n"


@dataclass
class Row:
    """A query, (path, box or None), and its nearest images, best first: [((path, box or None), similarity, mark)].

    A mark is one of MARKS: "" where it is not known what is right.
    """
    query: tuple
    nearest: list


def tile(item):
    """PIL image of TILE x TILE pixels of an image file or a part of it; small ones keep visible pixels."""
    picture = crop(load_tolerantly(item[0])[0], item[1])
    how = Image.Resampling.NEAREST if max(picture.size) < TILE else Image.Resampling.BICUBIC
    return ImageOps.pad(picture, (TILE, TILE), how, color="white")


def figure(item, caption, kind=""):
    """HTML of an image inside the page, and its caption."""
    data = io.BytesIO()
    tile(item).save(data, "JPEG", quality=85)
    caption = html.escape(caption)
    return (f'<figure class="{kind}"><img alt="{caption}" src="data:image/jpeg;base64,'
            f'{base64.b64encode(data.getvalue()).decode()}"><figcaption>{caption}</figcaption></figure>')


def neighbour_page(title, facts, rows, name_of, duplicates=None):
    """The page of some queries: a line each with the query on the left.

    facts: [(what, value)] at the top; rows: `Row`s; name_of: from a path to what it is called on the page; duplicates:
    None, or (a sentence, [(item, item, similarity)]), for a section of their own.
    """
    lines = []
    for row in rows:
        nearest = "".join(figure(item, f"{similarity:.3f} {mark} {name_of(item[0])}", mark)
                          for item, similarity, mark in row.nearest)
        lines.append(f'<div class="row">{figure(row.query, name_of(row.query[0]), "query")}<div>{nearest}</div></div>')
    sections = [section("Queries and their nearest images", ROWS_STYLE + "\n".join(lines))]
    if duplicates is not None:
        sentence, pairs = duplicates
        lines = ['<div class="row">' + figure(one, name_of(one[0])) + figure(two, f"{similarity:.3f} {name_of(two[0])}")
                 + "</div>" for one, two, similarity in pairs]
        sections.append(section("Near-duplicates", f"<p>{html.escape(sentence)}</p>\n" + "\n".join(lines)))
    return page(title, facts, sections)


def neighbour_strip(row):
    """A `Row` as one PIL picture: the query, a gap, its nearest images in frames of their marks' colours."""
    gap, label, frame = 12, 20, 4
    step = TILE + 2 * frame + gap
    picture = Image.new("RGB", (step * (len(row.nearest) + 1) + gap, TILE + 2 * frame + label), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=14)
    for i, (item, text, mark) in enumerate([(row.query, "query", ""), *row.nearest]):
        x = step * i + gap * (i > 0)
        draw.rectangle((x, 0, x + TILE + 2 * frame - 1, TILE + 2 * frame - 1), fill=MARKS[mark] if i else "black")
        picture.paste(tile(item), (x + frame, frame))
        draw.text((x + frame, TILE + 2 * frame + 2), f"{text:.3f} {mark}" if i else text, "black", font)
    return picture
