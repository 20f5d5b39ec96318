"""Real text: four sources, a real tokenizer, stated proportions, a loss below the unigram's.

`-s` prints the figures that the README quotes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from modular_lm.data.reader import SourceReader
from modular_lm.tracking.run_folder import RunFolder
from tests.support import REPO, Jobs

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]
WEIGHTS = {"wiki": 0.4, "books": 0.3, "gov": 0.2, "web": 0.1}


def unigram_entropy(data: Path, n_words: int) -> dict[str, float]:
    """Nats per token of the validation documents under the train split's token frequencies.

    Frequencies are of all sources mixed as in training, with one added to every count.
    """
    mixed = np.zeros(n_words)
    counted: dict[str, np.ndarray] = {}
    for name, weight in WEIGHTS.items():
        train = SourceReader(data / name, "train")
        tokens = train.windows(np.arange(train.n_windows(256)), 256)[:, :-1]
        mixed += weight * np.bincount(tokens.ravel(), minlength=n_words) / tokens.size
        # As validation scores them: the first 32 documents, cut, without the leading BOS.
        documents = [d[1:257] for d in SourceReader(data / name, "val").documents(32)]
        counted[name] = np.bincount(np.concatenate(documents), minlength=n_words)
    frequency = (mixed * 1e6 + 1) / (mixed * 1e6 + 1).sum()
    counted["all"] = np.sum([*counted.values()], axis=0)
    return {n: float(-(c * np.log(frequency)).sum() / c.sum()) for n, c in counted.items()}


def test_training_on_real_text_beats_the_unigram(
    jobs: Jobs, shared_data: Path, tmp_path: Path
) -> None:
    data, tokenizer = tmp_path / "data", shared_data / "tokenizers" / "llama2" / "tokenizer.model"
    prepared = jobs.run(
        "ray_jobs.prepare", f"src={shared_data / 'mini'}", f"dst={data}",
        "tokenizer.name=sp", f"tokenizer.path={tokenizer}",
    )  # fmt: skip
    folder = RunFolder(tmp_path / "run")
    trained = jobs.run(
        "ray_jobs.train", "config=configs/mini.yaml", f"dump_dir={folder.path}",
        f"data.root_dir={data}", f"data.tokenizer.path={tokenizer}",
        "steps=120", "logging.freq=1", "logging.mlflow.enabled=false",
    )  # fmt: skip
    entropy = unigram_entropy(data, 32_000)
    *_, scores = folder.eval_metrics
    print(prepared, trained)
    for name in (*WEIGHTS, "all"):
        nll = scores[f"validation/{name}/nll"]
        print(f"{name:6} validation loss {nll:.3f}  unigram entropy {entropy[name]:.3f} nats/token")
        assert nll < entropy[name]
    assert scores["validation/all/nll"] < entropy["all"] - 0.1

    config = yaml.safe_load((REPO / "configs" / "mini.yaml").read_text())
    batch = config["data"]["batch_size"] * config["ray"]["num_workers"]
    for line in folder.metrics:
        for name, weight in WEIGHTS.items():
            drawn = line[f"data/share/{name}"] * batch
            assert abs(drawn - weight * batch) < 1, line["global_step"]
