"""The peak of what linear_unlearn_loss holds: a weight callable of the user's own takes what a built-in one takes."""

import weakref

import pytest
import torch
from helpers.linear_head import Inside, rows_problem
from helpers.losses import need, squared

import gfast
from gfast.objectives import WGA
from gfast.ops import head


class Peak(Inside):
    """Bytes of the memory that ops returned and that is still referenced, and their maximum: exact, whatever the
    allocator does. ``known``: tensors that do not count."""

    def __init__(self, *known):
        super().__init__(self.count)
        self.known = {x.data_ptr() for x in known}
        self.alive = weakref.WeakKeyDictionary()  # a storage's Python object lives as long as the storage
        self.bytes = 0

    def count(self, func, out):
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.known:
                self.alive[x.untyped_storage()] = x.untyped_storage().nbytes()
        self.bytes = max(self.bytes, sum(self.alive.values()))


@pytest.mark.parametrize("impl", ["reference", "cpp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_weight_callable_takes_no_more_memory_than_a_built_in_weight(dtype, impl, monkeypatch):
    need("linear_unlearn_loss", impl, "cpu", dtype)
    # Tiles that the scoring pass folds have a size of their own, far below that of a real head and its chunk of logits;
    # here they are as far below these.
    monkeypatch.setattr(head, "_FOLD_BYTES", 1)
    n, D, V, chunk = 320, 32, 9000, 16

    def peak(objective):
        hidden, weight, _, labels = rows_problem(n, D, V, dtype)
        hidden.requires_grad_()
        weight.requires_grad_()
        with Peak(hidden, weight) as found:
            loss = gfast.linear_unlearn_loss(hidden, weight, labels, objective, chunk_rows=chunk, impl=impl).loss
            loss.backward()
        return found.bytes

    built_in, own = peak(WGA(2.0)), peak(squared)
    assert built_in >= (n * D + V * D + chunk * V) * dtype.itemsize  # the gradients and a chunk are seen
    assert own <= built_in + 4 * n * 4  # log-probs, weights and their product: a few fp32 vectors [N]
    if impl == "cpp" and dtype == torch.float32:  # 16-bit dW is summed over chunks in fp32
        assert built_in <= (n * D + V * D + chunk * V + 12 * n) * 4  # gradients and one chunk
