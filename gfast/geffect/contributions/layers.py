"""How the gradient of every kind of module is made of its inputs and of the gradients of its outputs.

The sample and gram engines never form a weight gradient. For each row t of a module call (a token of a sample) the
gradient of a parameter gets one of three contributions, and every supported module reduces to them:

    OuterProduct    b_t a_t^T          a Linear's weight (transposed in GPT-2's Conv1D); HeadProduct where b is not kept
    RowLookup       b_t at row id_t    an embedding
    RowSum          v_t                a bias (v = b), a norm's weight (v = b * x_hat)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gfast import module_kinds
from gfast.deferred import DeferredLogits
from gfast.geffect.contributions.head import HeadProduct
from gfast.geffect.contributions.tried import computes, norm_unit, normalized
from gfast.geffect.groups import GroupMap
from gfast.ops.dispatch import compiled


@dataclass(frozen=True)
class OuterProduct:
    """Row t adds b_t a_t^T to a gradient [D_out, D_in]; a [n, D_in], b [n, D_out]."""

    a: Tensor
    b: Tensor

    @property
    def rows(self) -> int:
        return len(self.b)

    @property
    def width(self) -> int:
        return self.b.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.a.dtype, self.b.dtype)

    def select(self, rows: Tensor | slice) -> OuterProduct:
        """The same for some of the rows."""
        return OuterProduct(self.a[rows], self.b[rows])

    def used(self) -> Tensor:
        """Which rows are not zero, bool [n]."""
        return _not_zero(self.a) & _not_zero(self.b)

    def columns(self, start: int, stop: int) -> Tensor:
        """b [n, stop - start] of some output features."""
        return self.b[:, start:stop]

    def at(self, ids: Tensor) -> Tensor:
        """b [n, m] of the output features ids [m]."""
        return self.b.index_select(1, ids)


@dataclass(frozen=True)
class RowLookup:
    """Row t adds b_t to row ids_t of a gradient [V, D]; ids int64 [n], b [n, D]."""

    ids: Tensor
    b: Tensor

    @property
    def rows(self) -> int:
        return len(self.b)

    def select(self, rows: Tensor | slice) -> RowLookup:
        """The same for some of the rows."""
        return RowLookup(self.ids[rows], self.b[rows])

    def used(self) -> Tensor:
        """Which rows are not zero, bool [n]."""
        return _not_zero(self.b)


@dataclass(frozen=True)
class RowSum:
    """Row t adds terms_t; terms [n, size of the parameter], fp32 or wider where they were computed here."""

    terms: Tensor

    @property
    def rows(self) -> int:
        return len(self.terms)


Contribution = OuterProduct | HeadProduct | RowLookup | RowSum


def _not_zero(x: Tensor) -> Tensor:
    """Which rows hold something else than zeros (NaN is something), bool [n]."""
    if x.device.type == "cpu" and compiled("used_rows") and x.stride(-1) == 1:
        return torch.ops.gfast.used_rows(x)
    # neither a look at the device nor memory of the size of x
    return torch.linalg.vector_norm(x, torch.inf, dim=-1) != 0


@dataclass(frozen=True)
class Site:
    """A module with trainable parameters of its own, and a rule for it.

    `parameters` maps its attributes ("weight", "bias") to names of `model.named_parameters()`, trainable ones only.
    `unit` is the weight with which a norm returns x_hat.
    """

    name: str
    module: nn.Module
    kind: str
    parameters: dict[str, str]
    unit: float = 1.0


@dataclass(frozen=True)
class Sites:
    """Where all trainable parameters are used."""

    modules: list[Site]

    def names(self) -> dict[int, str]:
        """id of each parameter -> its name."""
        sites = ((site.module, site.parameters) for site in self.modules)
        return {id(module._parameters[key]): name for module, attributes in sites for key, name in attributes.items()}

    def parameters_of(self, module: nn.Module | None) -> dict[str, str]:
        """Those of one module, as in `Site.parameters`."""
        return next((site.parameters for site in self.modules if site.module is module), {})


def find_sites(model: nn.Module, groups: GroupMap, engine: str) -> Sites:
    """The uses of every trainable parameter.

    Raises:
        ValueError: a parameter whose module has no rule; the message names both and says what to do instead.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters() if name in groups.index}
    modules = []
    for path, module in model.named_modules():
        attributes = {attribute: names[id(p)] for attribute, p in module._parameters.items() if id(p) in names}
        if not attributes:
            continue
        kind, why = module_kinds.kind_of(module), f"gfast has no rule for a {type(module).__name__}"
        if module_kinds.is_routed(path):
            kind, why = None, "experts of a mixture see tokens in an order of their own"
        elif "forward" in vars(module) and kind not in (None, "norm") and not computes(module, kind):
            kind, why = None, "its forward was replaced by one that computes something else"
        elif kind == "embedding" and (module.max_norm is not None or module.scale_grad_by_freq):
            kind, why = None, "an embedding with max_norm or scale_grad_by_freq has no gradient by rows"
        unit = norm_unit(module) if kind == "norm" else 1.0
        if kind is None or unit is None:
            name = next(iter(attributes.values()))
            shape = tuple(model.get_parameter(name).shape)
            raise ValueError(
                f"gfast: the {engine} engine cannot attribute the trainable parameter {name!r} {shape} of the module "
                f"{path!r}: {why}. Freeze it with requires_grad_(False), or use engine='stream' or 'token', or "
                f"token_effect(...).samples() for effects of samples, which take any module"
            )
        modules.append(Site(path, module, kind, attributes, unit))
    return Sites(modules)


class Watch:
    """Hooks on sites: in a backward, `consume(name, contribution)` is told of every parameter as soon as it is known.

    Inputs are kept from a module's forward to its backward, as training does, and longer if `again` announces another
    backward through the same graph follows; outputs that need no gradient (those of frozen embeddings, or of the first
    trainable module) are made the start of the graph. Its rows are the batch's samples one after the other, equally
    many each.

    Use it as a context manager around forward and backward passes, call `start` before each forward, and set `consume`
    before each backward.
    """

    def __init__(self, sites: list[Site], engine: str) -> None:
        self.sites, self.engine = sites, engine
        self.consume: Callable[[str, Contribution], None] | None = None
        self.again = False
        self.shape = (0, 0)  # of the batch: B, T
        self.ran: set[str] = set()
        self.called: list[tuple[nn.Module, dict[str, nn.Parameter]]] = []  # modules that hold constants, innermost last

    def __enter__(self) -> Watch:
        self.handles = []
        for site in self.sites:
            before, after = partial(self._before, site), partial(self._forward, site)
            self.handles.append(site.module.register_forward_pre_hook(before, with_kwargs=True))
            # before the hooks of others, which may change the output
            self.handles.append(site.module.register_forward_hook(after, with_kwargs=True, prepend=True))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()
        self._restore()

    def _restore(self, until: nn.Module | None = None) -> None:
        """The modules' own parameters in place of the constants, in calls that end (None: all) or an error has left."""
        while self.called:
            module, parameters = self.called.pop()
            module._parameters.update(parameters)
            if module is until:
                return

    def start(self, rows: int, length: int) -> None:
        """A batch [rows, length] comes next."""
        self.shape = (rows, length)
        self._restore()

    def check_all_ran(self) -> None:
        """ValueError naming a site that no forward called: its gradient is unknown, not zero."""
        for site in self.sites:
            if site.name not in self.ran:
                raise ValueError(
                    f"gfast: the module {site.name!r} owns trainable parameters but was not called, or was called "
                    f"inside compiled code where gfast cannot see it: the {self.engine} engine cannot attribute it. "
                    f"Freeze it with requires_grad_(False), or use engine='stream'"
                )

    def _before(
        self, site: Site, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        attributes = {attribute: module._parameters[attribute] for attribute in site.parameters}
        self.called.append((module, attributes))
        module._parameters.update({key: nn.Parameter(p.detach(), requires_grad=False) for key, p in attributes.items()})
        return self._expanded(args, kwargs) if site.kind == "embedding" else None

    def _expanded(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Positions [T] or [1, T] that all samples share are looked up once a sample, to have a gradient each."""
        rows, length = self.shape

        def expanded(value: Any) -> Any:
            shared = (
                isinstance(value, Tensor) and not value.is_floating_point() and value.shape in ((length,), (1, length))
            )
            return value.expand(rows, length) if shared else value

        return tuple(map(expanded, args)), {key: expanded(value) for key, value in kwargs.items()}

    def _forward(
        self, site: Site, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any
    ) -> Tensor | None:
        self._restore(module)
        if not torch.is_grad_enabled():
            return None
        self.ran.add(site.name)
        if site.kind == "embedding":
            read, scale = module_kinds.embedding_lookup(module, args, kwargs)
        else:
            read, scale = (*args, *kwargs.values())[0], 1.0
            if len(args) + len(kwargs) != 1 or not isinstance(read, Tensor) or not isinstance(output, Tensor):
                raise ValueError(
                    f"gfast: the {self.engine} engine cannot attribute the module {site.name!r}: it was called with "
                    f"more than one tensor. Freeze it, or use engine='stream'"
                )
            read = read.detach()
            if isinstance(output, DeferredLogits):  # they come with the head's, unless somebody asks for logits
                output.when_real.append(partial(self._seen, site, read, scale))
                return None
        return self._seen(site, read, scale, output)

    def _seen(self, site: Site, read: Tensor, scale: Any, output: Tensor) -> Tensor | None:
        """Keep what the output's backward will need; the output in place of the module's, if it is another."""
        result = None
        if not output.requires_grad:
            # the start of the graph; a copy, because what follows may change a module's output in place
            start = output.detach().requires_grad_()
            # its gradient may lie where a kept contribution does, and a second backward would be added to it in place
            start.register_post_accumulate_grad_hook(_drop_grad)
            output = result = start.clone()
        elif output._is_view():
            # the same, but for autograd no view: of one that is changed in place the node leaves the graph
            output = result = torch.ops.aten._unsafe_view(output, output.shape)
        # a Variable's version counts in-place changes, which autograd does not look for when the weight is frozen
        call = [read, read._version, scale]
        # of its node, and so after the hooks on the tensor itself, which may change its gradient
        output.grad_fn.register_prehook(partial(self._backward, site, call, output.output_nr))
        return result

    def _backward(self, site: Site, call: list[Any], place: int, grads: tuple[Tensor | None, ...]) -> None:
        grad = grads[place]
        if grad is None:
            return
        read, version, scale = call
        if not self.again:
            call.clear()  # the input is not needed any longer
        if read._version != version:
            raise ValueError(
                f"gfast: the input of {site.name!r} was changed in place after the module had read it: the "
                f"{self.engine} engine cannot attribute it. Freeze it, or use engine='stream'"
            )
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            for name, contribution in self._contributions(site, read, grad.detach(), scale):
                self.consume(name, contribution)

    def _contributions(
        self, site: Site, read: Tensor, grad: Tensor, scale: Tensor | float
    ) -> Iterator[tuple[str, Contribution]]:
        weight, bias = site.parameters.get("weight"), site.parameters.get("bias")
        size = grad.shape[-1] if site.kind != "norm" else site.module.weight.numel()
        rows, length = self.shape
        flat = grad.dim() == 2 and grad.shape[0] == rows * length
        if not flat and (grad.dim() < 3 or grad.shape[0] != rows):
            raise ValueError(
                f"gfast: the {self.engine} engine cannot attribute the module {site.name!r}: in a batch of {rows} "
                f"samples of {length} tokens its output has the shape {tuple(grad.shape)}, whose rows cannot be told "
                f"apart by sample. Measure one sample a batch, freeze it, or use engine='stream'"
            )
        b = grad.reshape(-1, size)  # [n, D_out]
        if weight is not None:
            if site.kind == "embedding":
                ids = read.reshape(-1)
                b = b * scale if isinstance(scale, Tensor) or scale != 1.0 else b
                if site.module.padding_idx is not None:
                    b = b.masked_fill((ids == site.module.padding_idx)[:, None], 0.0)
                yield weight, RowLookup(ids, b)
            elif site.kind == "norm":
                x_hat = normalized(site.module, read, site.unit).reshape(-1, size)  # [n, D], fp32 or fp64
                yield weight, RowSum(x_hat.mul_(b))
            else:
                a = read.reshape(-1, read.shape[-1])  # [n, D_in]
                yield weight, OuterProduct(a, b) if site.kind == "linear" else OuterProduct(b, a)
        if bias is not None:
            yield bias, RowSum(b)


def _drop_grad(tensor: Tensor) -> None:
    tensor.grad = None
