"""The records of a call: nobody writes to them."""

import pytest

from tritonattn.core.call import AttentionCall, Request
from tritonattn.core.terms import Terms


@pytest.mark.parametrize("record", [Request, AttentionCall, Terms])
def test_fields_are_set_by_constructors_alone(record):
    made = record(*range(len(record._fields)))
    for name in record._fields:
        with pytest.raises(AttributeError):
            setattr(made, name, None)
    assert made.changed(softcap=1.0).softcap == 1.0 if record is Terms else made.changed(q=1.0).q == 1.0
    assert made == record(*range(len(record._fields)))
