"""Few-step models at the length of the images that they are trained on."""

import pytest

from tests.docs.test_derivatives import SCALINGS, assert_as_eager
from tests.support.pairs import in_turn

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script")


@in_turn(loss=["mean flow", "through the tangent"], scaling=SCALINGS)
def test_few_step_models_of_1670_tokens(loss, scaling):
    assert_as_eager(loss, scaling, 1670)
