"""Many models at a time: each process takes one after the other, on its own GPU where there are several."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing import get_context

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from .runs import Run
from .training import Show


def distribute(task: Callable, runs: list[Run], workers: int, console: Console) -> Iterator[tuple[Run, dict]]:
    """Results as they come, of so many processes at a time, on all GPUs."""
    if workers == 1:
        for each in runs:
            with progress(console, f"{each.recipe}: {each.key}") as show:
                found = task(each, show)
            yield each, found
        return
    if not runs:
        return
    context = get_context("spawn")
    with (
        context.Manager() as manager,
        ProcessPoolExecutor(workers, context, initialise, (workers, context.Value("i", 0))) as pool,
        progress(console, f"{task.__name__}, {workers} at a time") as show,
    ):
        along = manager.dict()
        waiting = {pool.submit(perform_in_worker, task, each, along): each for each in runs}
        while waiting:
            finished, _ = wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in sorted(finished, key=lambda future: future.exception() is not None):
                each = waiting.pop(future)
                along.pop(each.key, None)
                if future.exception() is not None:
                    pool.shutdown(wait=False, cancel_futures=True)
                yield each, future.result()
            done = len(runs) - len(waiting)
            show(round(1000 * (done + sum(along.values()))), 1000 * len(runs))


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def initialise(workers: int, started) -> None:
    """Share the cores, and settle on a GPU: graphs are captured on the one that a process began with."""
    torch.set_num_threads(max(1, cores() // workers))
    with started.get_lock():
        number, started.value = started.value, started.value + 1
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())


def perform_in_worker(task: Callable, run: Run, along: dict) -> dict:
    shown = -1.0

    def show(step: int, of: int) -> None:
        nonlocal shown
        if step / of >= shown + 0.01:
            shown = along[run.key] = step / of

    return task(run, show)


@contextmanager
def progress(console: Console, title: str) -> Iterator[Show]:
    """Yields show(step, of): a bar on a terminal, elsewhere one line."""
    if not console.is_terminal:
        console.print(f"  {title}", soft_wrap=True)
        yield lambda step, of: None
        return
    columns = TextColumn("  {task.description}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=1.0)
        yield lambda step, of: bar.update(task, completed=step / of)
