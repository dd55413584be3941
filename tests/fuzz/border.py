"""Fuzzes the border: models that somebody changed, in wrappers, with batches of many kinds. What `model_loss` and
`g_effect` take comes out as autograd through the model's own logits says, and everything is left as it was.

    python tests/fuzz/border.py 1000            cases 0 to 999
    python tests/fuzz/border.py --case 12       one of them

A case follows from its number alone. It ends in equal numbers, in an error by gfast's name, or in numbers that are
none for the model itself (NaN of padding that sees nothing).
"""

from __future__ import annotations

import argparse
import copy
import functools
import random
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

sys.path.append(str(Path(__file__).resolve().parents[1]))

from fuzz.border_batches import OBJECTIVES, REDUCTIONS, Drawn, NotTaken, draw_batch, label_logp, terms  # noqa: E402
from helpers import architectures  # noqa: E402
from helpers.architectures import VOCAB  # noqa: E402

import gfast  # noqa: E402
from gfast.geffect.api import ENGINES  # noqa: E402
from gfast.objectives import DPO, NLL  # noqa: E402
from gfast.wrappers import unwrap_name  # noqa: E402

FAMILIES = "llama gpt2 gemma2 qwen2 cohere opt phi mixtral mamba gpt_neox granite".split()


class NoNumber(Exception):
    """The model's own gradient is NaN."""


class Bent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * x.tanh()


def _head(model: nn.Module) -> nn.Module:
    return model.get_output_embeddings()


def _linear(r: random.Random, model: nn.Module) -> nn.Module:
    return r.choice([x for x in model.modules() if isinstance(x, nn.Linear)])


def _freeze(r: random.Random, model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(r.random() < 0.5)
    model.get_input_embeddings().weight.requires_grad_()


def _tie(r: random.Random, model: nn.Module) -> None:
    _head(model).weight = model.get_input_embeddings().weight


def _bias(r: random.Random, model: nn.Module) -> None:
    head = _head(model)
    head.bias = nn.Parameter(torch.linspace(-1, 1, len(head.weight), dtype=head.weight.dtype))


def _learned_scale(r: random.Random, model: nn.Module) -> None:
    model.factor = nn.Parameter(torch.tensor(1.4, dtype=_head(model).weight.dtype))
    _head(model).register_forward_hook(lambda module, args, out: out * model.factor)


def _of_logits(function):
    def change(r: random.Random, model: nn.Module) -> None:
        def hook(module, args, out):
            if isinstance(out, tuple):
                return (function(out[0]),)
            out.logits = function(out.logits)
            return out

        model.register_forward_hook(hook)

    return change


def _subclass(r: random.Random, model: nn.Module) -> None:
    cls = type(model)

    class Tuple(cls):
        is_tuple = True

        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            return (out.logits / 1.7,)

    model.__class__ = Tuple


def _patched(r: random.Random, model: nn.Module) -> None:
    layer = _linear(r, model)
    layer.forward = functools.partial(lambda forward, x: forward(x) * 0.8, layer.forward)


CHANGES = {
    "frozen in part": _freeze,
    "tied": _tie,
    "bias": _bias,
    "scale that is learned": _learned_scale,
    "parametrised head": lambda r, model: parametrize.register_parametrization(_head(model), "weight", Bent()),
    "parametrised layer": lambda r, model: parametrize.register_parametrization(_linear(r, model), "weight", Bent()),
    "pruned": lambda r, model: prune.l1_unstructured(_linear(r, model), "weight", amount=0.3),
    "resized": lambda r, model: model.resize_token_embeddings(VOCAB + 13, mean_resizing=False),
    "hook on the head": lambda r, model: _head(model).register_forward_hook(lambda module, args, out: out * 2.0),
    "hook before the head": lambda r, model: _head(model).register_forward_pre_hook(lambda module, x: (x[0] * 0.8,)),
    "gradient hook": lambda r, model: _linear(r, model).weight.register_hook(lambda gradient: gradient * 0.5),
    "masked tokens": _of_logits(lambda z: z.masked_fill(torch.arange(z.shape[-1]) < 3, -1e3)),
    "mixed logits": _of_logits(lambda z: z + 0.05 * z.roll(1, -1)),
    "in place": _of_logits(lambda z: z.clone().mul_(0.5)),
    "subclass, a tuple": _subclass,
    "patched layer": _patched,
}


@functools.cache
def _built(family: str) -> nn.Module:
    return architectures.build(family)


def draw_model(r: random.Random) -> tuple[nn.Module, list[str]]:
    family = r.choice(FAMILIES)
    model, said = copy.deepcopy(_built(family)), [family]
    names = r.sample([*CHANGES], r.choice((0, 1, 1, 2)))
    for name in names:
        if (family, name) == ("mamba", "pruned"):  # reads weights without the call that makes them anew
            continue
        try:
            CHANGES[name](r, model)
        except (KeyError, TypeError, ValueError):  # PyTorch prunes no layer that is parametrised, and the like
            continue
        said.append(name)
    if r.random() < 0.03 and "subclass, a tuple" not in names:
        model = torch.compile(model, backend="eager")
        said.append("compiled")
    return model, said


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    if not all(bool(torch.isfinite(g).all()) for g in found if g is not None):
        raise NoNumber
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}


def of_data(model: nn.Module, data: list[Drawn], objective) -> dict[str, Tensor]:
    """The gradient of an objective by its default reduction over all batches."""
    parts = [terms(model, drawn, objective) for drawn in data]
    count = sum(counts[objective.default_reduction] for _, counts in parts)
    return gradients(model, sum(value for value, _ in parts) / max(count, 1))


def check_loss(r: random.Random, model: nn.Module) -> str:
    objective = r.choice(OBJECTIVES)
    drawn, reduction = draw_batch(r, pairs=isinstance(objective, DPO)), r.choice((None, *REDUCTIONS))
    value, counts = terms(model, drawn, objective)
    expected = gradients(model, value / max(counts[reduction or objective.default_reduction], 1))
    said = f"loss, {objective}, {reduction}, {drawn.said}"
    found = gradients(model, gfast.model_loss(model, drawn.batch, objective, reduction=reduction).loss)
    size = sum(float(x.double().square().sum()) for x in expected.values()) ** 0.5
    for name, right in expected.items():
        apart = float((found[name] - right).double().norm())
        allowed = 2e-4 * max(float(right.norm()), 1e-3 * size) + 1e-9
        assert apart <= allowed, f"{said}, {name}: {apart:.3g} of {size:.3g}"
    return said


def check_effect(r: random.Random, model: nn.Module) -> str:
    objective, engine = r.choice(OBJECTIVES), r.choice(ENGINES)
    forget, retain = ([draw_batch(r) for _ in range(r.choice((1, 2)))] for _ in range(2))
    pairs = [draw_batch(r, pairs=True) for _ in range(r.choice((1, 2)))] if isinstance(objective, DPO) else None
    if getattr(objective, "of_batch", False):
        del forget[1:]
    for drawn in [*forget, *retain, *(pairs or [])]:
        drawn.batch.pop("weight", None)
    descent = of_data(model, forget if pairs is None else pairs, objective)
    risks = [of_data(model, data, NLL()) for data in (forget, retain)]
    said = f"effect, {engine}, {objective}, {[drawn.said for drawn in [*forget, *retain, *(pairs or [])]]}"
    given = {"forget": forget, "retain": retain, "objective_batches": pairs}
    given = {name: None if some is None else [drawn.batch for drawn in some] for name, some in given.items()}
    effect = gfast.g_effect(model, objective, groups=lambda name: name, engine=engine, **given)
    for found, risk in zip((effect.unlearn, effect.retain), risks, strict=True):
        sizes = {name: float(risk[name].double().norm() * descent[name].double().norm()) for name in risk}
        for name, size in sizes.items():
            right, dot = float((risk[name].double() * descent[name].double()).sum()), found[unwrap_name(name)]
            allowed = 1e-4 * max(size, 1e-4 * max(sizes.values())) + 1e-9
            assert abs(dot - right) <= allowed, f"{said}, {name}: {dot:.6g} for {right:.6g}"
    return said


def samples_of(drawn: Drawn) -> list[Tensor]:
    """Which of the labels [B, T - 1] are of each sample of an effect: of the scored texts where rows hold several."""
    valid = drawn.batch["labels"][:, 1:] != -100
    texts = torch.where(valid, drawn.texts[:, 1:], -1)
    several = any(len(set(row.tolist()) - {-1}) > 1 for row in texts) or "sequence_id" in drawn.batch
    if several:
        return [texts == text for text in dict.fromkeys(texts[valid].tolist())]
    rows = torch.arange(len(texts))[:, None]
    return [valid & (rows == row) for row in range(len(texts))]


def check_samples(r: random.Random, model: nn.Module) -> str:
    """pg_effect, token_effect and gram_effect: dots of log-probs' gradients with risks', and of each with each."""
    which, forget, retain = r.choice(("sample", "token", "gram")), draw_batch(r), draw_batch(r)
    for drawn in (forget, retain):
        drawn.batch.pop("weight", None)
    said = f"{which} effect, {forget.said}, {retain.said}"

    def each(drawn: Drawn) -> list[dict[str, Tensor]]:
        return [
            gradients(model, torch.where(some, label_logp(model, drawn)[0], 0.0).sum()) for some in samples_of(drawn)
        ]

    if which == "token":
        places = [some for sample in samples_of(forget) for some in sample.nonzero().tolist()]
        left = [gradients(model, label_logp(model, forget)[0][row, place]) for row, place in places]
    else:
        left = each(forget)
    right = [of_data(model, [drawn], NLL()) for drawn in (forget, retain)]
    measure = {"sample": gfast.pg_effect, "token": gfast.token_effect, "gram": gfast.gram_effect}[which]
    found = measure(model, forget=forget.batch, retain=retain.batch, groups=lambda name: name)
    if which == "gram":
        right = [{name: -x for name, x in one.items()} for one in each(retain)]
        values = {name: found.matrix[name] for name in found.matrix}
    else:
        sides = [found.unlearn, found.retain]
        if which == "token":
            sides = [{name: torch.cat(list(some)) for name, some in side.items()} for side in sides]
        values = {name: torch.stack([side[name] for side in sides], 1) for side in sides[:1] for name in side}
    norm = [
        [sum(float(x.double().square().sum()) for x in one.values()) ** 0.5 for one in some] for some in (left, right)
    ]
    for name in left[0] if left else ():
        got = values[unwrap_name(name)]
        assert tuple(got.shape) == (len(left), len(right)), f"{said}: {tuple(got.shape)}, {len(left)} x {len(right)}"
        for i, a in enumerate(left):
            for j, b in enumerate(right):
                dot, size = float((a[name].double() * b[name].double()).sum()), float(a[name].norm() * b[name].norm())
                allowed = 1e-4 * max(size, 1e-4 * norm[0][i] * norm[1][j]) + 1e-9
                assert abs(float(got[i, j]) - dot) <= allowed, (
                    f"{said}, {name}, {i}, {j}: {got[i, j]:.6g} for {dot:.6g}"
                )
    return said


def run_case(number: int) -> tuple[str, str]:
    """What the case was, and "equal", "no number", or what gfast refused it for. AssertionError for what is wrong."""
    r = random.Random(f"border {number}")
    torch.manual_seed(number)
    model, said = draw_model(r)

    def state() -> list:
        flags = [(x.training, len(x._forward_hooks), "forward" in vars(x)) for x in model.modules()]
        return [flags, [(p.requires_grad, p.grad) for p in model.parameters()], torch.get_rng_state().tolist()]

    before, check = state(), r.choices((check_loss, check_effect, check_samples), (5, 3, 2))[0]
    try:
        said.append(check(r, model))
        how = "equal"
    except NoNumber:
        how = "no number"
    except NotTaken as error:
        how = f"the model takes no such batch: {error}"
    except ValueError as error:
        assert "gfast" in str(error), f"{said}: {error}"
        how = str(error)
    except AssertionError as error:
        raise AssertionError(f"case {number}: {said}: {error}") from None
    assert state() == before, f"case {number}: {said}: the model or the random numbers are not as they were"
    return ", ".join(said), how


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", nargs="?", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--case", type=int)
    args = parser.parse_args()
    cases = [args.case] if args.case is not None else range(args.first, args.first + args.count)
    equal = failed = 0
    for number in cases:
        try:
            what, how = run_case(number)
            equal += how == "equal"
            if args.case is not None:
                print(what, how, sep="\n")
        except Exception as error:
            failed += 1
            print(
                f"FAILED {type(error).__name__}: {error}\n    python tests/fuzz/border.py --case {number}", flush=True
            )
    print(f"{len(cases)} cases: {equal} equal, {len(cases) - equal - failed} refused or NaN, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
