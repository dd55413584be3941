"""Rules that end a training: what they say, what is refused, and where they end it."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.training_tiny import collator, config, datasets, pairing, parameters, tiny_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from gfast import cli
from gfast.data import batches
from gfast.objectives import GA, WGA
from gfast.training.callback import GEffectCallback
from gfast.training.config import UnlearnConfig
from gfast.training.records import read_records
from gfast.training.resume import last_checkpoint
from gfast.training.stop import StopCallback, parse_rules
from gfast.training.trainer import UnlearnTrainer
from gfast.training.trajectory import NLLCallback

FORGET, RETAIN = (batches(side, collator(), 4) for side in datasets())


def course(**series):
    """Measurements at steps 0, 5, 10 ...; None: not measured there."""
    length = len(next(iter(series.values())))
    found = [{name: values[at] for name, values in series.items() if values[at] is not None} for at in range(length)]
    return [(5 * at, values) for at, values in enumerate(found)]


@pytest.mark.parametrize(
    ("text", "series", "held"),
    [
        ("forget_nll>4", {"forget_nll": [1.0, 4.0, 4.5]}, [10]),
        ("forget_nll >= 4 for 2", {"forget_nll": [5.0, 1.0, 4.0, 4.5]}, [10, 15]),
        ("retain_nll>1.1x", {"retain_nll": [2.0, 2.3, 2.19, 2.21]}, [15]),
        ("retain_nll>1.1x", {"retain_nll": [2.0, 2.3, 2.2]}, []),
        ("retain_effect<-0.5*unlearn_effect for 3",
         {"retain_effect": [1.0, -3.0, -3.0, None, -2.1], "unlearn_effect": [-1.0, 4.0, 4.0, None, 4.0]}, [5, 10, 20]),
        ("retain_effect<0.5*unlearn_effect", {"retain_effect": [1.0, -1.0], "unlearn_effect": [-4.0, -4.0]}, []),
        ("retain_effect<0.5*unlearn_effect", {"retain_effect": [1.0, -2.1], "unlearn_effect": [-4.0, -4.0]}, [5]),
        ("retain_effect<-unlearn_effect", {"retain_effect": [1.0], "unlearn_effect": [-4.0]}, [0]),
        ("unlearn_effect > -.5e1", {"unlearn_effect": [-6.0, -4.0]}, [5]),
        ("retain_cosine<=2 X", {"retain_cosine": [-0.1, -0.15, -0.2]}, [10]),
        ("retain_nll>1.1x", {"retain_nll": [2.0, math.nan]}, [5]),
        ("forget_nll<retain_nll", {"forget_nll": [1.0], "retain_nll": [math.nan]}, [0]),
    ],
)  # fmt: skip
def test_what_a_rule_means(text, series, held):
    (rule,) = parse_rules(text)
    assert rule.held(course(**series)) == held
    if held:
        said = rule.reason(course(**series))
        assert f"at step {held[-1]}: " in said and rule.quantity in said and repr(rule.text) in said


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("retain_nl>1.1x", 1, "there is no quantity 'retain_nl'; did you mean retain_nll?"),
        ("loss>4", 1, "The quantities are forget_nll, retain_nll, unlearn_effect"),
        ("", 1, "there is no quantity ''"),
        ("retain_nll", 11, "one of < <= > >="),
        ("retain_nll=4", 11, "one of < <= > >="),
        ("forget_nll>", 12, "a number (4)"),
        ("forget_nll>-", 13, "a number (4)"),
        ("forget_nll>1e999", 12, "too large"),
        ("forget_nll>4 for", 17, "number of measurements"),
        ("forget_nll>4 for 0", 18, "number of measurements"),
        ("forget_nll>4 for 1.5", 18, "number of measurements"),
        ("forget_nll>4, retain_nll>2", 13, "an argument of its own"),
        ("forget_nll>4 for 3 times", 20, "an argument of its own"),
        ("retain_effect<-0.5*unlern_effect", 20, "did you mean unlearn_effect?"),
        ("retain_nll>1.1*retain_nll", 16, "cannot be compared with itself; a multiple of its start is written 1.1x"),
    ],
)
def test_what_is_no_rule(text, place, words):
    with pytest.raises(ValueError) as caught:
        parse_rules(["forget_nll>4", text])
    assert str(caught.value).startswith("gfast: stop rule ") and f"character {place}: " in str(caught.value)
    assert words in str(caught.value)


def trainer(folder, rules, *callbacks, **options):
    data, collate = pairing()
    args = config(folder, retain_term="nll", **{"max_steps": 6, "stop": rules, **options})
    torch.manual_seed(7)
    return UnlearnTrainer(tiny_model(), args, train_dataset=data, data_collator=collate, callbacks=list(callbacks))


def effects(every=2, **options):
    return GEffectCallback(every, FORGET, RETAIN, GA(), label="GA() + NLL()", **options)


def counts(folder):
    frame = read_records(folder)
    frame = frame[frame["quantity"] == "stop"]
    assert set(frame["objective"]) == {"GA() + NLL()"}
    return {rule: dict(zip(rows["step"], rows["value"], strict=True)) for rule, rows in frame.groupby("group")}


def test_a_run_ends_where_its_rule_holds_with_a_checkpoint(tmp_path, caplog):
    rules = ["unlearn_effect<0 for 3", "forget_nll>1000x"]
    one = trainer(tmp_path / "run", rules, NLLCallback(1, FORGET, RETAIN), effects())
    one.train()
    assert one.state.global_step == 4 and last_checkpoint(tmp_path / "run").name == "checkpoint-4"
    found = counts(tmp_path / "run")
    assert found == {rules[0]: {0: 1.0, 2: 2.0, 4: 3.0}, rules[1]: dict.fromkeys(range(5), 0.0)}
    said = next(record.message for record in caplog.records if "training ends" in record.message)
    assert "rule 'unlearn_effect<0 for 3' at step 4: unlearn_effect -" in said
    assert "for 3 measurements in a row" in said

    # From the very checkpoint of the stop no further step is taken; a start that breaks a rule is not even trained.
    again = trainer(tmp_path / "run", rules, NLLCallback(1, FORGET, RETAIN), effects())
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    for name, value in parameters(one.model).items():
        assert torch.equal(value, again.model.get_parameter(name)), name
    at_once = trainer(tmp_path / "none", "forget_nll>0", NLLCallback(1, FORGET, RETAIN))
    before = parameters(at_once.model)
    at_once.train()
    assert at_once.state.global_step == 0 and all(
        torch.equal(x, at_once.model.get_parameter(n)) for n, x in before.items()
    )


def test_the_count_of_a_killed_run_goes_on(tmp_path):
    class Dies(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    options = {"save_strategy": "steps", "save_steps": 3}
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, ["unlearn_effect<0 for 6"], effects(1), Dies(), **options).train()
    assert list(counts(tmp_path)["unlearn_effect<0 for 6"].values()) == [1, 2, 3, 4, 5]
    again = trainer(tmp_path, ["unlearn_effect<0 for 6"], effects(1), **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 5
    assert list(counts(tmp_path)["unlearn_effect<0 for 6"].values()) == [1, 2, 3, 4, 5, 6]


def test_what_nothing_measures_is_refused_before_any_work(tmp_path, capsys):
    with pytest.raises(ValueError, match="needs retain_effect, which this run does not measure.*--geffect_every"):
        trainer(tmp_path, "retain_effect<0", NLLCallback(1, FORGET, RETAIN)).train()
    with pytest.raises(ValueError, match=r"needs retain_cosine.*norms=True"):
        trainer(tmp_path, "retain_cosine<0", effects()).train()
    with pytest.raises(ValueError, match="--nll_every or --geffect_every"):
        trainer(tmp_path, "retain_nll>2").train()
    several = GEffectCallback(1, FORGET, RETAIN, [GA(), WGA()])
    with pytest.raises(ValueError, match=r"that retain_effect is recorded for: GA\(\), WGA\(alpha=1.0\)"):
        trainer(tmp_path, None, several, StopCallback("retain_effect<0")).train()
    with pytest.raises(ValueError, match="did you mean forget_nll"):
        UnlearnConfig(output_dir=str(tmp_path), use_cpu=True, stop="forge_nll>1")
    with pytest.raises(ValueError, match="give StopCallback a rule"):
        StopCallback([])
    assert not list(tmp_path.iterdir())
    arguments = ["unlearn", "--model", "nowhere", "--use_cpu", "true", "--output_dir", str(tmp_path)]
    assert cli.main([*arguments, "--stop", "retain_nll>1.1x", "retain_effect<0", "--nll_every", "2"]) == 2
    assert "stop rule 'retain_effect<0' needs retain_effect" in capsys.readouterr().err
    (tmp_path / "rules.yaml").write_text("stop: retain_effect < -0.5*unlearn_effect for 3\n")
    assert cli.main([*arguments, "--config", str(tmp_path / "rules.yaml")]) == 2
    assert "stop rule 'retain_effect < -0.5*unlearn_effect for 3' needs" in capsys.readouterr().err


def test_rules_about_live_effects(tmp_path):
    live = {"geffect_live": True}
    rules = ["unlearn_effect<0 for 3", "forget_nll>1000x", "retain_effect>1e9"]
    one = trainer(tmp_path / "live", rules, NLLCallback(2, FORGET, RETAIN), **live)
    one.train()
    assert one.state.global_step == 3 and last_checkpoint(tmp_path / "live").name == "checkpoint-3"
    frame = read_records(tmp_path / "live")
    stops = frame[frame["quantity"] == "stop"]
    assert set(zip(stops["objective"], stops["group"], strict=True)) == {
        ("GA() + NLL() (live)", rules[0]), ("GA() + NLL()", rules[1]), ("GA() + NLL() (live)", rules[2])}  # fmt: skip
    assert dict(stops[stops["group"] == rules[0]][["step", "value"]].values) == {0: 1, 1: 2, 2: 3}
    assert sorted(stops[stops["group"] == rules[1]]["step"]) == [0, 2]
    # What a step measures by the way gives way to a callback, in whose name effects are recorded too.
    both = trainer(tmp_path / "both", "unlearn_effect<0 for 2", effects(), **live)
    both.train()
    assert both.state.global_step == 2 and counts(tmp_path / "both") == {"unlearn_effect<0 for 2": {0: 1, 2: 2}}
    again = trainer(tmp_path / "live", rules, NLLCallback(2, FORGET, RETAIN), **live)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    with pytest.raises(ValueError, match="needs unlearn_effect.*--geffect_live_unlearn"):
        trainer(tmp_path / "wga", "unlearn_effect<0", objective="WGA", **live).train()


def test_in_a_plain_trainer(tmp_path):
    def collate(items):
        return {name: value for name, value in collator()(items).items() if name != "sample_id"}

    def plain(*callbacks):
        settings = {"use_cpu": True, "max_steps": 4, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
        args = TrainingArguments(output_dir=str(tmp_path / "out"), remove_unused_columns=False, **settings)
        return Trainer(
            tiny_model(), args, train_dataset=datasets()[0], data_collator=collate, callbacks=list(callbacks)
        )

    where = {"run_folder": tmp_path / "elsewhere"}
    stop = StopCallback("forget_nll<1x for 2", **where)
    ended = plain(NLLCallback(1, FORGET, RETAIN, **where), stop)
    ended.train()
    assert ended.state.global_step == 2 and "forget_nll" in stop.reason
    with pytest.raises(ValueError, match="give that after it"):
        plain(StopCallback("forget_nll<0"), NLLCallback(1, FORGET, RETAIN)).train()
