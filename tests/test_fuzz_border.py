"""Models that somebody changed, with batches of many kinds: `python tests/fuzz/border.py 10000` runs more of them."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from fuzz import border  # noqa: E402


def equal_among(cases) -> int:
    return sum(border.run_case(number)[1] == "equal" for number in cases)


def test_what_is_taken_is_what_the_models_own_logits_say():
    assert equal_among(range(18)) >= 10


@pytest.mark.slow
def test_of_many_more_cases():
    assert equal_among(range(18, 216)) >= 100


def test_a_wrong_number_is_found(monkeypatch):
    """The fuzzer's own test: a loss that is another by one part in a thousand."""
    right = border.gfast.model_loss

    def wrong(*args, **options):
        out = right(*args, **options)
        return out._replace(loss=out.loss * 1.001)

    monkeypatch.setattr(border.gfast, "model_loss", wrong)
    with pytest.raises(AssertionError, match=r"case \d+: \['"):
        equal_among(range(10))
