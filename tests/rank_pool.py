"""Four processes on gloo that wait for work: one start of them serves every group of one to four ranks."""

import faulthandler
import os
import pickle
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed, multiprocessing

RANKS = 4
PATIENCE = 120  # seconds that a test waits for an answer
TIMEOUT = timedelta(seconds=2)  # of the groups in which a rank does not take part


class RankError(Exception):
    """What a rank raised, by the name of its class and its message."""

    def __init__(self, kind: str, message: str, trace: str) -> None:
        super().__init__(f"{kind}: {message}\n{trace}")
        self.kind, self.message = kind, message


class RankPool:
    """Functions run on the first ranks, each with its group as the first argument."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        self.pipes, self.processes = [], []
        for rank in range(RANKS):
            ours, theirs = context.Pipe()
            store = str(Path(self.folder.name) / "store")
            self.processes.append(context.Process(target=serve, args=(rank, store, theirs), daemon=True))
            self.pipes.append(ours)
        for process in self.processes:
            process.start()

    def answers(self, size: int, function, *arguments, **options) -> list:
        """What each of the first `size` ranks returned, or a RankError."""
        for pipe in self.pipes[:size]:
            pipe.send_bytes(pickle.dumps((size, function, arguments, options)))
        return [self.answer(rank) for rank in range(size)]

    def answer(self, rank: int):
        assert self.pipes[rank].poll(PATIENCE), f"rank {rank} has not answered in {PATIENCE} s"
        try:
            return pickle.loads(self.pipes[rank].recv_bytes())
        except (EOFError, ConnectionError):
            self.processes[rank].join(PATIENCE)
            raise AssertionError(f"rank {rank} ended with exit code {self.processes[rank].exitcode}") from None

    def answers_of_all_but_the_last(self, function, *arguments) -> list:
        """All ranks run it, and the last one may end."""
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps((RANKS, function, arguments, {})))
        return [self.answer(rank) for rank in range(RANKS - 1)]

    def run(self, size: int, function, *arguments, **options) -> list:
        """What each of the first `size` ranks returned."""
        answers = self.answers(size, function, *arguments, **options)
        for answer in answers:
            if isinstance(answer, Failure):
                raise RankError(*answer.of)
        return answers

    def is_whole(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(PATIENCE)
        self.folder.cleanup()


class Failure:
    """What a rank raised instead of its answer: kind, message, traceback."""

    def __init__(self, *of: str) -> None:
        self.of = of

    def __repr__(self) -> str:
        return "Failure: " + "\n".join(self.of)


def serve(rank: int, store: str, pipe) -> None:
    """One process: take a function, run it, answer; end when the pipe is closed."""
    faulthandler.enable()
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    groups = {size: distributed.new_group(list(range(size))) for size in range(1, RANKS + 1)}
    while True:
        try:
            size, function, arguments, options = pickle.loads(pipe.recv_bytes())
        except (EOFError, ConnectionError):
            os._exit(0)  # groups in which a rank took no part cannot be left in good order
        try:
            answer = function(groups[size], *arguments, **options)
        except Exception as error:
            answer = Failure(type(error).__name__, str(error), traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))
