"""The claim of the demo: with a factor that grows with n, records are recalled at 32 times the trained length."""

import torch

from tritonattn.lab import demo


def test_the_factor_recalls_and_the_control_forgets(capsys):
    assert demo.run(torch.device("cpu")) == 0
    rows = [row.split()[-4:-1] for row in capsys.readouterr().out.splitlines() if row.count("%") == 4]
    control, *others = ([float(share.rstrip("%")) for share in row] for row in rows)
    assert control[0] > 95
    assert control[-1] < 70
    assert len(others) == 3
    for share in others:
        assert share[0] > 95
        assert share[-1] > 85
