"""Convert a model between Hugging Face, Meta/Lingua and this project's checkpoints.

from=hf     folder with config.json and model.safetensors (or shards and their index)
from=meta   folder with consolidated.00.pth (Meta) or consolidated.pth (Lingua) and params.json
from=torch  file written by to=torch: model, config and tokenizer for torch.load
from=dcp    checkpoint folder (or URI) of this project, or a run's: then its latest
from=safetensors  folder written by to=safetensors
to=dcp      checkpoint folder, for ckpt= of every job and checkpoint.init_ckpt_path
to=torch    one .pth file
to=hf       folder for Hugging Face's Llama; dense models only
to=safetensors  folder with model.safetensors and params.json, our config; any model

Formats hf and meta need the model's tokenizer; the others bring theirs. One process, without Ray.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, get_args

from modular_lm.cli import run_job
from modular_lm.config import ConvertConfig
from modular_lm.config.schema import SourceFormat
from modular_lm.errors import EXIT_DONE, ConfigError
from modular_lm.files import check_new
from modular_lm.storage import Place
from modular_lm.tokenizer import build_tokenizer
from modular_lm.train.inventory import find

USAGE = (
    "python -m ray_jobs.convert from=hf src=LLAMA dst=CKPT "
    "tokenizer.name=sp tokenizer.path=LLAMA/tokenizer.model"
)
_BRING_TOKENIZER = ("torch", "dcp", "safetensors")


def main(config: ConvertConfig, given: dict[str, Any]) -> int:
    """The job; returns the exit code."""
    source, src, dst = _checked(config, given)  # before torch is loaded
    from modular_lm.train.conversion import convert

    with tempfile.TemporaryDirectory() as scratch:
        model = convert(source, config.to, src, dst, config.tokenizer, Path(scratch))
    count = sum(tensor.numel() for tensor in model.state.values())
    print(f"{src} ({source}, {count:,} parameters) -> {dst} ({config.to})", flush=True)
    return EXIT_DONE


def _checked(config: ConvertConfig, given: dict[str, Any]) -> tuple[str, Place, Path]:
    """Source format, src and dst. Raises ConfigError or CheckpointError."""
    source = config.from_
    if source is None:
        raise ConfigError(f"from=null: expected one of {', '.join(get_args(SourceFormat))}")
    if not config.dst:
        raise ConfigError("dst=: expected a path to write")
    dst = Path(config.dst).expanduser().absolute()
    check_new(dst, "dst")
    if config.to == "torch" and dst.is_dir():
        raise ConfigError(
            f"dst={config.dst}: is a folder; to=torch writes one file, e.g. model.pth"
        )
    if source == "dcp":
        src = find(config.src, "src").resolve()
    else:
        src = Path(config.src).expanduser()
        if not config.src or not src.exists():
            raise ConfigError(f"src={config.src}: no such file or folder")
    _check_tokenizer(source, config, given)
    return source, src, dst


def _check_tokenizer(source: str, config: ConvertConfig, given: dict[str, Any]) -> None:
    if source in _BRING_TOKENIZER:
        if "tokenizer" in given:
            raise ConfigError(f"tokenizer: from={source} brings its own tokenizer; remove the key")
    elif "tokenizer" not in given:
        raise ConfigError(
            f"tokenizer.name: from={source} needs the model's tokenizer; "
            "set tokenizer.name and tokenizer.path"
        )
    else:
        build_tokenizer(config.tokenizer, key="tokenizer")


if __name__ == "__main__":
    run_job(ConvertConfig, main, what=__doc__ or "", usage=USAGE)
