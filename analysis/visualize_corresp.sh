#!/usr/bin/env bash
# Matches between the patches of two views (Figure 19).
# Flags go to the script.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec "${PYTHON:-python3}" "$here/correspondence/visualize_correspondence.py" --data_path data/imagenet/val "$@"
