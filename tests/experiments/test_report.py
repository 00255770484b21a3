"""The report is one file that asks for nothing, escapes everything and says where an interval contains zero."""

import functools
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from experiments import figures, report, results, scaling_law
from experiments.statistics import Interval

HOSTILE = "<script>alert('x')</script> & \"quoted\" $1$"
SVG = "{http://www.w3.org/2000/svg}"
VOID = {"meta", "link", "br", "img", "hr"}


def interval(mean, half, **changes):
    return Interval(mean, mean - half, mean + half, 0.95, "paired bootstrap over 9 users and 3 seeds", **changes)


def result(**changes):
    fields = {
        "experiment": "quickstart",
        "command": "python -m experiments quickstart --data world",
        "commit": "0123abc+dirty",
        "device": {
            "kind": "cpu",
            "platform": "cpu",
            "count": 1,
            "processor": "A <chip>",
            "cores": 2,
            "memory_gib": 24.0,
        },
        "versions": {"python": "3.12.1", "jax": "0.11.2"},
        "seeds": (0, 1, 2),
        "started": "2025-01-31T12:00:00+00:00",
        "seconds": 185.0,
        "rows": (),
        "figures": {},
    }
    return results.Result(**{**fields, **changes})


def sizes_law(noise=0.0):
    x = np.repeat([1e5, 4e5, 2e6], 2)
    y = (0.01 if noise == 0 else 0.0) * np.log(x) + noise * np.random.default_rng(0).normal(size=6)
    return x, y, scaling_law.fit(x, y)


@functools.cache
def every_figure(label="DIN"):
    return draw_every_figure(label)


def draw_every_figure(label="DIN"):
    x, y, law = sizes_law()
    curve = (np.arange(1, 2001), np.linspace(6, 2, 2000))
    return {
        "loss": figures.loss_curves({label: curve, "other": curve}),
        "auc": figures.auc_bars({label: interval(0.7, 0.01), "DIN + LUM": interval(0.71, 0.01)}, oracle=0.8),
        "bars": figures.bars({label: 3.0, "b": -1.0}, title=label, x_label="events/s"),
        "differences": figures.differences({label: interval(0.01, 0.02)}, title="gain", x_label="AUC"),
        "law": figures.scaling_law(law, x, y, title="law", x_label="parameters", y_label="R@10", groups=[label] * 6),
        "lines": figures.lines(
            {label: (x[::2], y[::2])}, title="lines", x_label="x", y_label="y", log_x=True,
            bands={label: (y[::2] - 1, y[::2] + 1)}, references={"popularity": 0.1},
        ),
    }  # fmt: skip


class Checker(HTMLParser):
    """Collects tags and ids, and fails on a tag that closes another one than the last opened."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.ids, self.links = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "data", "action", "srcset"):
                self.links.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def checked(page):
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert not checker.open
    return checker


@functools.cache
def full_page(text="plain"):
    panels = [
        report.Panel(f"{name} {text}", svg, f"What is shown: {text}.", samples=9000, users=1200, seeds=3, interval=text)
        for name, svg in every_figure(text).items()
    ]
    return report.page(
        result(command=text, commit=text, versions={text: text}),
        text,
        lead=text,
        headline=[{"system": text, text: 0.5}],
        panels=panels,
        findings=[report.Finding(text)],
        tables={text: [{text: text}]},
    )


def test_the_page_asks_for_nothing():
    page = full_page()
    checker = checked(page)
    assert all(link.startswith(("#", "data:,")) for link in checker.links) and checker.links
    assert not re.search(r"@import|url\((?!#)|<script|<iframe|<img|<object|javascript:", page)
    # addresses that stand in the text are names of XML vocabularies, which nothing fetches
    assert set(re.findall(r"https?://[^\"' <>)]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert checker.tags.count("svg") == 6 and checker.tags.count("style") == 1
    assert "prefers-color-scheme: dark" in page and "@media print" in page


def test_ids_are_unique_over_all_figures_and_references_resolve():
    page = full_page()
    checker = checked(page)
    assert len(checker.ids) == len(set(checker.ids)) > 50
    used = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', page))
    assert used and {a or b for a, b in used} <= set(checker.ids)


def test_every_inserted_text_is_escaped():
    page = full_page(HOSTILE)
    checker = checked(page)
    assert "script" not in checker.tags and "<script" not in page
    assert page.count("&lt;script&gt;") >= 20
    plain = re.sub("<svg.*?</svg>", "", full_page(), flags=re.DOTALL)
    marked = re.sub("<svg.*?</svg>", "", page, flags=re.DOTALL)
    assert checked(plain).tags == checked(marked).tags, "text must not change the structure"


def test_a_figure_is_xml_in_the_page_s_colours():
    for name, svg in every_figure(HOSTILE).items():
        root = ElementTree.fromstring(svg)
        assert root.tag == f"{SVG}svg" and root.attrib["role"] == "img" and root.attrib["aria-label"]
        assert root.find(f".//{SVG}style") is None, "a rule for * would reach the whole page"
        assert "currentColor" in svg and figures.INK not in svg
        assert "var(--series-0, #0072b2)" in svg
        assert "metadata" not in svg and "<?xml" not in svg and len(svg) < 100_000, name


def test_figures_are_the_same_every_time():
    assert draw_every_figure() == every_figure()


def test_drawing_leaves_matplotlib_as_it_was():
    before = dict(matplotlib.rcParams)
    figures.bars({"a": 1.0}, title="t", x_label="x")
    assert dict(matplotlib.rcParams) == before


def texts(svg):
    return ["".join(node.itertext()).strip() for node in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_figures_show_their_numbers():
    drawn = {name: texts(svg) for name, svg in every_figure().items()}
    assert {"0.7000", "0.7100", "oracle: true click probability (0.8000)", "AUC (0.5 = chance)"} <= set(drawn["auc"])
    assert {"+0.0100", "contains zero"} <= set(drawn["differences"])
    assert {"95 % confidence band", "fit", "DIN", "100k", "400k", "2M", "R@10"} <= set(drawn["law"])
    assert {"training events", "loss (nats)", "other"} <= set(drawn["loss"])
    clear = figures.differences({"a": interval(0.05, 0.02)}, title="gain", x_label="AUC")
    assert "contains zero" not in texts(clear)


@pytest.mark.parametrize(("value", "text"), [(64, "64"), (1536, "1.54k"), (999_900, "1M"), (19e6, "19M"), (7e9, "7B")])
def test_short_numbers(value, text):
    assert figures.short(value) == text


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: figures.bars({}, title="t", x_label="x"), "nothing to draw"),
        (lambda: figures.bars({"a": float("nan")}, title="t", x_label="x"), "a bar has the value nan"),
        (lambda: figures.loss_curves({"a": ([1, 2], [1, np.inf])}), r"'a' has \(2.0, inf\) at 1"),
        (lambda: figures.loss_curves({"a": ([1, 2], [1])}), r"'a' has \(1,\) values for \(2,\) places"),
        (lambda: figures.loss_curves({"a": ([], [])}), "a point or more"),
        (
            lambda: figures.lines({"a": ([0, 1], [1, 2])}, title="t", x_label="x", y_label="y", log_x=True),
            "x = 0; a logarithmic axis",
        ),
        (lambda: report.Panel("t", "<p>no figure</p>", "s"), "expected one <svg> element"),
        (lambda: report.Panel("t", "<svg></svg>", ""), "says what it shows"),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()


def test_a_law_of_two_variables_has_no_figure_of_one():
    p, n = np.array([1e5, 1e6, 1e7, 1e5, 1e6]), np.array([32, 64, 128, 128, 32])
    law = scaling_law.fit_joint({"P": p, "L": n}, np.log(p) + np.log(n))
    with pytest.raises(ValueError, match="variables P, L"):
        figures.scaling_law(law, p, p, title="t", x_label="x", y_label="y")


def test_an_interval_that_contains_zero_is_said_to():
    none, some = report.difference("A against B", interval(0.01, 0.02)), report.difference("A", interval(0.03, 0.02))
    assert "The interval contains zero: this run shows no difference." in none.text and not none.shown
    assert (
        "contains zero" not in some.text and some.shown and "+0.0300 AUC, 95 % interval +0.0100 to +0.0500" in some.text
    )
    flat, steep = report.law("over size", sizes_law(noise=1.0)[2]), report.law("over size", sizes_law()[2])
    assert "the interval contains zero" in flat.text and not flat.shown and steep.shown
    panel = report.Panel("t", "<svg></svg>", "s", notes=(none, "a plain note"))
    page = report.page(result(), "t", headline=[], panels=[panel], findings=[some])
    assert page.count("class=unshown") == 1 and "a plain note" in page


def test_captions_state_n_seeds_and_interval():
    panel = report.Panel("t", "<svg></svg>", "s", samples=9000, users=1200, seeds=1, interval="95 %, bootstrap")
    assert panel.caption() == "n: 9,000 samples, 1,200 users, 1 seed. Interval: 95 %, bootstrap."
    assert report.Panel("t", "<svg></svg>", "s").caption() == "No interval is shown."


def test_the_page_says_how_to_repeat_it():
    page = report.page(result(), "t", headline=[{"a": 1}], panels=[])
    for text in (
        "python -m experiments quickstart --data world",
        "0123abc+dirty",
        "the sources differed from this commit",
        "1 × cpu; A &lt;chip&gt;, 2 cores; 24.0 GiB of memory",
        "jax 0.11.2",
        "0, 1, 2",
        "3 min 05 s",
    ):
        assert text in page, text


def test_the_headline_takes_columns_and_headings():
    rows = [{"system": "DIN", "auc": 0.7, "secret": 1}, {"system": "LUM", "auc": None}]
    page = report.page(result(), "t", headline=rows, columns={"system": "System", "auc": "AUC"}, panels=[])
    assert '<th>System</th><th class="n">AUC</th>' in page and "secret" not in page
    assert '<td>LUM</td><td class="n">-</td>' in page


def test_write_replaces_the_page_whole(tmp_path: Path):
    path = report.write(tmp_path / "runs" / "report.html", "old")
    assert report.write(path, full_page()).read_text(encoding="utf-8") == full_page()
    assert list(path.parent.iterdir()) == [path]
