"""Self-written text: prefixes, penalty, copies and openings do what they say, and change nothing
where they are off.
"""

import functools

import pytest
import torch
from families import tiny_model
from transformers import PreTrainedModel

from prunenet.text.generate import SamplingOptions, distinct, generate_blocks


@functools.cache
def model() -> PreTrainedModel:
    return tiny_model("llama")


def written(*, prefixes=None, progress=None, **options):
    asked = SamplingOptions(**{"sequences": 12, "tokens": 14, "keep": 1.0, "batch": 5} | options)
    return generate_blocks(model(), 1, asked, prefixes=prefixes, progress=progress)


def grams(row: list[int], n: int = 8) -> set[tuple[int, ...]]:
    return {tuple(row[i : i + n]) for i in range(len(row) - n + 1)}


@torch.no_grad()
def log_likelihood(ids: torch.Tensor, first: int) -> torch.Tensor:
    """Of the tokens from `first` on, by a forward pass of the whole sequences; the start is never
    sampled.
    """
    logits = model()(ids).logits[:, first - 1 : -1]
    logits[..., 1] = -torch.inf
    return logits.log_softmax(-1).gather(-1, ids[:, first:, None]).sum((1, 2))


def test_options_that_allow_everything_leave_the_text_as_it_was():
    everything = written()
    assert torch.equal(written(prefixes=None, penalty=1.0, overlap=1.0, openings=0), everything)
    # Nothing to object to: no round of rewriting either.
    assert torch.equal(written(openings=13), everything)
    assert everything.shape == (12, 14)


def test_each_sequence_starts_with_its_document_s_prefix():
    prefixes = torch.tensor([[7, 8, 9], [10, 11, 12]])
    rows = written(prefixes=prefixes)
    assert (rows[:, 0] == 1).all()
    assert torch.equal(rows[:, 1:4], prefixes.repeat(6, 1))
    assert rows.shape == (12, 14)
    # What comes behind a prefix is the model's: with a narrow nucleus, the likeliest token each
    # time.
    greedy = written(prefixes=prefixes, top_p=1e-6, hot=1.0, temperature=1.0)
    logits = model()(greedy).logits[:, 3:-1].detach()
    logits[..., 1] = -torch.inf
    assert torch.equal(greedy[:, 4:], logits.argmax(-1))


def test_the_filter_judges_what_was_sampled_behind_the_prefix():
    prefixes = torch.randint(3, 64, (12, 4), generator=torch.Generator().manual_seed(1))
    everything, kept = written(prefixes=prefixes), written(prefixes=prefixes, keep=0.5)
    best = log_likelihood(everything, 5).topk(6).indices.sort().values
    assert torch.equal(kept, everything[best])


@pytest.mark.long
def test_a_strong_penalty_keeps_tokens_from_coming_again():
    def repeats(rows: torch.Tensor) -> int:
        return sum(len(row) - len(set(row)) for row in rows.tolist())

    plain = written(top_p=1e-6, hot=1.0, temperature=1.0, tokens=30)
    penalised = written(top_p=1e-6, hot=1.0, temperature=1.0, tokens=30, penalty=1e6)
    assert repeats(plain) > 0
    # Positive logits of known tokens become 0 and negative ones hopeless: of 62 others some logit
    # is always positive.
    assert repeats(penalised) == 0


def test_the_penalty_divides_positive_logits_and_multiplies_negative_ones():
    rows = written(top_p=1e-6, hot=1.0, temperature=1.0, penalty=1.7)
    expected = torch.ones(1, 1, dtype=torch.long)
    for _ in range(13):
        logits = model()(expected).logits[0, -1].tolist()
        known = set(expected[0].tolist())
        scores = [
            (v / 1.7 if v > 0 else v * 1.7) if i in known else v for i, v in enumerate(logits)
        ]
        scores[1] = -float("inf")
        expected = torch.cat(
            (expected, torch.tensor([[max(range(64), key=scores.__getitem__)]])), 1
        )
    assert torch.equal(rows, expected.repeat(12, 1))


def test_the_filter_reads_the_model_s_likelihood_and_not_the_penalised_one():
    options = {"penalty": 20.0, "top_p": 1.0, "hot": 1.0, "temperature": 1.0, "sequences": 30}
    everything, kept = written(**options), written(**options, keep=0.5)
    best = log_likelihood(everything, 1).topk(15).indices.sort().values
    assert torch.equal(kept, everything[best])


def test_no_two_sequences_open_alike_and_none_is_missing():
    plain = written(hot=1.5)
    assert len({tuple(row[1:2]) for row in plain.tolist()}) < 12
    rows = written(hot=1.5, openings=1)
    assert len({tuple(row[1:2]) for row in rows.tolist()}) == len(rows) == 12
    assert torch.equal(rows, written(hot=1.5, openings=1))


def test_the_same_opening_behind_another_prefix_is_another_opening():
    prefixes = torch.arange(3, 15)[:, None]
    rows = written(prefixes=prefixes, openings=1, top_p=0.5, hot=0.5, temperature=0.5)
    # None was written anew: each prefix has its row, in turn.
    assert torch.equal(rows[:, 1], prefixes[:, 0])
    assert len(set(rows[:, 2].tolist())) < 12


def test_rewritten_rows_take_the_prefix_of_the_row_they_replace():
    prefixes = torch.tensor([[20], [21], [22]])
    assert len({tuple(row[1:3]) for row in written(prefixes=prefixes, hot=0.9).tolist()}) < 12
    rows = written(prefixes=prefixes, hot=0.9, openings=1)
    assert torch.bincount(rows[:, 1])[20:].tolist() == [4, 4, 4]
    assert len({tuple(row[1:3]) for row in rows.tolist()}) == 12


def test_text_that_always_comes_out_the_same_is_kept_once():
    calls: list[tuple[int, int]] = []
    rows = written(
        top_p=1e-6, hot=1.0, temperature=1.0, overlap=0.5, progress=lambda *done: calls.append(done)
    )
    assert rows.shape == (1, 14)
    done, planned = zip(*calls, strict=True)
    assert list(done) == sorted(done)
    assert done[-1] == planned[-1]
    assert all(now <= whole for now, whole in calls)


@pytest.mark.long
def test_repeated_text_is_written_anew_until_no_sequence_shares_too_much_with_an_earlier_one():
    options = {"top_p": 0.3, "hot": 0.4, "temperature": 0.4, "sequences": 8, "tokens": 24}
    rows = written(**options, overlap=0.3)
    for index, row in enumerate(rows.tolist()):
        for earlier in rows.tolist()[:index]:
            assert len(grams(row[1:]) & grams(earlier[1:])) <= 0.3 * len(grams(row[1:]))
    plain = written(**options)
    assert not distinct(plain, overlap=0.3).all()


def test_distinct_compares_with_each_earlier_sequence_that_stays():
    a, b, c = list(range(10, 20)), list(range(30, 40)), list(range(50, 60))
    rows = torch.tensor(
        [
            [1, *a],  # 3 8-grams
            [1, *a[:9], 3],  # 2 of 3 are the first's
            [1, *a[:8], 3, 4],  # 1 of 3
            [1, *b],
            [1, *a[:4], *b[:6]],  # the words are known, the 8-grams are not
            [1, *c],
            [1, *c],
        ]
    )
    assert distinct(rows, overlap=0.5).tolist() == [True, False, True, True, True, True, False]
    assert distinct(rows, overlap=0.3).tolist() == [True, False, False, True, True, True, False]
    assert distinct(rows, overlap=1.0).all()
    assert distinct(rows, overlap=1.0, openings=4).tolist() == [
        True,
        False,
        False,
        True,
        False,
        True,
        False,
    ]
    assert distinct(rows, overlap=1.0, openings=9).tolist() == [
        True,
        False,
        True,
        True,
        True,
        True,
        False,
    ]
    # Of two earlier sequences that share an n-gram, the one that shares more decides; one that went
    # does not count.
    mixed = torch.tensor([[1, *a[:8], 3, 4], [1, *a], [1, *a[:9], 5], [1, *a[1:9], 5, 6]])
    assert distinct(mixed, overlap=0.5).tolist() == [True, True, False, True]
    # A prompt is part of what opens a sequence, and no part of its n-grams.
    prompted = torch.tensor([[1, *a, *b], [1, *a, *c]])
    assert distinct(prompted, prompt=11, overlap=0.1).tolist() == [True, True]
    assert distinct(prompted, prompt=1, overlap=0.1).tolist() == [True, False]
    assert distinct(prompted, prompt=11, overlap=1.0, openings=1).tolist() == [True, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": 0.0}, "`overlap` must be in"),
        ({"penalty": 0.0}, "`penalty` must be above 0"),
        ({"temperature": 0.0}, "`temperature` must be above 0"),
        ({"sequences": 0}, "`sequences` must be above 0"),
        ({"prefixes": torch.ones(2, 13, dtype=torch.long)}, "do not suit sequences of 14 tokens"),
        ({"prefixes": torch.ones(0, 2, dtype=torch.long)}, "at least one row"),
        ({"prefixes": torch.full((2, 2), 64)}, "beyond the model's 64 embeddings"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        written(**options)
