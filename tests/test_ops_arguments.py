"""Arguments that cannot be meant are refused before any work."""

from functools import partial

import pytest
import torch
from helpers.losses import problem

import gfast
from gfast.objectives import DPO, GA, NPO, RMU, RR, TNPO, WGA, WTNPO, SatImp, SimNPO

INF, NAN = float("inf"), float("nan")
LABELS = torch.zeros(3, dtype=torch.long)


def linear(op):
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4)

    def call(**options):
        options = dict(hidden=hidden, weight=weight) | options
        h, w = options.pop("hidden"), options.pop("weight")
        if op == "linear_token_kl":
            return gfast.linear_token_kl(h, w, h, w, LABELS[: len(h)], **options)
        more = () if op == "linear_token_logp" else (GA(),)
        return getattr(gfast, op)(h, w, LABELS[: len(h)], *more, **options)

    return call


LINEAR = ["linear_token_logp", "linear_unlearn_loss", "linear_token_kl"]


@pytest.mark.parametrize("op", LINEAR)
def test_of_heads(op):
    call = linear(op)
    call(chunk_rows=1)
    for rows in (0, -1, -512):
        with pytest.raises(ValueError, match=f"{op}: chunk_rows must be at least 1, not {rows}"):
            call(chunk_rows=rows)
    for rows in (2.5, "2", NAN):
        with pytest.raises(ValueError, match=f"{op}: chunk_rows must be whole numbers"):
            call(chunk_rows=rows)
    for value in (INF, NAN, 0.0, -1.0):
        with pytest.raises(ValueError, match=f"{op}: softcap must be positive and finite"):
            call(softcap=value)
        with pytest.raises(ValueError, match=f"{op}: logit_scale must be positive and finite"):
            call(logit_scale=value)
    with pytest.raises(ValueError, match=f"{op}: .*empty vocabulary"):
        call(weight=torch.zeros(0, 4))
    with pytest.raises(ValueError, match="no implementation is called 'fast'"):
        call(hidden=torch.zeros(0, 4, requires_grad=True), impl="fast")


@pytest.mark.parametrize("chunks", [[0, 0], [-3, -3], [4, 0], [-3, 4]])
def test_of_raw_ops(chunks):
    ops, head = torch.ops.gfast, [torch.randn(3, 4), torch.randn(7, 4), None]
    last = ([0, 7, *chunks], [1.0, 0.0], "", "reference")
    need, one, logp = [True, True, False], torch.ones(()), torch.zeros(3)
    numbers = [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    for call in (
        partial(ops.linear_token_logp, *head, LABELS, *last),
        partial(ops.linear_token_logp_backward, *head, LABELS, logp, torch.zeros(3, 2), logp, *last, need),
        partial(ops.linear_unlearn, head, LABELS, [None, None, LABELS], one, "token", numbers, [1, 3], *last, need),
        partial(ops.linear_token_kl, head, head, LABELS, one, *last, need),
    ):
        with pytest.raises(ValueError, match="chunk_rows must be at least 1"):
            call()


@pytest.mark.parametrize("value", [0, 0.0, -1, -0.5, NAN, INF, torch.tensor(0), torch.tensor(-2.0), torch.tensor(NAN)])
def test_normalizers(value):
    hidden, weight, _, labels, ref = problem(dtype=torch.float32)
    logits, valid = hidden @ weight.t(), labels != -100
    for call in (
        lambda: gfast.unlearn_loss(logits, labels, GA(), normalizer=value),
        lambda: gfast.unlearn_loss(logits, labels, NPO(), ref_logp=ref, normalizer=value),
        lambda: gfast.linear_unlearn_loss(hidden, weight, labels, GA(), normalizer=value),
        lambda: gfast.linear_unlearn_loss(hidden.requires_grad_(), weight, labels, GA(), normalizer=value),
        lambda: gfast.token_kl(logits, logits, labels, normalizer=value),
        lambda: gfast.linear_token_kl(hidden, weight, hidden, weight, labels, normalizer=value),
        lambda: RMU(layer=1).value(hidden, valid, normalizer=value),
    ):
        with pytest.raises(ValueError, match="normalizer must be a positive number"):
            call()


@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_parameters_of_objectives(value):
    for make in (
        lambda: WGA(value),
        lambda: SatImp(value, 1.0),
        lambda: SatImp(1.0, value),
        lambda: TNPO(value),
        lambda: WTNPO(value, 1.0),
        lambda: WTNPO(1.0, value),
        lambda: NPO(value),
        lambda: SimNPO(value, 0.0),
        lambda: SimNPO(1.0, value),
        lambda: DPO(value),
        lambda: RMU(layer=1, c=value),
    ):
        with pytest.raises(ValueError, match=r"gfast: \w+\(.*finite|must be"):
            make()


def test_an_empty_vocabulary():
    for rows in (0, 3):
        logits = torch.zeros(rows, 0)
        for impl in ("auto", "fast"):
            for call in (
                lambda: gfast.token_logp(logits, LABELS[:rows], impl=impl),  # noqa: B023
                lambda: gfast.unlearn_loss(logits, LABELS[:rows], GA(), impl=impl),  # noqa: B023
                lambda: gfast.token_kl(logits, logits, LABELS[:rows], impl=impl),  # noqa: B023
            ):
                with pytest.raises(ValueError, match="empty vocabulary"):
                    call()


@pytest.mark.parametrize("impl", ["auto", "reference", "cpp"])
def test_hidden_states_of_no_width(impl):
    hidden, weight = torch.zeros(3, 0), torch.zeros(7, 0)
    for rows in (0, 3):
        given, labels = hidden[:rows], LABELS[:rows]
        for call in (
            lambda: gfast.linear_token_logp(given, weight, labels, impl=impl),  # noqa: B023
            lambda: gfast.linear_unlearn_loss(given, weight, labels, GA(), impl=impl),  # noqa: B023
            lambda: gfast.linear_token_kl(given, weight, given, weight, labels, impl=impl),  # noqa: B023
        ):
            with pytest.raises(ValueError, match="width 0 make no logits"):
                call()


@pytest.mark.parametrize("value", [torch.ones(3), torch.ones(1), "3"])
def test_a_normalizer_is_one_number(value):
    logits = torch.randn(3, 7)
    for call in (
        lambda: gfast.unlearn_loss(logits, LABELS, GA(), normalizer=value),
        lambda: gfast.unlearn_loss(logits, LABELS, GA(), normalizer=value, impl="reference"),
        lambda: gfast.token_kl(logits, logits, LABELS, normalizer=value),
        lambda: RMU(layer=1).value(torch.randn(1, 3, 4), LABELS[None] == 0, value),
    ):
        with pytest.raises(ValueError, match="normalizer must be one number"):
            call()


@pytest.mark.parametrize("kind", [RMU, RR])
def test_layers_are_counted_from_the_embeddings(kind):
    with pytest.raises(ValueError, match="layer must be >= 0"):
        kind(layer=-1)


@pytest.mark.parametrize("op", ["unlearn_loss", "linear_unlearn_loss"])
def test_numbers_of_sequences(op):
    """Out of their range they are named; a pair's halves lie half the labels apart, and none is scored alone."""
    logits, labels, rows = torch.randn(4, 3, 5), torch.zeros(4, 3, dtype=torch.long), torch.arange(4)[:, None]
    given = (logits,) if op == "unlearn_loss" else (logits, torch.eye(5))
    ids = rows.expand(4, 3)

    def loss(objective, ids, labels=labels):
        return getattr(gfast, op)(*given, labels, objective, ref_logp=torch.full((4, 3), -1.0), sequence_id=ids).loss

    for wrong, held in ((ids - 1, "-1"), (ids + 9, "12")):
        with pytest.raises(ValueError, match=rf"{op}: sequence_id must be in \[0, 12\).* holds {held}"):
            loss(NPO(), wrong)
    with pytest.raises(TypeError, match="sequence_id must be whole numbers"):
        loss(NPO(), ids.float())
    with pytest.raises(ValueError, match=r"forget answer s and its preferred answer s \+ 6 .* pair 0 one half"):
        loss(DPO(), ids)  # was NPO of all four
    plain = getattr(gfast, op)(*given, labels, DPO(), ref_logp=torch.full((4, 3), -1.0)).loss
    assert loss(DPO(), torch.where(ids < 2, ids, ids + 4)).item() == pytest.approx(plain.item(), rel=1e-6)
