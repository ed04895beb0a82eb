"""The reference's command for the backbone that its fine-tuning reads; ours reads whole checkpoints too.

    python evaluation/classification_layer_decay/extract_backbone_weights.py CHECKPOINT OUTPUT.pth --checkpoint_key teacher

The same as `python extract_backbone_weights.py CHECKPOINT OUTPUT.pth --checkpoint_key teacher --format flat`.
"""
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    root = Path(__file__).resolve().parent.parent.parent
    sys.path.insert(0, str(root))
    sys.argv += ["--format", "flat"]
    runpy.run_path(str(root / "extract_backbone_weights.py"), run_name="__main__")
