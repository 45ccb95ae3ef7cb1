import math

from nemo_cascade.learner.ranks import combined


def test_metrics_add_and_maxima_stay_maxima():
    parts = [{"loss": 0.25, "ratio_max": 3.0}, {"loss": 0.5, "ratio_max": 2.0, "kl": 0.1}]
    assert combined(parts) == {"loss": 0.75, "ratio_max": 3.0, "kl": 0.1}


def test_a_negative_maximum_survives_and_nothing_gives_nothing():
    assert combined([{"gap_max": -2.0}, {"gap_max": -1.0}]) == {"gap_max": -1.0}
    assert combined([]) == {}


def test_a_nan_stays_one_and_a_domains_own_name_decides_nothing():
    for parts in ([3.0, math.nan], [math.nan, 3.0]):
        assert math.isnan(combined([{"gap_abs_max": value} for value in parts])["gap_abs_max"])
    assert combined([{"masked_share/to_max": 0.25}, {"masked_share/to_max": 0.5}]) == {"masked_share/to_max": 0.75}
