"""A rank that raises, hangs or ends: the others get an error. By its name this file runs last of those of the pool."""

import pytest
from rank_pool import RANKS, TIMEOUT, Failure
from rank_work import one_missing

pytestmark = pytest.mark.xdist_group("distributed")


@pytest.mark.parametrize(("how", "check_ranks"), [("raises", True), ("sleeps", False), ("ends", True)])
def test_a_rank_that_takes_no_part_is_an_error_on_the_others(pool, how, check_ranks):
    """Within the group's timeout. The last of these ends a process of the pool."""
    if how != "ends":
        *answers, last = pool.answers(RANKS, one_missing, how, check_ranks)
        assert isinstance(last, Failure) == (how == "raises")
    else:
        answers = pool.answers_of_all_but_the_last(one_missing, how, check_ranks)
    for seconds in answers:
        assert isinstance(seconds, float), seconds
        assert seconds < TIMEOUT.total_seconds() + 5
