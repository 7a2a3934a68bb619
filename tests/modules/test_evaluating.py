"""A model that is read for inspection is left as it was, whatever happens."""

import pytest
import torch

from safedelta_hf import SafeDeltaCallback
from safedelta_hf.modules.evaluating import evaluating
from tests.fixtures import tiny
from tests.hf.test_precision import NUMBER, ROWS, sharp, trained


def test_what_accelerate_put_in_place_of_forward_is_put_back(tmp_path):
    model = sharp()
    trainer = trained(model, SafeDeltaCallback(ROWS, NUMBER), tmp_path, "bf16")
    ids = {"input_ids": torch.arange(3, 11)[None]}
    wrapped = vars(model)["forward"]
    with torch.no_grad():
        cast = model.eval()(**ids).logits
        exact = tiny.llama()
        exact.load_state_dict(model.state_dict())
        exact = exact(**ids).logits
        with pytest.raises(ZeroDivisionError), evaluating(model):
            assert torch.equal(model(**ids).logits, exact)
            raise ZeroDivisionError
        assert vars(model)["forward"] is wrapped
        assert torch.equal(model(**ids).logits, cast) and not torch.equal(cast, exact)
    assert type(trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)) is type(model)
