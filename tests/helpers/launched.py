"""The processes that `rpsa run` has launched."""

import psutil


def workers_of(process: int) -> dict[int, int]:
    """By rank the processes below `process`."""
    children = psutil.Process(process).children()
    return {int(one.environ()["RANK"]): one.pid for one in children if "RANK" in one.environ()}
