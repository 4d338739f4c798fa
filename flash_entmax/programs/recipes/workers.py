"""Many models at a time: every process takes one run after another. Several GPUs are shared out among the processes."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing import get_context

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from .recipe import Run
from .training import Show


def distribute(task: Callable, runs: list[Run], workers: int, console: Console) -> Iterator[tuple[Run, dict]]:
    """Yield each run with ``task(run, show)`` as soon as it is done; ``workers`` processes work at a time."""
    if workers == 1:
        for run in runs:
            with progress(console, f"{run.recipe}: {run.key}") as show:
                found = task(run, show)
            yield run, found
        return
    if not runs:
        return
    context = get_context("spawn")
    with (
        context.Manager() as manager,
        ProcessPoolExecutor(workers, context, initialise, (workers, context.Value("i", 0))) as pool,
        progress(console, f"{task.__name__}, {workers} at a time") as show,
    ):
        shares = manager.dict()  # of each run that is in work, the part that is done
        waiting = {pool.submit(perform_in_worker, task, run, shares): run for run in runs}
        while waiting:
            finished, _ = wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in sorted(finished, key=lambda future: future.exception() is not None):
                run = waiting.pop(future)
                shares.pop(run.key, None)
                if future.exception() is not None:
                    pool.shutdown(wait=False, cancel_futures=True)
                yield run, future.result()
            done = len(runs) - len(waiting)
            show(round(1000 * (done + sum(shares.values()))), 1000 * len(runs))


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def initialise(workers: int, started) -> None:
    """Take this process's share of the cores, and one GPU for good: CUDA graphs are captured on the first one used."""
    torch.set_num_threads(max(1, cores() // workers))
    with started.get_lock():
        number, started.value = started.value, started.value + 1
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())


def perform_in_worker(task: Callable, run: Run, shares: dict) -> dict:
    """``task(run, show)``, which notes its progress in ``shares`` by steps of a hundredth."""
    noted = -1.0

    def show(step: int, steps: int) -> None:
        nonlocal noted
        if step / steps >= noted + 0.01:
            noted = shares[run.key] = step / steps

    return task(run, show)


@contextmanager
def progress(console: Console, title: str) -> Iterator[Show]:
    """Yield show(step, steps), which moves a bar on a terminal. Elsewhere print the title, and show does nothing."""
    if not console.is_terminal:
        console.print(f"  {title}", soft_wrap=True)
        yield lambda step, steps: None
        return
    columns = TextColumn("  {task.description}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=1.0)
        yield lambda step, steps: bar.update(task, completed=step / steps)
