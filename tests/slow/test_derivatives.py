"""Few-step models at the length of the images that they are trained on."""

import pytest

from tests.docs.test_derivatives import SCALINGS, assert_as_eager

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script")


@pytest.mark.parametrize("loss", ["mean flow", "through the tangent"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_few_step_models_of_1670_tokens(loss, scaling):
    assert_as_eager(loss, scaling, 1670)
