# SPDX-License-Identifier: Apache-2.0
"""The recipes of the paper: its settings, and every step of them on a small random Llama."""

from __future__ import annotations

import json

import pytest
from helpers.tofu_like import write_tofu_like
from helpers.training_tiny import saved_tiny
from test_reproduce import reproduce

from gfast.reproduce.plan import Plan, steps_of
from gfast.reproduce.recipe import load_recipe
from gfast.reproduce.steps import Steps

SMALL = ["data.path={data}", "model={model}", "unlearn.use_cpu=true", "teach.use_cpu=true", "evaluate.max_new_tokens=4"]


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    """Overrides that make the paper's recipes small: a random Llama of 32 blocks, files as TOFU has them."""
    folder = tmp_path_factory.mktemp("paper")
    saved_tiny(folder / "model", layers=32, hidden_size=8, intermediate_size=8, initializer_range=0.1)
    data = write_tofu_like(folder / "tofu")
    return folder, [text.format(data=data, model=folder / "model") for text in SMALL]


@pytest.mark.parametrize(("name", "rate"), [("llama2-7b-tofu", "1e-05"), ("phi-tofu", "2e-05")])
def test_the_papers_settings(paper, name, rate, tmp_path):
    _, changes = paper
    recipe = load_recipe(name, [*changes, "grid.step=1"])
    plan = Plan(recipe, tmp_path)
    steps = {step.name: step for step in plan.steps}
    flags = {name: step.inputs["flags"] for name, step in steps.items() if name.startswith("runs/")}
    for one in flags.values():
        assert float(one["learning_rate"]) == float(rate) and one["seed"] == 42 and one["bf16"] is True
        assert (one["per_device_train_batch_size"], one["gradient_accumulation_steps"]) == (4, 4)
        assert (one["weight_decay"], one["max_grad_norm"], one["lr_scheduler_type"]) == (0, 0, "linear")
    arguments = {name: one["objective_args"] for name, one in flags.items() if "objective_args" in one}
    assert arguments["runs/npo-0.5/seed42"] == ["beta=0.5"] and arguments["runs/tnpo-4/seed42"] == ["beta=4"]
    assert arguments["runs/wga-5/seed42"] == ["alpha=5"] and arguments["runs/wtnpo/seed42"] == ["alpha=1.5", "beta=4"]
    counted = steps_of({key: recipe.unlearn[key] for key in ("epochs", "warmup_epochs")} | {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}, 200)  # fmt: skip
    assert (counted["max_steps"], counted["warmup_steps"]) == (62, 12)  # as the published code counts them
    named = {name for names in recipe.figures.values() for name in names}
    assert named == set(recipe.objectives)
    assert load_recipe("paper").title == load_recipe("llama2-7b-tofu").title


# One objective of each kind, on 32 blocks. The others have other numbers, which the test above reads, as are those of
# the other recipe.
KINDS = "ga,npo-0.5,wtnpo,po,rmu-32,ga-gd,npo-kl,rmu-rr"


@pytest.mark.slow
def test_every_kind_of_step_of_a_recipe_of_the_paper(paper, tmp_path):
    name, (_, changes) = "llama2-7b-tofu", paper
    few = f"objectives=[{KINDS}] "
    few += "unlearn.bf16=false teach.bf16=false unlearn.max_steps=1 teach.max_steps=1 unlearn.epochs=null "
    few += "teach.epochs=null unlearn.learning_rate=1e-3 unlearn.geffect_every=1 grid.step=1 evaluate.rows=2 "
    few += (
        "calibrate.resolution=0.5 evaluate.extraction_samples=1 sizes.objectives=[ga] grid.objectives=[WGA,NPO:beta=1]"
    )
    few = [*changes, *few.split()]
    assert reproduce(name, *few, "--out", tmp_path) == 0
    plan = Plan(load_recipe(name, few), tmp_path)
    steps = Steps(plan.steps, plan.checksum)
    assert {steps.state(step)[0] for step in steps.steps} == {"done"}
    values = json.loads((tmp_path / "tables.json").read_text())
    rows = {row["name"]: row for row in values["objectives"]}
    assert len(rows) == 2 + len(plan.recipe.objectives)
    assert all(row["model_utility"] is not None and row["forget_quality"] is not None for row in rows.values()
               if row["name"] not in ("taught", "retain-model"))  # fmt: skip
    assert len(values["grid"]["rows"]) == 2 and [row["rows"] for row in values["sizes"]] == [2, 4, 6]
    # keep_models is false: a run's weights go, what was measured of it stays
    assert not list(tmp_path.glob("runs/*/*/model.safetensors")) and list(tmp_path.glob("runs/*/*/records/*.parquet"))
    assert (tmp_path / "taught" / "model.safetensors").exists()
