"""The documentation: links lead somewhere, pages are short, flags, names and files are there, the example runs."""
import importlib
import re
from pathlib import Path

import pytest
import torch

import main_ibot
from evaluation import report

ROOT = Path(__file__).resolve().parent.parent
TOY = "evaluation/eval_class_means.py"  # that docs/adding.md adds
PAGES = [path.relative_to(ROOT).as_posix() for folder in (".", "docs", "evaluation", "benchmarks", "tests/fakecuda")
         for path in sorted((ROOT / folder).glob("*.md"))]


def prose(page):
    """The text of a page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(path):
    """What headings are linked by, as code hosts derive it."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "", heading)).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        assert path.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(path), f"{page}: {target}"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *(page for page in PAGES if page.startswith("docs/"))])
def test_pages_are_short(page):
    assert len((ROOT / page).read_text().splitlines()) <= (250 if page == "README.md" else 200)
    for row in re.findall(r"^\|(.+)\|$", prose(page), re.MULTILINE):
        for cell in row.split(" | "):
            assert len(cell.split()) < 40, f"{page}: {cell}"


def test_every_flag_of_pretraining_is_described():
    pages = [(ROOT / "docs" / name).read_text() for name in ("flags.md", "augmentation.md")]
    flags = {action.dest for action in main_ibot.get_args_parser()._actions}
    assert flags - set(re.findall(r"--(\w+)", "".join(pages))) == set()
    assert set(re.findall(r"^\| `--(\w+)", "\n".join(pages), re.MULTILINE)) - flags == set()


def test_names_and_files_are_there():
    for page in PAGES:
        text = (ROOT / page).read_text()
        for module, name in re.findall(r"`(models|loader|images|utils|engine|main_ibot)\.(\w+)", text):
            assert name == "py" or hasattr(importlib.import_module(module), name), f"{page}: {module}.{name}"
        for name in re.findall(r"`((?:evaluation|analysis|benchmarks|tests|engine|models|docs)/[\w/.]+\.(?:py|sh|md))`", text):
            assert (ROOT / name).exists() or name == TOY, f"{page}: {name}"


def test_the_picture_has_every_file():
    picture = (ROOT / "docs/images/architecture.svg").read_text()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("engine/[a-z]*.py")]:
        name = "extract_backbone" if path.stem.startswith("extract_backbone") else path.name
        assert f">{name}" in picture, name


def test_the_added_evaluation_runs(digits, tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/adding.md").read_text(), re.DOTALL | re.MULTILINE)
    script, test = (next(block for block in blocks if start in block) for start in ("__main__", "def test_"))
    names = {"torch": torch, "__name__": "toy", "__file__": str(ROOT / TOY)}
    exec(script, names)
    exec(test, names)
    names["test_nearest_mean_equals_the_definition"]()

    monkeypatch.setattr("sys.argv", [TOY, *"--pretrained_weights random --arch vit_nano --patch_size 4 --image_size 16 --device cpu "
                                     f"--num_workers 0 --data_path {digits} --output_dir {tmp_path}".split()])
    names["main"]()
    top1 = re.search(r"^random, nearest class mean: top-1 ([\d.]+) %$", capsys.readouterr().out, re.MULTILINE).group(1)
    report.report(tmp_path)
    assert re.search(rf"class_means +{top1}", capsys.readouterr().out)
