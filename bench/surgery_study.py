"""Does surgery on gradients help? Retain NLL at equal forget NLL, with and without it, on the bundled authors.

A small Llama learns the bundled authors by heart (as `gfast demo` has it). From it every objective, with a retain
term, unlearns some of them by plain gradient descent on both (GD) and by every rule of surgery, over several seeds. The
NLL of both sets is measured along each run; an objective's runs are compared at the forget NLL that all of them reach.

    python bench/surgery_study.py --out runs/surgery        # about ten minutes on two cores; goes on where it was ended
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from pathlib import Path

import torch
from harness import environment

import gfast
from gfast.data import Collator, ForgetRetain, ForgetRetainCollator, batches
from gfast.demo import QUICK, Plan, Study
from gfast.files import write_json
from gfast.objectives import GA, NLL, NPO, TNPO, WGA
from gfast.report.matched import match
from gfast.training.evaluation import nll

OBJECTIVES = {"GA": GA(), "WGA": WGA(), "NPO": NPO(beta=0.1), "TNPO": TNPO()}
RULES = {"GD": None, "PCGrad": "pcgrad:tensor", "GRU": "gru:global", "SAGO": "sago", "retain": "retain:tensor"}


def course(study: Study, model, references, objective, rule: str | None, args, seed: int) -> list[list[float]]:
    """[step, forget NLL, retain NLL] along a run."""
    model, tokenizer = copy.deepcopy(model), study.tokenizer
    torch.manual_seed(seed)
    collate = ForgetRetainCollator(Collator(tokenizer, references["forget"]), Collator(tokenizer))
    data, size = ForgetRetain(study.forget, study.retain, seed=seed), study.plan.batch_size
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    monitor = gfast.GEffectMonitor(model, objective=objective, surgery=rule)
    shown = torch.utils.data.Subset(study.retain, study.measured)
    sides = [batches(some, study.collator, 40) for some in (study.forget, shown)]
    found, step, epoch = [[0, *(nll(model, side) for side in sides)]], 0, 0
    while step < args.steps and found[-1][1] < args.until:
        data.set_epoch(epoch)
        epoch += 1
        loader = torch.utils.data.DataLoader(data, size, shuffle=True, generator=order, collate_fn=collate)
        for batch in loader:
            monitor.forget(gfast.model_loss(model, batch["forget"], objective))
            monitor.retain(gfast.model_loss(model, batch["retain"], NLL()))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % args.every == 0:
                found.append([step, *(nll(model, side) for side in sides)])
            if step >= args.steps or found[-1][1] >= args.until:
                break
    return found


def compared(runs: list[dict]) -> list[dict]:
    """Of every objective and rule: retain NLL at the forget NLL that all runs of the objective reach, by seed."""
    rows = []
    for name in dict.fromkeys(run["objective"] for run in runs):
        own = [run for run in runs if run["objective"] == name]
        match(own)
        for rule in dict.fromkeys(run["rule"] for run in own):
            matched = [run["matched"] for run in own if run["rule"] == rule and run["matched"]]
            kept = [one["retain_nll"] for one in matched]
            if kept:
                spread = statistics.stdev(kept) if len(kept) > 1 else 0.0
                rows.append({"objective": name, "rule": rule, "forget_nll": matched[0]["forget_nll"],
                             "retain_nll": statistics.mean(kept), "spread": spread, "runs": len(kept),
                             "steps": statistics.mean(one["step"] for one in matched)})  # fmt: skip
    return rows


def figure(rows: list[dict], start: float, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["objective"] for row in rows))
    drawing = Figure(figsize=(2.4 * len(names) + 0.6, 3.0), layout="constrained")
    FigureCanvasAgg(drawing)
    for ax, name in zip(drawing.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        own = [row for row in rows if row["objective"] == name]
        for at, row in enumerate(own):
            ax.errorbar(at, row["retain_nll"], row["spread"], marker="o", capsize=3, color=f"C{at}")
        ax.axhline(start, linestyle=":", color="0.4", linewidth=1)
        ax.set_xticks(range(len(own)), [row["rule"] for row in own], rotation=45, ha="right")
        ax.set_title(f"{name}, at forget NLL {own[0]['forget_nll']:.2f}", fontsize=9)
        ax.set_xlim(-0.5, len(own) - 0.5)
    drawing.axes[0].set_ylabel("retain NLL (dotted: before)")
    drawing.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=1, help="steps between measurements")
    parser.add_argument("--until", type=float, default=6.0, help="a run ends where its forget NLL is above")
    parser.add_argument("--learning-rate", type=float, default=2.5e-4)
    parser.add_argument("--objectives", default=",".join(OBJECTIVES))
    parser.add_argument("--rules", default=",".join(RULES))
    parser.add_argument("--quick", action="store_true", help="a smaller model: only to see that it runs")
    args = parser.parse_args(argv)
    plan = Plan(**QUICK) if args.quick else Plan()
    args.out.mkdir(parents=True, exist_ok=True)
    study = Study(plan, args.out, cpu=True)
    model = study.learn().eval()
    references = study.references(model)
    path = args.out / "courses.json"
    settings = {"steps": args.steps, "every": args.every, "learning_rate": args.learning_rate, "quick": args.quick}
    known = json.loads(path.read_text()) if path.exists() else {}
    runs = known.get("runs", []) if known.get("settings") == settings else []
    for name in args.objectives.split(","):
        for rule in args.rules.split(","):
            for seed in range(args.seeds):
                if any((run["objective"], run["rule"], run["seed"]) == (name, rule, seed) for run in runs):
                    continue
                found = course(study, model, references, OBJECTIVES[name], RULES[rule], args, seed)
                runs.append({"objective": name, "rule": rule, "seed": seed, "course": found})
                write_json(path, {"settings": settings, "runs": runs})
                print(f"{name} {rule} {seed}: forget {found[-1][1]:.3f}, retain {found[-1][2]:.3f}", flush=True)
    rows = compared([dict(run) for run in runs])
    write_json(args.out / "surgery.json", {"environment": environment("cpu"), "settings": settings, "rows": rows})
    figure(rows, runs[0]["course"][0][2], args.out / "surgery.png")
    for row in rows:
        print(f"{row['objective']:6}{row['rule']:8}retain NLL {row['retain_nll']:.4f} +- {row['spread']:.4f} "
              f"at forget NLL {row['forget_nll']:.3f}, step {row['steps']:.1f}")  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
