"""Processes that run a function on every rank: one pool a session, which a failed or silent rank replaces."""

import functools
import inspect
import multiprocessing
import traceback
from collections.abc import Callable
from importlib import import_module
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

SECONDS = 60  # for a case
GRACE = 10  # for the others, once a rank has failed


class RankFailedError(AssertionError):
    pass


class Pool:
    """`size` gloo processes; `run(function, *arguments)` calls function(rank, *arguments) on each."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._ranks: list[tuple[Any, Any]] = []
        self._folder: TemporaryDirectory | None = None

    def run(self, function: Callable, *arguments: Any, seconds: float = SECONDS) -> list[Any]:
        """Return the results by rank; raise RankFailedError with the traces of the ranks that failed or hang."""
        if not self._ranks:
            self._start()
        for _, pipe in self._ranks:
            pipe.send((function, arguments))
        answers: dict[int, Any] = {}
        pipes = {pipe: rank for rank, (_, pipe) in enumerate(self._ranks)}
        deadline = monotonic() + seconds
        while len(answers) < self.size and monotonic() < deadline:
            for pipe in wait([p for p, rank in pipes.items() if rank not in answers], deadline - monotonic()):
                try:
                    answers[pipes[pipe]] = pipe.recv()
                except EOFError:
                    answers[pipes[pipe]] = (False, "the process died")
                if not answers[pipes[pipe]][0]:
                    deadline = min(deadline, monotonic() + GRACE)
        failures = [f"rank {rank}: {answer}" for rank, (fine, answer) in sorted(answers.items()) if not fine]
        failures += [f"rank {rank}: no answer" for rank in range(self.size) if rank not in answers]
        if failures:
            self.close()
            raise RankFailedError("\n".join(failures))
        return [answers[rank][1] for rank in range(self.size)]

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch._dynamo", "tritonattn.distributed", "tritonattn.huggingface"])
        self._folder = TemporaryDirectory()
        store = Path(self._folder.name) / "store"
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.size, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))

    def close(self) -> None:
        for process, pipe in self._ranks:
            pipe.close()
            process.kill()
            process.join()
        self._ranks = []
        if self._folder:
            self._folder.cleanup()


def _serve(rank: int, size: int, store: Path, pipe: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = (True, function(rank, *arguments))
        except BaseException:  # pytest.fail included
            pipe.send((False, traceback.format_exc()))
            return  # as a script does: the others then meet a closed connection
        pipe.send(answer)


def on_every_rank(function: Callable) -> Callable:
    """A test of function(rank, *fixtures), which runs on every rank of the pool."""

    @functools.wraps(function)
    def test(pool: Pool, **fixtures: Any) -> None:
        pool.run(_run_test, function.__module__, function.__name__, fixtures)

    _, *names = inspect.signature(function).parameters.values()
    test.__signature__ = inspect.Signature([inspect.Parameter("pool", inspect.Parameter.POSITIONAL_OR_KEYWORD), *names])
    return test


def _run_test(rank: int, module: str, name: str, fixtures: dict[str, Any]) -> None:
    getattr(import_module(module), name).__wrapped__(rank, **fixtures)
