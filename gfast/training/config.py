# SPDX-License-Identifier: Apache-2.0
"""UnlearnConfig: TrainingArguments plus what unlearning needs."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import get_type_hints

import torch
from transformers import TrainingArguments

from gfast.geffect.live.surgery import Surgery
from gfast.given import fits
from gfast.objectives import JSD, KL, NLL, REGISTRY, RR, Mix, Objective
from gfast.objectives.registry import parse_objective
from gfast.original import REFERENCES, check_reference_name
from gfast.training.conflict import parse_weights
from gfast.training.dual import check_dual, moves
from gfast.training.options import COMPILATION, refuse_ignored_options
from gfast.training.stop import parse_rules

RETAIN_TERMS = ("none", "nll", "kl", "jsd", "rr")


@dataclass
class UnlearnConfig(TrainingArguments):
    """All of TrainingArguments, and the loss gamma * objective(forget) + alpha * retain_term(retain).

    Defaults that differ from TrainingArguments: learning_rate 1e-5 (unlearning needs small steps), logging_steps 1,
    report_to "none", remove_unused_columns False (it must stay so), label_names ["labels"]. max_grad_norm 0 or None is
    no clipping.

    Errors: ValueError for an unknown objective or retain term, parameters the objective does not have, and options of
    TrainingArguments that would have no effect here (gfast.training.options says which, and what to do instead).

    >>> config = UnlearnConfig(output_dir="run", objective="WGA", objective_args=["alpha=0.5"], retain_term="nll")
    >>> str(config.build_objective())
    'WGA(alpha=0.5) + NLL()'
    """

    _argument_group_name = "training"

    output_dir: str = field(
        default="unlearned", metadata={"help": "The run folder: records, checkpoints and the final model."}
    )
    objective: str = field(
        default="NPO",
        metadata={
            "help": f"Forget objective: {', '.join(cls.__name__ for cls in REGISTRY.values())}; with parameters: "
            "WGA:alpha=0.5."
        },
    )
    objective_args: list[str] | None = field(
        default=None,
        metadata={"help": "Parameters of the objective, as name=value (alpha=0.5). In YAML a mapping will do."},
    )
    retain_term: str = field(
        default="none",
        metadata={
            "help": "Retain objective: none, nll, kl or jsd (to the original model) or rr (RMU's).",
            "choices": RETAIN_TERMS,
        },
    )
    gamma: float = field(default=1.0, metadata={"help": "Factor of the forget objective."})
    alpha: float = field(default=1.0, metadata={"help": "Factor of the retain objective."})
    groups: str = field(
        default="paper",
        metadata={"help": "Parameter groups of the G-effect: paper (embed, shallow, middle, deep, lm) or layer."},
    )
    geffect_every: int = field(
        default=0,
        metadata={"help": "Measure the G-effect before training, every so many steps and at the end; 0: never."},
    )
    geffect_samples: int = field(
        default=0,
        metadata={"help": "Use only the first so many samples of each side for G-effect and NLL; 0: all of them."},
    )
    geffect_live: bool = field(
        default=False,
        metadata={
            "help": "Measure the G-effect of every step from its own gradients, for almost nothing (retain side; both "
            "for GA)."
        },
    )
    geffect_live_unlearn: bool = field(
        default=False,
        metadata={"help": "The same on the unlearn side too: one backward more for objectives other than GA."},
    )
    geffect_live_update: bool = field(
        default=False,
        metadata={"help": "Record what each optimizer step did to the risk, to first order (AdamW, SGD momentum)."},
    )
    surgery: str | None = field(
        default=None,
        metadata={
            "help": "Where the gradients of both sides pull against each other: pcgrad, retain (only the harmful part "
            "of the forget gradient goes) or gru, each :tensor, :group or :global, or sago."
        },
    )
    nll_every: int = field(
        default=0,
        metadata={
            "help": "Measure the NLL of both sides before training, every so many steps and at the end; 0: never. It "
            "takes forwards only; a G-effect gives the NLL too."
        },
    )
    weights: str = field(
        default="none",
        metadata={
            "help": "Weights of the forget tokens beside the objective's own: none, or retain_conflict: tokens count "
            "the less, the more their removal would harm the retain set (gfast.geffect.retain_conflict); or atwu: by a "
            "scorer that learns beside the model, with its numbers as in atwu:beta=5,every=10 "
            "(gfast.training.scorer.ATWU).",
        },
    )
    weights_every: int = field(
        default=50, metadata={"help": "Measure weights by retain conflict anew every so many steps."}
    )
    weights_tau: float = field(
        default=1.0, metadata={"help": "Their temperature: large values leave all tokens a weight of 1."}
    )
    stop: list[str] | None = field(
        default=None,
        metadata={
            "help": "Rules that end the run, in quotes: 'retain_nll>1.1x' (times its start), 'forget_nll>4', "
            "'retain_effect<0.5*unlearn_effect for 3' (measurements in a row). What they are about must be measured: "
            "--nll_every, --geffect_every.",
        },
    )
    record_every: int = field(
        default=1, metadata={"help": "Write loss and weights to OUTPUT_DIR/records every so many steps; 0: never."}
    )
    reference: str = field(
        default="auto",
        metadata={
            "help": "With adapters, what the original model is: base (adapters off), adapted (the model as it starts, "
            "adapters on), or auto: base, refused where the adapters do not start at zero.",
            "choices": REFERENCES,
        },
    )
    own_loss_terms: bool = field(
        default=False,
        metadata={"help": "Add the terms that the model adds to its own loss, such as the balance of experts."},
    )
    joint_forward: bool = field(
        default=False,
        metadata={
            "help": "Run both sides in one call of the model: FSDP and ZeRO-3 gather its weights once a step, and "
            "embeddings take less memory. Not with live effects, surgery, RMU, RR or own_loss_terms."
        },
    )
    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate."})
    logging_steps: float = field(default=1, metadata={"help": "Log every so many steps."})
    report_to: str | None = field(
        default="none", metadata={"help": "Where to send logs besides the records; none by default."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "The same command goes on from the newest checkpoint of OUTPUT_DIR by itself; a folder here is "
            "that checkpoint instead, and false none: from step 0."
        },
    )
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Must stay False: forget and retain batches are nested."}
    )

    def __post_init__(self) -> None:
        refuse_ignored_options(self, COMPILATION)
        self._refuse_other_kinds()
        super().__post_init__()
        refuse_ignored_options(self)
        check_reference_name(self.reference)
        if self.retain_term not in RETAIN_TERMS:
            raise ValueError(f"retain_term is {self.retain_term!r}; choose one of {', '.join(RETAIN_TERMS)}")
        if self.groups not in ("paper", "layer"):
            raise ValueError(f"groups is {self.groups!r}; choose paper or layer")
        for name in ("geffect_every", "geffect_samples", "nll_every", "record_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give 0 or more")
        if self.gradient_accumulation_steps < 1:
            raise ValueError(f"gradient_accumulation_steps is {self.gradient_accumulation_steps}; give 1 or more")
        self.stop = [self.stop] if isinstance(self.stop, str) else self.stop
        parse_rules(self.stop)
        if self.weights_every < 1 or not self.weights_tau > 0:
            raise ValueError(
                f"weights_every is {self.weights_every} and weights_tau {self.weights_tau}; give 1 or more, and a "
                "positive number"
            )
        if self.surgery is not None:
            Surgery.parse(self.surgery)
        if self.label_names is None:
            self.label_names = ["labels"]
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # nothing to pin for; the data loader would only warn
        parse_weights(self.weights)
        self._refuse_options_without_effect()
        if self.weights != "none" and self.geffect_every:
            raise ValueError(
                f"geffect_every measures the objective as it is, and weights={self.weights!r} weighs its tokens anew "
                "along the run: leave geffect_every out; geffect_live measures the steps with their weights"
            )
        measures = self.geffect_every or self.geffect_live or self.geffect_live_unlearn or self.surgery
        if moves(self.build_objective()) and measures:
            raise ValueError(
                "geffect_every, geffect_live and surgery work with fixed factors, and PDU's dual variable moves one: "
                "leave them out and measure checkpoints with gfast geffect, or give primal_dual=False"
            )

    def _refuse_other_kinds(self) -> None:
        """Values that are not of their field's kind. Flags and --config convert theirs; in Python the text "false"
        would be true, and a measurement every 2.5 steps one every 5.
        """
        kinds = {"int": "a whole number", "float": "a finite number", "bool": "True or False", "str": "a text"}
        for name, kind in type(self).__dict__["__annotations__"].items():
            if kind in kinds and not fits(getattr(self, name), kind):
                raise ValueError(f"{name} is {getattr(self, name)!r}; give {kinds[kind]}")
        if self.max_grad_norm is None:  # no clipping, as transformers has it before version 5
            self.max_grad_norm = 0.0
        hints = get_type_hints(TrainingArguments)
        for entry in fields(TrainingArguments):
            value, known = getattr(self, entry.name), entry.metadata.get("choices")
            if value is None and entry.default is not None and (hints[entry.name] in (int, float, bool) or known):
                raise ValueError(f"{entry.name} is None; give a value, or leave it out for {entry.default!r}")
            # Trainer would take another word for the default.
            if known and isinstance(value, str) and value not in known:
                raise ValueError(f"{entry.name} is {value!r}; choose one of {', '.join(map(str, known))}")

    def _refuse_options_without_effect(self) -> None:
        """What is said of a part that is not asked for, as where alpha is meant to be WGA's."""
        if self.geffect_samples and not (self.geffect_every or self.nll_every):
            raise ValueError(
                f"geffect_samples is {self.geffect_samples}, and has no effect without --geffect_every or --nll_every"
            )
        parts = (
            ("retain_term", ("alpha",), "; a parameter of the objective is given with it, as in WGA:alpha=0.5"),
            ("weights", ("weights_every", "weights_tau"), " retain_conflict"),
        )
        for part, names, more in parts:
            for name in names if getattr(self, part).partition(":")[0] in ("none", "atwu") else ():
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise ValueError(f"{name} is {getattr(self, name)}, and has no effect without --{part}{more}")

    @property
    def live(self) -> bool:
        """Whether steps are measured by their own gradients: they need retain batches then."""
        return self.geffect_live or self.geffect_live_unlearn or self.geffect_live_update or self.surgery is not None

    def build_objective(self) -> Objective:
        """The forget objective alone, or a Mix with the retain term. ValueError when they do not fit together."""
        forget = parse_objective(self.objective, self.objective_args)
        if self.retain_term == "none":
            check_dual(forget)
            return forget if self.gamma == 1.0 else Mix(forget, gamma=self.gamma)
        if self.retain_term == "rr":
            if getattr(forget, "layer", None) is None:
                raise ValueError(
                    f"retain_term rr keeps the hidden states of RMU's layer, but {forget} has no layer; use RMU"
                )
            retain: Objective = RR(layer=forget.layer)
        else:
            retain = {"nll": NLL, "kl": KL, "jsd": JSD}[self.retain_term]()
        return Mix(forget, retain, gamma=self.gamma, alpha=self.alpha)
