"""The page about a checkpoint: complete, self-contained, and honest about what failed."""
import base64
import contextlib
import importlib.util
import io
import re
import sys
import types
from html.parser import HTMLParser

import pytest
from analysis_data import run_main, write_checkpoint, write_images
from PIL import Image

import engine
from analysis import report
from evaluation.common.results import append_result


class Links(HTMLParser):
    """Everything a page loads or points to, and the balance of its tags."""

    def __init__(self):
        super().__init__()
        self.found, self.open = [], []

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(autouse=True)
def scripts_in_this_process(monkeypatch):
    """The page's commands without a new interpreter each, which would take a minute."""
    def run(command, capture_output, text):
        _, path, *flags = command
        spec = importlib.util.spec_from_file_location(path.rpartition("/")[2][:-3], path)
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        output, code, errors = io.StringIO(), 0, ""
        with monkeypatch.context() as patch, contextlib.redirect_stdout(output):
            patch.setattr(sys, "argv", command[1:])
            try:
                script.main()
            except engine.InputError as error:
                code, errors = 1, f"error: {error}\n"
        return types.SimpleNamespace(returncode=code, stdout=output.getvalue(), stderr=errors)
    monkeypatch.setattr(report, "subprocess", types.SimpleNamespace(run=run))


def test_page_is_complete_and_needs_nothing_else(digits, tmp_path, monkeypatch, capsys):
    write_checkpoint(tmp_path / "checkpoint.pth")
    (tmp_path / "log.txt").write_text('{"epoch": 0, "train_loss": 3, "train_cls": 2, "train_patch": 1}\n' * 2)
    append_result(tmp_path / "robustness", "imagenet_a", "c.pth", "state_dict", {}, {"acc": 12.3456})
    words = ["--pretrained_weights", tmp_path / "checkpoint.pth", "--pictures", "2", "--epochs", "2"]
    run_main(monkeypatch, report, *words, "--data_path", digits / "train")
    page = (tmp_path / "report/index.html").read_text()
    links = Links()
    links.feed(page)
    assert not links.open and not re.search("https?://", page)
    ids = re.findall(r'id="([^"]*)"', page)
    assert len(ids) == 1 + len(report.TEXTS) and [link for link in links.found if link[0] == "#"] == [f"#{name}" for name in ids]
    pictures = [link for link in links.found if link.startswith("data:image/")]
    assert len(pictures) == len([link for link in links.found if link[0] != "#"]) == 1 + 1 + 3 + 1 + 1 + 2 + 3 + 2 + 2 + 1 + 1 + 1
    for picture in pictures:
        Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2]))).load()
    assert "k-NN top-1 (k = 10, " in page and page.index("before-and-after-training") < page.index("clusters-of-patches")
    assert "matching accuracy 0." in page and "k = 16, best: top-1" in page and "teacher, best: top-1" in page and "NS.5: " in page
    assert re.search(r"the components hold [\d., ]+ % of the variance of 256 patches", page)  # 4 images of 64 pixels
    assert re.search(r"\d+ queries among 41 images; \d+ pair.s. of images with a similarity from", page)
    assert re.search(r"here .* 12\.3 ", page) and page.count("O.BB.") == 1
    assert 'class="error"' not in page and "failed" not in capsys.readouterr().out


def test_failed_parts_are_on_the_page_and_in_the_exit_code(tmp_path, monkeypatch):
    """One image a class: there are no pairs of a class. The data have no val/: no heads are trained."""
    write_images(tmp_path / "images", "ab", 1)
    write_checkpoint(tmp_path / "checkpoint.pth")
    stale = tmp_path / "out/attention/idx9_attn.png"  # of an earlier page, about more images
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"")
    with pytest.raises(engine.InputError, match="1 parts failed, the page says why: Correspondence between two images"):
        run_main(monkeypatch, report, "--pretrained_weights", tmp_path / "checkpoint.pth", "--data_path", tmp_path / "images", "--output_dir", tmp_path / "out", "--pictures", "1")
    page = (tmp_path / "out/index.html").read_text()
    assert not stale.exists()
    assert re.search(r'class="error">[^<]*no class has 2 images', page) and page.count("<section") == 7


def test_a_log_with_half_lines_and_no_numbers(tmp_path):
    """As a kill and losses that were not finite leave it; a log of something else gives no section."""
    line = '{"epoch": %s, "train_loss": %s, "train_cls": 2, "train_patch": 1}\n'
    (tmp_path / "log.txt").write_text(line % (0, 3) + line % (1, "null") + line % (2, "4") + '{"epoch": 3, "tra')
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw_curves", lambda curves, *_: found.append(curves))
        (tmp_path / "loss.png").write_bytes(b"")
        assert 'id="training"' in report.training_section(tmp_path, tmp_path)
    assert found == [{"total": [(0, 3), (2, 4)], "[CLS]": [(0, 2), (1, 2), (2, 2)], "patch": [(0, 1), (1, 1), (2, 1)]}]
    for text in ("", "[1]\nhello\n", '{"epoch": 0}\n', line % (0, "null") * 0):
        (tmp_path / "log.txt").write_text(text)
        assert report.training_section(tmp_path, tmp_path) is None


def test_find_data(tmp_path):
    for name in ("train", "val"):
        (tmp_path / "data" / name).mkdir(parents=True)
    data = tmp_path / "data"
    for path in (data, data / "train", data / "val"):
        assert report.find_data(path) == (data, data / "val")
    (tmp_path / "other/val").mkdir(parents=True)
    assert report.find_data(tmp_path / "other") == (None, tmp_path / "other/val")
    assert report.find_data(data / "train/dog") == (None, data / "train/dog")


def test_mistakes_are_named(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "checkpoint.pth")
    for words, message in ((("random",), "the page is about a checkpoint"), ((tmp_path / "none.pth",), "no such file"),
                           ((tmp_path / "checkpoint.pth",), "--data_path: is needed")):
        with pytest.raises(engine.InputError, match=message):
            run_main(monkeypatch, report, "--pretrained_weights", *words)
