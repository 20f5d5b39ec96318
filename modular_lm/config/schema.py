"""The dataclass tree of every job's configuration.

Keys carry Meta Lingua's names where Lingua has the thing. A field is declared with `key(default,
help, bounds)`; `load` reads type, bounds and help from here, so this is the only place where a key
is described (those of `optim.*` in `optim`). Conditions between keys are in `checks`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from modular_lm.config.keys import key
from modular_lm.config.optim import OptimConfig

TokenizerName = Literal["bytes", "sp", "tiktoken", "llama2", "llama3", "gemma"]
DatasetName = Literal[
    "fineweb_edu",
    "fineweb_edu_10bt",
    "fineweb_edu_100bt",
    "fineweb_edu_350bt",
    "fineweb",
    "fineweb_10bt",
    "fineweb_100bt",
    "fineweb_350bt",
    "dclm_baseline_1.0",
    "dclm_baseline_1.0_10prct",
]
Aggregation = Literal["drop", "avg", "mean", "sum", "stack"]
Pool = Literal["mean", "last"]
ColumnInit = Literal["copy", "fresh"]
ModuleTrain = Literal["new", "all"]
Mixer = Literal["attention"]
FsdpType = Literal["full_shard", "shard_grad_op", "no_shard"]
Recompute = Literal["none", "selective", "full"]
Float8Recipe = Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"]
Dtype = Literal["fp32", "bf16"]
Loader = Literal["ray", "local"]
SourceFormat = Literal["hf", "meta", "torch", "dcp", "safetensors"]
TargetFormat = Literal["dcp", "torch", "hf", "safetensors"]
ShardsAction = Literal["inspect", "verify"]
SplitName = Literal["train", "val"]
ModulesAction = Literal["list", "add", "export", "import", "merge"]
AttentionImpl = Literal["auto", "sdpa", "flex", "xformers"]


@dataclass
class TokenizerConfig:
    name: TokenizerName = key(
        "bytes", "kind of tokenizer, or for prepare one to download; tokenizer=X is short for this"
    )
    path: str | None = key(
        None, "sentencepiece model, tiktoken rank file, or the name of a tiktoken encoding"
    )


@dataclass
class DataConfig:
    root_dir: str | None = key(
        None, "folder that holds one prepared folder per source; not needed for `builtin`"
    )
    sources: dict[str, float] = key(
        {"builtin": 1.0}, "source name -> sampling weight (normalised to sum to 1)"
    )
    stages: dict[str, dict[str, float]] = key(
        {}, "step -> {source: weight} that replace `sources` from that step on"
    )
    loader: Loader = key(
        "ray",
        "ray: tasks of Ray Data read ahead; local: each worker reads for itself (as torchrun does)",
    )
    allow_change: bool = key(
        False, "continue a run although its data or their order have changed; recorded"
    )
    seq_len: int = key(2048, "tokens per training sample", ge=1)
    batch_size: int = key(8, "samples per data-parallel worker and micro-step", ge=1)
    seed: int | None = key(None, "seed of the data order; default: the top-level `seed`", ge=0)
    document_mask: bool = key(
        False, "keep the documents of a training sample apart; default: attend across them"
    )
    tokenizer: TokenizerConfig = key(
        TokenizerConfig, "the tokenizer that the shards were made with"
    )


@dataclass
class ModelConfig:
    dim: int = key(512, "width of the residual stream", ge=1)
    n_layers: int = key(8, "number of layers", ge=1)
    n_heads: int | None = key(None, "attention heads; default: dim / head_dim, else 8", ge=1)
    head_dim: int | None = key(None, "width of a head; default: dim / n_heads", ge=1)
    n_kv_heads: int | None = key(None, "key/value heads (GQA); default: n_heads", ge=1)
    ffn_dim_multiplier: float | None = key(
        None, "factor on the feed-forward width of 8/3 dim", gt=0
    )
    multiple_of: int = key(256, "the feed-forward width is rounded up to a multiple of this", ge=1)
    norm_eps: float = key(1e-5, "epsilon of RMSNorm", gt=0)
    rope_theta: float = key(10000.0, "base of the rotary embedding", gt=0)
    init_base_std: float | None = key(
        None, "standard deviation of the initial weights; default: fan_in ** -0.5", gt=0
    )
    vocab_size: int = key(-1, "size of the vocabulary; -1: the tokenizer's", ge=-1)
    weight_tying: bool = key(False, "use the embedding as output head")
    mixer: Mixer = key("attention", "sequence mixer of the layers")
    sliding_window: int | None = key(
        None, "a dense model whose tokens see only so many, themselves included", ge=1
    )
    module_seq_len: int | None = key(
        None, "chunk length in tokens; null or >= seq_len: one chunk, a dense model", ge=1
    )
    module_agg: Aggregation = key("avg", "what a chunk reads from the chunks before it")
    module_n_layers: int | None = key(
        None, "layers per module; default: max(1, n_layers // 4)", ge=1
    )
    module_n_summary: int = key(1, "summaries per chunk; must divide module_seq_len", ge=1)
    module_pool: Pool = key("mean", "how a summary is made from the tokens of its sub-chunk")
    module_lookback: int = key(
        0, "tokens of the chunk before that each chunk's attention also sees", ge=0
    )
    module_agg_dim: int | None = key(
        None, "width of the memory attention of `stack`; default: dim / 4", ge=1
    )
    module_sum_scale: float | None = key(
        None, "factor of `sum`; default: 1 / (chunks per sample * module_n_summary)", gt=0
    )
    create_module_name: str | None = key(
        None, "name of a column to add to the model of checkpoint.init_ckpt_path, and to train"
    )
    create_module_init: ColumnInit = key(
        "copy", "copy: it begins as the base; fresh: newly drawn, doing nothing at first"
    )
    module_train: ModuleTrain | None = key(
        None,
        "new: only the column of module_route learns; all: what is shared, too; default: "
        "new for an added column, all for the base",
    )
    module_route: str | None = key(
        None, "the column that chunks run through; default: create_module_name, else base"
    )
    module_names: list[str] = key(
        [], "columns beside the base; default: those of checkpoint.init_ckpt_path, and the new one"
    )


@dataclass
class DistributedConfig:
    fsdp_type: FsdpType = key(
        "full_shard",
        "full_shard: free weights after forward; shard_grad_op: keep them until after backward; "
        "no_shard: every worker holds all (as DDP)",
    )
    dp_replicate: int | None = key(
        None, "groups that each hold the model once (HSDP); default: 1, or as dp_shard leaves", ge=1
    )
    dp_shard: int | None = key(
        None, "workers that share the weights of a group, e.g. those of a node; default: all", ge=1
    )
    tp_size: int = key(
        1, "workers that compute the same rows together (tensor and sequence parallel)", ge=1
    )
    model_dtype: Dtype = key("bf16", "compute type of the layers; master weights stay fp32")
    activation_checkpointing: Recompute = key(
        "none",
        "what backward computes again: none, full: each layer from its input, selective: all but "
        "the results of activation_checkpointing_save",
    )
    activation_checkpointing_save: list[str] = key(
        [], "selective: operators whose results are kept, e.g. aten.mm; default: matmuls, attention"
    )
    compile: bool = key(False, "torch.compile each layer; layers share what is compiled")
    float8_recipe: Float8Recipe | None = key(
        None, "linear layers in float8 (torchao; on CPUs an emulation, for tests); default: none"
    )
    float8_filter: str = key(
        r"layers\.[0-9]+\.", "regular expression of the linear layers that float8_recipe is for"
    )
    attn_impl: AttentionImpl = key(
        "auto", "attention backend; auto: sdpa, or on GPUs one that a trial at the start proves"
    )


@dataclass
class SaveEvery:
    every: int = key(0, "steps between two of these; 0: never", ge=0)
    keep: int = key(0, "how many of these to keep; 0 or -1: all", ge=-1)


@dataclass
class DumpEvery(SaveEvery):
    every: int = key(1000, "steps between two of these; 0: only at the end", ge=0)
    keep: int = key(3, "how many of these to keep; 0 or -1: all", ge=-1)


@dataclass
class RollingConfig:
    minutes: float = key(
        30.0, "save at least this often; removed when there is a newer one; 0: never", ge=0
    )


@dataclass
class CheckpointConfig:
    dump: DumpEvery = key(DumpEvery, "checkpoints to resume from")
    eval: SaveEvery = key(SaveEvery, "validate, and keep a checkpoint, at these steps")
    rolling: RollingConfig = key(RollingConfig, "checkpoints against the loss of work")
    path: str | None = key(
        None, "folder of the checkpoints, or a URI (s3://, gs://); default: dump_dir/checkpoints"
    )
    async_save: bool = key(
        True, "train on while a checkpoint is written; needs host memory for a copy of it"
    )
    init_ckpt_path: str | None = key(
        None,
        "start a new run from the weights of this checkpoint (or a run's latest), Hugging Face "
        "folder or .pth; aggregation sites that it lacks start at zero",
    )


@dataclass
class ValidationConfig:
    max_docs: int = key(256, "validation documents per source; 0: no validation", ge=0)
    batch_size: int | None = key(
        None, "documents per worker and step; default: data.batch_size", ge=1
    )
    chunk_len: int | None = key(
        None,
        "chunk length in tokens of the loss curves by position in chunk and by chunk; "
        "default: model.module_seq_len; null there or >= data.seq_len: no curves",
        ge=1,
    )


@dataclass
class EvalConfig:
    validation: ValidationConfig = key(ValidationConfig, "validation loss during training")


@dataclass
class MlflowConfig:
    enabled: bool = key(True, "mirror the run in MLflow")
    tracking_uri: str | None = key(
        None, "default: MLFLOW_TRACKING_URI, else sqlite mlflow.db beside dump_dir"
    )
    experiment: str = key("modular-lm", "name of the MLflow experiment")


@dataclass
class LoggingConfig:
    freq: int = key(10, "steps between two lines of metrics", ge=1)
    mlflow: MlflowConfig = key(MlflowConfig, "MLflow")


@dataclass
class RayConfig:
    num_workers: int | list[int] = key(
        1, "training workers; [min,max]: as many as there is room for as nodes come and go", ge=1
    )
    cpus_per_worker: int = key(1, "CPUs per worker", ge=1)
    use_gpu: bool | None = key(None, "one GPU per worker; default: if the cluster has GPUs")
    max_failures: int = key(
        3, "restarts after a crash or a hang; counted anew after each new checkpoint", ge=0
    )
    max_preemptions: int = key(
        -1, "restarts because nodes were taken away; -1: as many as it takes", ge=-1
    )
    resize_after_s: float = key(
        60.0, "with num_workers=[min,max]: use new nodes once they have been there so long", ge=0
    )


@dataclass
class TrainConfig:
    name: str = key("debug", "name of the run")
    dump_dir: str | None = key(None, "folder of the run; default: runs/<name>")
    seed: int = key(42, "seed of initial weights and, unless data.seed is set, of the data", ge=0)
    steps: int = key(1000, "optimizer steps of the whole run", ge=1)
    stop_at: int | None = key(
        None, "end complete at this step, the schedules still those of `steps`", ge=1
    )
    grad_acc_steps: int = key(1, "micro-steps per optimizer step", ge=1)
    hang_timeout_s: float = key(
        600.0,
        "fail an attempt that has done no step for so long, or for ten times its slowest step if "
        "that is longer; 0: never",
        ge=0,
    )
    dry_run: bool = key(False, "print the resolved config and what it costs, then stop")
    data: DataConfig = key(DataConfig, "what is read")
    model: ModelConfig = key(ModelConfig, "what is computed")
    optim: OptimConfig = key(OptimConfig, "how it is learned")
    distributed: DistributedConfig = key(DistributedConfig, "how it is spread")
    checkpoint: CheckpointConfig = key(CheckpointConfig, "what is saved")
    eval: EvalConfig = key(EvalConfig, "what is measured beside the training loss")
    logging: LoggingConfig = key(LoggingConfig, "what is reported")
    ray: RayConfig = key(RayConfig, "where it runs")


@dataclass
class PrepareConfig:
    src: str = key(
        "builtin",
        "a file or folder of documents, a folder of such folders (one source each), or `builtin`; "
        "with dataset: the folder for its files",
    )
    dst: str | None = key(
        None, "folder to write; one sub-folder per source; required unless builtin"
    )
    tokenizer: TokenizerConfig = key(TokenizerConfig, "tokenizer to use")
    dataset: DatasetName | None = key(
        None, "download this to src, by default dst/<dataset>, and prepare dst/<dataset>_shuffled"
    )
    revision: str | None = key(
        None, "branch, tag or commit of the dataset; default: main as it is at the first download"
    )
    download_only: bool = key(
        False, "stop when dataset and tokenizer are on disk: for a node with internet, without Ray"
    )
    seed: int = key(42, "seed of the global document shuffle", ge=0)
    val_fraction: float = key(
        0.01,
        "share of the documents held out for validation, chosen by a hash of the text",
        ge=0,
        lt=1,
    )
    add_bos: bool = key(True, "begin each document with BOS")
    add_eos: bool = key(True, "end each document with EOS")
    dedup: bool = key(False, "of documents with the same text, keep one")
    shards: int | None = key(
        None, "shards per source and split; default: one per 64 MiB of text, at most 2048", ge=1
    )
    overwrite: bool = key(False, "replace sources that were prepared differently or are damaged")


@dataclass
class ShardsConfig:
    action: ShardsAction | None = key(
        None, "inspect: say what is inside; verify: read and check every byte; required"
    )
    dir: str = key("", "a prepared source, or a folder of some; required")
    split: SplitName = key("train", "whose documents to show")
    samples: int = key(3, "documents to show the beginnings of", ge=0)
    tokenizer: TokenizerConfig = key(
        TokenizerConfig, "to show text, not ids: the tokenizer that the shards were made with"
    )


@dataclass
class GenerateConfig:
    ckpt: str = key("", "a checkpoint folder, or a run's: then its latest")
    prompt: str = key("", "text to continue; empty: start from BOS")
    max_tokens: int = key(128, "tokens to generate", ge=1)
    temperature: float = key(0.0, "0: greedy; else sample from softmax(logits / temperature)", ge=0)
    top_k: int | None = key(None, "sample among the k most likely tokens", ge=1)
    top_p: float | None = key(
        None, "sample among the most likely tokens that hold this probability", gt=0, le=1
    )
    seed: int = key(42, "seed of the sampling", ge=0, lt=2**63)
    route: str | None = key(
        None, "column to run, or auto: each chunk by evidence; default: the one that was trained"
    )
    modules: list[str] = key([], "columns that route=auto chooses among; default: all")
    out: str | None = key(None, "write a JSON line {prompt, text, tokens} to this file")


@dataclass
class ConvertConfig:
    from_: SourceFormat | None = key(None, "what src is; required", name="from")
    to: TargetFormat = key("dcp", "what to write; dcp: a checkpoint folder of this project")
    src: str = key("", "folder or file to read; required")
    dst: str = key("", "folder (torch: file) to write, which must not exist; required")
    tokenizer: TokenizerConfig = key(
        TokenizerConfig, "the model's tokenizer; required for hf and meta"
    )


@dataclass
class ModulesConfig:
    action: ModulesAction | None = key(None, "what to do; required")
    ckpt: str = key("", "a checkpoint folder, or a run's: then its latest; never changed")
    name: str = key("", "the column to make or, action=export, to write")
    init: ColumnInit = key(
        "copy", "copy: a new column is as the base; fresh: newly drawn, doing nothing at first"
    )
    modules: list[str] = key([], "columns whose mean action=merge takes, e.g. base,code")
    src: str = key("", "file of a column to import")
    out: str = key("", "file to export a column to")
    dst: str = key("", "checkpoint folder to write, which must not exist")


@dataclass
class DoctorConfig:
    script: str = key(
        "ray_jobs.train", "the job to check: its module, or an sbatch script, whose options are too"
    )
    device_memory: float | None = key(
        None, "GiB of the device to train on, if that is not one of this machine", gt=0
    )
