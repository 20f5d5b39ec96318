"""Continue a text with a trained model: `ckpt=` a checkpoint's folder, or a run's (its latest).

Prints the prompt and its continuation; with `out=FILE` also writes a JSON line
{"prompt", "text", "tokens"}, with `route=auto` and "columns", of each chunk. One prompt needs no
cluster, so no Ray is started.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modular_lm.cli import run_job
from modular_lm.config import GenerateConfig
from modular_lm.errors import ConfigError
from modular_lm.model.sizes import column_names
from modular_lm.storage import Place
from modular_lm.train.inventory import find
from modular_lm.train.saved_config import read_config

if TYPE_CHECKING:
    from modular_lm.model.lm import LanguageModel

log = logging.getLogger(__name__)

USAGE = 'python -m ray_jobs.generate ckpt=DIR prompt="..." key=value ...'


def main(config: GenerateConfig, given: dict[str, Any]) -> int:
    """The job; returns the exit code."""
    _check_route(config, find(config.ckpt))  # before torch is loaded
    out = Path(config.out) if config.out else None
    if out is not None and out.is_dir():
        raise ConfigError(f"out={config.out}: is a folder; name a file")
    if out is not None and not out.absolute().parent.is_dir():
        raise ConfigError(f"out={config.out}: there is no folder {out.absolute().parent}")
    from modular_lm.generate import generate
    from modular_lm.train.checkpoint import load_for_inference

    model, tokenizer, _, folder = load_for_inference(config.ckpt)
    log.info("model of %s", folder)
    candidates = (config.modules or model.column_names) if config.route == "auto" else ()
    prompt = tokenizer.encode(config.prompt, add_bos=True)
    (tokens,) = generate(
        model,
        [prompt],
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
        eos_id=tokenizer.eos_id,
        route=None if config.route == "auto" else config.route,
        candidates=candidates,
    )
    # Decoded together: a token alone need not be whole characters.
    text = tokenizer.decode(prompt + tokens)[len(tokenizer.decode(prompt)) :]
    print(config.prompt + text)
    line = {"prompt": config.prompt, "text": text, "tokens": tokens}
    if candidates:
        line["columns"] = _columns_of_chunks(model, candidates, prompt + tokens)
        log.info("columns by chunk: %s", " ".join(line["columns"]))
    if out is not None:
        out.write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


def _columns_of_chunks(
    model: LanguageModel, candidates: Sequence[str], tokens: list[int]
) -> list[str]:
    import torch

    from modular_lm.model.routing import choose_routes

    routes = choose_routes(model, candidates, torch.tensor([tokens]).to(model.device))
    return [model.column_names[number] for number in routes[0].tolist()]


def _check_route(config: GenerateConfig, folder: Place) -> None:
    """Raise ConfigError for columns that the checkpoint does not have."""
    names = column_names(read_config(folder).model)
    if config.route not in (None, "auto", *names):
        raise ConfigError(f"route={config.route}: expected auto or a column: {', '.join(names)}")
    if config.modules and config.route != "auto":
        raise ConfigError(f"modules={','.join(config.modules)}: is for route=auto")
    if unknown := [name for name in config.modules if name not in names]:
        raise ConfigError(
            f"modules={','.join(config.modules)}: there is no column {unknown[0]}; "
            f"there are {', '.join(names)}"
        )


if __name__ == "__main__":
    run_job(GenerateConfig, main, what=__doc__ or "", usage=USAGE)
