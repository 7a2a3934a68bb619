"""The section says what the callback's arguments say, and nothing that they do not."""

import dataclasses
import inspect
import json

import pytest
import yaml

from safedelta_hf import AutoStrength, PolishConfig, ProfileConfig, Ridge, SafeDeltaCallback, TaskRidge, Ties, Treatment
from safedelta_hf.errors import ConfigurationError, DataError
from safedelta_hf.integrations.settings import Settings
from tests.fixtures import tiny


def read(text):
    return Settings.read(yaml.safe_load(text))


def test_settings_are_the_arguments_of_the_callback_with_its_defaults():
    arguments = inspect.signature(SafeDeltaCallback).parameters
    defaults = {name: one.default for name, one in arguments.items() if name != "processing_class"}
    assert {field.name: field.default for field in dataclasses.fields(Settings)} == defaults


@pytest.mark.parametrize(
    "text, name, value",
    [
        ("rule: ridge", "rule", Ridge()),
        ("strength: 2", "rule", TaskRidge(strength=2)),
        ("strength: auto", "rule", TaskRidge()),
        ("{rule: ridge, strength: {lost: 0.1}}", "rule", Ridge(strength=AutoStrength(lost=0.1))),
        ("rule: {name: ridge, strength: 0.5}", "rule", Ridge(strength=0.5)),
        ("{rule: {name: ties, others: [elsewhere]}, strength: 1.0}", "rule", Ties(others=["elsewhere"], strength=1.0)),
        ("config: {batch_size: 2, targets: [q_proj]}", "config", ProfileConfig(batch_size=2, targets=["q_proj"])),
        ("treatment: {embeddings: keep}", "treatment", Treatment(embeddings="keep")),
        ("polish: true", "polish", PolishConfig()),
        ("polish: false", "polish", None),
        ("polish: {steps: 20}", "polish", PolishConfig(steps=20)),
        ("safety_dataset: refusals.jsonl", "safety_dataset", "refusals.jsonl"),
        ("keep_tuned: null", "keep_tuned", None),
    ],
)
def test_a_setting_is_read(text, name, value):
    assert read(text) == Settings(**{name: value})


@pytest.mark.parametrize(
    "text, told",
    [
        ("saftey_dataset: x", "safedelta: there is no setting 'saftey_dataset'; did you mean 'safety_dataset'?"),
        ("polish: {stpes: 3}", "safedelta.polish: there is no setting 'stpes'; did you mean 'steps'?"),
        ("strength: {lots: 0.1}", "safedelta.strength: there is no setting 'lots'; did you mean 'lost'?"),
        ("rule: {name: ridge, density: 0.1}", "safedelta.rule: there is no setting 'density'; there are strength"),
        ("7: x", "safedelta: there is no setting 7; there are base, config"),
        ("rule: rigde", "safedelta: rule='rigde' does not name one of safe_delta, ridge"),
        ("rule: [ridge]", "does not name one of"),
        ("{rule: {name: ridge, strength: 1}, strength: 1}", "strength is given twice"),
        ("strength: 1e-3", "strength='1e-3' is a text in YAML, no number; write 1.0e-3"),
        ("polish: {rate: 5E-1}", "safedelta.polish: rate='5E-1' is a text in YAML, no number; write 5.0e-1"),
        ("strength: true", "strength=True must be a number"),
        ("polish: 3", "polish=3 must be a mapping with settings of PolishConfig"),
        ("config: {batch_size: '8'}", "batch_size='8' must be a whole number"),
        ("treatment: {head: kept}", "head='kept' is not one of"),
        ("base: 3", "base=3 must be the path of a folder"),
        ("safety_dataset: 3", "safety_dataset=3 must be a file"),
        ("refusals.jsonl", "section='refusals.jsonl' must be a mapping"),
        ("", "section=None must be a mapping"),
    ],
)
def test_a_wrong_setting_is_named(text, told):
    with pytest.raises(ConfigurationError) as caught:
        read(text)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    "text, error, told",
    [
        ("rule: ridge", ConfigurationError, "give either safety_dataset or profile"),
        ("safety_dataset: nowhere.jsonl", DataError, "nowhere.jsonl"),
        ("{safety_dataset: FILE, task_examples: 1.5}", ConfigurationError, "task_examples=1.5 must be a whole number"),
        ("{safety_dataset: FILE, sort_task: 'no'}", ConfigurationError, "sort_task='no' must be True or False"),
    ],
)
def test_what_the_callback_refuses_is_refused(text, error, told, tmp_path):
    (tmp_path / "refusals.jsonl").write_text("\n".join(map(json.dumps, tiny.conversations(16))))
    with pytest.raises(error) as caught:
        read(text.replace("FILE", str(tmp_path / "refusals.jsonl"))).callback()
    assert told in str(caught.value)
