import torch

from safedelta_hf.compare import TunedModel
from tests.fixtures import tiny


def test_restoring_is_exact_after_any_change():
    model = tiny.perturbed(tiny.llama(tied=True))
    tuned, before = TunedModel(model), tiny.weights(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert tiny.same(tiny.weights(tuned.restored()), before)
