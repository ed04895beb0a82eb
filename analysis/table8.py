"""Table 8 of the paper for one classifier: what the robustness analyses wrote into results.json, beside the published rows.

    python analysis/table8.py --output_dir work_dirs/JOB/robustness
"""
import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import engine
from evaluation.common.results import read_results

COLUMNS = ("O.F.", "M.S.", "M.R.", "M.N.", "N.F.", "O.BB.", "O.BT.", "IN-9", "S.5", "NS.5", "IN-A", "IN-C", "IN")
PAPER = {"DINO": (89.2, 89.2, 80.4, 78.3, 52.0, 21.9, 18.4, 96.4, 64.7, 42.0, 12.3, 51.7, 77.0),
         "iBOT": (90.9, 89.7, 81.7, 80.3, 53.5, 22.7, 17.4, 96.8, 65.9, 43.4, 13.8, 48.1, 77.9)}
# Where each column is found: protocol of the record, then names in its metrics.
PLACES = (*(("imagenet9", name) for name in ("only_fg", "mixed_same", "mixed_rand", "mixed_next", "no_fg", "only_bg_b",
                                             "only_bg_t", "original")),
          ("occlusion", "S.5"), ("occlusion", "NS.5"), ("imagenet_a", "acc"), ("imagenet_c", "mean19"),
          ("occlusion", "random", "0", 0))


def table_row(records):
    """The 13 values of the latest records of results.json; None where there is none."""
    row = []
    for protocol, *names in PLACES:
        value = None
        for record in records:  # the latest one that has it
            found = record["metrics"] if record["protocol"] == protocol else {}
            for name in names:
                found = found[name] if isinstance(found, list) else (found or {}).get(name)
            value = value if found is None else found
        row.append(value)
    return row


def of_latest_classifier(records):
    """The records of the classifier, file and weights, that was tested last: a row is about one."""
    def classifier(record):
        return os.path.realpath(record["checkpoint"]), record["settings"].get("weights_hash")
    tested = [record for record in records if record["protocol"] in {protocol for protocol, *_ in PLACES}]
    return [record for record in tested if classifier(record) == classifier(tested[-1])]


def main():
    parser = argparse.ArgumentParser(description="Table 8 of a run", allow_abbrev=False)
    parser.add_argument("--output_dir", required=True, help="folder of results.json")
    folder = parser.parse_args().output_dir
    records = of_latest_classifier(read_results(folder))
    if not records:
        raise engine.InputError(f"{Path(folder) / 'results.json'}: no results; the robustness tests write them")
    for name, row in (("", COLUMNS), *PAPER.items(), ("here", table_row(records))):
        cells = [value if isinstance(value, str) else "-" if value is None else f"{value:.1f}" for value in row]
        print(f"{name:6}" + "".join(f"{cell:>7}" for cell in cells))
    print(f"here: {records[-1]['checkpoint']}")
    print("DINO and iBOT: the paper's rows for ViT-S/16; IN-C: error, lower is better; IN: centre crops, bilinear, as here")


if __name__ == "__main__":
    engine.run(main)
