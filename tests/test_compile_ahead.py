"""`python -m fp8jax.bench ahead`: steps compiled for devices that are not here; their cost."""

import re

import jax
import pytest

from fp8jax.bench import ahead, targets


@pytest.mark.parametrize("device", ["TPU 7x", "H200", "B200"])
def test_a_table_for_a_device_that_is_not_here(device, tmp_path, capsys):
    if not targets.has_compiler(device):
        pytest.skip(f"compiling for {device} needs no device, but {targets.INSTALL}")
    path = tmp_path / "table.md"
    ahead.main([device], ["current"], ["large"], scale=16, out=path)
    rows = re.findall(r"^\| (\w+) \|(.*)\|$", path.read_text(), re.MULTILINE)
    assert [name for name, _ in rows] == ["bf16", "current"]
    cells = {name: [cell.strip() for cell in row.split("|")] for name, row in rows}
    # Six sites with three products each, in each of two layers.
    assert [cells[name][5] for name in cells] == ["0 of 36", "36 of 36"]
    if device == "TPU 7x":
        assert cells["bf16"][0] == "1.000" and float(cells["current"][1].split()[0]) > 0
    else:
        assert cells["bf16"][:3] == ["", "", ""]  # GPUs' programs hold no estimates
    assert path.read_text() in capsys.readouterr().out


def test_a_device_that_is_unknown_is_refused():
    with pytest.raises(ValueError, match="device must be one of H200, B200, TPU 7x, .* got 'H100'"):
        targets.topology("H100")


def test_options_name_what_there_is():
    options = ahead.options(["--devices", "H200", "--contenders", "delayed"])
    assert options.devices == ["H200"] and options.contenders == ["delayed"]
    with pytest.raises(SystemExit):
        ahead.options(["--contenders", "nothing"])


def test_loops_count_as_often_as_they_run():
    def looped(x):
        return jax.lax.scan(lambda c, _: (c @ x, None), x, length=5)[0]

    x = jax.ShapeDtypeStruct((8, 8), "float32")
    assert ahead.cost_of(jax.jit(looped).lower(x).compile()).products == 5
