#!/usr/bin/env bash
# Installs each given wheel or sdist into an empty environment and runs a few lines with it.
# Dependencies are borrowed from $PYTHON's environment (a plain .pth line: its editable installs stay invisible), so
# that torch is not downloaded again. The copy under test wins because its own site-packages come first.
set -euo pipefail

PYTHON=${PYTHON:-python3}
borrowed=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
for artifact in "$@"; do
  artifact=$(realpath "$artifact")
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  "$PYTHON" -m venv "$scratch/venv"
  python=$scratch/venv/bin/python
  "$python" -m pip install --quiet --no-deps "$artifact"
  echo "$borrowed" > "$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/borrowed.pth"
  (cd "$scratch" && "$python" - "$scratch" <<'PY'
import sys

import numpy as np
import segclip_fast
import segclip_fast.kernels
from segclip_fast import _C
from segclip_fast.ops import felzenszwalb
from segclip_fast.training.runs import available, load_run

for module in (segclip_fast, segclip_fast.kernels, _C):
    assert module.__file__.startswith(sys.argv[1]), f"{module.__name__} came from {module.__file__}"
image = np.zeros((16, 16, 3), np.uint8)
image[:, 8:] = 255
labels = felzenszwalb(image, scale=1.0, sigma=0.0, min_size=1)
assert labels[0, 0] == 0 and labels[0, 15] == 1 and labels.max() == 1, labels
assert load_run("paper").batch_size == 96 and len(available()) > 3, available()
print(_C.cuda_build(), _C.cuda_devices())
PY
  )
  echo "ok: $(basename "$artifact")"
  rm -rf "$scratch"
done
