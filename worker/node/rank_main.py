"""`python -m worker.node.rank_main STORE RANK`: a tensor-parallel rank above 0.

It loads its shares of the models in the same order as rank 0, executes rank 0's commands, and ends with it.
"""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path

import torch
from transformers import PreTrainedModel

from jobs.errors import BasicError
from jobs.logs import log_to_stderr
from jobs.processes import BAD_SETTINGS_STATUS
from worker.drafters.head_file import is_head
from worker.engine.errors import EngineError, RankLost
from worker.engine.model.backend import fuse_layers
from worker.engine.model.loading import gather_embeddings, load, native_dtype
from worker.engine.options import EngineOptions
from worker.engine.parallel.channel import RankChannel
from worker.engine.parallel.commands import CommandKind
from worker.engine.parallel.leader_model import FollowerModels
from worker.loading.capacity import bytes_left
from worker.loading.drafts import draft_path
from worker.loading.model_store import resolve
from worker.loading.quantization import choose_kv_dtype
from worker.loading.tensor_parallel import draft_tp_size
from worker.settings import WorkerSettings

log = logging.getLogger(__name__)


def main() -> int:
    """Execute commands until rank 0 sends END or is lost; return the exit status."""
    store, rank = sys.argv[1:]
    settings = WorkerSettings()
    log_to_stderr(settings.log_format, logging.WARNING)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # rank 0 drains, then sends END
    try:
        follow(settings, Path(store), int(rank))
    except RankLost as lost:
        log.warning("%s", lost, extra={"action": "rank_lost"})
        return 1
    except (BasicError, EngineError) as error:
        print(error, file=sys.stderr)
        return BAD_SETTINGS_STATUS
    return 0


def follow(settings: WorkerSettings, store: Path, rank: int) -> None:
    """Load this rank's shares and execute commands until the end."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)  # where Triton launches its kernels
    channel = RankChannel(store, rank, settings.tp, device)
    loaded = _load(settings, device)
    models = FollowerModels(loaded)
    while True:
        for command in channel.recv():
            if command.kind is CommandKind.END:
                return
            if command.kind is CommandKind.FREE_MEMORY:
                sequences, context, rows = command.numbers
                options = EngineOptions(max_sequences=sequences, max_context=context, prefill_rows=rows)
                channel.all_reduce_min(bytes_left(loaded[0], options, settings.memory_share / settings.tp))
            else:
                models.execute(command)


def _load(settings: WorkerSettings, device: torch.device) -> list[PreTrainedModel]:
    """Load the target's share, and the draft if all ranks hold it, exactly as the first rank does (`load_engine`)."""
    dtype = native_dtype(device) if settings.dtype == "auto" else getattr(torch, settings.dtype)
    path = resolve(settings.target, settings.cache_dir, base=settings.base_model)
    loaded = [load(path, dtype=dtype, device=device, ranks=settings.tp, context=settings.max_context)]
    choose_kv_dtype(settings, loaded[0])
    draft = draft_path(settings)
    if draft is not None and is_head(draft):
        gather_embeddings(loaded[0])
    elif draft is not None and settings.draft_ranks == "all":
        ranks = draft_tp_size(draft, settings)
        loaded.append(load(draft, dtype=dtype, device=device, ranks=ranks, context=settings.max_context))
        choose_kv_dtype(settings, loaded[1])
    for model in loaded:
        fuse_layers(model)
    return loaded


if __name__ == "__main__":
    sys.exit(main())
