"""MLflow's registry: exported checkpoints as versions of a model, and who may be called champion.

A version's tags say what was measured and which runs made it; an alias points to one version.
Nothing here waits for an unavailable server: the checkpoint itself is in the store.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.redact import redact
from pipeline.tracking.address import database_of
from pipeline.tracking.mlflow_calls import TrackingError, brief, client_of, failures
from pipeline.tracking.names import model_name

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

MODEL_PACKAGES = ("torch", "transformers", "peft", "pillow", "safetensors")
CANDIDATE = "candidate"
"""The alias of the newest version."""
MANIFEST_TAG = "adsc.manifest"
"""SHA-256 of the manifest: one checkpoint is one version, however often it is exported."""
MODEL_TAG = "adsc.model"
"""`models:/m-...`, the logged model of a version; MLflow's own field is empty on databases."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One condition of a promotion."""

    name: str
    tag: str
    """The version's tag that holds the measured value."""
    limit: float
    at_least: bool
    """Else at most."""

    def value(self, tags: Mapping[str, str]) -> float | None:
        """What was measured; None where nothing was."""
        try:
            return float(tags[self.tag])
        except (KeyError, ValueError):
            return None

    def holds(self, tags: Mapping[str, str]) -> bool:
        value = self.value(tags)
        if value is None:
            return False
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        return f"{self.name} {'at least' if self.at_least else 'at most'} {self.limit:g}"


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """What `promote` found, and whether the alias moved."""

    name: str
    version: str
    alias: str
    before: str | None
    """The version that had the alias."""
    values: dict[str, float | None]
    """By the gate's words."""
    refused: tuple[str, ...]
    """Gates that don't hold; empty means that the alias is the version's."""


def register(
    client: MlflowClient, run_id: str, folder: Path, name: str, tags: Mapping[str, str]
) -> tuple[str, str]:
    """Log a checkpoint as a model and register it, unless this very one is registered.

    Returns:
        `models:/m-...` and `models:/NAME/VERSION`; that version has the alias `candidate`.
    """
    from mlflow.exceptions import MlflowException

    name = model_name(name)
    try:
        client.create_registered_model(name, description=f"Checkpoints exported as {name}.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    version = _version_of(client, name, tags[MANIFEST_TAG]) if MANIFEST_TAG in tags else None
    if version is None:
        logged = log_model(client, run_id, folder, name)
        version = client.create_model_version(
            name,
            # Not its address: that would be looked up in this process's global MLflow.
            source=client.get_logged_model(logged.removeprefix("models:/")).artifact_location,
            run_id=run_id,
            tags={**tags, MODEL_TAG: logged},
            description=_described(tags, client.get_run(run_id).info.experiment_id),
            model_id=logged.removeprefix("models:/"),
        )
    client.set_registered_model_alias(name, CANDIDATE, str(version.version))
    return version.tags[MODEL_TAG], f"models:/{name}/{version.version}"


def promote(
    tracking_uri: str, name: str, gates: tuple[Gate, ...], alias: str, version: str = CANDIDATE
) -> Promotion:
    """Give a version the alias, if every gate holds for what its tags say was measured.

    Args:
        version: a number, or another alias.

    Raises:
        TrackingError: no such model or version; no server answers.
    """
    name = model_name(name)
    database = database_of(tracking_uri)
    if database is not None and not database.is_file():
        raise TrackingError(f"can't promote {name}: there is no database {database}")
    try:
        client = client_of(tracking_uri)
        by_alias = not version.isdecimal()
        get = client.get_model_version_by_alias if by_alias else client.get_model_version
        found = get(name, version)
        aliases = client.get_registered_model(name).aliases
        values = {str(gate): gate.value(found.tags) for gate in gates}
        refused = tuple(str(gate) for gate in gates if not gate.holds(found.tags))
        before = aliases.get(alias)
        if not refused:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            measured = "; ".join(f"{gate}: {value:.6g}" for gate, value in values.items())
            client.set_model_version_tag(
                name, found.version, f"adsc.promoted.{alias}", f"{now}, {measured}"
            )
            client.set_registered_model_alias(name, alias, str(found.version))
    except failures() as error:
        raise TrackingError(
            f"can't promote {name} at {redact(tracking_uri)}: {redact(brief(error))}"
        ) from None
    return Promotion(
        name=name,
        version=str(found.version),
        alias=alias,
        before=None if before is None else str(before),
        values=values,
        refused=refused,
    )


def _version_of(client: MlflowClient, name: str, manifest: str) -> ModelVersion | None:
    for version in client.search_model_versions(f"name = '{name}'", max_results=1000):
        if version.tags.get(MANIFEST_TAG) == manifest and MODEL_TAG in version.tags:
            return version
    return None


def _described(tags: Mapping[str, str], experiment: str) -> str:
    """A version's page begins with this, Markdown; links are to other pages of MLflow."""
    runs = ", ".join(
        f"[{key.removeprefix('adsc.run.')}](#/experiments/{experiment}/runs/{value})"
        for key, value in sorted(tags.items())
        if key.startswith("adsc.run.")
    )
    kept, cost = tags.get("adsc.retention"), tags.get("adsc.flops_of_control")
    measured = "Not measured."
    if kept and cost:
        measured = (
            f"**{100 * float(kept):.1f} % of the control's accuracy at {100 * float(cost):.1f} % "
            "of its FLOPs.**"
        )
    return (
        f"{measured} {_budgets(tags)}Plan `{tags.get('adsc.plan', 'none')}`. Files: "
        f"{tags.get('adsc.address', 'in the store of the run')}; manifest "
        f"`{tags.get(MANIFEST_TAG, 'unknown')[:12]}`. Made by the runs {runs or 'unknown'}."
    )


def _budgets(tags: Mapping[str, str]) -> str:
    """A table of the named plans that were scored, each a budget of this one checkpoint."""
    prefix = "adsc.plan."
    names = [key.removeprefix(prefix) for key in tags if key.startswith(prefix)]
    if not names:
        return ""
    lines = [
        "| budget | plan | vision tokens | accuracy | of the control's | FLOPs of the control's |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:

        def shown(key: str, scale: float = 1, name: str = name, unit: str = "") -> str:
            value = tags.get(f"adsc.{key}.{name}")
            return "-" if value is None else f"{scale * float(value):.1f}{unit}"

        cells = [name, f"`{tags[prefix + name]}`", shown("average_vision_tokens")]
        cells += [
            shown(key, 100, unit=" %") for key in ("accuracy", "retention", "flops_of_control")
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "One checkpoint for several budgets:\n\n" + "\n".join(lines) + "\n\n"


def fetch_checkpoint(uri: str | None, model: str) -> Path:
    """A registered model's checkpoint, `models:/name@alias` or `models:/name/version`, as a folder
    of this machine.

    Raises:
        TrackingError: no MLflow is named, or it has no such model.
    """
    if uri in (None, "off"):
        raise TrackingError("no MLflow server: give --mlflow URI, or set MLFLOW_TRACKING_URI")
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    try:
        place = download_artifacts(model, tracking_uri=uri, registry_uri=uri)
    except MlflowException as error:
        raise TrackingError(f"MLflow at {redact(str(uri))} has no {model}: {error}") from None
    found = sorted(Path(place).glob("artifacts/*/config.json"))
    if not found:
        raise TrackingError(f"{model} holds no checkpoint: `adsc run` registers models that do")
    return found[0].parent


def log_model(client: MlflowClient, run_id: str, folder: Path, name: str) -> str:
    """`mlflow.pyfunc.log_model`, with explicit ids instead of an active run and global
    addresses."""
    from mlflow.entities import LoggedModelOutput
    from mlflow.entities.logged_model_status import LoggedModelStatus
    from mlflow.models import Model
    from mlflow.pyfunc import save_model

    import adsc
    from pipeline.tracking import mlflow_model

    experiment = client.get_run(run_id).info.experiment_id
    logged = client.create_logged_model(experiment, name, source_run_id=run_id)
    status = LoggedModelStatus.FAILED
    try:
        with tempfile.TemporaryDirectory(prefix="adsc-model-") as scratch:
            target = Path(scratch) / "model"
            save_model(
                str(target),
                python_model=mlflow_model.__file__,
                artifacts={"checkpoint": str(folder)},
                code_paths=[str(Path(adsc.__file__).parent)],
                signature=mlflow_model.signature(),
                input_example=mlflow_model.example(),
                pip_requirements=[
                    f"{pkg}=={metadata.version(pkg).partition('+')[0]}" for pkg in MODEL_PACKAGES
                ],
                mlflow_model=Model(
                    artifact_path=logged.artifact_location,
                    run_id=run_id,
                    model_uuid=logged.model_id,
                    model_id=logged.model_id,
                ),
            )
            client.log_model_artifacts(logged.model_id, str(target))
        status = LoggedModelStatus.READY
    finally:
        client.finalize_logged_model(logged.model_id, status)
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    return logged.model_uri
