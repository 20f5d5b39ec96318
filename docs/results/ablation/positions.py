"""The loss by position in a chunk and by chunk, mean over seeds, of a sweep's trials with chunks.

python docs/results/ablation/positions.py SWEEP_FOLDER
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict

import numpy as np

from modular_lm.sweep.folder import SweepFolder

POSITIONS = [0, 1, 3, 7, 15, 31, 63, 255]
CHUNKS = [0, 1, -1]

folder = SweepFolder(sys.argv[1])
rows = defaultdict(list)
for trial in folder.trials():
    if length := trial["values"].get("model.module_seq_len"):
        last = max((folder.run(trial["name"]).path / "evals").glob("*/positions.json"))
        losses = json.loads(last.read_text())["sources"]["all"]
        shown = [position for position in POSITIONS if position < length]
        positions = np.array(losses["position_in_later_chunks"]["nll"])[shown]
        chunks = np.array(losses["chunk_index"]["nll"])[CHUNKS]
        gaps = [np.nan] * (len(POSITIONS) - len(shown))
        rows[trial["arm"]].append([*positions, *gaps, *chunks])
print("| variant |", " | ".join(map(str, POSITIONS)), "| first chunk | second | last |")
for arm, seeds in rows.items():
    cells = ["-" if np.isnan(loss) else f"{loss:.2f}" for loss in np.mean(seeds, axis=0)]
    print(f"| {arm} | " + " | ".join(cells) + " |")
