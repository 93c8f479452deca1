"""No tensor of a training step is made on a device by default: shown without a GPU, and so that it will not fail on one."""

import forks
import pytest
from runs import checkpoint, difference, generated, metrics
from systems import NAMES, SYSTEMS


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.xdist_group(f"faults_{name}")) for name in NAMES])
def test_a_step_makes_its_tensors_where_its_inputs_are(name, tmp_path, tmp_path_factory):
    """Forward, loss and backward with `meta` as the default device end with the same bits as without."""
    system = SYSTEMS[name]
    data = generated(tmp_path_factory, name, *(f"--{key}={value}" for key, value in system.synth.items()))
    for workspace, faults in (("plain", {}), ("foreign", {"foreign_device": True})):
        words = system.words(data, tmp_path / workspace, {"max_steps": 2, "workers": 0}, system.one)
        forks.start(*words, output=tmp_path / f"{workspace}.txt", faults=faults).end()
    for part in system.parts:
        assert difference(checkpoint(tmp_path / "foreign", 2, part), checkpoint(tmp_path / "plain", 2, part)) == []
    loss = lambda workspace: [row["loss/loss"] for row in metrics(tmp_path / workspace).values()]
    assert len(loss("plain")) == 2 and loss("foreign") == loss("plain")
