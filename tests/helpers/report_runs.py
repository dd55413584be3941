"""Runs whose records are known numbers."""

from gfast.training.records import write_record, write_run_info

GROUPS = ("embed+lm", "shallow", "middle", "deep")
# Per recorded step: total unlearn and retain G-effect, forget and retain NLL.
GA_COURSE = {0: (-4.0, 1.0, 0.1, 0.12), 5: (-400.0, -300.0, 2.0, 1.0), 10: (-50.0, -60.0, 9.0, 7.0)}
MIX_COURSE = {0: (-4.0, 2.0, 0.1, 0.12), 5: (-40.0, 0.5, 1.0, 0.13), 10: (-20.0, 0.0, 2.1, 0.13)}


def write_run(folder, objective, course, groups=GROUPS, **info):
    write_run_info(folder, {"objective": objective, "model": {"hidden": 8}, "seed": 3, **info})
    for step, (unlearn, retain, forget_nll, retain_nll) in course.items():
        common = {"run": folder.name, "objective": objective, "step": step, "epoch": step / 5}
        rows = []
        for side, total, nll in (("unlearn", unlearn, forget_nll), ("retain", retain, retain_nll)):
            shares = {group: total / len(groups) for group in groups} | {"total": total}
            rows += [{"quantity": "g_effect", "side": side, "group": g, "value": v} for g, v in shares.items()]
            rows += [{"quantity": "cosine", "side": side, "group": g, "value": v / 500} for g, v in shares.items()]
            rows.append({"quantity": "risk", "side": side, "value": nll})
        rows += [
            {"quantity": "loss", "value": -forget_nll},
            {"quantity": "mean_weight", "value": 1 / (1 + step)},
            {"quantity": "mean_inverse_confidence", "value": 2.0**step},
        ]
        write_record(folder, [common | row for row in rows])
    return folder
