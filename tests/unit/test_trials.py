"""What a search keeps of its trials, and in which order they stand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ftcore.search import load_search
from ftcore.storage import Folder
from ftcore.trials import Found
from pipelines.telling import Teller


def told(folder: Path, results: list[tuple[str, str, float, float]]) -> Found:
    """`results`: trial, run, share, validation loss."""
    Found("", "min").write(Folder(str(folder)))
    search = load_search(None, ["optim.lr={choice: [1, 2]}"], {"searcher": "random"})
    teller = Teller(str(folder), search.model_dump_json())
    teller.setup()
    for name, run, share, loss in results:
        trial: Any = SimpleNamespace(trial_id=name, config={"optim.lr": "1"})
        if name not in teller.found.trials:
            teller.on_trial_start(0, [], trial)
        teller.on_trial_result(0, [], trial, {"share": share, "step": int(share), "validation_loss": loss, "run": run})
    found = Found.read(Folder(str(folder)))
    assert found is not None
    return found


def test_a_trial_that_took_over_other_weights_is_ranked_by_what_they_came_to(tmp_path: Path) -> None:
    found = told(
        tmp_path,
        [("a", "a", 50, 1.0), ("b", "b", 25, 1.2), ("a", "a.1", 25, 1.3), ("a", "a.1", 50, 1.4), ("b", "b", 50, 1.1)],
    )
    assert [(trial.id, trial.best("min"), trial.share) for trial in found.ranked()] == [("b", 1.1, 50.0), ("a", 1.3, 50.0)]
    assert len(found.trials["a"].looks) == 3 and found.trials["a"].run == "a.1"
