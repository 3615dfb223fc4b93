"""Heart disease in four hospitals, each a client: the published setting of FLamby's Fed-Heart-Disease.

FLamby (Ogier du Terrail et al. 2022) sets the cleaning rule, the split, the standardization, the model and the local
work; `benchmarks/heart.py` compares with its figures.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from privacy.refused import Refused
from scenarios import Examples, Federation, Scenario, sources
from scenarios.settings import Export, Fleet, Local, Reference, Rounds, Settings

HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")

_LEAST = 10
_KEPT = 10  # the last three of the 13 columns (slope, vessels, thal) are missing for most patients: FLamby drops them
_CATEGORIES = {2: (1.0, 2.0, 3.0, 4.0), 6: (0.0, 1.0, 2.0)}  # chest pain and ECG: column -> its values

Table = NDArray[np.float64]


class Records(NamedTuple):
    """One hospital's patients. Inputs are (patients, 13), not standardized; labels (patients,) are 1 for disease."""

    x: Table
    y: NDArray[np.int64]
    x_test: Table
    y_test: NDArray[np.int64]
    x_incomplete: Table
    """Patients with a missing value (NaN) in one of the ten columns: neither training nor test."""
    y_incomplete: NDArray[np.int64]


def parse(text: str, name: str) -> Records:
    """The records of one processed UCI file: per line 13 numbers, "?" where missing, and the diagnosis 0 to 4.

    The first ten columns stay; patients who lack none of them are split, train share 0.66, as FLamby splits them.
    Chest pain (four values) and ECG (three) become indicators of all values but the first: 8 + 3 + 2 = 13 inputs.
    Raises Refused, with `name` and the line, for anything else.
    """
    rows = [_row(line, f"{name} line {i}") for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    table = np.array(rows, dtype=np.float64).reshape(-1, 14)
    x, y = table[:, :_KEPT], (table[:, -1] > 0).astype(np.int64)
    indicators = [np.where(np.isnan(x[:, c]), np.nan, x[:, c] == v) for c in _CATEGORIES for v in _CATEGORIES[c][1:]]
    x = np.column_stack([np.delete(x, list(_CATEGORIES), axis=1), *indicators])
    complete = ~np.isnan(x).any(axis=1)
    if (number := int(complete.sum())) < _LEAST:
        raise Refused(f"{name} holds {number} complete patients, fewer than {_LEAST}: is this the whole file?")
    kept, labels = x[complete], y[complete]
    counts = np.bincount(labels, minlength=2)
    train, test = train_test_split(
        np.arange(number),
        train_size=0.66,
        test_size=1 - 0.66,
        random_state=43,
        stratify=labels if counts.min() > 2 else None,
    )
    return Records(kept[train], labels[train], kept[test], labels[test], x[~complete], y[~complete])


def _row(line: str, place: str) -> list[float]:
    """14 numbers, NaN where missing. What it says of a fault quotes no value: it may travel to the server."""
    cells = [cell.strip() for cell in line.split(",")]
    try:
        row = [np.nan if cell == "?" else float(cell) for cell in cells]
    except ValueError:
        raise Refused(f"{place} holds something that is neither a number nor ?: see docs/data.md") from None
    if len(row) != 14:
        raise Refused(f"{place} has {len(row)} columns instead of 14: see docs/data.md")
    for column, (cell, value) in enumerate(zip(cells, row, strict=True)):
        allowed = (0, 1, 2, 3, 4) if column == 13 else _CATEGORIES.get(column, (value,))
        if (cell != "?" and not (np.isfinite(value) and value in allowed)) or (cell == "?" and column == 13):
            raise Refused(f"{place}, column {column + 1} has a value that no patient can have: see docs/data.md")
    return row


def logistic() -> nn.Module:
    """13 inputs, one logit; torch's own initialization, as FLamby has it."""
    return nn.Linear(13, 1)


def loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean binary cross-entropy of logits (N, 1) against labels (N,) of 0 and 1."""
    return nn.functional.binary_cross_entropy_with_logits(outputs[:, 0], labels.to(outputs.dtype))


def data(settings: Settings) -> Federation:
    """One client a hospital, whose loader reads that hospital's file alone.

    Where the server evaluates it needs all four files; with evaluation.on=clients each node needs its own.
    Training inputs, and a hospital's own test inputs, are standardized by its own training part. The server's test set
    (all hospitals' test parts, 254 patients) is standardized by the pooled training parts.
    All 740 complete patients are training or test, so the validation part is the 180 whom the cleaning rule leaves out,
    each missing value replaced by the pooled training mean: real labelled patients whom no client trains on, but sicker
    than the others (70 % against 52 %) and less well predicted. It serves to compare edge models, never as a result.
    """
    if settings.partition != "natural":
        raise Refused(f"heart's clients are its hospitals, not {settings.partition!r}: leave partition=natural")
    if settings.fleet.clients != len(HOSPITALS):
        raise Refused(f"heart's clients are its {len(HOSPITALS)} hospitals: leave fleet.clients={len(HOSPITALS)}")
    folder = sources.find("heart_disease", settings.run.data)
    on_server = settings.evaluation.on == "server"
    hospitals = [h for h in HOSPITALS if on_server or sources.holds(folder, _file(h))]

    @cache
    def records(hospital: str) -> Records:
        if hospital not in HOSPITALS:
            raise Refused(f"there is no hospital {hospital!r}: the clients of heart are {', '.join(HOSPITALS)}")
        return parse(sources.read_text(folder, _file(hospital)), str(folder / _file(hospital)))

    def client(hospital: str) -> Examples:
        own = records(hospital)
        return _standardized(own.x, own.y, own.x)

    def client_test(hospital: str) -> Examples:
        own = records(hospital)
        return _standardized(own.x_test, own.y_test, own.x)

    known = Records(*(np.concatenate(parts) for parts in zip(*map(records, hospitals), strict=True)))
    return Federation(
        sizes={hospital: len(records(hospital).y) for hospital in hospitals},
        client=client,
        validation=_standardized(known.x_incomplete, known.y_incomplete, known.x),
        test=_standardized(known.x_test, known.y_test, known.x) if on_server else None,
        client_test=client_test,
    )


def _file(hospital: str) -> str:
    return f"processed.{hospital}.data"


def _standardized(x: Table, y: NDArray[np.int64], reference: Table) -> Examples:
    """Zero mean and unit (unbiased) variance by `reference`; a missing value becomes 0, a constant is only centred."""
    varies = np.ptp(reference, axis=0) > 0  # the deviation of a constant is rounding noise, not always 0
    scaled = (x - reference.mean(axis=0)) / np.where(varies, reference.std(axis=0, ddof=1), 1)
    return Examples(torch.from_numpy(np.nan_to_num(scaled).astype(np.float32)), torch.from_numpy(y))


SCENARIO = Scenario(
    summary="heart disease, 4 hospitals as clients, logistic model, no privacy by default (data: heart_disease)",
    settings=Settings(
        partition="natural",
        rounds=Rounds(number=15),
        local=Local(steps=100, batch=4, rate=0.001),
        fleet=Fleet(clients=len(HOSPITALS)),
        export=Export(prune=0.0),
        reference=Reference(central_epochs=50, central_batch=4, central_rate=0.003),
    ),
    models={"logistic": logistic},
    data=data,
    loss=loss,
    classes=("no disease", "disease"),
    skipped={"pruned": "a logistic model has no hidden channels to prune"},
)
