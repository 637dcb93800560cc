"""Which run of MLflow's is meant: what other processes and its client need. It sends nothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RunHandle:
    """Where a run is: all that another process needs to write into it. Picklable; without `run_id`
    and `token` it writes nowhere."""

    tracking_uri: str
    run_id: str | None
    experiment: str = ""
    token: str = ""
    """A tag of the run, by which it is found where MLflow gave no id."""
    spool: str = ""
    """Folder of the journals; a folder for temporary files if it is empty."""

    @property
    def nowhere(self) -> bool:
        """Whether what is tracked goes nowhere."""
        return self.run_id is None and not self.token
