"""The paper's runs by name: every flag exists and can be trained with, given ones count, and pages have the same numbers."""
import re
from pathlib import Path

import pytest

import engine
import main_ibot
import recipes

ROOT = Path(__file__).resolve().parent.parent


def row_of(name):
    """The row of docs/ablations.md."""
    row = recipes.RECIPES[name]
    numbers = " | ".join(f"{value:.1f}" if value else "–" for value in (row.knn, row.linear, row.finetuned))
    return f"| `{name}` | {row.what} | {numbers} | {row.note or '–'} |"


def parse(*words):
    return main_ibot.get_args_parser().parse_args(recipes.expand(list(words)))


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_can_be_trained_with(name, tmp_path):
    """Its flags exist, are what is parsed, and pass the checks."""
    flags = recipes.flags_of(name)
    known = {action.dest for action in main_ibot.get_args_parser()._actions}
    assert flags.keys() <= known
    file = ["--tokenizer_file", "x"] if "--tokenizer_file" in recipes.RECIPES[name].note else []
    args = parse("--recipe", name, "--data_path", "x", "--output_dir", str(tmp_path), *file)
    assert args.recipe == name and recipes.differing(vars(args), name) == {}
    main_ibot.check_args(args)
    assert recipes.notes(args, recipes.RECIPES[name].batch)[0].startswith(f"recipe {name} (")


def test_given_flags_count_wherever_they_stand():
    for words in ("--epochs 100 --recipe vit_s16_800ep --pred_ratio 0.4", "--recipe=vit_s16_800ep --pred_ratio 0.4 --epochs 100"):
        args = parse(*words.split())
        assert (args.epochs, args.pred_ratio, args.pred_ratio_var, args.out_dim) == (100, [0.4], [0, 0.2], 8192)
        assert args.local_crops_number == 10 and args.shared_head and not args.norm_last_layer
    assert recipes.differing(vars(args), "vit_s16_800ep") == {"epochs": ["100"], "pred_ratio": ["0.4"]}
    assert recipes.differing({}, "vit_s16_800ep").keys() == recipes.flags_of("vit_s16_800ep").keys()
    line, split, batch = recipes.notes(args, 64)
    assert line.endswith("; otherwise here: --epochs 100 --pred_ratio 0.4") and "--out_dim 8192" in line
    assert "0.32" in split and "total batch is 1024, here it is 64" in batch
    assert recipes.as_settings(vars(args), 40) == {
        "recipe": "vit_s16_800ep", "recipe_otherwise": "--epochs 100 --pred_ratio 0.4, after 40 epochs"}
    assert recipes.as_settings(vars(parse("--recipe", "vit_s16_800ep")), 800)["recipe_otherwise"] == ""
    assert recipes.as_settings({}, 3) == recipes.as_settings({"recipe": ["x"]}, 3) == {}
    assert parse("--epochs", "3").recipe is None and recipes.notes(parse(), 64) == []


def test_table_and_mistyped_names(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["main_ibot.py", "--recipe", "list"])
    with pytest.raises(SystemExit) as end:
        main_ibot.main()
    printed = capsys.readouterr().out
    assert not end.value.code
    for name, row in recipes.RECIPES.items():
        [line] = re.findall(rf"^{re.escape(name)} .*", printed, re.MULTILINE)
        assert row.source in line and row.note in line and all(
            f" {value:.1f} " in line for value in (row.knn, row.linear, row.finetuned) if value)
    monkeypatch.setattr("sys.argv", ["main_ibot.py", "--epochs", "3", "--recipe=vit_s_800ep"])
    with pytest.raises(engine.InputError, match="^--recipe vit_s_800ep: there is none of that name; close: vit_s16_800ep, .*; all"):
        main_ibot.main()
    with pytest.raises(engine.InputError, match="there is none of that name; all"):
        recipes.expand(["--recipe", "???"])


def test_what_differs_between_neighbours():
    """From the paper's text, not from the table: plain DINO hides nothing, all of Table 18 differs in the targets alone."""
    def difference(name, base="table9_ibot"):
        own, other = recipes.flags_of(name), recipes.flags_of(base)
        return {flag for flag in own.keys() | other.keys() if own.get(flag) != other.get(flag)}

    assert difference("table9_dino") == {"lambda2", "use_masked_im_modeling", "out_dim"}
    assert difference("table9_no_cls") == {"lambda1"} and difference("k_4096") == {"out_dim"}
    for name in recipes.RECIPES:
        if name.startswith("table18"):
            assert difference(name) and difference(name) <= {"patch_targets", "patch_centering", "teacher_patch_temp",
                                                             "warmup_teacher_patch_temp"}
    assert difference("fig8_e", "fig8_c") == {"local_crops_scale"}
    assert recipes.flags_of("ratio_0.5")["lambda2"] == ["2"] and recipes.flags_of("ratio_2")["lambda2"] == ["0.5"]
    assert recipes.flags_of("area_b16_0.32")["local_crops_scale"] == ["0.05", "0.32"]


def test_pages_have_every_recipe_with_its_numbers():
    page, readme = (ROOT / "docs/ablations.md").read_text().splitlines(), (ROOT / "README.md").read_text()
    found = {name: numbers.split(" | ") for name, numbers in re.findall(
        r"^\| `(\w+)` \|.*\| ((?:[\d.]+|–) \| (?:[\d.]+|–) \| (?:[\d.]+|–))(?: \(.*\))? \|$", readme, re.MULTILINE)}
    assert len(found) == 10
    for name, row in recipes.RECIPES.items():
        if name in found:
            assert found[name] == [f"{value:.1f}" if value else "–" for value in (row.knn, row.linear, row.finetuned)]
        assert page.count(row_of(name)) == (name not in found), f"docs/ablations.md lacks the line:\n{row_of(name)}"
    assert sum(line.startswith("| `") and line.count(" | ") == 5 for line in page) == len(recipes.RECIPES) - len(found)
    named = set(re.findall(r"--recipe ([a-z]\w*)", readme + "\n".join(page)))
    assert named - recipes.RECIPES.keys() <= {"list"}
