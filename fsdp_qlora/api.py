"""The public Python API: what the commands do, for scripts, notebooks and process groups."""

import dataclasses
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsdp_qlora import atomic, errors
from fsdp_qlora.config import TrainConfig, parse

if TYPE_CHECKING:
    from fsdp_qlora.distributed.world import World
    from fsdp_qlora.inference import Opened

Event = dict[str, Any]  # a line of metrics.jsonl
Callback = Callable[[Event], Any] | None
Place = str | Path
Rows = Iterable[Mapping[str, Any]] | None  # such as a datasets.Dataset or a list of dicts


class TrainError(RuntimeError):
    """A run has failed.

    Attributes:
        code: exit code that the command would have had, see errors.py.
    """

    def __init__(self, code: int, lines: list[str]) -> None:
        super().__init__("\n".join(lines) or f"the run ended with code {code}")
        self.code = code


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a finished run has left.

    Attributes:
        output_dir: directory of the run, with the adapter, the record and report.html.
        losses: mean loss of every step, nats per trained token; None where it was not finite.
        evaluations: events of the record, in order: step, loss, perplexity.
        memory: peaks in GiB by rank, phase and row, and of the host, as summary.json has them.
        summary: the whole of summary.json.
    """

    output_dir: Path
    losses: list[float | None]
    evaluations: list[Event]
    memory: dict[str, Any]
    summary: dict[str, Any]


class _Follower:
    """Reads metrics.jsonl as it grows, and calls back, once for each step and each evaluation."""

    def __init__(self, path: Path, on_step: Callback, on_eval: Callback) -> None:
        self._path, self._offset = path, 0
        self._callbacks = {"step": on_step, "eval": on_eval}
        self.events: dict[str, dict[Any, Event]] = {"step": {}, "eval": {}}

    def poll(self) -> None:
        """Take what has come since the last call."""
        if not self._path.is_file():
            return
        with self._path.open("rb") as file:
            if file.seek(0, os.SEEK_END) < self._offset:  # a restarted run has cut its record
                self._offset = 0
            file.seek(self._offset)
            for raw in file:
                if not raw.endswith(b"\n"):
                    break
                self._offset += len(raw)
                self._take(atomic.parse_json(raw) or {"event": "damaged"})

    def _take(self, line: Event) -> None:
        kind, key = line.get("event", "step"), (line.get("step"), line.get("when"))
        if kind not in self.events:
            return
        is_new, callback = key not in self.events[kind], self._callbacks[kind]
        self.events[kind][key] = line  # of a step that was taken again the last one counts
        if is_new and callback is not None:
            callback(line)


def plan(config: TrainConfig) -> Any:
    """Say what a run needs on this machine, before a weight is read; no torch.

    Args:
        config: the run; what it leaves at its default the plan may choose.

    Returns:
        A planning.run.RunPlan: `lines` for people, `to_dict()` with GiB by phase and row, `found`
        with `fits` and the predicted speed, `cfg` with what was chosen.

    Raises:
        UserError: no such model, or more ranks than GPUs.
    """
    from fsdp_qlora.distributed import launch
    from fsdp_qlora.export import adapter

    if config.init_adapter is not None:
        words = [f"--{name}={getattr(config, name)}" for name in sorted(_given(config))]
        config = parse(adapter.expand_init(words))
    return launch.plan_run(config, _given(config))


def train(
    config: TrainConfig, dataset: Rows = None, on_step: Callback = None, on_eval: Callback = None
) -> TrainResult:
    """Fine-tune a model, as the command `train` does.

    Ranks are started as processes of their own. Inside a process group (torchrun, Ray Train, or
    torch.distributed initialised by the caller) this process is one of the ranks instead, and every
    rank must call.

    Args:
        config: the run.
        dataset: rows, such as a datasets.Dataset or a list of dicts; None: those that
            `config.dataset` names. They are kept as JSON lines beside the other caches, under the
            hash of their content, so that the run can be resumed.
        on_step: called with each step's line of metrics.jsonl: step, loss, learning_rate,
            tokens_per_s, memory of every rank. On rank 0 only.
        on_eval: called with each evaluation: step, loss. On rank 0 only.

    Returns:
        What the run has left, on every rank.

    Raises:
        UserError: the run cannot be started; the message has value, rule and remedy.
        TrainError: the run has failed. What a callback raises ends the run too.
    """
    from fsdp_qlora import run

    if dataset is not None:
        config = dataclasses.replace(config, dataset=str(_keep_rows(dataset)))
    config = dataclasses.replace(config, output_dir=str(_place(config)))
    follower = _Follower(config.resolved_output_dir / "metrics.jsonl", on_step, on_eval)
    values, used = {name: getattr(config, name) for name in sorted(_given(config))}, config
    argv, rank = [f"--{name}={value}" for name, value in values.items()], _rank(config)
    if rank is not None:
        used = run.join_and_run(argv, (lambda: None) if rank else follower.poll)
    else:
        lines: list[str] = []
        code = run.launch_ranks(argv, tell=lines.append, poll=follower.poll)
        if code:
            raise TrainError(code, lines)
    if rank:
        follower = _Follower(used.resolved_output_dir / "metrics.jsonl", None, None)

    def read() -> TrainResult:
        follower.poll()
        summary = atomic.read_json(used.resolved_output_dir / "summary.json")
        losses = [line["loss"] for line in follower.events["step"].values()]
        memory, evaluations = summary.get("ledger", {}), [*follower.events["eval"].values()]
        return TrainResult(used.resolved_output_dir, losses, evaluations, memory, summary)

    group = _group()  # of the caller's; its other hosts need not see the directory
    return read() if group is None else group.first(read)


def merge(adapter: Place, out: Place, base: str = "auto") -> Path:
    """Merge an adapter into its base and write a plain model, as the command `merge` does.

    Args:
        adapter: directory of the adapter.
        out: directory to be made.
        base: what it is added to: "16bit", "dequantized", or "auto" for what training saw.

    Returns:
        The directory, with merge.json: how far the model is from base + adapter.

    Raises:
        UserError: an adapter or a base that does not fit, a full disk.
    """
    from fsdp_qlora.export import commands

    commands.merge([f"--adapter={adapter}", f"--out={out}", f"--base={base}"])
    return Path(out)


def load_model(path: Place, adapter: Place | None = None, any_base: bool = False) -> "Opened":
    """Load a model that answers, in this process, on its CPU or one GPU.

    The process is a torch.distributed group of one rank until the model's `close` is called.

    Args:
        path: directory or hub name of a model, or directory of an adapter, which names its base.
        adapter: directory of an adapter to put on top of the model.
        any_base: the model may be another one than the adapter was trained on.

    Returns:
        The model; `generate(prompt, max_tokens=256, temperature=0.0)` returns its answer.

    Raises:
        UserError: no such model, no such adapter, or this process is one of several ranks.
    """
    from fsdp_qlora import inference
    from fsdp_qlora.export.adapter import CONFIG_NAME, LAYERS_NAME

    if _rank(TrainConfig()) is not None:
        rule = "this process is in a process group already"
        raise errors.UserError("load_model", rule, "close the other model, or use another process")
    names = (CONFIG_NAME, LAYERS_NAME)
    is_adapter = adapter is None and any((Path(path) / name).is_file() for name in names)
    flags = [] if is_adapter else [f"--model_name={path}"]
    place = Path(path if adapter is None else adapter) if is_adapter or adapter else None
    try:
        opened = inference.open_run(place, inference.config_of(place, flags), any_base)
        opened.load_adapter()
    except BaseException:
        from fsdp_qlora.distributed import world

        world.leave()
        raise
    return opened


def _group() -> "World | None":
    if "torch" not in sys.modules:  # nobody has made a group without it
        return None
    from fsdp_qlora.distributed import world

    return world.of_process_group()


def _rank(config: TrainConfig) -> int | None:
    """The number of this process in its process group; None: it is in none."""
    from fsdp_qlora.distributed import launch

    if (group := _group()) is not None:
        return group.rank
    is_rank = launch.is_rank(os.environ, config.world_size)
    return int(launch.rank_env(os.environ, config)["RANK"]) if is_rank else None


def _place(config: TrainConfig) -> Path:
    """The output directory of a run; of one that goes on, its own."""
    from fsdp_qlora.training import preflight

    saved = None
    if config.resume is not None and config.output_dir is None:
        _, saved = preflight.expand_resume([f"--resume={config.resume}"])
    return saved.run_dir if saved else config.resolved_output_dir


def _given(config: TrainConfig) -> frozenset[str]:
    """The options that are not at their defaults: those that the plan must leave as they are."""
    fields = dataclasses.fields(config)
    return frozenset(f.name for f in fields if getattr(config, f.name) != f.default)


def _keep_rows(rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write rows as JSON lines, once for equal ones."""
    rule, kinds = "every row must be a dict of JSON values ({})", (TypeError, ValueError)
    remedy = "convert the other values to text"
    with errors.one_line_of("dataset", remedy, rule=rule, kinds=kinds):
        text = "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)
    data = text.encode()
    path = atomic.cache_dir() / "rows" / f"{hashlib.sha256(data).hexdigest()[:32]}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as own:  # ranks of a group all write
        return path if path.exists() else atomic.write(Path(own, path.name), data).replace(path)
