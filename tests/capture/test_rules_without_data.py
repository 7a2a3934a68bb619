"""Every rule without data, by every road: it does what it does with a profile, or says what it needs."""

import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from typer.testing import CliRunner

from safedelta_hf import adjust_adapter, adjust_adapter_files, adjust_checkpoint, adjust_model, adjust_saved
from safedelta_hf.cli.main import app
from safedelta_hf.errors import AdapterError, ConfigurationError
from safedelta_hf.rules import RULES, Gradients
from tests.fixtures import adapters, checkpoints, tiny

KINDS = ("one layer", "tied", "gpt2", "mixtral")
UNREADING = [name for name, rule in RULES.items() if not rule.reads_moments]
READING = [name for name, rule in RULES.items() if rule.reads_moments]


def further(kind, seed):
    return tiny.perturbed(checkpoints.MODELS[kind](), seed=seed)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    found = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind.replace(" ", "-"))
        found[kind] = checkpoints.case(folder, kind)
        for name, seed in (("one", 11), ("other", 12)):
            checkpoints.save(further(kind, seed), folder / name)
    base = checkpoints.MODELS["one layer"]()
    adapters.adapted(base).save_pretrained(found["one layer"].folder / "adapter")
    return found


@pytest.fixture
def case(made, tmp_path, request):
    kind = request.node.callspec.params.get("kind", "one layer")
    return made[kind].copy_to(tmp_path)


def made_rule(name, strength, one, other, model):
    """The rule with the further models that it needs, wherever they are kept."""
    gradients = Gradients({key: torch.ones_like(value) for key, value in model.state_dict().items()})
    settings = {
        "model_stock": {"others": [one, other]},
        "ties": {"others": [one]},
        "safe_merge": {"unaligned": one, "safe": other, "threshold": 0.9},
        "safe_patch": {
            "forget": one,
            "loosen": other,
            "forget_gradients": gradients,
            "loosen_gradients": gradients,
            "keep_forget": 0.2,
            "keep_loosen": 0.2,
            "retention": 0.5,
            "rescale": True,
            "seed": 0,
        },
    }
    return RULES[name](strength=strength, **settings.get(name, {}))


def rule_of(name, case, strength=1.0):
    return made_rule(name, strength, case.folder / "one", case.folder / "other", case.model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", UNREADING)
def test_a_model_comes_out_as_with_a_profile_by_every_road(name, kind, case):
    rule, given = rule_of(name, case), {"base": case.base, "tuned": case.tuned, "progress": False}
    report = adjust_checkpoint(**given, output=case.output, rule=rule)
    assert "no safety data were read" in report.summary() and report.outcome == "adjusted"
    adjust_checkpoint(**given, output=case.folder / "expected", rule=rule, profile=case.profile)
    adjust_saved(**given, output=case.folder / "saved", rule=rule)
    wanted = checkpoints.contents(case.folder / "expected")
    assert checkpoints.contents(case.output) == wanted == checkpoints.contents(case.folder / "saved")
    assert wanted != checkpoints.contents(case.tuned)
    model = type(case.model).from_pretrained(case.tuned)
    in_memory = made_rule(name, 1.0, further(kind, 11), further(kind, 12), model)
    adjust_model(model, base=case.base, rule=in_memory, progress=False)
    checkpoints.save(model, case.folder / "memory", "4KB")
    found = {key: value for key, value in checkpoints.contents(case.folder / "memory").items() if key in wanted}
    assert all(wanted[key] == value for key, value in found.items() if "safetensors" in key)
    if name == "safe_merge" or name == "safe_patch" or name == "model_stock":
        assert any(note for one in report.parameters for note in one.notes)


@pytest.mark.parametrize("name", UNREADING)
def test_an_adapter_comes_out_alike_by_every_road_or_whole_weights_are_asked_for(name, case):
    rule, folder = rule_of(name, case), case.folder
    before = checkpoints.contents(folder / "adapter")

    def in_memory():
        model = PeftModel.from_pretrained(checkpoints.MODELS["one layer"](), folder / "adapter")
        adjust_adapter(model, rule=rule, progress=False)
        return adapters.own_tensors(model)

    def in_files():
        given = {"output": folder / "files", "base": case.base, "rule": rule, "progress": False}
        adjust_adapter_files(folder / "adapter", **given)
        return load_file(folder / "files" / "adapter_model.safetensors")

    def saved():
        given = {"output": folder / "saved", "base": case.base, "rule": rule, "progress": False}
        adjust_saved(tuned=folder / "adapter", **given)
        return load_file(folder / "saved" / "adapter_model.safetensors")

    if rule.needs_dense:
        for road in (in_memory, in_files, saved):
            with pytest.raises(AdapterError, match=f"{name} merges whole weights.*merge_and_unload"):
                road()
        assert not (folder / "files").exists() and not (folder / "saved").exists()
    else:
        found = [road() for road in (in_memory, in_files, saved)]
        assert tiny.same(found[0], found[1]) and tiny.same(found[0], found[2])
    assert checkpoints.contents(folder / "adapter") == before


@pytest.mark.parametrize("name", RULES)
def test_the_command_does_it_or_says_in_one_line_what_it_needs(name, case):
    paths = [f"--base={case.base}", f"--tuned={case.tuned}", f"--output={case.output}", f"--rule={name}"]
    result = CliRunner().invoke(app, ["apply", *paths, "--strength=1"])
    if name in ("model_stock", "safe_merge", "safe_patch"):
        needed = "the command line cannot name"
    else:
        needed = "give either safety_dataset or profile (--safety-data" if name in READING else None
    assert result.exit_code == (0 if needed is None else 1), result.output
    assert needed is None or (needed in result.output and result.output.count("\n") == 1)
    assert case.output.exists() == (needed is None)
    if needed is None:
        shutil.rmtree(case.output)
    auto = CliRunner().invoke(app, ["apply", *paths, "--strength=auto"])
    assert auto.exit_code == 1 and auto.output.count("\n") == 1 and not case.output.exists()


@pytest.mark.parametrize("name", RULES)
def test_a_strength_that_is_to_be_measured_needs_refusals_by_every_road(name, case):
    rule, folder = rule_of(name, case, "auto"), case.folder
    given = {"rule": rule, "progress": False}
    files = {"base": case.base, "output": case.output} | given
    for road in (
        lambda: adjust_model(type(case.model).from_pretrained(case.tuned), base=case.base, **given),
        lambda: adjust_adapter(adapters.adapted(checkpoints.MODELS["one layer"]()), **given),
        lambda: adjust_checkpoint(tuned=case.tuned, **files),
        lambda: adjust_adapter_files(folder / "adapter", **files),
        lambda: adjust_saved(tuned=case.tuned, **files),
        lambda: adjust_saved(tuned=folder / "adapter", **files),
    ):
        with pytest.raises(ConfigurationError, match=r"safety_dataset or profile|needs a safety profile|give a number"):
            road()
        assert not case.output.exists()
