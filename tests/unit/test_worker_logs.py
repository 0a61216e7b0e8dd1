"""The last words of a worker that died: the most certain cause that its node's logs hold."""

from __future__ import annotations

import pytest

from cluster.worker_logs import Logs, WorkerPlace, laid_out, verdict, why_it_died

CRASH = """:job_id:06
*** SIGSEGV received at time=1795253814 on cpu 0 ***
PC: @     0x7f9717b74219  (unknown)  (unknown)
Fatal Python error: Segmentation fault

Stack (most recent call first):
  File "/site-packages/deepspeed/kernel.py", line 519 in launch
  File "/work/loop.py", line 9 in step
"""
TRACED = """:actor_name:A
Traceback (most recent call last):
  File "/site-packages/torch/serialization.py", line 12, in save
    self.stream.write(data)
  File "/app/extra.py", line 30, in flush
    raise OSError(5, "Input/output error")
OSError: [Errno 5] Input/output error
"""


@pytest.mark.parametrize(
    ("logs", "expected"),
    [
        (Logs(CRASH, "", "", ""), "its process died of SIGSEGV in launch (/site-packages/deepspeed/kernel.py:519)"),
        (
            Logs(TRACED, "", "", ""),
            "its process died; the last error in its log: OSError: [Errno 5] Input/output error (/app/extra.py:30 in flush)",
        ),
        (
            Logs(TRACED, "", "Out of memory: Killed process 77 (ray::train) total-vm:9kB", ""),
            "the kernel's OOM killer killed it: the machine was out of memory",
        ),
        (
            Logs("", "", "", "1 worker(s) were killed due to the node running low on memory. pid 77"),
            "Ray's memory monitor killed it: the node ran low on memory",
        ),
        (
            Logs(":job_id:06\nlast warning\n", "step 12\n", "", ""),
            "its process died (SIGKILL, or it ended itself); its last words: step 12 | last warning",
        ),
        (Logs(":job_id:06\n", "", "", ""), "its process died without a word (SIGKILL, or it ended itself)"),
    ],
)
def test_the_most_certain_cause_is_told(logs: Logs, expected: str) -> None:
    assert verdict(logs, 77) == expected


def test_the_memory_monitor_is_named_from_rays_own_account() -> None:
    assert why_it_died(None, "2 worker(s) were killed due to the node running low on memory.").startswith("Ray's memory monitor")


def test_one_line_says_which_rank_is_on_which_node() -> None:
    places = {0: WorkerPlace("10.0.0.1", "a", 1), 2: WorkerPlace("10.0.0.1", "a", 3), 1: WorkerPlace("10.0.0.2", "b", 2)}
    assert laid_out(places) == "3 workers on 2 nodes: ranks 0, 2 on 10.0.0.1; rank 1 on 10.0.0.2"
