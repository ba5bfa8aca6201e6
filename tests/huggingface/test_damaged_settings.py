"""Damaged or hostile settings in a config are refused when the model is loaded, by the name of the entry."""

import json
import re
import time

import pytest
import transformers

from tests.huggingface.architectures import ARCHITECTURES

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
LLAMA = ARCHITECTURES["llama"]
LAYER = "model.layers.0.self_attn"
ENTRY = f"config.tritonattn.layers['{LAYER}']"


def nested(depth: int):
    scaling = "sqrt_dim"
    for _ in range(depth):
        scaling = {"name": "per_head", "mode": scaling}
    return scaling


# Settings of one layer, the entry that is named, and the rest of the message.
KEYS = "expected a dict with keys out of backend, batch_invariant, gain, scaling"
NAME, NUMBER = "expected a name, a dict with a name, a number or None", "expected a number, None or {'learned': [4, 1]}"
LAYERS = {
    "null": (None, "", KEYS),
    "an unknown entry": ({"scale": 1.0}, "", KEYS),
    "a bool": ({"scaling": True}, ".scaling", f"{NAME}, got True"),
    "no name": ({"scaling": {"tau": 1.0}}, ".scaling", "expected a name"),
    "an unknown name": ({"scaling": "sqrt"}, ".scaling", "expected a name in tritonattn.SCALINGS, got 'sqrt'"),
    "an unknown argument": ({"scaling": {"name": "cosine", "tauu": 1.0}}, ".scaling", "expected a dict with keys out"),
    "heads": ({"scaling": {"name": "per_head", "heads": 10**9}}, ".scaling", "expected a dict with keys out of mode"),
    "a bad argument": ({"scaling": {"name": "cosine", "tau": "x"}}, ".scaling", "cosine cannot be made: tau"),
    "a missing argument": ({"scaling": "scheduled"}, ".scaling", "scheduled cannot be made"),
    "a bad mode": ({"scaling": {"name": "per_head", "mode": {"name": "x"}}}, ".scaling.mode", "expected a name in tri"),
    "300 nested": ({"scaling": nested(300)}, ".scaling" + 8 * ".mode", "expected at most 8 scalings inside one"),
    "a gain": ({"gain": "x"}, ".gain", f"{NUMBER}, got 'x'"),
    "a huge gain": ({"gain": {"learned": [10**12]}}, ".gain", f"{NUMBER}, got"),
    "a nested gain": ({"gain": {"learned": [[4], 1]}}, ".gain", NUMBER),
    "a base": ({"scaling": "log_key_count:x"}, ".scaling", "expected a name, or one of log_key_count:LENGTH"),
    "a backend": ({"backend": "cuda"}, ".backend", "expected one of auto, "),
}
# Whole entries `tritonattn`, and the message.
LISTED = "config.tritonattn.layers: expected a dict from names of modules to their"
WHOLES = {
    "layers null": ({"layers": None}, LISTED),
    "another entry": ({"layers": {LAYER: {}}, "more": 1}, "config.tritonattn: expected a dict with keys out of"),
    "a string": ("ssmax", f"config.tritonattn: {KEYS}"),
    "learned for all": ({"scaling": "ssmax"}, "config.tritonattn.scaling: expected a scaling without parameters"),
    "a learned gain for all": ({"gain": {"learned": [4, 1]}}, "config.tritonattn.gain: expected a number or None"),
}
CASES = {
    name: ({"layers": {LAYER: settings}}, f"{ENTRY}{entry}: {text}") for name, (settings, entry, text) in LAYERS.items()
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    LLAMA.build("sdpa").save_pretrained(folder)
    return folder, json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("case", [*CASES, *WHOLES])
def test_it_is_refused_on_loading(case, saved):
    folder, config = saved
    entry, message = {**CASES, **WHOLES}[case]
    (folder / "config.json").write_text(json.dumps({**config, "tritonattn": entry}))
    begun = time.process_time()
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert time.process_time() - begun < 2
    assert len(str(error.value)) < 500
