"""Triton row kernels against a literal fp64 computation: compiled on CUDA, in Triton's interpreter elsewhere."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from helpers.marks import slow_when  # noqa: E402

from gfast.kernels.common import tile  # noqa: E402
from gfast.kernels.kl import kl_rows  # noqa: E402
from gfast.kernels.rows import logp_rows, logp_rows_grad, weighted_rows  # noqa: E402
from gfast.kernels.scale import scale_  # noqa: E402
from gfast.ops.dispatch import interpreter_fails  # noqa: E402

COMPILED = torch.cuda.is_available()
DEVICE = "cuda" if COMPILED else "cpu"
WHY_NOT = "" if COMPILED else interpreter_fails()
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy on inf - inf in lanes that are not selected
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT),
]

slow_unless_compiled = slow_when if not COMPILED else lambda condition: lambda test: test  # compiled, all are quick
EPS = torch.finfo(torch.float32).eps
SIZES = [1, 2, 7, 31, 33, 257, 1000]
FORMS = [(1.0, 0.0), (0.7, 0.0), (1.0, 3.0), (1.3, 30.0)]  # (scale, softcap)
FAMILIES = {  # sign, p_pow, q_pow, beta
    "GA": (1.0, 0.0, 0.0, 0.0),
    "WGA": (1.0, 0.5, 0.0, 0.0),
    "SatImp": (1.0, 5.0, 1.0, 0.0),
    "TNPO": (1.0, 0.0, 0.0, 1.0),
    "WTNPO": (1.0, 1.0, 0.0, 2.0),
    "NLL": (-1.0, 0.0, 0.0, 0.0),
    "all": (-1.0, 0.5, 0.5, 0.1),
}


def make(rows: int, vocab: int, dtype=torch.float32, spread: float = 3.0, seed: int = 0):
    g = torch.Generator().manual_seed(seed + 131 * vocab + rows)
    logits = (torch.randn(rows, vocab, generator=g) * spread).to(dtype)  # [N, V]
    labels = torch.randint(vocab, (rows,), generator=g)  # [N]
    if rows > 1:
        labels[1] = -100
    ref_logp = -3 * torch.rand(rows, generator=g)  # [N]
    return logits.to(DEVICE), labels.to(DEVICE), ref_logp.to(DEVICE)


def effective(z, scale, softcap):
    """z' and dz'/dz."""
    if softcap == 0:
        return scale * z, torch.full_like(z, scale)
    return softcap * torch.tanh(scale * z / softcap), scale / torch.cosh(scale * z / softcap) ** 2


def literal(logits, labels, ref_logp, family, coef, scale, softcap, dtype):
    """logp [N], weight [N], gradient [N, V] written down as the formulas stand, computed in `dtype`."""
    sign, p_pow, q_pow, beta = family
    z, slope = effective(logits.to(dtype), scale, softcap)
    valid = labels != -100
    hit = torch.zeros_like(z, dtype=torch.bool).scatter_(1, labels.clamp(min=0)[:, None], True)
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    logp = log_p[hit]
    rest = p.masked_fill(hit, 0).sum(-1)  # 1 - p
    log_w = torch.zeros_like(logp)
    if p_pow:
        log_w = log_w + p_pow * logp
    if q_pow:
        log_w = log_w + q_pow * rest.log()
    w = sign * log_w.exp()
    if beta:
        w = w * 2 * torch.sigmoid(beta * (logp - ref_logp.to(dtype)))
    grad = (coef.to(dtype) * w)[:, None] * torch.where(hit, rest[:, None], -p) * slope
    zero = torch.zeros_like(logp)
    return torch.where(valid, logp, zero), torch.where(valid, w, zero), torch.where(valid[:, None], grad, 0.0)


def literal_kl(logits, ref_logits, labels, coef, form, ref_form, dtype):
    z, slope = effective(logits.to(dtype), *form)
    z_ref, _ = effective(ref_logits.to(dtype), *ref_form)
    log_p, log_q = z.log_softmax(-1), z_ref.log_softmax(-1)
    q = log_q.exp()
    terms = torch.where(q > 0, q * (log_q - log_p), 0.0)
    grad = coef.to(dtype) * (log_p.exp() - q) * slope
    valid = labels != -100
    return torch.where(valid, terms.sum(-1), 0.0), torch.where(valid[:, None], grad, 0.0)


def check_kl(logits, ref_logits, labels, form=(1.0, 0.0), ref_form=(1.0, 0.0), out=None):
    """KL and gradient by the law, in units of what is subtracted: for close rows both are remainders."""
    coef = torch.tensor(0.37, device=DEVICE)
    truth = literal_kl(logits, ref_logits, labels, coef, form, ref_form, torch.float64)
    plain = literal_kl(logits, ref_logits, labels, coef, form, ref_form, torch.float32)
    out = poisoned(logits) if out is None else out
    log_p, log_q = effective(logits.double(), *form)[0].log_softmax(-1), effective(ref_logits.double(), *ref_form)[0]
    log_q = log_q.log_softmax(-1)
    q = log_q.exp()
    terms = torch.where(q > 0, q * (log_q.abs() + log_p.abs()), 0.0).sum(-1, keepdim=True)
    parts = (coef * torch.maximum(log_p.exp(), q) * effective(logits.double(), *form)[1]).amax(-1, keepdim=True)
    kl = kl_rows(logits, ref_logits, labels, coef, *form, *ref_form, out)
    check_law(kl, plain[0], truth[0], terms)
    check_law(out, plain[1], truth[1], parts)
    return kl, out


def worst(x, truth, size=None):
    """Largest error of a row relative to `size` [N, 1], by default that row's largest entry."""
    rows = max(1, truth.shape[0])
    size = truth.reshape(rows, -1).abs().amax(1, keepdim=True) if size is None else size
    return ((x.double() - truth).reshape(rows, -1).abs() / size.clamp(min=1e-30)).max().item()


def check_law(actual, plain, truth, size=None):
    """Error at most twice that of plain PyTorch with the same output dtype, plus one rounding of that dtype.

    Row by row, because the errors of one row are one draw: a law about a maximum needs several.
    """
    assert torch.isfinite(actual).all()
    if truth.numel():
        error, allowed = worst(actual, truth, size), 2 * worst(plain.to(actual.dtype), truth, size)
        allowed += torch.finfo(actual.dtype).eps
        assert error <= allowed, f"error {error:.3e}, plain PyTorch allows {allowed:.3e}"


def poisoned(like):
    return torch.full_like(like, float("nan"))


def check_weighted(logits, labels, ref_logp, family, scale=1.0, softcap=0.0, out=None, coef=0.37):
    coef = torch.as_tensor(coef, device=DEVICE)
    source = logits.clone()
    out = poisoned(logits) if out is None else out
    logp, weight = weighted_rows(logits, labels, ref_logp if family[3] else None, *family, coef, scale, softcap, out)
    truth = literal(source, labels, ref_logp, family, coef, scale, softcap, torch.float64)
    plain = literal(source, labels, ref_logp, family, coef, scale, softcap, torch.float32)
    for actual, p, t in zip((logp, weight, out), plain, truth, strict=True):
        check_law(actual, p, t)
    assert (out[labels == -100] == 0).all() and (logp[labels == -100] == 0).all()
    return logp, weight, out


def test_weighted_rows_with_a_factor_a_row():
    coef = torch.tensor([0.37, -2.0, 0.0, 1e-3, 5.0, 1.0, 0.5, -0.1, 7.0, 0.2])
    check_weighted(*make(10, 257, torch.float32), FAMILIES["WTNPO"], coef=coef)


@slow_unless_compiled(lambda p: p.dtype != torch.float32 and p.vocab not in (7, 257))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", SIZES)
def test_weighted_rows_ragged(vocab, dtype):
    check_weighted(*make(10, vocab, dtype), FAMILIES["WTNPO"])


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows):
    logits, labels, _ = given = make(rows, 33)
    logp, weight, out = check_weighted(*given, FAMILIES["SatImp"])
    assert logp.shape == weight.shape == (rows,)
    kl = kl_rows(logits, logits, labels, torch.ones((), device=DEVICE), out=out)
    assert kl.shape == (rows,) and (kl.abs() <= 4 * EPS).all() and (out.abs() <= EPS).all()
    assert logp_rows(logits, labels)[1].shape == (rows, 2)


# every family, and every form of the logits with the one that has all weights
@slow_unless_compiled(lambda p: p.form != FORMS[-1] and p.family != FAMILIES["all"])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("form", FORMS)
def test_weight_families(family, form):
    check_weighted(*make(10, 33, spread=5.0), family, *form)


@slow_unless_compiled(lambda p: p.form != FORMS[-1] and p.vocab != 257)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("vocab", [1, 7, 257])
def test_logp_rows_and_grad(vocab, form):
    logits, labels, ref_logp = make(5, vocab, torch.bfloat16)
    logp, stats = logp_rows(logits, labels, *form)
    coef = torch.tensor([1.0, 2.0, -3.0, 0.5, 0.0], device=DEVICE)
    out = poisoned(logits)
    logp_rows_grad(logits, labels, logp, stats, coef, *form, out)
    truth = literal(logits, labels, ref_logp, FAMILIES["GA"], coef, *form, torch.float64)
    plain = literal(logits, labels, ref_logp, FAMILIES["GA"], coef, *form, torch.float32)
    check_law(logp, plain[0], truth[0])
    check_law(out, plain[2], truth[2])
    z = effective(logits.double(), *form)[0]
    valid = labels != -100
    assert torch.allclose(stats.double().sum(1)[valid], z.logsumexp(-1)[valid], rtol=1e-6, atol=1e-6)
    assert (stats[~valid] == 0).all()
    logp_rows_grad(logits, labels, logp, stats, coef, *form, logits)
    assert torch.equal(logits, out)


@pytest.mark.parametrize("vocab", [4096, 5008, 5001])
def test_several_blocks(vocab):
    """Several blocks: without a tail, with one, and with rows that are not aligned; targets all over the row."""
    logits, labels, ref_logp = make(6, vocab)
    labels[2:] = torch.tensor([0, 2048, 4095, vocab - 1], device=DEVICE)
    logits[3] = logits[3].sort().values
    logits[4] = logits[4].sort(descending=True).values
    logp, _, out = check_weighted(logits, labels, ref_logp, FAMILIES["GA"])
    same, stats = logp_rows(logits, labels)
    again = poisoned(logits)
    logp_rows_grad(logits, labels, same, stats, torch.full((6,), 0.37, device=DEVICE), 1.0, 0.0, again)
    assert torch.equal(same, logp) and torch.allclose(again, out, rtol=80 * EPS, atol=0)
    ref_logits, _, _ = make(6, vocab, seed=9)
    check_kl(logits, ref_logits, labels)
    weighted_rows(logits, labels, None, *FAMILIES["GA"], torch.tensor(0.37, device=DEVICE), out=logits)
    assert torch.equal(logits, out), "in place differs"
    assert tile(vocab, 4 * vocab, 4)["R"] * 4 < vocab, "one block holds the row: the loops were not tested"


@pytest.mark.parametrize("layout", ["in place", "rows apart", "odd rows apart", "expanded"])
def test_memory_layouts(layout):
    logits, labels, ref_logp = make(5, 257, torch.bfloat16)
    out = None
    if layout == "in place":
        out = logits
    elif layout == "expanded":
        logits = logits[:1].expand(5, 257)
        out = torch.full((5, 257), float("nan"), dtype=logits.dtype, device=DEVICE)
    else:
        wide = torch.full((5, 272 if layout == "rows apart" else 301), 7.0, dtype=logits.dtype, device=DEVICE)
        out = wide[:, :257]
        logits = wide.clone()[:, :257].copy_(logits)
    check_weighted(logits, labels, ref_logp, FAMILIES["WGA"], out=out)
    if "apart" in layout:
        assert (wide[:, 257:] == 7).all(), "columns beyond the vocabulary were written"


@pytest.mark.parametrize("gap", [-100.0, -30.0, 15.0, 30.0, 80.0])
def test_target_far_from_the_rest(gap):
    """logp, 1 - p, p and the gradients keep their relative accuracy at both ends, where plain PyTorch has no digit."""
    logits, labels, ref_logp = make(3, 257, spread=1.0)
    labels[1] = 5
    logits.scatter_(1, labels[:, None], gap)
    bound = (abs(gap) + 20) * EPS  # an fp32 exponential of x knows x, and so exp(x), to |x| EPS
    one = torch.ones((), device=DEVICE)
    for family in ("GA", "WGA", "SatImp", "TNPO"):
        sign, p_pow, q_pow, beta = FAMILIES[family]
        out = poisoned(logits)
        logp, weight = weighted_rows(logits, labels, ref_logp if beta else None, sign, p_pow, q_pow, beta, one, out=out)
        truth = literal(logits, labels, ref_logp, FAMILIES[family], one, 1.0, 0.0, torch.float64)
        if gap > 0:  # log_softmax has lost log p in fp64 too, where p is 1 to 16 digits
            rest = (logits.double().scatter(1, labels[:, None], float("-inf")) - gap).exp().sum(-1)
            truth = (-rest.log1p(), truth[1], truth[2])
        for name, actual, true in zip(("logp", "weight", "grad"), (logp, weight, out), truth, strict=True):
            large = true.abs() > 1e-30
            factor = 5 if family == "SatImp" else 1  # the power multiplies the error of log p
            error = ((actual.double() - true).abs() / true.abs().clamp(min=1e-30))[large]
            assert (error <= 4 * factor * bound).all(), (family, name, error.max())
    logp, stats = logp_rows(logits, labels)
    logp_rows_grad(logits, labels, logp, stats, torch.ones_like(logp), 1.0, 0.0, out)
    true = literal(logits, labels, ref_logp, FAMILIES["GA"], one, 1.0, 0.0, torch.float64)[2]
    hit = out.gather(1, labels[:, None]).double() / true.gather(1, labels[:, None])
    assert (hit - 1).abs().max() <= 4 * bound


def test_probability_exactly_one():
    logits = torch.full((2, 40), float("-inf"), device=DEVICE)
    logits[:, 3] = 2.0
    labels = torch.tensor([3, 3], device=DEVICE)
    for name, family in FAMILIES.items():
        logp, weight, out = check_weighted(logits, labels, torch.zeros(2, device=DEVICE), family)
        assert (logp == 0).all() and (out == 0).all(), name
    assert weighted_rows(logits, labels, None, 1.0, 0.0, 1.0, 0.0, torch.ones((), device=DEVICE))[1].eq(0).all()


@pytest.mark.parametrize("form", FORMS)
def test_large_logits(form):
    check_weighted(*make(4, 257, spread=1e4), FAMILIES["WGA"], *form)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", [float("-inf"), torch.finfo(torch.bfloat16).min])
def test_masked_vocabulary(mask, dtype):
    logits, labels, ref_logp = make(4, 257, dtype)
    labels = labels.clamp(max=99)
    logits[:, 100:] = mask
    _, _, out = check_weighted(logits, labels, ref_logp, FAMILIES["SatImp"])
    assert (out[:, 100:] == 0).all()


def test_label_outside_vocabulary_is_nan_not_a_stray_read():
    logits, labels, _ = make(3, 33)
    labels = torch.tensor([33, -1, 2**40], device=DEVICE)
    out = torch.zeros_like(logits)
    logp, weight = weighted_rows(logits, labels, None, *FAMILIES["WGA"], torch.ones((), device=DEVICE), out=out)
    assert logp.isnan().all() and weight.isnan().all() and out.isnan().all()


def test_nan_logit_reaches_its_row_only():
    logits, labels, _ = make(3, 33)
    labels[:] = 4
    logits[0, 9] = float("nan")
    out = torch.zeros_like(logits)
    logp, _ = weighted_rows(logits, labels, None, *FAMILIES["GA"], torch.ones((), device=DEVICE), out=out)
    assert logp[0].isnan() and out[0].isnan().all()
    assert logp[1:].isfinite().all() and out[1:].isfinite().all()


@pytest.mark.parametrize("vocab", [31, 1000])
def test_bf16_gradient_is_rounded_once(vocab):
    """bf16 logits and their fp32 copies differ in the last rounding only: to nearest, but truncated interpreted."""
    logits, labels, _ = make(4, vocab, torch.bfloat16)
    one = torch.ones((), device=DEVICE)
    narrow, wide = poisoned(logits), poisoned(logits.float())
    weighted_rows(logits, labels, None, *FAMILIES["GA"], one, out=narrow)
    weighted_rows(logits.float(), labels, None, *FAMILIES["GA"], one, out=wide)
    ulp = torch.finfo(torch.bfloat16).eps * (0.5 if COMPILED else 1.0)
    assert ((narrow.float() - wide).abs() <= ulp * wide.abs() * (1 + 1e-3) + 1e-38).all()


@slow_unless_compiled(lambda p: p.vocab != 31 and (p.dtype, p.forms[0]) != (torch.float32, (1.3, 3.0)))
@pytest.mark.parametrize("forms", [((1.0, 0.0), (1.0, 0.0)), ((0.7, 0.0), (1.3, 30.0)), ((1.3, 3.0), (1.0, 2.0))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 2, 31, 257])
def test_kl_rows(vocab, dtype, forms):
    logits, labels, _ = make(6, vocab, dtype)
    ref_logits, _, _ = make(6, vocab, dtype, seed=9)
    kl, out = check_kl(logits, ref_logits, labels, *forms)
    coef = torch.tensor(0.37, device=DEVICE)
    assert torch.equal(kl, kl_rows(logits, ref_logits, labels, coef, *forms[0], *forms[1]))
    kl_rows(logits, ref_logits, labels, coef, *forms[0], *forms[1], logits)
    assert torch.equal(logits, out), "in place differs"


@pytest.mark.parametrize("offset", [0.0, 512.0, -512.0])
def test_kl_with_masks_offsets_and_close_rows(offset):
    logits, labels, _ = make(12, 257)
    ref_logits = logits + 1e-3 * make(12, 257, seed=3)[0]
    logits[:, 100:] = ref_logits[:, 100:] = float("-inf")  # 0 log 0
    ref_logits[:, 7] = float("-inf")  # q = 0 where p > 0
    check_kl(logits + offset, ref_logits, labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0, 1, 33, 5000])
def test_scale(size, dtype):
    x = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype).to(DEVICE)
    kept = x.clone()
    scale_(x, torch.ones((), device=DEVICE))
    assert torch.equal(x, kept)
    scale_(x, torch.tensor(0.5, device=DEVICE))
    assert torch.equal(x, kept * 0.5)
    scale_(x, torch.tensor(-0.3, device=DEVICE))
    if size:
        check_law(x, kept.float() * -0.15, kept.double() * -0.15)


def test_bad_arguments_are_refused():
    logits, labels, _ = make(4, 33)
    one = torch.ones((), device=DEVICE)
    with pytest.raises(ValueError, match="stride 33 along the vocabulary"):
        logp_rows(torch.zeros(33, 33, device=DEVICE).t(), torch.zeros(33, dtype=torch.int64, device=DEVICE))
    with pytest.raises(ValueError, match="out has shape"):
        weighted_rows(logits, labels, None, *FAMILIES["GA"], one, out=logits[:2])
    with pytest.raises(ValueError, match="pass ref_logp"):
        weighted_rows(logits, labels, None, *FAMILIES["TNPO"], one)
    with pytest.raises(ValueError, match="contiguous"):
        scale_(logits.t(), one)


@pytest.mark.parametrize("vocab", [1, 33, 32000, 50257, 128256, 256000])
def test_tile_fits(vocab):
    for itemsize in (2, 4):
        for streams in (1, 2):
            for aligned in (True, False):
                t = tile(vocab, streams * vocab * itemsize, itemsize, streams, aligned)
                assert t["R"] & (t["R"] - 1) == 0 and t["R"] >= 1 and 1 <= t["num_warps"] <= 32
                assert not aligned or t["K"] * itemsize == 16


@pytest.mark.cuda
@pytest.mark.skipif(not COMPILED, reason="needs an NVIDIA GPU: sizes of real models")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [32000, 50257, 128256, 256000])
def test_real_sizes(vocab, dtype):
    logits, labels, ref_logp = make(300, vocab, dtype)  # more rows than programs
    for form in [(1.0, 0.0), (1.0, 30.0)]:
        _, _, out = check_weighted(logits, labels, ref_logp, FAMILIES["all"], *form)
        again = logits.clone()
        check_weighted(again, labels, ref_logp, FAMILIES["all"], *form, out=again)
        assert torch.equal(again, out), "in place differs"
    ref_logits, _, _ = make(300, vocab, dtype, seed=1)
    check_kl(logits, ref_logits, labels, (1.0, 0.0), (1.0, 30.0))


@pytest.mark.cuda
@pytest.mark.skipif(not COMPILED, reason="needs an NVIDIA GPU with 6 GB: offsets beyond 2^31 elements")
def test_rows_beyond_two_billion_elements():
    rows, vocab = 17000, 128256
    if torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("less than 6 GB of free GPU memory")
    logits = torch.zeros(rows, vocab, dtype=torch.bfloat16, device=DEVICE)
    logits[-1, 11] = 20.0
    labels = torch.full((rows,), -100, device=DEVICE)
    labels[-1] = 11
    logp, _ = weighted_rows(logits, labels, None, *FAMILIES["GA"], torch.ones((), device=DEVICE), out=logits)
    other = (vocab - 1) * torch.tensor(-20.0, dtype=torch.float64).exp()
    assert abs(logp[-1].item() / -other.log1p().item() - 1) < 1e-4
    assert logits[-1, 11].item() > 0 and (logits[0] == 0).all()
