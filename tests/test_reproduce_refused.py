# SPDX-License-Identifier: Apache-2.0
"""What a recipe of `gfast reproduce` cannot say: refused before anything is written."""

from __future__ import annotations

import pytest
from test_reproduce import written

from gfast import cli
from gfast.files import write_json


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("unlearn.learning_rat=1", "there is no flag unlearn.learning_rat; did you mean learning_rate?"),
        ("sead=[1]", "there is no key sead; did you mean seeds?"),
        ("evaluate.row=1", "there is no key evaluate.row; did you mean rows?"),
        ("evaluate.extraction_samples=3", "has no effect without evaluate.extraction"),
        ("objectives.x=WGAA", "no objective is called 'WGAA'; did you mean WGA?"),
        ("objectives.x={objective: GA, retain_trm: nll}", "objectives.x.retain_trm; did you mean retain_term?"),
        ("objectives=[ga, npo]", "objectives is 'npo'"),
        ("figures={all: [gaa]}", "figures.all is 'gaa'; did you mean ga?"),
        ("grid.run=gaa", "grid.run is 'gaa'; did you mean ga?"),
        ("grid.objectives=[PO]", "PO is no weighting"),
        ("calibrate.metric=nll", "choose one of extraction_strength"),
        ("calibrate.keep=95", "calibrate.keep is 95"),
        ("unlearn.seed=1", "unlearn.seed is said elsewhere: seeds"),
        ("unlearn.lora_r=4", "calibrate mixes whole weights"),
        ("seeds=[1, 1]", "each once"),
        ("seeds=1", "seeds should be a list"),
        ("data.source=tofuu", "data.source is 'tofuu'; did you mean tofu?"),
        ("sizes.data=[{forget_author: 1}]", "sizes.data.forget_author; did you mean forget_authors?"),
        ("sizes.data=[{max_retain: 4}]", "{'max_retain': 4} is called 4-authors-first-6, as the recipe's own data is"),
        ("sizes.data=[{max_forget: 3}, {max_forget: 3, max_retain: 2}]", "as {'max_forget': 3} is"),
        ("launch=accelerate launch", "does not say how many processes train, and the epochs of teach"),
        ("match_at=true", "match_at is True, and should be a number or null"),
        ("keep_models='no'", "keep_models is 'no', and should be true or false"),
        ("seeds=[a]", "seeds[0] is 'a', and should be a whole number"),
        ("seeds=[-1]", "each once, from 0 to"),
        ("sizes.data=[3]", "sizes.data[0] is 3, and should be a mapping"),
        ("model=3", "model is 3, and should be text or a mapping"),
        ("teach.epochs=x", "teach.epochs is 'x', and should be a number"),
        ("unlearn.epochs=0", "unlearn.epochs is 0; give passes"),
        ("unlearn.stop=[a", "the value is not valid YAML"),
        ("unlearn={max_steps: 2}", "give nll_every or geffect_every"),
        ("nonsense", "should read key=value"),
    ],
)
def test_what_a_recipe_cannot_say(change, words, tmp_path, capsys):
    recipe = written(tmp_path)
    assert cli.main(["reproduce", str(recipe), change, "--out", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_weights_of_an_adapter_are_not_mixed(tmp_path, capsys):
    (tmp_path / "adapter").mkdir()
    write_json(tmp_path / "adapter" / "adapter_config.json", {"base_model_name_or_path": "base"})
    words = [f"model={tmp_path / 'adapter'}", "--out", str(tmp_path / "out")]
    assert cli.main(["reproduce", str(written(tmp_path)), *words]) == 2
    assert "calibrate mixes whole weights" in capsys.readouterr().err.strip().splitlines()[-1]
