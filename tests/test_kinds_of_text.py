"""Kinds of self-written text: as much of each, and openings from every cluster."""

import pytest
import torch
from families import tiny_model

from prunenet.text import kinds
from prunenet.text.generate import SamplingOptions

START, KNOWN = 1, 64


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def test_each_kind_has_its_rows_in_turn_and_an_opening_of_its_own(model) -> None:
    asked = SamplingOptions(sequences=5, tokens=14, batch=5, seed=3)
    rows = kinds.written(model, START, KNOWN, asked, ("documents", "openings", "clusters"))
    assert rows.shape == (3 * asked.kept, 14)
    assert bool((rows[:, 0] == START).all())
    documents = kinds.written(model, START, KNOWN, asked, ("documents",))
    assert torch.equal(rows[::3], documents)
    openings = {tuple(row) for row in kinds.spread_openings(model, START, KNOWN, 5, 3).tolist()}
    assert {tuple(row) for row in rows[2::3, 1:9].tolist()} <= openings


def test_openings_come_from_as_many_clusters_as_there_are(model, monkeypatch) -> None:
    seen: dict[str, torch.Tensor] = {}
    places = kinds._places

    def clusters(points: torch.Tensor, count: int, seed: int) -> torch.Tensor:
        # one opening of each rare cluster among many of one
        seen["labels"] = torch.zeros(len(points), dtype=torch.long)
        seen["labels"][[3, 11]] = torch.tensor([1, 2])
        return seen["labels"]

    def remembered(model, ids: torch.Tensor) -> torch.Tensor:
        seen["ids"] = ids[:, 1:].cpu()
        return places(model, ids)

    monkeypatch.setattr(kinds, "_clusters", clusters)
    monkeypatch.setattr(kinds, "_places", remembered)
    found = kinds.spread_openings(model, START, KNOWN, 3, seed=0)
    labels = [seen["labels"][(seen["ids"] == row).all(1)].tolist() for row in found]
    assert {label for row in labels for label in row} == {0, 1, 2}


def test_openings_depend_on_the_seed_alone(model) -> None:
    first = kinds.spread_openings(model, START, KNOWN, 6, seed=0)
    assert first.shape == (6, kinds.OPENING)
    assert torch.equal(first, kinds.spread_openings(model, START, KNOWN, 6, seed=0))
    assert not torch.equal(first, kinds.spread_openings(model, START, KNOWN, 6, seed=1))


def test_rows_of_the_same_direction_are_of_one_cluster() -> None:
    points = torch.nn.functional.normalize(
        torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]], dtype=torch.float64)
    )
    labels = kinds._clusters(points, 2, seed=0).tolist()
    assert labels[0] == labels[1] != labels[2] == labels[3]
    assert kinds._clusters(points, 1, seed=0).tolist() == [0] * 4
