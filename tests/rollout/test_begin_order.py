from rollout.engine.begin_order import BEGUN, BeginOrder
from rollout.worker import credit_groups


def test_longest_first_unknown_as_the_longest() -> None:
    order = BeginOrder(max_sequences=1000)
    short, long, unknown = (order.priority(tokens, 500) for tokens in (20, 400, 0))
    assert unknown < long < short


def test_nobody_is_overtaken_by_more_than_a_turnover() -> None:
    order = BeginOrder(max_sequences=64)
    shortest = order.priority(1, 500)
    later = [order.priority(500, 500) for _ in range(80)]
    assert 50 < sum(each < shortest for each in later) <= 64
    assert later == sorted(later)


def test_predictions_beyond_what_may_be_generated() -> None:
    assert BeginOrder(8).priority(9999, 100) == BeginOrder(8).priority(100, 100)


def test_credit() -> None:
    assert credit_groups(64, 8, ahead=0.0) == 8
    assert credit_groups(64, 8, ahead=0.5) == 12
    assert credit_groups(4, 8, ahead=0.0) == 1
    assert credit_groups(4, 8, ahead=0.25) == 2


def test_what_goes_on_comes_before_all_that_is_to_begin() -> None:
    order = BeginOrder(1)
    assert min(order.priority(predicted, 1 << 30) for predicted in (0, 1, 1 << 30)) > BEGUN
