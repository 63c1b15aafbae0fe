"""Lines and points of one plot look different."""

from __future__ import annotations

import itertools

from sit.utils.plot_style import style


def test_no_two_look_alike():
    looks = [style(index) for index in range(49)]
    for one, other in itertools.combinations(looks[:7], 2):
        assert one["color"] != other["color"] and one["marker"] != other["marker"]
    assert len({(look["color"], look["linestyle"]) for look in looks[:28]}) == 28, "as lines"
    assert len({(look["color"], look["marker"]) for look in looks}) == 49, "as points without a line"
