"""Products in bfloat16 on a CPU without arithmetic for it."""

import pytest
import torch
from families import tiny_model, token_ids
from test_evaluate import TEXT, word_tokenizer
from torch.nn import functional as F

import prunenet
from prunenet.evaluation.divergence import divergence
from prunenet.evaluation.options import EvaluationOptions
from prunenet.evaluation.perplexity import perplexity
from prunenet.evaluation.repetition import repetition
from prunenet.policies.artifact import Policy, PolicyConfig
from prunenet.recover import training
from prunenet.recover.estimate import writing
from prunenet.recover.options import Tuning
from prunenet.recover.training import tuned
from prunenet.runtime import products
from prunenet.runtime.products import fast_products
from prunenet.text.cached import Wanted, cached_text
from prunenet.text.calibration import CalibrationSet

LOW = torch.bfloat16
IDS = torch.randint(3, 60, (8, 12), generator=torch.Generator().manual_seed(0))
BLOCKS = CalibrationSet(IDS, "data", {"text": "test"})
TUNING = Tuning(updates="full", steps=1, batch=1)


@pytest.fixture(autouse=True)
def without(monkeypatch) -> None:
    """A CPU that has no bfloat16, whatever this one has."""
    monkeypatch.setattr(products, "lacks", lambda dtype: dtype == LOW)


@pytest.fixture
def model():
    return tiny_model("llama").to(LOW)


@pytest.fixture
def widened(monkeypatch) -> list[bool]:
    """Of each linear layer that was computed in bfloat16: whether in fast products."""
    seen: list[bool] = []

    def forward(self, inputs):
        if self.weight.dtype == LOW:
            seen.append(products._Widened.entered)
        return F.linear(inputs, self.weight, self.bias)

    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    return seen


def pairs():
    draw = torch.Generator().manual_seed(1)
    x, w = (torch.randn(3, 8, generator=draw).to(LOW) for _ in range(2))
    return x, w


@pytest.mark.parametrize(
    "product",
    [
        F.linear,
        lambda x, w: x @ w.T,
        lambda x, w: torch.einsum("ik,jk->ij", x, w),
        lambda x, w: torch.einsum("ik,jk->ij", [x, w]),
        lambda x, w: torch.bmm(x[None], w.T[None])[0],
        lambda x, w: torch.addmm(torch.zeros(3, dtype=LOW), x, w.T),
    ],
    ids=["linear", "@", "einsum", "einsum of a list", "bmm", "addmm"],
)
def test_a_product_is_that_of_float32_rounded_once(model, product) -> None:
    x, w = pairs()
    with fast_products(model):
        found = product(x, w)
    assert found.dtype == LOW
    assert found.equal((x.float() @ w.float().T).to(LOW))


def test_attention_keeps_its_dtype_and_its_mask(model) -> None:
    q, k, v = (torch.randn(1, 2, 5, 4).to(LOW) for _ in range(3))
    mask = torch.ones(5, 5).tril().bool()
    with fast_products(model):
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    wide = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask)
    assert found.equal(wide.to(LOW))


def test_gradients_pass(model) -> None:
    x, w = (tensor.requires_grad_() for tensor in pairs())
    with fast_products(model):
        F.linear(x, w).float().sum().backward()
    assert x.grad.dtype == w.grad.dtype == LOW
    torch.testing.assert_close(
        w.grad.float(), x.detach().float().sum(0).expand(3, 8), rtol=0.02, atol=0.02
    )


def test_float32_and_what_stands_outside_a_block_are_left_alone(model, widened) -> None:
    with fast_products(tiny_model("llama")):
        assert not products._Widened.entered
    with fast_products(model), fast_products(model):
        pass
    model(token_ids())
    assert widened
    assert not any(widened)


def test_a_block_ends_with_an_error_too(model, widened) -> None:
    with pytest.raises(KeyError), fast_products(model):
        raise KeyError
    model(token_ids())
    assert not any(widened)


def test_weights_that_nothing_changes_are_converted_once_and_others_each_time(model) -> None:
    (x, _), linear = pairs(), torch.nn.Linear(8, 3).to(LOW).requires_grad_(False)
    weight = linear.weight
    for unchanged in (True, False):
        with fast_products(linear, unchanged=unchanged):
            before = F.linear(x, weight)
            weight.data.mul_(2)
            assert F.linear(x, weight).equal(before if unchanged else 2 * before)


def test_weights_that_offloading_makes_anew_are_never_taken_for_earlier_ones(model) -> None:
    x, w = pairs()
    with fast_products(model, unchanged=True):
        for size in range(1, 9):  # each at the place in memory of the one before
            weight = torch.nn.Parameter(w * size, requires_grad=False)
            assert F.linear(x, weight).equal((x.float() @ (w * size).float().T).to(LOW))
            del weight


def cut(model):
    prunenet.prune(model, Policy.untrained(PolicyConfig(hidden=(8,))), ratio=0.5, blocks=BLOCKS)


def written(model):
    ids = torch.zeros(1, 4, dtype=torch.long)
    cached_text(model, {}, Wanted(1, 4, 0, 60), None, lambda: (model(ids), ids)[1])


@pytest.mark.parametrize(
    "use",
    [
        cut,
        written,
        lambda model: perplexity(model, word_tokenizer(), TEXT, EvaluationOptions(window=12)),
        lambda model: repetition(model, IDS[:2, :4]),
        lambda model: divergence(model, lambda _, down: down, IDS),
        lambda model: writing(model, word_tokenizer(), blocks=2, tokens=8, bos="auto"),
        lambda model: tuned(model, BLOCKS, TUNING, teacher=tiny_model("llama").to(LOW)),
        lambda model: tuned(tiny_model("llama"), BLOCKS, TUNING, teacher=model),
        lambda model: prunenet.train(
            model, prunenet.Recipe(updates=1, masks=2, evaluate_at=(0.5,)), blocks=BLOCKS
        ),
    ],
    ids=[
        "prune",
        "write",
        "perplexity",
        "repetition",
        "divergence",
        "estimate",
        "recover",
        "teach",
        "train",
    ],
)
def test_what_runs_a_model_runs_it_in_fast_products(model, use, widened, tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNENET_CACHE", str(tmp_path))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    use(model)
    assert widened
    assert all(widened)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_copies_in_float32_learn_in_float32(model, widened, monkeypatch) -> None:
    monkeypatch.setattr(training, "lacks", products.lacks)
    found = tuned(model, BLOCKS, TUNING)
    assert len(found.history) == 2
    assert not widened
