"""A replica's folder: locked while it lives, removed by the next one when it was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from serving.scratch import PREFIX, YOUNG_S, Scratch

HOLD = """
import sys, time
from pathlib import Path
from serving.scratch import Scratch
print(Scratch.new(Path(sys.argv[1])).path, flush=True)
time.sleep(600)  # it lives until it is killed
"""


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_holds_is_not(tmp_path: Path) -> None:
    def old(path: Path) -> Path:
        os.utime(path, (time.time() - 2 * YOUNG_S,) * 2)
        return path

    holders = [subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        dead, living = (old(Path(holder.stdout.readline().strip())) for holder in holders)
        (dead / "adapter").write_text("large")
        old(dead)
        holders[0].send_signal(signal.SIGKILL)
        holders[0].wait()
        (tmp_path / f"{PREFIX}link").symlink_to(living)
        fresh = tmp_path / f"{PREFIX}just-made"
        fresh.mkdir()
        own = Scratch.new(tmp_path)
        assert not dead.exists() and living.exists() and fresh.exists() and (tmp_path / f"{PREFIX}link").is_symlink()
        own.remove()
        assert not own.path.exists()
        again = Scratch.new(tmp_path)
        assert living.exists()
        again.remove()
    finally:
        for holder in holders:
            holder.kill()
            holder.communicate()
